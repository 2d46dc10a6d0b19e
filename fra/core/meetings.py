"""Pairs of features that are live together on given pairs of rows: which they are, in how many documents they meet, and
sums over them. The one kernel of a census's stripes and of the search for induction channels.

Every pair of rows (t, s) gives a small block, [live at t, live at s]. Which pair of features each of its numbers
belongs to is sorted out once, for all heads: by a table over all pairs where that is no larger than the blocks are,
else by a sort, whose memory follows the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.blocks import WORK_BYTES, add_at

PAIR_BYTES = 40
"""Of one pair of entries while pairs of features are sorted out."""
_CELL_BYTES = 4 * 8
"""Of one pair of entries in a block, beside one another."""


class _Rows(NamedTuple):
    """Pairs of rows whose busiest row is about as wide in all of them."""

    chosen: Int[Tensor, " n"]
    width: int
    """Most live features of any of these rows."""


class RowPairs(NamedTuple):
    """Some pairs of rows, their entries side by side."""

    chosen: Int[Tensor, " n"]
    """Which of the pairs of rows."""
    q_entry: Int[Tensor, "n w"]
    k_entry: Int[Tensor, "n w"]
    """Entries of the rows; what is beyond a row's own has the place 0."""
    place: Int[Tensor, " n_w_w"]
    """Of each pair of entries among the pairs of features, numbered from 1; 0 for none."""


class Meetings:
    """All pairs of features that meet on given pairs of rows, in `floor` documents at least."""

    def __init__(
        self,
        slot: Int[Tensor, " entries"],
        start: Int[Tensor, " rows_and_end"],
        n_live: int,
        rows: tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]],
        floor: int = 0,
    ):
        """slot: each entry's feature among `n_live`, entries by row; start: first entry of each row, and the end; rows:
        the query's, the key's and their document; start and rows on the CPU. floor: 0 where documents need not be
        counted.
        """
        self._slot, self._start, self._n_live = slot, start, n_live
        q_row, k_row, doc = rows
        per_row, home = start.diff(), slot.device
        blocks, codes, docs = [], [], []
        for chosen, width in _graded(per_row[q_row], per_row[k_row]):
            (q, live_q), (k, live_k) = (self._entries(row[chosen], width) for row in (q_row, k_row))
            # 0 stands for none, and real pairs are numbered from 1.
            code = (1 + slot[q] * n_live)[:, :, None] + slot[k][:, None, :]
            codes.append((code * (live_q[:, :, None] & live_k[:, None, :])).flatten())
            blocks.append((chosen.to(home), q, k))
            docs.append(doc[chosen])
        sizes = [len(code) for code in codes]
        tabled = n_live**2 <= 2 * sum(sizes)
        found, places, self.documents = (self._by_table if tabled else self._by_sort)(codes, docs, floor)
        self.blocks = [RowPairs(*block, place) for block, place in zip(blocks, places, strict=True)]
        code = found - 1
        self.q_slot, self.k_slot = code // n_live, code % n_live
        """By query feature, then key feature; `documents`: in how many each pair meets (ones where not counted)."""

    def _entries(self, row: Int[Tensor, " n"], width: int) -> tuple[Int[Tensor, "n w"], Tensor]:
        """Entries of some rows, side by side, and which of them are there."""
        start, beside, home = self._start, torch.arange(width), self._slot.device
        first, count = start[row][:, None], (start[row + 1] - start[row])[:, None]
        return (first + beside).clamp(max=int(start[-1]) - 1).to(home), (beside < count).to(home)

    def _by_table(self, codes: list[Tensor], docs: list[Tensor], floor: int) -> tuple[Tensor, list[Tensor], Tensor]:
        home = self._slot.device
        met = torch.zeros(self._n_live**2 + 1, dtype=torch.int32, device=home)
        if floor:
            for here in _by_document(codes, docs):
                # A pair counts once a document: however often it meets there, the same number is written.
                met.scatter_(0, here, met.gather(0, here) + 1)
        else:
            for code in codes:
                met[code] = 1
        met[0] = 0
        found = (met >= max(1, floor)).nonzero()[:, 0]
        place = torch.zeros_like(met)
        place[found] = torch.arange(1, len(found) + 1, dtype=torch.int32, device=home)
        return found, [place[code] for code in codes], met[found].long()

    def _by_sort(self, codes: list[Tensor], docs: list[Tensor], floor: int) -> tuple[Tensor, list[Tensor], Tensor]:
        home, n_live = self._slot.device, self._n_live
        every = torch.cat((torch.zeros(1, dtype=torch.long, device=home), *codes))
        # int32 is sorted in less than half the time.
        every = every.int() if n_live**2 < 2**31 - 1 else every
        found, place = torch.unique(every, return_inverse=True)
        places = list(torch.split(place[1:], [len(code) for code in codes]))
        found = found[1:].long()
        met = torch.ones_like(found)
        if floor:
            met = _n_documents(places, docs, len(found))
            enough = met >= floor
            number = torch.cat((enough.new_zeros(1), enough)).cumsum(0) * torch.cat((enough.new_zeros(1), enough))
            found, met, places = found[enough], met[enough], [number[place] for place in places]
        return found, places, met

    @cached_property
    def count(self) -> Int[Tensor, " pairs"]:
        """Pairs of rows at which each pair of features meets."""
        found = torch.zeros(len(self.q_slot) + 1, dtype=torch.long, device=self._slot.device)
        for block in self.blocks:
            add_at(found, block.place, found.new_ones(()).expand(len(block.place)))
        return found[1:]

    def sums(
        self,
        q_value: Float[Tensor, " entries"],
        k_value: Float[Tensor, " entries"],
        column: Int[Tensor, " n"] | None = None,
        n_columns: int = 1,
    ) -> Float[Tensor, "pairs n_columns"]:
        """Products of both entries' values, summed: the position part. column: of each pair of rows, 0 where None."""
        found = q_value.new_zeros(len(self.q_slot) + 1, n_columns)
        for block in self.blocks:
            values = q_value[block.q_entry][:, :, None] * k_value[block.k_entry][:, None, :]
            at = block.place
            if column is not None and n_columns > 1:
                at = (at.view(len(block.chosen), -1).long() * n_columns + column[block.chosen][:, None]).flatten()
            add_at(found.view(-1), at, values.flatten())
        return found[1:]


