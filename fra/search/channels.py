"""Channels of one head on repeated documents: their couplings, and exactly what removing them does to its attention."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.core.blocks import add_at
from fra.core.coded import Arm, capped_scores, log_odds, measure_arm, pair_couplings
from fra.core.frozen import FrozenLayer, Side
from fra.core.weights import Model
from fra.dictionaries.codes import Codes
from fra.errors import CannotLoad
from fra.search.terms import few_at_once, terms_of
from fra.stimuli.repeated import Batch


@dataclass(frozen=True)
class Arms:
    """Both arms of a set of documents at one layer."""

    batch: Batch
    repeated: Arm
    control: Arm


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    found: dict[str, Any] = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in found.items()}
    return Batch(**moved)


@torch.no_grad()
def measure_arms(model: Model, sae: Any, batch: Batch, layer: int, hook_name: str) -> Arms:
    """Runs both arms of a set through the model and the dictionary."""
    sides = [measure_arm(model, sae, tokens, layer, hook_name) for tokens in (batch.tokens, batch.control)]
    return Arms(on_device(batch, sides[0].frozen.x.device), *sides)


def evenly(n_documents: int, n: int, device: torch.device) -> Int[Tensor, " m"]:
    """Indices of n documents (all where there are fewer), evenly spaced."""
    some = min(n, n_documents)
    return torch.arange(some, device=device) * n_documents // some


def few_documents(batch: Batch, index: Int[Tensor, " m"]) -> Batch:
    """The batch with these documents alone, in ascending order."""
    new = torch.full((len(batch),), -1, device=index.device)
    new[index] = torch.arange(len(index), device=index.device)
    rows = new[batch.row_doc] >= 0
    sources = tuple(batch.sources[d] for d in index.tolist())
    own = (batch.tokens[index], batch.control[index], batch.periods[index], new[batch.row_doc[rows]])
    return Batch(*own, batch.row_pos[rows], batch.row_key[rows], batch.row_moved[rows], sources)


def few_of_arm(arm: Arm, index: Int[Tensor, " m"]) -> Arm:
    """The arm on these documents alone, in ascending order."""
    codes, frozen = arm.codes, arm.frozen
    batch, pos = codes.shape
    new = torch.full((batch,), -1, device=index.device)
    new[index] = torch.arange(len(index), device=index.device)
    doc = new[codes.row // pos]
    kept = doc >= 0
    entries = (doc[kept] * pos + codes.row[kept] % pos, codes.feature[kept], codes.value[kept])
    bias, error = codes.bias.expand_as(codes.error)[index], codes.error[index]
    return Arm(on_documents(frozen, index), Codes(*entries, codes.decoder, bias, error, (len(index), pos)))


def on_documents(frozen: FrozenLayer, index: Int[Tensor, " m"] | slice) -> FrozenLayer:
    """The frozen layer on some documents alone."""
    by_document = ("x", "sigma", "gain_q", "gain_k", "model_scores", "pattern")
    return dataclasses.replace(frozen, **{name: getattr(frozen, name)[index] for name in by_document})


def few_arms(arms: Arms, index: Int[Tensor, " m"]) -> Arms:
    """Both arms on these documents alone."""
    return Arms(few_documents(arms.batch, index), few_of_arm(arms.repeated, index), few_of_arm(arms.control, index))


def shifted_keys(batch: Batch, shift: int) -> tuple[Int[Tensor, " n_rows"], Bool[Tensor, " batch"]]:
    """Key of every second-copy row on another stripe, and the documents on which it is far from the induction stripe.

    Shift 0 is the induction key. Other shifts turn the first copy round by that many tokens, so that every stripe has
    the same rows; documents where that lands at a lag of period - 2 .. period + 1 are to be left out.
    """
    if shift == 0:
        return batch.row_key, torch.ones(len(batch), dtype=torch.bool, device=batch.row_key.device)
    period = batch.periods[batch.row_doc]
    turned = shift % batch.periods
    return 1 + (batch.row_key - 1 + shift) % period, (turned > 1) & (turned < batch.periods - 2)


@dataclass(frozen=True)
class Effects:
    """Sums by document over rows where a channel's i is live in either arm; divide by `rows` for the mean.
    [n_documents, n_channels] each.
    """

    nats: Float[np.ndarray, "n_documents n"]
    """dL(repeated) - dL(control)."""
    attention: Float[np.ndarray, "n_documents n"]
    """The same in attention: dA(repeated) - dA(control)."""
    contrast: Float[np.ndarray, "n_documents n"]
    """The head's own attention contrast on those rows."""
    rows: Float[np.ndarray, "n_documents n"]
    covered: Float[np.ndarray, "n_documents n"]
    """Rows of the repeated arm with i live, for the coverage."""

    def of(self, documents: Int[np.ndarray, " m"]) -> Effects:
        """The sums of some documents."""
        return Effects(*(getattr(self, part.name)[documents] for part in dataclasses.fields(self)))


