"""The search for induction channels: exhaustive over live pairs of features.

A head writes every channel as F_ij(t,s) = a_i(t) a_j(s) G_ij (G by offset where it rotates), so the search splits into
a position part, which all heads and all nulls of the layer share, and the coupling G, which is the head's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.coded import Arm, pair_couplings
from fra.core.frozen import Side
from fra.core.meetings import Meetings
from fra.core.threads import each
from fra.errors import CannotLoad
from fra.search.channels import evenly, shifted_keys
from fra.search.designs import ChannelNulls, ChannelSearch
from fra.stimuli.repeated import Batch

_TABLE_CELLS = 2**30


@dataclass(frozen=True)
class Stripe:
    """Pairs of features jointly live on a stripe, with the position part of M = G * sum F_q^T (F_key - mean_{u<=t}
    F_u).
    """

    pairs: Int[Tensor, "n 2"]
    position_part: Float[Tensor, "n n_offsets"]
    """By offset t - s where the head rotates, else one column."""
    offsets: Int[Tensor, " n_offsets"]
    documents: Int[Tensor, " n"]
    """Documents in which the pair is jointly live on the stripe."""
    selectivity: Float[Tensor, " n"]
    """1 less the key feature's mean activation over all keys relative to that at the stripe's key, where i is live."""

    def strongest(self, arm: Arm, head: int, n: int) -> tuple[Int[Tensor, "m 2"], Float[Tensor, " m"]]:
        """The n pairs of largest M for one head, strongest first, and their M."""
        m = (self.position_part * pair_couplings(arm, head, self.pairs, self.offsets)).sum(-1)
        best = m.topk(min(n, len(m)))
        return self.pairs[best.indices], best.values


class _Entries(NamedTuple):
    """Active entries of some features, by row."""

    kept: Int[Tensor, " n"]
    """The features, among all live ones."""
    slot: Int[Tensor, " entries"]
    """Each entry's feature, among the kept ones."""
    start: Int[Tensor, " rows_and_end"]
    q_value: Float[Tensor, " entries"]
    k_value: Float[Tensor, " entries"]


