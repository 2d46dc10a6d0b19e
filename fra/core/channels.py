"""Every channel of one head on one document, reduced over positions, table by table; the n strongest without the rest.

|F_ij(t,s)| is at most the product of both vectors' lengths (a rotation keeps them), so that sums, means and largest
terms of a channel are bounded by a product of one number for each of its features. Features stand in descending order
of that number: what lies beyond the last column that can reach the n-th strongest so far is not computed.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fra.core import reductions
from fra.core.blocks import Side, add_at, reduce_blocks, segments
from fra.core.reductions import Entries, Reduce
from fra.core.strongest import Strongest
from fra.errors import FraError

SAMPLED = 256
"""Features of either side, those of the largest bounds, whose channels are looked at before all others."""
_ROUNDING = 1e-6
"""Computed values may exceed a bound by so much of it, and never do."""


class OrderedEntries:
    """The entries of one side by feature, features in descending order of what bounds their channels."""

    def __init__(self, entries: Entries, reduce: Reduce):
        length = entries.vector.norm(dim=1)
        bound = length.new_zeros(len(entries.live))
        if reduce == "count":
            bound = torch.bincount(entries.slot, minlength=len(entries.live)).to(length)
        elif reduce in ("max", "mean"):
            bound.scatter_reduce_(0, entries.slot, length, "amax")
        else:
            add_at(bound, entries.slot, length)
        order = bound.argsort(descending=True, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        slot, at = place[entries.slot].sort(stable=True)
        self.live, self.slot, self.pos, self.vector = entries.live[order], slot, entries.pos[at], entries.vector[at]
        self.falls = -bound[order].cpu()
        """Minus the bounds: ascending, to be searched."""
        self.coefficient = None if entries.coefficient is None else entries.coefficient[at]
        self.direction = None if entries.direction is None else entries.direction[order]
        every = torch.arange(len(order) + 1, device=order.device)
        self.first: list[int] = torch.searchsorted(slot, every).tolist()
        """Index of the first entry of each feature, and the end."""

    def entries(self, features: slice) -> slice:
        """Those of consecutive features."""
        return slice(self.first[features.start], self.first[features.stop])

    def side(self, features: slice, n_pos: int) -> Side:
        """The entries of some features by position."""
        some = self.entries(features)
        pos, at = self.pos[some].sort(stable=True)
        return Side(pos, self.slot[some][at], self.vector[some][at], n_pos)


class ChannelTables:
    """Reductions over positions of the channels of some features."""

    def __init__(self, q: Entries, k: Entries, mask: Bool[Tensor, "pos pos"], reduce: Reduce):
        self.q, self.k, self.mask, self.reduce = OrderedEntries(q, reduce), OrderedEntries(k, reduce), mask, reduce
        self.causal = bool((mask == torch.ones_like(mask).tril()).all())

    def _positions(
        self, rows: slice, columns: slice, of_q: Float[Tensor, " q"], of_k: Float[Tensor, " k"]
    ) -> Float[Tensor, "rows columns"]:
        """Sum over unmasked (t, s) of of_q(t, i) * of_k(s, j)."""
        q, k = self.q.entries(rows), self.k.entries(columns)
        queries = of_q.new_zeros(len(self.mask), rows.stop - rows.start)
        queries[self.q.pos[q], self.q.slot[q] - rows.start] = of_q[q]
        # Of each key the sum over the queries that attend to it.
        reached = queries.flip(0).cumsum(0).flip(0) if self.causal else self.mask.to(queries).mT @ queries
        bounds = torch.tensor(self.k.first[columns.start : columns.stop + 1], device=of_k.device) - k.start
        return segments(reached, self.k.pos[k], bounds, of_k[k].contiguous()).mT

    def count(self, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """Unmasked (t, s) at which both features are live."""
        ones = (self.q.vector.new_ones(len(side.pos)) for side in (self.q, self.k))
        return self._positions(rows, columns, *ones)

    def value(self, rows: slice, columns: slice, count: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The reduction; in closed form where vectors are not rotated: sum_{t,s} a_i(t) a_j(s) <u_i, v_j> = (U V^T) *
        (F^T C F), with C the mask.
        """
        if self.reduce == "count":
            return count
        kind = "sum" if self.reduce == "mean" else self.reduce
        q, k = self.q, self.k
        if kind == "max" or q.direction is None or k.direction is None:
            weights = None if self.causal else self.mask.to(q.vector)
            sides = q.side(rows, len(self.mask)), k.side(columns, len(self.mask))
            found = reduce_blocks(*sides, (kind,), weights)[kind]
        else:
            assert q.coefficient is not None and k.coefficient is not None
            coupling, of_q, of_k = q.direction[rows] @ k.direction[columns].mT, q.coefficient, k.coefficient
            if kind == "abs":
                coupling, of_q, of_k = coupling.abs(), of_q.abs(), of_k.abs()
            found = coupling * self._positions(rows, columns, of_q, of_k)
        found = found / count.clamp(min=1) if self.reduce == "mean" else found
        return found.masked_fill(count == 0, 0.0)

    def reach(self, row: int, best: Strongest) -> int:
        """How many of the first key features can have a channel as strong as the n-th so far, with any query feature
        from this one on.
        """
        highest = -float(self.q.falls[row]) * (1 + _ROUNDING)
        if best.threshold <= 0:
            return len(self.k.live)
        if highest <= 0:
            return 0
        return int(torch.searchsorted(self.k.falls, -best.threshold / highest, right=True))


