"""Streaming reductions over all pairs of query and key entries, in tiles; what they reduce is never stored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from threading import Lock, local
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.core.strongest import Strongest
from fra.core.threads import each
from fra.errors import FraError

Reduce = Literal["sum", "abs", "max", "mean", "count"]
TERMS = ("feature", "bias", "error")

TILE_ELEMENTS = 1 << 22
"""Numbers in one tile. Results do not depend on it."""


@dataclass(frozen=True)
class Entries:
    """The live features of every position on one side, sorted by position, then feature."""

    pos: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    vector: Float[Tensor, "n d_head"]
    coefficient: Float[Tensor, " n"] | None
    """Without rotation a vector is coefficient times its feature's direction, wherever it stands; None with rotation.
    """
    direction: Float[Tensor, "live d_head"] | None
    """One for each of `live`."""

    @cached_property
    def live(self) -> Int[Tensor, " live"]:
        """Ids of the features that are live anywhere, ascending."""
        live: Tensor = torch.unique(self.feature)
        return live

    @cached_property
    def slot(self) -> Int[Tensor, " n"]:
        """Each entry's index into `live`."""
        return torch.searchsorted(self.live, self.feature)

    @cached_property
    def rank(self) -> Int[Tensor, " n"]:
        """Each entry's place among the entries of its position."""
        return torch.arange(len(self.pos), device=self.pos.device) - self.first(self.pos)

    def first(self, pos: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        """Index of the first entry of each of these positions."""
        return torch.searchsorted(self.pos, pos)

    def matrix(self, values: Float[Tensor, " n"], n_pos: int) -> Float[Tensor, "live pos"]:
        """`values` as a sparse matrix of live features by positions."""
        return torch.sparse_coo_tensor(
            torch.stack((self.slot, self.pos)), values, (len(self.live), n_pos), check_invariants=False
        )


@dataclass(frozen=True)
class SideTerms:
    """One side of the head: what each position brings to the score. The query side carries the scale."""

    entries: Entries
    bias: Float[Tensor, "pos d_head"]
    error: Float[Tensor, "pos d_head"]

    def sum(self, term: str) -> Float[Tensor, "pos d_head"]:
        """The vectors of one kind of term, summed within each position."""
        if term != "feature":
            return self.bias if term == "bias" else self.error
        return torch.zeros_like(self.bias).index_add_(0, self.entries.pos, self.entries.vector)

    def of(self, features: Int[Tensor, " n"]) -> Float[Tensor, "n pos d_head"]:
        """The vectors of chosen features, zero where they are not live."""
        entries = self.entries
        vectors = entries.vector.new_zeros(len(features), len(self.bias), entries.vector.shape[-1])
        which, at = torch.nonzero(features[:, None].to(entries.feature.device) == entries.feature, as_tuple=True)
        vectors[which, entries.pos[at]] = entries.vector[at]
        return vectors


class _Terms(NamedTuple):
    q_features: Int[Tensor, " n"]
    k_features: Int[Tensor, " m"]
    values: Float[Tensor, "n m"]


class Pair(_Terms):
    """One score's feature-feature terms: (q_features [n], k_features [m], values [n, m]), and values as the product of
    two matrices: what the weights make of two features that are as active as they are on average while live, and how
    active they are here against that.
    """

    unscaled: Float[Tensor, "n m"]
    """The terms if each feature were at its mean while live (at 1, where no means are known)."""
    scaling: Float[Tensor, "n m"]
    """Activation over that mean, query feature times key feature. values = unscaled * scaling."""

    def __new__(cls, q_features: Tensor, k_features: Tensor, values: Tensor, unscaled: Tensor, scaling: Tensor) -> Pair:
        """The three of a tuple, and the two matrices beside them."""
        own = super().__new__(cls, q_features, k_features, values)
        own.unscaled, own.scaling = unscaled, scaling
        return own


def memory_budget() -> int:
    """Bytes that one result may take: half of this machine's memory (4 GiB where the system does not tell)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 4 << 30


def refuse_beyond_memory(n_rows: int, row_bytes: int, what: str, instead: str) -> None:
    """Raises FraError where a result of `n_rows` would take more than memory_budget()."""
    needed = n_rows * row_bytes
    if needed > memory_budget():
        raise FraError(
            f"{n_rows:,} {what} would take {needed:,} bytes, more than "
            f"the {memory_budget():,} that may be used: {instead}."
        )


_SCANNED_AT_ONCE = 1 << 19
"""Numbers compared with the running threshold at once: few enough to stay in a cache."""
_ROWS_TOGETHER = 32
"""Rows whose largest number is looked for first, column by column."""
SAMPLED = 384
"""Entries of either side, the longest, whose pairs are looked at before all others."""
_STRETCHES, STRETCH = 4, 1024
"""Consecutive query entries that one thread works on: at least so many stretches, of at most so many entries."""
_ROUNDING = 1e-4
"""Products in tiles of another shape may differ in their last bits."""


def top_terms(
    q: Entries, k: Entries, mask: Bool[Tensor, "pos pos"], n: int, by: Literal["abs", "value"], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of query entries, of key entries, and values of the n strongest unmasked pairs; ties by q_pos, k_pos,
    q_feature, k_feature. On a CPU torch's own number of threads share the work; the answer does not depend on it.
    """
    lengths = [side.vector.norm(dim=1) for side in (q, k)]
    longest = [length.sort(descending=True, stable=True) for length in lengths]
    best, lock, own = Strongest(n), Lock(), local()
    floor = _sampled_threshold(q, k, mask, n, by, dtype, *(found.indices[:SAMPLED] for found in longest))
    best.expect(floor)
    # Keys beyond the last that a stretch of queries may attend are never multiplied.
    last = (torch.arange(len(mask), device=mask.device) * mask).amax(1).cummax(0).values + 1
    stops, of_row = torch.searchsorted(k.pos, last).tolist(), q.pos.tolist()
    widest = 1 + int(max(q.rank.max(), k.rank.max()))

    def stretch(rows: slice) -> None:
        """Offers the strongest pairs of some consecutive query entries."""
        stop = stops[of_row[rows.stop - 1]]
        q_length, q_at = lengths[0][rows].sort(descending=True, stable=True)
        # Longest first on both sides: a pair is at most as strong as its two lengths' product.
        k_at = longest[1].indices[longest[1].indices < stop]
        k_length = -lengths[1][k_at]
        q_at, low, k_vector = q_at + rows.start, 0, k.vector[:0]
        while low < len(q_at):
            highest = float(q_length[low]) * (1 + _ROUNDING)
            n_keys = stop
            if floor > 0:  # not the threshold, which rises as threads go: the last bits of products are those of shapes
                n_keys = int(torch.searchsorted(k_length, -floor / max(highest, 1e-300), right=True))
            if not n_keys:
                break
            if not len(k_vector):
                k_vector = k.vector[k_at[:n_keys]]
            width = max(1, min(TILE_ELEMENTS, _SCANNED_AT_ONCE) // n_keys)
            some = q_at[low : low + (width - width % min(_ROWS_TOGETHER, width))]
            if len(getattr(own, "work", ())) < len(some) * n_keys:
                own.work = q.vector.new_empty(len(some) * n_keys)  # fresh pages cost as much as the product
            into = own.work[: len(some) * n_keys].view(len(some), n_keys)
            values = torch.mm(q.vector[some], k_vector[:n_keys].mT, out=into).to(dtype)
            row, column, key, value = _strong(values, by, best.threshold)
            row, column = some[row], k_at[column]
            seen = mask[q.pos[row], k.pos[column]].nonzero()[:, 0]
            row, column = row[seen], column[seen]
            code = ((q.pos[row] * len(mask) + k.pos[column]) * widest + q.rank[row]) * widest + k.rank[column]
            with lock:
                best.offer(key[seen], code, value[seen])
            low += len(some)

    width = max(_ROWS_TOGETHER, min(STRETCH, -(-len(q.pos) // _STRETCHES)))
    # The last stretches have most keys.
    starts = range(0, len(q.pos), width)[::-1]
    stretches = [slice(start, min(start + width, len(q.pos))) for start in starts]
    each(stretch, stretches, q.vector.device, torch.get_num_threads())
    _, code, values = best.result()
    code, k_rank = code.to(q.pos.device) // widest, code.to(q.pos.device) % widest
    code, q_rank = code // widest, code % widest
    return q.first(code // len(mask)) + q_rank, k.first(code % len(mask)) + k_rank, values


def _strong(
    values: Float[Tensor, "rows k"], by: Literal["abs", "value"], threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, columns, keys and values of what is as strong as the threshold."""
    found = []
    for low, some in _grouped(values, min(_ROWS_TOGETHER, len(values))):
        # Few columns of a group of rows hold anything as strong: the others are looked at no further.
        highest = some.amax(1)
        if by == "abs":
            highest = torch.maximum(highest, -some.amin(1))
        group, column = (highest >= threshold).nonzero(as_tuple=True)
        candidates = some[group, :, column]
        key = candidates.abs() if by == "abs" else candidates
        at, within = (key >= threshold).nonzero(as_tuple=True)
        row = low + group[at] * some.shape[1] + within
        found.append((row, column[at], key[at, within], candidates[at, within]))
    row, column, key, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    return row, column, key, value


def _grouped(values: Float[Tensor, "rows k"], together: int) -> Iterator[tuple[int, Float[Tensor, "groups group k"]]]:
    """All rows, `together` of them in a group, and the rest as one."""
    whole = len(values) // together * together
    if whole:
        yield 0, values[:whole].view(-1, together, values.shape[1])
    if whole < len(values):
        yield whole, values[None, whole:]


def _sampled_threshold(
    q: Entries,
    k: Entries,
    mask: Bool[Tensor, "pos pos"],
    n: int,
    by: Literal["abs", "value"],
    dtype: torch.dtype,
    q_at: Int[Tensor, " some"],
    k_at: Int[Tensor, " some"],
) -> float:
    """What the n strongest pairs cannot fall below: the n-th of some entries' pairs."""
    if n > len(q_at) * len(k_at):
        return -torch.inf
    values = (q.vector[q_at] @ k.vector[k_at].mT).to(dtype)
    key = (values.abs() if by == "abs" else values).masked_fill(~mask[q.pos[q_at]][:, k.pos[k_at]], -torch.inf)
    lowest = float(key.flatten().topk(n).values[-1])
    return lowest - _ROUNDING * abs(lowest)


def feature_tiles(q: Entries, k: Entries, n_pos: int) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of the query's live features, with the indices of their entries (ordered by feature)."""
    order = q.slot.argsort(stable=True)
    width = max(1, TILE_ELEMENTS // max(len(k.pos), n_pos))
    for start in range(0, len(q.live), width):
        stop = min(start + width, len(q.live))
        low, high = torch.searchsorted(q.slot[order], torch.tensor([start, stop], device=order.device)).tolist()
        yield slice(start, stop), order[low:high]