class Search:
    """The position part of the search on discovery documents of one layer: shared by its heads, and by nulls that
    change only weights.
    """

    def __init__(
        self, batch: Batch, arm: Arm, head: int = 0, activity_documents: int = ChannelNulls.activity_documents
    ) -> None:
        """`head` matters only where a QK-norm gives every head gains of its own. `activity_documents`: how many,
        evenly spaced, `activity` is counted on.
        """
        self._few = evenly(len(batch), activity_documents, arm.codes.row.device)
        self.batch, self.arm = batch, arm
        self._live = torch.unique(arm.codes.feature)
        if (len(self._live) + 1) ** 2 > _TABLE_CELLS:
            most = int(_TABLE_CELLS**0.5) - 1
            raise CannotLoad(f"{len(self._live)} live features make too large a table of pairs ({most} would fit)")
        codes = arm.codes
        self._slot = torch.searchsorted(self._live, codes.feature)
        self._values = arm.coefficients("query", head), arm.coefficients("key", head)
        self._q = self._padded("query", head)
        self._k = self._padded("key", head)
        self._doc, self._pos = batch.row_doc, batch.row_pos

    def _padded(self, side: Side, head: int) -> tuple[Int[Tensor, "batch pos width"], Float[Tensor, "batch pos width"]]:
        """Places of live entries among the live features and their coefficients, as wide as the busiest position;
        the rest holds a place of its own (len(live)) and zeros.
        """
        codes = self.arm.codes
        batch, pos = codes.shape
        per_row = torch.bincount(codes.row, minlength=batch * pos)
        within = torch.arange(len(codes.row), device=codes.row.device) - (per_row.cumsum(0) - per_row)[codes.row]
        width = int(per_row.max())
        place = torch.full((batch * pos, width), len(self._live), device=codes.row.device)
        value = codes.value.new_zeros(batch * pos, width)
        place[codes.row, within] = torch.searchsorted(self._live, codes.feature)
        value[codes.row, within] = self.arm.coefficients(side, head)
        # the first position, often a sink, may be far busier than any other; it is on no stripe
        self._width = int(per_row.view(batch, pos)[:, 1:].max())
        return place.view(batch, pos, width), value.view(batch, pos, width)

    def _products(
        self, q_rows: tuple[Tensor, Tensor], k_rows: tuple[Tensor, Tensor]
    ) -> tuple[Int[Tensor, "rows n"], Float[Tensor, "rows n"]]:
        """Linear ids q * (n_live + 1) + k and products of coefficients of every entry pair of matching (document,
        position).
        """
        width = None if bool((k_rows[1] == 0).any()) else self._width
        q_place, q_value = (table[..., : self._width][q_rows] for table in self._q)
        k_place, k_value = (table[..., :width][k_rows] for table in self._k)
        pair = q_place[:, :, None] * (len(self._live) + 1) + k_place[:, None, :]
        return pair.flatten(1), (q_value[:, :, None] * k_value[:, None, :]).flatten(1)

    def stripes(self, shifts: Sequence[int], floor: int = ChannelSearch.floor) -> dict[int, Stripe]:
        """For each shift every pair jointly live on its stripe in at least `floor` documents, with its position part.

        The mean over keys of a null stripe that leaves documents out is that of all documents, scaled to its rows.
        """
        often = self._often(floor)
        parts = each(lambda shift: self._joint(shift, floor, often), shifts, self._live.device)
        found = dict(zip(shifts, parts, strict=True))
        everything = torch.unique(torch.cat([pair for pair, _, _, _ in found.values()]))
        mean = self._mean_part(everything)
        stripes = {}
        n = len(self._live) + 1
        for shift, (pair, part, count, share) in found.items():
            less = share * mean[torch.searchsorted(everything, pair)]
            offsets = torch.arange(part.shape[1], device=pair.device)
            stripes[shift] = Stripe(
                torch.stack([self._live[pair // n], self._live[pair % n]], 1),
                part - less,
                offsets,
                count,
                1 - less.sum(1) / part.sum(1),
            )
        return stripes

    @property
    def _n_offsets(self) -> int:
        return 1 if self.arm.frozen.rotary is None else self.arm.codes.shape[1]

    def _often(self, floor: int) -> _Entries:
        """Entries of features that are live in `floor` documents on rows or on first copies: a pair that is jointly
        live in as many has no others, and tables over the fewer features stay in a core's cache.
        """
        codes = self.arm.codes
        batch, pos = codes.shape
        n = len(self._live)
        enough = torch.zeros(n, dtype=torch.bool, device=codes.row.device)
        first_copy = (self.batch.row_key, self.batch.row_key - 1)  # other stripes turn the keys round within it
        for positions in ((self._pos,), first_copy):
            on = torch.zeros(batch * pos, dtype=torch.bool, device=codes.row.device)
            for at in positions:
                on[self._doc * pos + at] = True
            there = torch.nonzero(on[codes.row])[:, 0]
            documents = torch.unique(codes.row[there] // pos * n + self._slot[there]) % n
            enough |= torch.bincount(documents, minlength=n) >= floor
        kept = torch.nonzero(enough)[:, 0]
        entries = torch.nonzero(enough[self._slot])[:, 0]
        per_row = torch.bincount(codes.row[entries], minlength=batch * pos).cpu()
        start = torch.cat((per_row.new_zeros(1), per_row.cumsum(0)))
        q_value, k_value = (values[entries] for values in self._values)
        return _Entries(kept, torch.searchsorted(kept, self._slot[entries]), start, q_value, k_value)

    def _joint(self, shift: int, floor: int, often: _Entries) -> tuple[Tensor, Tensor, Tensor, float]:
        """Linear ids of eligible pairs, their stripe sums by offset, document counts, and the share of rows used."""
        keys, documents = shifted_keys(self.batch, shift)
        used = documents[self._doc]
        doc, pos, key = self._doc[used], self._pos[used], keys[used]
        length = self.arm.codes.shape[1]
        of_rows = (doc * length + pos).cpu(), (doc * length + key).cpu(), doc.cpu()
        found = Meetings(often.slot, often.start, len(often.kept), of_rows, floor)
        part = found.sums(often.q_value, often.k_value, pos - key, self._n_offsets)
        pair = often.kept[found.q_slot] * (len(self._live) + 1) + often.kept[found.k_slot]
        return pair, part, found.documents, float(used.double().mean())

    def _add(self, part: Tensor, eligible: Tensor, pair: Tensor, value: Tensor, offset: Tensor) -> None:
        """part[pair, offset] += value for eligible pairs."""
        at = torch.searchsorted(eligible, pair).clamp(max=len(eligible) - 1)
        known = eligible[at] == pair if len(eligible) else torch.zeros_like(pair, dtype=torch.bool)
        part.view(-1).index_add_(0, at[known] * part.shape[1] + offset[known], value[known])

    def _mean_part(self, pairs: Int[Tensor, " n"]) -> Float[Tensor, "n n_offsets"]:
        """sum over second-copy rows t of F_q(t)_i mean_{u<=t} F_u,j for linear pair ids, by offset where the head
        rotates.

        Not the census's position parts, which are made for every document's own pairs and by block of key features
        because they may not fit: these rows are no stripe, and their table, which fits, is one matrix product.
        """
        mask = self.arm.frozen.mask
        weight = mask.to(self._q[1].dtype) / mask.sum(-1, keepdim=True)
        if self._n_offsets == 1:
            q, k = self._dense("query"), self._dense("key")
            return (q[self._doc, self._pos].T @ (weight @ k)[self._doc, self._pos]).flatten()[pairs][:, None]
        part = weight.new_zeros(len(pairs), self._n_offsets)
        for offset in range(self._n_offsets):
            chosen = torch.nonzero(self._pos >= offset)[:, 0]
            doc, pos = self._doc[chosen], self._pos[chosen]
            pair, value = self._products((doc, pos), (doc, pos - offset))
            value = value * weight[pos, pos - offset][:, None]
            self._add(part, pairs, pair.flatten(), value.flatten(), torch.full_like(pair, offset).flatten())
        return part

    def _dense(self, side: Side) -> Float[Tensor, "batch pos live_and_one"]:
        """Coefficients of the live features as dense columns, the padding's column last and zero."""
        place, value = self._q if side == "query" else self._k
        return value.new_zeros(*place.shape[:2], len(self._live) + 1).scatter_add_(2, place, value)

    def activity(self, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "n 3"]:
        """Log products of frequencies and of mean magnitudes, and log causal co-activation count: what matched pairs
        must share.
        """
        frequency, magnitude, together = self._activity
        i, j = torch.searchsorted(self._live, pairs.T.contiguous())
        columns = (frequency[0, i] * frequency[1, j], magnitude[0, i] * magnitude[1, j], together[i, j] + 1)
        return torch.stack([column.clamp(min=1e-12).log() for column in columns], dim=1)

    @cached_property
    def _activity(self) -> tuple[Tensor, Tensor, Tensor]:
        sides = [self._dense("query")[self._few], self._dense("key")[self._few]]
        live = [(side != 0).to(side.dtype) for side in sides]
        frequency = torch.stack([part.mean((0, 1)) for part in live])
        total = torch.stack([part.abs().sum((0, 1)) for part in sides])
        times = torch.stack([part.sum((0, 1)) for part in live])
        together = live[0].flatten(0, 1).T @ live[1].cumsum(1).flatten(0, 1)
        return frequency, total / times.clamp(min=1), together

    def live_pairs(self, n: int, rng: np.random.Generator) -> Int[Tensor, "n 2"]:
        """n random pairs of live features."""
        drawn = torch.from_numpy(rng.integers(0, len(self._live), (n, 2)))
        pairs: Tensor = self._live[drawn.to(self._live.device)]
        return pairs
