"""Every channel of one head on one document, reduced over positions, table by table; the n strongest without the rest.

|F_ij(t,s)| is at most the product of both vectors' lengths (a rotation keeps them), so that sums, means and largest
terms of a channel are bounded by a product of one number for each of its features. Features stand in descending order
of that number: what lies beyond the last column that can reach the n-th strongest so far is not computed.

Where vectors are not rotated a channel's sum is <u_i, v_j> sum c_i(t) c_j(s), so that its coupling and both sums of
|c| bound it more closely, for one product of small matrices: the few that can still be among the n strongest are
computed one by one, from the entries at which they are live. Where they are rotated, sums are computed in single
precision first, with a bound of their rounding, and those that can be among the strongest once more, as they are given.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
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
STEP_ELEMENTS, _STEPS = 1 << 16, 64
"""Channels bounded at once, at least, and the steps of a whole table at most: small ones follow the staircase closely.
"""
SCREENED = 1 << 20
"""Terms in single precision at once: few enough to stay in a cache."""
_SPARSE = 8
"""Of so many channels one at most must be left for them to be computed one by one: a table costs less a channel."""


class OrderedEntries:
    """The entries of one side by feature, features in descending order of what bounds their channels."""

    def __init__(self, entries: Entries, reduce: Reduce):

        def gathered(sizes: Float[Tensor, " n"]) -> Float[Tensor, " live"]:
            found = sizes.new_zeros(len(entries.live))
            if reduce == "count":
                return torch.bincount(entries.slot, minlength=len(found)).to(sizes)
            if reduce in ("max", "mean"):
                return found.scatter_reduce_(0, entries.slot, sizes, "amax")
            add_at(found, entries.slot, sizes)
            return found

        size = None if entries.coefficient is None else gathered(entries.coefficient.abs())
        if entries.direction is None or size is None or reduce == "count":
            bound = gathered(entries.vector.norm(dim=1))
        else:
            bound = size * entries.direction.norm(dim=1)
        order = bound.argsort(descending=True, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        slot, at = place[entries.slot].sort(stable=True)
        self.live, self.slot, self.pos = entries.live[order], slot, entries.pos[at]
        self._vector, self._at = entries.vector, at
        self.falls = -bound[order].cpu()
        """Minus the bounds: ascending, to be searched."""
        self.coefficient = None if entries.coefficient is None else entries.coefficient[at]
        self.direction = None if entries.direction is None else entries.direction[order]
        self.bounding = None
        """Directions times what bounds their coefficients: products of both sides' bound channels."""
        if self.direction is not None and size is not None:
            self.bounding = (self.direction * size[order, None]).float()
        self.bounds = torch.searchsorted(slot, torch.arange(len(order) + 1, device=order.device))
        self.n_entries = torch.bincount(slot, minlength=len(order))
        self.first: list[int] = self.bounds.tolist()
        """Index of the first entry of each feature, and the end."""

    @cached_property
    def vector(self) -> Float[Tensor, "n d_head"]:
        """As they enter the score."""
        return self._vector[self._at]

    @cached_property
    def rough(self) -> Float[Tensor, "n d_head"]:
        """The same in single precision."""
        return self.vector.float()

    @cached_property
    def place(self) -> Int[Tensor, " n"]:
        """Positions in numbers as small as they allow: half of a mask's time is the comparison."""
        return self.pos.short() if not len(self.pos) or int(self.pos.max()) < 1 << 15 else self.pos.int()

    def of(self, features: Int[Tensor, " m"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """All entries of each of these features (places), one feature after another, and whose they are (0 to m)."""
        first, number = self.bounds[features], self.bounds[features + 1] - self.bounds[features]
        whose = torch.repeat_interleave(number)
        return torch.arange(len(whose), device=whose.device) + (first - number.cumsum(0) + number)[whose], whose

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
        ones = (side.falls.new_ones(len(side.pos), device=side.pos.device) for side in (self.q, self.k))
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

    @property
    def closely_bounded(self) -> bool:
        """Whether a channel's coupling bounds it."""
        known = self.q.bounding is not None and self.k.bounding is not None
        return known and self.reduce in ("sum", "abs", "mean")

    def strong(
        self, rows: slice, columns: slice, threshold: float
    ) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]] | None:
        """Rows and columns of the channels whose coupling lets them reach the threshold; None where these are many."""
        assert self.q.bounding is not None and self.k.bounding is not None
        bound = self.q.bounding[rows] @ self.k.bounding[columns].mT
        # In single precision, which is off by so much of the lengths' product at most.
        off = (self.q.bounding.shape[1] + 8) * torch.finfo(bound.dtype).eps
        longest = float(self.q.falls[rows.start] * self.k.falls[columns.start])
        reaches = bound.abs_() >= threshold / (1 + _ROUNDING) - off * longest
        if int(reaches.sum()) * _SPARSE > reaches.numel():
            return None
        row, column = reaches.nonzero(as_tuple=True)
        return row + rows.start, column + columns.start

    @property
    def screened(self) -> bool:
        """Whether a table in single precision says which channels are worth a closer look."""
        return not self.closely_bounded and self.reduce in ("sum", "abs") and not self.mask.is_cuda

    def roughly_strong(
        self, rows: slice, columns: slice, threshold: float
    ) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]] | None:
        """Rows and columns of the channels that can reach the threshold, by their sums in single precision."""
        size, off = self.rough(rows, columns)
        reaches = size >= threshold / (1 + _ROUNDING) - off
        if int(reaches.sum()) * _SPARSE > reaches.numel():
            return None
        row, column = reaches.nonzero(as_tuple=True)
        return row + rows.start, column + columns.start

    def rough(self, rows: slice, columns: slice) -> tuple[Float[Tensor, "rows columns"], float]:
        """|value| in single precision, and by how much any is off at most: each term by d_head + 1 roundings of the
        product of lengths, their sum by one more a term.
        """
        q, k = self.q.entries(rows), self.k.entries(columns)
        n_keys, n_columns = k.stop - k.start, columns.stop - columns.start
        bounds, order = self.k.bounds[columns.start : columns.stop + 1] - k.start, torch.arange(n_keys)
        found = self.q.rough.new_zeros(rows.stop - rows.start, n_columns)
        keys, k_pos = self.k.rough[k], self.k.place[k, None]
        together = max(1, min(SCREENED, self._work[0].numel()) // max(1, n_keys))
        for low in range(q.start, q.stop, together):
            some = slice(low, min(low + together, q.stop))
            # fresh pages cost as much as the product
            terms, hidden = (part[: n_keys * (some.stop - low)].view(n_keys, -1) for part in self._work)
            torch.mm(keys, self.q.rough[some].mT, out=terms)
            if self.causal:
                torch.gt(k_pos, self.q.place[some], out=hidden)
            else:
                torch.logical_not(self.mask[self.q.pos[some]][:, self.k.pos[k]].mT, out=hidden)
            terms.masked_fill_(hidden, 0.0)
            by_key = segments(terms.abs_() if self.reduce == "abs" else terms, order, bounds)
            found.index_add_(0, self.q.slot[some] - rows.start, by_key.mT.contiguous())
        longest = float(self.q.falls[rows.start] * self.k.falls[columns.start])
        most = int(self.q.n_entries[rows].max() + self.k.n_entries[columns].max())
        return found.abs_(), (keys.shape[1] + 1 + most) * torch.finfo(found.dtype).eps * longest

    @cached_property
    def _work(self) -> tuple[Float[Tensor, " terms"], Bool[Tensor, " terms"]]:
        """Room for the terms of a tile, and for which of them are masked."""
        room = max(len(self.k.pos), min(SCREENED, len(self.k.pos) * len(self.q.pos)))
        return self.q.rough.new_empty(room), torch.empty(room, dtype=torch.bool)

    def rotated_one_by_one(self, q_at: Int[Tensor, " m"], k_at: Int[Tensor, " m"]) -> tuple[Tensor, Tensor]:
        """Values and counts of single channels, from every pair of their entries."""
        values, counts = self.q.vector.new_zeros(2, len(q_at))
        at = list(zip(q_at.tolist(), k_at.tolist(), strict=True))
        for number, (row, column) in enumerate(at):
            q, k = self.q.entries(slice(row, row + 1)), self.k.entries(slice(column, column + 1))
            attended = self.mask[self.q.pos[q]][:, self.k.pos[k]]
            terms = (self.q.vector[q] @ self.k.vector[k].mT) * attended
            values[number] = terms.abs().sum() if self.reduce == "abs" else terms.sum()
            counts[number] = attended.sum()
        return values, counts

    def one_by_one(self, q_at: Int[Tensor, " m"], k_at: Int[Tensor, " m"]) -> tuple[Float[Tensor, " m"], Tensor]:
        """Values and counts of single channels, in closed form where vectors are not rotated."""
        q, k = self.q, self.k
        if not self.closely_bounded:
            return self.rotated_one_by_one(q_at, k_at)
        assert q.direction is not None and k.direction is not None
        assert q.coefficient is not None and k.coefficient is not None
        rows, back = torch.unique(q_at, return_inverse=True)
        at, whose = q.of(rows)
        # Of each query feature, at each key, the sum over the queries that attend to it: of coefficients, and of ones.
        reached = q.coefficient.new_zeros(2, len(rows), len(self.mask))
        reached[0, whose, q.pos[at]] = q.coefficient[at].abs() if self.reduce == "abs" else q.coefficient[at]
        reached[1, whose, q.pos[at]] = 1.0
        reached = reached.flip(2).cumsum(2).flip(2) if self.causal else reached @ self.mask.to(reached)
        at, whose = k.of(k_at)
        size = k.coefficient[at].abs() if self.reduce == "abs" else k.coefficient[at]
        met = reached[:, back[whose], k.pos[at]]
        value, count = size.new_zeros(2, len(q_at))
        add_at(value, whose, met[0] * size)
        add_at(count, whose, met[1])
        coupling = (q.direction[q_at] * k.direction[k_at]).sum(1)
        value = value * (coupling.abs() if self.reduce == "abs" else coupling)
        return (value / count.clamp(min=1) if self.reduce == "mean" else value).masked_fill(count == 0, 0.0), count

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
    if n is None:
        _refuse(tables, least, dtype)
    elif n <= SAMPLED**2 // 16 and min(n_q, n_k) >= 4 * SAMPLED:
        values, count = _made(tables, slice(0, SAMPLED), slice(0, SAMPLED), dtype)
        best.expect_some(values.abs().masked_fill(count < least, -1.0))
    at_once = reductions.TILE_ELEMENTS
    if n is not None:
        at_once = min(at_once, max(STEP_ELEMENTS, n_q * n_k // _STEPS))
    low = 0
    while low < n_q and (stop := tables.reach(low, best)):
        rows = slice(low, min(low + max(1, at_once // max(stop, len(mask))), n_q))
        _offer(tables, rows, slice(0, stop), best, least, d_sae, dtype)
        low = rows.stop
    _, code, value, count = best.result()
    return code // d_sae, code % d_sae, value, count


def _made(tables: ChannelTables, rows: slice, columns: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    count = tables.count(rows, columns)
    return tables.value(rows, columns, count).to(dtype), count


def _offer(
    tables: ChannelTables, rows: slice, columns: slice, best: Strongest, least: int, d_sae: int, dtype: torch.dtype
) -> None:
    """Offers those channels of a tile that can be among the strongest."""
    q_ids, k_ids = tables.q.live, tables.k.live
    few = None
    if best.threshold > 0 and tables.closely_bounded:
        few = tables.strong(rows, columns, best.threshold)
    elif best.threshold > 0 and tables.screened:
        few = tables.roughly_strong(rows, columns, best.threshold)
    if few is None:
        values, count = _made(tables, rows, columns, dtype)
        # int64: d_sae**2 passes 2**31 at 46 341
        best.offer_tile(values, q_ids[rows] * d_sae, k_ids[columns], count, least)
        return
    together = max(1, reductions.TILE_ELEMENTS // (2 * len(tables.mask)))
    for q_at, k_at in zip(torch.split(few[0], together), torch.split(few[1], together), strict=True):
        value, count = tables.one_by_one(q_at, k_at)
        value, enough = value.to(dtype), count >= least
        code = q_ids[q_at] * d_sae + k_ids[k_at]
        best.offer(*(column[enough] for column in (value.abs().double(), code, value, count.long())))


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