def reduce_channels(
    q: Entries,
    k: Entries,
    mask: Bool[Tensor, "pos pos"],
    reduce: Reduce,
    n: int | None,
    min_count: int,
    d_sae: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query features, key features, values and counts of the n strongest channels (of all where n is None), by |value|;
    ties by ids.

    Only channels with `count` at least `min_count`, and at least 1. Raises FraError where all of them would not fit
    into memory, as soon as they are that many.
    """
    tables, best, least = ChannelTables(q, k, mask, reduce), Strongest(n), max(1, min_count)
    n_q, n_k = len(tables.q.live), len(tables.k.live)

    def made(rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        count = tables.count(rows, columns)
        return tables.value(rows, columns, count).to(dtype), count

    if n is None:
        _refuse(tables, least, dtype)
    elif n <= SAMPLED**2 // 16 and min(n_q, n_k) >= 4 * SAMPLED:
        values, count = made(slice(0, SAMPLED), slice(0, SAMPLED))
        best.expect_some(values.abs().masked_fill(count < least, -1.0))
    low = 0
    while low < n_q and (stop := tables.reach(low, best)):
        width = max(1, reductions.TILE_ELEMENTS // max(stop, len(mask)))
        rows, columns = slice(low, min(low + width, n_q)), slice(0, stop)
        values, count = made(rows, columns)
        # int64: d_sae**2 passes 2**31 at 46 341
        best.offer_tile(values, tables.q.live[rows] * d_sae, tables.k.live[columns], count, least)
        low = rows.stop
    _, code, value, count = best.result()
    return code // d_sae, code % d_sae, value, count


def _refuse(tables: ChannelTables, least: int, dtype: torch.dtype) -> None:
    """Counts live channels, and raises FraError when they are more than fit into memory."""
    # Key, code, value, count, and as much again while they are sorted.
    row_bytes, budget, n_live = 2 * (2 * dtype.itemsize + 16), reductions.memory_budget(), 0
    n_q, columns = len(tables.q.live), slice(0, len(tables.k.live))
    width = max(1, reductions.TILE_ELEMENTS // max(columns.stop, len(tables.mask)))
    for low in range(0, n_q, width):
        n_live += int((tables.count(slice(low, min(low + width, n_q)), columns) >= least).sum())
        if n_live * row_bytes > budget:
            raise FraError(
                f"more than {n_live:,} live channels would take {n_live * row_bytes:,} bytes, more than the {budget:,} "
                "that may be used: pass n= for the strongest, or min_count=."
            )
