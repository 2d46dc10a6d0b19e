"""All terms of one head on one document, in blocks, reduced over positions for every pair of live features."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn.functional import embedding_bag

WORK_BYTES = 1 << 23
"""Of one intermediate array. Answers do not depend on it, beyond rounding."""


def segments(
    values: Float[Tensor, "n m"], order: Int[Tensor, " n2"], bounds: Int[Tensor, " k1"], weight: Tensor | None = None
) -> Float[Tensor, "k m"]:
    """Sums of rows `order[bounds[i]:bounds[i+1]]` of `values`, times `weight` where given: one pass, no atomics."""
    found: Tensor = embedding_bag(
        order, values, bounds, mode="sum", per_sample_weights=weight, include_last_offset=True
    )
    return found


def by_slot(slot: Int[Tensor, " n"], n_slots: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " bounds"]]:
    """Order and bounds that make `segments` sum by slot."""
    order = slot.argsort(stable=True)
    return order, torch.searchsorted(slot[order], torch.arange(n_slots + 1, device=slot.device))


def add_at(table: Num[Tensor, " n"], at: Int[Tensor, " m"], values: Num[Tensor, " m"]) -> None:
    """table[at] += values with repeated indices, in an order that does not change from run to run."""
    if table.is_cuda:
        table.index_put_((at.long(),), values, accumulate=True)  # sorts; index_add_ would use atomics there
    else:
        table.index_add_(0, at, values)


class Side:
    """Entries of one document on one side: vectors as they enter the score, sorted by position."""

    def __init__(self, pos: Int[Tensor, " n"], slot: Int[Tensor, " n"], vector: Float[Tensor, "n d_head"], n_pos: int):
        """`slot`: each entry's feature among those asked for."""
        self.pos, self.vector = pos, vector
        self.own = False
        """Whether every entry is a slot of its own."""
        self.live, self.local = torch.unique(slot, return_inverse=True)
        """Slots that occur, and each entry's place among them."""
        self.bounds: list[int] = [0, *torch.bincount(pos, minlength=n_pos).cumsum(0).tolist()]
        """Number of entries before each position, and the end: one look at the device, then loops need none."""
        self._by_slot: dict[int, tuple[Tensor, Tensor]] = {}

    def by_entry(self, slot: Int[Tensor, " n"]) -> Side:
        """The same entries, each with a slot of its own: where hardly any feature occurs twice, adding up entries of
        one feature costs more than it saves.
        """
        other = copy(self)
        other.live, other.local, other._by_slot = slot, torch.arange(len(slot), device=slot.device), {}
        other.own = True
        return other

    def with_vectors(self, vector: Float[Tensor, "n d_head"]) -> Side:
        """The same entries of another head: nothing else is computed again."""
        other = copy(self)
        other.vector = vector
        return other

    def by_slot(self, stop: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " bounds"]]:
        """`by_slot` of the first entries."""
        if stop not in self._by_slot:
            self._by_slot[stop] = by_slot(self.local[:stop], len(self.live))
        return self._by_slot[stop]


class Block(NamedTuple):
    """Terms of consecutive query entries with all keys up to the last of their positions."""

    terms: Float[Tensor, "k q"]
    queries: slice
    """Entries of the query side."""
    begin: int
    """Keys before this one lie at or before every query of the block; the rest may lie ahead of some."""
    stop: int
    """Number of keys."""


def causal_blocks(q: Side, k: Side) -> Iterator[Block]:
    """All terms <q, k> with s <= t, in blocks; a few with s > t are among them, not yet masked."""
    n_rows = max(1, WORK_BYTES // (max(1, len(k.pos)) * q.vector.element_size()))
    for low in range(0, len(q.pos), n_rows):
        high = min(low + n_rows, len(q.pos))
        first, last = bisect_right(q.bounds, low) - 1, bisect_right(q.bounds, high - 1) - 1
        stop = k.bounds[last + 1]
        if stop:
            yield Block(k.vector[:stop] @ q.vector[low:high].mT, slice(low, high), k.bounds[first], stop)


def reduce_blocks(
    q: Side, k: Side, kinds: Sequence[str], weights: Float[Tensor, "pos pos"] | None
) -> dict[str, Float[Tensor, "q_live k_live"]]:
    """Terms <q, k> reduced over entries, by each of `kinds`: "abs", "max", "mass", or any that is linear. weights: what
    terms are multiplied by (zero where masked; for "max" only its zeros matter, for "mass" it is the pattern); None for
    1 at and before the query.
    """
    found = {
        kind: q.vector.new_full((len(q.live), len(k.live)), -torch.inf if kind == "max" else 0.0) for kind in kinds
    }
    for terms, queries, begin, stop in causal_blocks(q, k):
        q_pos, k_pos = q.pos[queries], k.pos[:stop]
        order, bounds = k.by_slot(stop)
        weight = None if weights is None else weights[q_pos][:, k_pos].mT.contiguous()
        if weight is None:
            terms[begin:].masked_fill_(k_pos[begin:, None] > q_pos, 0.0)
        for kind, table in found.items():
            if kind == "max":
                hidden = k_pos[:, None] > q_pos if weight is None else weight == 0
                by_key = terms.new_full((len(k.live), len(q_pos)), -torch.inf)
                slot = k.local[:stop, None].expand_as(terms)
                by_key.scatter_reduce_(0, slot, terms.masked_fill(hidden, -torch.inf), "amax")
                table.scatter_reduce_(0, q.local[queries, None].expand(-1, len(k.live)), by_key.mT, "amax")
                continue
            if kind == "mass":
                assert weight is not None
                by_key = _mass(terms, weight, k.local[:stop], order, bounds)
            else:
                some = terms.abs() if kind == "abs" else terms
                by_key = segments(some if weight is None else some * weight, order, bounds)
            if q.own:
                table[queries] = by_key.mT
                continue
            by_query = by_key.mT.contiguous()  # half the time of adding up strided rows
            if table.is_cuda:  # index_add_ would use atomics there
                table += segments(by_query, *by_slot(q.local[queries], len(q.live)))
            else:
                table.index_add_(0, q.local[queries], by_query)
    return found


def _mass(terms: Tensor, pattern: Tensor, slot: Tensor, order: Tensor, bounds: Tensor) -> Float[Tensor, "k_live q"]:
    """sum_s A(t,s) |F(t,s) - sum_u A(t,u) F(t,u)|: keys without the feature have F = 0, and the rest of A."""
    mean = segments(terms * pattern, order, bounds)
    share = segments(pattern, order, bounds)
    live = segments((terms - mean[slot]).abs_() * pattern, order, bounds)
    return live + (1 - share).clamp(min=0) * mean.abs()