def _graded(q_count: Int[Tensor, " n"], k_count: Int[Tensor, " n"]) -> Iterator[_Rows]:
    """Pairs of rows by how busy they are, so that little is padded, in groups of about WORK_BYTES."""
    busiest, both = torch.maximum(q_count, k_count), torch.minimum(q_count, k_count) > 0
    grade = busiest.double().log2().ceil().long()
    for level in torch.unique(grade[both]).tolist():
        chosen = ((grade == level) & both).nonzero()[:, 0]
        width = int(busiest[chosen].max())
        for some in chosen.split(max(1, WORK_BYTES // (_CELL_BYTES * width * width))):
            yield _Rows(some, width)


def _by_document(codes: list[Tensor], docs: list[Tensor]) -> Iterator[Tensor]:
    """All codes of one document after another, wherever its rows stand."""
    pieces: dict[int, list[Tensor]] = {}
    for code, doc in zip(codes, docs, strict=True):
        numbers, counts = torch.unique_consecutive(doc, return_counts=True)
        rows = torch.split(code.view(len(doc), -1), counts.tolist())
        for number, some in zip(numbers.tolist(), rows, strict=True):
            pieces.setdefault(number, []).append(some.flatten())
    for some_pieces in pieces.values():
        yield torch.cat(some_pieces)


def _n_documents(places: list[Tensor], docs: list[Tensor], n: int) -> Int[Tensor, " pairs"]:
    """Documents in which each place occurs, from 1 to n."""
    n_docs = 1 + max((int(doc.max()) for doc in docs), default=0)
    seen = [
        (place.view(len(doc), -1).long() * n_docs + doc.to(place.device)[:, None]).flatten()
        for place, doc in zip(places, docs, strict=True)
    ]
    if not seen:
        return torch.zeros(n, dtype=torch.long)
    return torch.bincount(torch.unique(torch.cat(seen)) // n_docs, minlength=n + 1)[1:]
