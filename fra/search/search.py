"""The search for induction channels: exhaustive over live pairs of features.

A head writes every channel as F_ij(t,s) = a_i(t) a_j(s) G_ij, so the search splits into a position part, which all
heads and all nulls of the layer share, and the coupling G, which is the head's own. Where the head rotates, G_ij at an
offset is the product of a few parts of its own and as many turns that depend on the offset alone (`Rotary.turns`): the
turns go into the position part.
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

from fra.core.coded import Arm, coupling_parts
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
    position_part: Float[Tensor, "n parts"]
    """By part of the coupling (`fra.core.coded.coupling_parts`)."""
    documents: Int[Tensor, " n"]
    """Documents in which the pair is jointly live on the stripe."""
    selectivity: Float[Tensor, " n"]
    """1 less the key feature's mean activation over all keys relative to that at the stripe's key, where i is live."""

    def values(
        self, arm: Arm, head: int, which: Int[Tensor, " m"] | None = None, raised: float = 0.0
    ) -> Float[Tensor, " m"]:
        """M of all or some pairs for one head, their couplings raised by so much at all offsets."""
        pairs, position_part = (
            (self.pairs, self.position_part) if which is None else (self.pairs[which], self.position_part[which])
        )
        parts = coupling_parts(arm, head, pairs)
        if raised:
            parts[:, -1] += raised
        return (position_part * parts).sum(-1)

    def strongest(self, arm: Arm, head: int, n: int) -> tuple[Int[Tensor, "m 2"], Float[Tensor, " m"]]:
        """The n pairs of largest M for one head, strongest first, and their M."""
        m = self.values(arm, head)
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
        return place.view(batch, pos, width), value.view(batch, pos, width)

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
            stripes[shift] = Stripe(
                torch.stack([self._live[pair // n], self._live[pair % n]], 1),
                part - less,
                count,
                1 - less[:, -1] / part[:, -1],  # the last part has the same turn at every offset
            )
        return stripes

    @cached_property
    def _turns(self) -> Float[Tensor, "n_offsets parts"] | None:
        """Of every offset, where the layer rotates."""
        rotary, length = self.arm.frozen.rotary, self.arm.codes.shape[1]
        return None if rotary is None else rotary.turns(torch.arange(length, device=self._live.device))

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
        """Linear ids of eligible pairs, their stripe sums by part, document counts, and the share of rows used."""
        keys, documents = shifted_keys(self.batch, shift)
        used = documents[self._doc]
        doc, pos, key = self._doc[used], self._pos[used], keys[used]
        length = self.arm.codes.shape[1]
        of_rows = (doc * length + pos).cpu(), (doc * length + key).cpu(), doc.cpu()
        found = Meetings(often.slot, often.start, len(often.kept), of_rows, floor)
        if self._turns is None:
            part = found.sums(often.q_value, often.k_value)
        else:
            part = found.sums(often.q_value, often.k_value, pos - key, length) @ self._turns
        pair = often.kept[found.q_slot] * (len(self._live) + 1) + often.kept[found.k_slot]
        return pair, part, found.documents, float(used.double().mean())

    def _mean_part(self, pairs: Int[Tensor, " n"]) -> Float[Tensor, "n parts"]:
        """sum over second-copy rows t of F_q(t)_i mean_{u<=t} F_u,j for linear pair ids, by part where the head
        rotates.

        Not the census's position parts, which are made for every document's own pairs and by block of key features
        because they may not fit: these rows are no stripe, and their table, which fits, is one matrix product (a part).
        """
        mask = self.arm.frozen.mask
        weight = mask.to(self._q[1].dtype) / mask.sum(-1, keepdim=True)
        if self._turns is None:
            q, k = self._dense("query"), self._dense("key")
            return (q[self._doc, self._pos].T @ (weight @ k)[self._doc, self._pos]).flatten()[pairs][:, None]
        n = len(self._live) + 1
        q_kept, q_at = torch.unique(pairs // n, return_inverse=True)
        k_kept, k_at = torch.unique(pairs % n, return_inverse=True)
        q = self._sparse_queries(q_kept)
        keys = self._dense("key")[:, :, k_kept]
        rows = torch.split(self._pos, self.batch.periods.tolist())
        everywhere = torch.arange(len(mask), device=pairs.device)
        ahead = (everywhere[:, None] - everywhere).clamp(min=0)
        part = weight.new_zeros(len(pairs), self._turns.shape[1])
        for number, turn in enumerate(self._turns.T):
            turned = weight * turn[ahead]
            means = torch.cat([turned[pos] @ own for pos, own in zip(rows, keys, strict=True)])
            part[:, number] = torch.sparse.mm(q, means)[q_at, k_at]
        return part

    def _sparse_queries(self, kept: Int[Tensor, " n"]) -> Float[Tensor, "n n_rows"]:
        """Coefficients of some of the live features on the second-copy rows."""
        length = self.arm.codes.shape[1]
        row_of = torch.full((len(self.batch) * length,), -1, device=kept.device)
        row_of[self._doc * length + self._pos] = torch.arange(len(self._pos), device=kept.device)
        place = torch.full((len(self._live),), -1, device=kept.device)
        place[kept] = torch.arange(len(kept), device=kept.device)
        at = torch.stack((place[self._slot], row_of[self.arm.codes.row]))
        there = (at >= 0).all(0)
        size = (len(kept), len(self._pos))
        return torch.sparse_coo_tensor(at[:, there], self._values[0][there], size, check_invariants=True).coalesce()

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