class HeadOnArms:
    """One head on both arms of a set of documents: its contrast on a stripe, and what the removal of channels does
    to it.
    """

    def __init__(self, arms: Arms, head: int, queries: Sequence[Tensor] | None = None) -> None:
        """`queries`: those of the same head with other keys (`HeadOnArms.queries`), where they are known."""
        self.head, self.batch = head, arms.batch
        self.keys = arms.batch.row_key
        self.sides = (arms.repeated, arms.control)
        doc, pos = self.batch.row_doc, self.batch.row_pos
        if not bool(arms.repeated.frozen.mask[pos, self.keys].all()):
            layer = arms.repeated.frozen.layer
            raise CannotLoad(f"layer {layer} masks induction keys: its window is shorter than the repeat")
        frozen = [arm.frozen for arm in self.sides]
        self.queries = queries or [layer.scale * layer.vectors("query", head)[doc, pos] for layer in frozen]
        """[n_rows, d_head] of every second-copy row, the score's scale included, repeated and control."""
        self.row_scores = [
            self.against_keys(own, layer.vectors("key", head)).masked_fill_(~layer.mask[pos], -torch.inf)
            for own, layer in zip(self.queries, frozen, strict=True)
        ]
        self.capped = [capped_scores(arm, rows).double() for arm, rows in zip(self.sides, self.row_scores, strict=True)]
        self._all = [capped.logsumexp(-1) for capped in self.capped]
        self._row_of = torch.full((len(self.batch) * self.batch.tokens.shape[1],), -1, device=doc.device)
        self._row_of[doc * self.batch.tokens.shape[1] + pos] = torch.arange(len(doc), device=doc.device)

    def on_stripe(self, keys: Int[Tensor, " n_rows"]) -> HeadOnArms:
        """The same head on another stripe: `keys` names the stripe's key of every second-copy row."""
        other = copy.copy(self)
        for cached in ("base", "contrast", "others", "weight"):
            other.__dict__.pop(cached, None)
        other.keys = keys
        return other

    @cached_property
    def others(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of every row's scores without the stripe's key, repeated and control."""
        found = []
        for capped, total in zip(self.capped, self._all, strict=True):
            attention = (capped.gather(1, self.keys[:, None])[:, 0] - total).exp()
            found.append(total + torch.log1p(-attention.clamp(max=1 - 1e-15)))
        return found[0], found[1]

    @cached_property
    def weight(self) -> tuple[Tensor, Tensor]:
        """[n_rows, k_pos] attention among the keys other than the stripe's, repeated and control."""
        found = [
            (capped - others[:, None]).exp_().scatter_(1, self.keys[:, None], 0.0).to(scores.dtype)
            for capped, others, scores in zip(self.capped, self.others, self.row_scores, strict=True)
        ]
        return found[0], found[1]

    @cached_property
    def base(self) -> tuple[Tensor, Tensor]:
        """Log-odds of the stripe's key on every row, repeated and control."""
        own = [capped.gather(1, self.keys[:, None])[:, 0] for capped in self.capped]
        return own[0] - self.others[0], own[1] - self.others[1]

    @cached_property
    def contrast(self) -> Float[Tensor, " n_rows"]:
        """A_repeated(t, key) less the larger of the control's attention at the key and at the moved token."""
        at = [odds.sigmoid() for odds in self.base]
        moved = (self.capped[1].gather(1, self.batch.row_moved[:, None])[:, 0] - self._all[1]).exp()
        return at[0] - torch.maximum(at[1], moved)

    def live_documents(self) -> Int[Tensor, " d_sae"]:
        """Documents in which each feature is live on a second-copy row of either arm."""
        d_sae, length = len(self.sides[0].codes.decoder), self.batch.tokens.shape[1]
        on = [self._row_of[arm.codes.row] >= 0 for arm in self.sides]
        both = [
            arm.codes.row[kept] // length * d_sae + arm.codes.feature[kept]
            for arm, kept in zip(self.sides, on, strict=True)
        ]
        return torch.bincount(torch.unique(torch.cat(both)) % d_sae, minlength=d_sae)

    def by_document(self, values: Float[Tensor, "n_rows ..."]) -> Float[np.ndarray, "n_documents ..."]:
        """Sums of row values by document."""
        out = values.new_zeros(len(self.batch), *values.shape[1:], dtype=torch.float64)
        return np.asarray(out.index_add_(0, self.batch.row_doc, values.double()).cpu())

    def channels(self, pairs: Int[Tensor, "n 2"], allowed: Bool[Tensor, "n_rows n"] | None = None) -> Effects:
        """Exact effect of removing each channel by itself, at every key of the row; only over `allowed` rows where
        given.

        Only keys at which j is live change: with w the attention among the other keys and d_u the change of a score, dL
        = d_{s*} + log(1 + sum_u w_u (exp(-d_u) - 1)).
        """
        n, n_rows = len(pairs), len(self.keys)
        parts = [self._removed(side, pairs) for side in (0, 1)]
        if allowed is not None:
            kept = [allowed[row, channel] for row, channel, _, _ in parts]
            parts = [(a[on], b[on], c[on], d[on]) for (a, b, c, d), on in zip(parts, kept, strict=True)]
        # rows of either arm, each once
        where = torch.unique(torch.cat([channel * n_rows + row for row, channel, _, _ in parts]))
        channel, row = where // n_rows, where % n_rows
        sums = torch.zeros(5, len(self.batch) * n, dtype=torch.float64, device=where.device)
        cell = self.batch.row_doc[row] * n + channel
        sums[2].index_add_(0, cell, self.contrast[row])
        sums[3].index_add_(0, cell, torch.ones_like(self.contrast[row]))
        for side, (row, channel, nats, attention) in enumerate(parts):
            cell = self.batch.row_doc[row] * n + channel
            sums[0].index_add_(0, cell, nats if side == 0 else -nats)
            sums[1].index_add_(0, cell, attention if side == 0 else -attention)
            if side == 0:
                sums[4].index_add_(0, cell, torch.ones_like(nats))
        return Effects(*(np.asarray(part.view(len(self.batch), n).cpu()) for part in sums))

    def _removed(self, side: int, pairs: Int[Tensor, "n 2"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(row, channel, dL, dA) of one arm for every row where a channel's i is live."""
        frozen = self.sides[side].frozen
        plain = frozen.rotary is None and frozen.softcap is None
        row, channel, nats = self._by_rows(side, pairs) if plain else self._by_entries(side, pairs)
        odds = self.base[side][row]
        return row, channel, nats, odds.sigmoid() - (odds - nats).sigmoid()

    def _by_rows(self, side: int, pairs: Int[Tensor, "n 2"]) -> tuple[Tensor, Tensor, Tensor]:
        """(row, channel, dL) from all keys of every live row at once, a channel at a time."""
        arm, batch = self.sides[side], self.batch
        q_ids, q_at = torch.unique(pairs[:, 0], return_inverse=True)
        k_ids, k_at = torch.unique(pairs[:, 1], return_inverse=True)
        q = arm.columns("query", self.head, q_ids)[batch.row_doc, batch.row_pos].T.contiguous()
        k = arm.columns("key", self.head, k_ids).permute(2, 0, 1).contiguous()
        G = pair_couplings(arm, self.head, pairs, pairs[:0, 0])[:, 0]
        weight = self.weight[side].to(k.dtype)
        live = [torch.nonzero(one)[:, 0] for one in q]
        found = []
        for channel, (i, j) in enumerate(zip(q_at.tolist(), k_at.tolist(), strict=True)):
            row = live[i]
            scaled = q[i, row] * -G[channel]
            minus_F = k[j].index_select(0, batch.row_doc[row]).mul_(scaled[:, None])
            own = minus_F.gather(1, self.keys[row, None])[:, 0].double()
            rest = minus_F.expm1_().mul_(weight.index_select(0, row)).sum(-1, dtype=torch.float64)
            nats = torch.log1p(rest.clamp(min=-1 + 1e-15)) - own
            found.append((row, torch.full_like(row, channel), nats))
        if not found:
            empty = pairs.new_zeros(0)
            return empty, empty, self.base[side][:0]
        row, channel_of, nats = (torch.cat(column) for column in zip(*found, strict=True))
        return row, channel_of, nats

    def _by_entries(self, side: int, pairs: Int[Tensor, "n 2"]) -> tuple[Tensor, Tensor, Tensor]:
        """(row, channel, dL) from every live key of every live row, one by one."""
        arm = self.sides[side]
        terms = terms_of(arm, self.head, self.batch, self._row_of, pairs)
        r, which, F = terms.row[terms.which], terms.which, terms.F
        before = self.capped[side][r, terms.key]
        change = (
            F
            if arm.frozen.softcap is None
            else before - arm.frozen.cap(self.row_scores[side][r, terms.key].double() - F)
        )
        own = terms.key == self.keys[r]
        weight = (before - self.others[side][r]).exp().masked_fill(own, 0.0)
        rest = torch.zeros(len(terms.row), dtype=torch.float64, device=r.device)
        rest.index_add_(0, which, weight * torch.expm1(-change))
        nats = torch.log1p(rest.clamp(min=-1 + 1e-15))
        nats.index_add_(0, which[own], change[own])
        return terms.row, terms.channel, nats

    def removed_together(self, pairs: Int[Tensor, "n 2"]) -> Effects:
        """Exact effect of removing all channels of a set at once, over rows where a member's i is live."""
        return self._together([self._share(arm, pairs) for arm in self.sides])

    def _share(
        self, arm: Arm, pairs: Int[Tensor, "n 2"]
    ) -> tuple[Bool[Tensor, " n_rows"], Float[Tensor, "n_rows k_pos"]]:
        """Rows with a member's i live, and the sum of the channels' contributions to the scores of every row."""
        doc, pos = self.batch.row_doc, self.batch.row_pos
        if arm.frozen.rotary is not None:
            return self._share_by_entries(arm, pairs)
        q_ids, q_at = torch.unique(pairs[:, 0], return_inverse=True)
        k_ids, k_at = torch.unique(pairs[:, 1], return_inverse=True)
        q = arm.columns("query", self.head, q_ids)[doc, pos]
        k = arm.columns("key", self.head, k_ids)
        M = q.new_zeros(len(q_ids), len(k_ids))
        M[q_at, k_at] = pair_couplings(arm, self.head, pairs, pos[:0])[:, 0]
        return (q != 0).any(-1), self.against_keys(q @ M, k)

    def _share_by_entries(
        self, arm: Arm, pairs: Int[Tensor, "n 2"]
    ) -> tuple[Bool[Tensor, " n_rows"], Float[Tensor, "n_rows k_pos"]]:
        """The same from the terms one by one: couplings that turn with the offset are no one matrix."""
        n_rows, length = len(self.keys), self.batch.tokens.shape[1]
        live = torch.zeros(n_rows, dtype=torch.bool, device=pairs.device)
        total = torch.zeros(n_rows * length, dtype=torch.float64, device=pairs.device)
        for few in few_at_once(arm, self.batch, self._row_of, pairs):
            terms = terms_of(arm, self.head, self.batch, self._row_of, few)
            live[terms.row] = True
            add_at(total, terms.row[terms.which] * length + terms.key, terms.F)
        return live, total.view(n_rows, length).to(arm.codes.value.dtype)

    def against_keys(
        self, rows: Float[Tensor, "n_rows n"], keys: Float[Tensor, "batch k_pos n"]
    ) -> Float[Tensor, "n_rows k_pos"]:
        """Dot products of every row with the keys of its own document."""
        parts = torch.split(rows, self.batch.periods.tolist())
        return torch.cat([part @ keys[number].T for number, part in enumerate(parts)])

    def marginal(self, side: Side, feature: int) -> Effects:
        """Exact effect of removing everything one feature does on one side: all channels (i, .) or all channels (.,
        j).
        """
        return self._together([self._share_of_one(arm, side, feature) for arm in self.sides])

    def _share_of_one(
        self, arm: Arm, side: Side, feature: int
    ) -> tuple[Bool[Tensor, " n_rows"], Float[Tensor, "n_rows k_pos"]]:
        """`_share` of all channels of one feature: against what all features together write on the other side."""
        doc, pos = self.batch.row_doc, self.batch.row_pos
        own = arm.columns(side, self.head, torch.tensor([feature], device=doc.device))
        alone = arm.in_place(own * arm.couplings(self.head)[side == "key"][feature])
        every = arm.in_place(arm.written("key" if side == "query" else "query", self.head))
        live = torch.zeros(arm.codes.shape, dtype=torch.bool, device=doc.device)
        live.view(-1)[arm.codes.row] = True
        if side == "query":
            return (own[doc, pos] != 0)[:, 0], self.against_keys(alone[doc, pos], every)
        return live[doc, pos], self.against_keys(every[doc, pos], alone)

    def _together(self, shares: Sequence[tuple[Tensor, Tensor]]) -> Effects:
        """Effects of one removal given, for each arm, which rows have it live and what it adds to their scores."""
        live = shares[0][0] | shares[1][0]
        nats, attention = torch.zeros_like(self.base[0]), torch.zeros_like(self.base[0])
        for side, (there, F) in enumerate(shares):
            changed = log_odds(capped_scores(self.sides[side], self.row_scores[side] - F).double(), self.keys)
            sign = 1 - 2 * side
            nats += there * sign * (self.base[side] - changed)
            attention += there * sign * (self.base[side].sigmoid() - changed.sigmoid())
        columns = [nats, attention, self.contrast * live, live.to(nats.dtype), shares[0][0].to(nats.dtype)]
        return Effects(*(self.by_document(column)[:, None] for column in columns))
