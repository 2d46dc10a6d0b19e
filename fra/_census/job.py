"""One question to a census, what has been found of its answer, and how much memory may go into it; and the channels
that meet on stripes t - s = k, as a sorted list: far fewer than a table has cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from fra._census.corpus import Corpus
from fra._census.observe import Layer
from fra._census.tables import Kind, Where
from fra.core.blocks import add_at
from fra.core.meetings import Meetings
from fra.core.strongest import Strongest
from fra.errors import FraError

CensusReduce = Literal["sum", "abs", "max", "mean", "count", "contrast", "sensitivity", "mass"]
Source = tuple[CensusReduce, int]
"""A reduction and a head."""

_ROW_BYTES = 2 * 40
"""Of one channel in a result: head, ids, value, count, and as much again while they are ordered."""


@dataclass(frozen=True)
class Ask:
    """One question to a census."""

    reduces: tuple[CensusReduce, ...]
    n: int | None
    heads: tuple[int, ...]
    where: Where
    least: int
    documents: int = 1


def kind_of(source: Source) -> Kind:
    """What a table must hold for it: a mean is a sum until it is offered."""
    return "sum" if source[0] == "mean" else source[0]


class Job:
    """A question, the strongest channels so far of every source, and the budget."""

    def __init__(self, layer: Layer, corpus: Corpus, ask: Ask, memory_budget: int):
        self.layer, self.corpus, self.ask, self.memory_budget = layer, corpus, ask, memory_budget
        self.sources = {(name, head): self._source(name, head) for name in ask.reduces for head in ask.heads}
        """Of every reduction and head, whose numbers it has."""
        self.best = {source: Strongest(ask.n) for source in self.sources.values()}
        self._n_rows = 0
        offsets = sorted({offset for stripe in corpus.stripes for offset in stripe})
        self.offsets: list[int | None] = [None]
        """With rotation the stripes' offsets, whose position parts are made one by one."""
        if layer.rotary is not None and ask.where == "stripe":
            self.offsets = [k for k in offsets if k < (layer.weights.window or k + 1)] or [0]
        self.counted = self._must_count()
        """Whether counts of all channels are made; else values that are not zero are live, and counts of the strongest
        are left to the caller.
        """
        self.often: StripeChannels | None = None
        """Channels that meet in enough documents, where that was asked."""

    def _source(self, name: CensusReduce, head: int) -> Source:
        """Whose numbers, up to sign, are those of this reduction and head: counts are the same for every head, and
        where coefficients are positive and nothing rotates all terms of a channel have one sign.
        """
        if name == "count":
            return name, self.ask.heads[0]
        if name == "abs" and self.layer.rotary is None and not self.corpus.signed:
            return "sum", head
        return name, head

    def _must_count(self) -> bool:
        ask, live = self.ask, len(self.corpus.live)
        simple = all(name in ("sum", "abs", "count") for name in ask.reduces)
        few = ask.n is not None and ask.n * len(ask.heads) * len(ask.reduces) < live // 4
        return not (simple and few and ask.least == 1 and not self.corpus.signed)

    def refuse(self, n_rows: int) -> None:
        """Counts rows of the answer, and raises FraError where they are too many."""
        self._n_rows += n_rows
        if self._n_rows * _ROW_BYTES > self.memory_budget:
            raise FraError(
                f"more than {self._n_rows:,} live channels would take {self._n_rows * _ROW_BYTES:,} bytes and "
                f"memory_budget is {self.memory_budget:,}: pass n= for the strongest, or min_count=."
            )

    def head_groups(self, sources: Sequence[Source]) -> Iterator[list[int]]:
        """The heads, as many at a time as their directions take a quarter of the budget (one at least)."""
        heads = sorted({head for _, head in sources})
        of_one = 2 * len(self.corpus.live) * self.layer.d_head * self.corpus.value.itemsize
        at_once = max(1, self.memory_budget // 4 // of_one)
        for low in range(0, len(heads), at_once):
            yield heads[low : low + at_once]

    def width(self, column: int, most: int) -> int:
        """Key features at a time, where each takes `column` bytes, within the budget and `most`. Raises FraError where
        not one fits.
        """
        if column > self.memory_budget:
            raise FraError(
                f"memory_budget={self.memory_budget:,} bytes holds not even one key feature's column of "
                f"{len(self.corpus.live):,} channels: give at least {column:,}."
            )
        return max(1, min(most, self.memory_budget // column))

    def offer(
        self, source: Source, values: Num[Tensor, "rows k"], q_ids: Tensor, k_ids: Tensor, count: Tensor | None
    ) -> None:
        """A tile of one source's table."""
        if source[0] == "mean" and count is not None:
            values = values / count.clamp(min=1)
        counted = count if self.counted or source[0] == "count" else None
        q_code = q_ids * self.layer.d_sae  # int64: d_sae**2 passes 2**31 at 46 341
        self.best[source].offer_tile(values, q_code, k_ids, counted, self.ask.least)


def stripe_rows(corpus: Corpus, window: int | None) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Rows of the queries and of their keys on the stripes of every document, on the CPU."""
    q_rows, k_rows, starts = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)], corpus.row_start
    for doc, offsets in enumerate(corpus.stripes):
        first, stop = starts[doc], starts[doc + 1]
        for offset in offsets:
            if offset < (window or stop):
                q_rows.append(torch.arange(first + offset, stop))
                k_rows.append(torch.arange(first, stop - offset))
    return torch.cat(q_rows), torch.cat(k_rows)


def n_stripe_pairs(corpus: Corpus, window: int | None) -> int:
    """Pairs of entries that meet on the stripes."""
    per_row = corpus.entry_start.diff()
    q_row, k_row = stripe_rows(corpus, window)
    return int((per_row[q_row] * per_row[k_row]).sum())


class StripeChannels:
    """All channels that meet on the stripes of a corpus, in at least `floor` documents."""

    def __init__(self, layer: Layer, corpus: Corpus, floor: int = 0):
        self.layer, self.corpus = layer, corpus
        slots = torch.zeros(layer.d_sae, dtype=torch.long, device=corpus.device)
        slots[corpus.live] = torch.arange(len(corpus.live), device=corpus.device)
        self._slot = slots[corpus.feature.long()]
        q_row, k_row = stripe_rows(corpus, layer.weights.window)
        doc = torch.searchsorted(torch.tensor(corpus.row_start[:-1]), q_row, right=True) - 1
        self._found = Meetings(self._slot, corpus.entry_start, len(corpus.live), (q_row, k_row, doc), floor)
        self._offset = (q_row - k_row).to(corpus.device)
        self.q_slot, self.k_slot = self._found.q_slot, self._found.k_slot
        """Places among the live features: by query feature, then key feature."""

    @property
    def count(self) -> Int[Tensor, " channels"]:
        """Pairs (t, s) on the stripes at which each channel is live."""
        return self._found.count

    def values(
        self, kind: str, head: int, q_side: Float[Tensor, "live d_head"], k_side: Float[Tensor, "live d_head"]
    ) -> Float[Tensor, " channels"]:
        """Sums, absolute sums or maxima of one head over the stripes; the sides are the live features' directions.

        Single terms, not position parts times couplings: most channels meet once or twice, and picking both directions
        of a channel costs more than the few products of its block.
        """
        corpus, rotary = self.corpus, self.layer.rotary
        found = corpus.value.new_full((len(self.q_slot) + 1,), -torch.inf if kind == "max" else 0.0)
        q_value, k_value = corpus.value, corpus.value
        if corpus.gain_q is not None and corpus.gain_k is not None:
            row = torch.arange(len(corpus.per_row), device=corpus.device)
            row = row.repeat_interleave(corpus.per_row.long(), output_size=len(corpus.value))
            q_value, k_value = q_value * corpus.gain_q[head, row], k_value * corpus.gain_k[head, row]
        if rotary is not None:
            k_side = rotary.rotate(k_side, torch.zeros(len(k_side), dtype=torch.long, device=k_side.device))
        for block in self._found.blocks:
            q = q_side[self._slot[block.q_entry]] * q_value[block.q_entry][..., None]
            k = k_side[self._slot[block.k_entry]] * k_value[block.k_entry][..., None]
            if rotary is not None:
                q = rotary.rotate(q.transpose(0, 1), self._offset[block.chosen]).transpose(0, 1)
            terms = (q @ k.mT).flatten()
            if kind == "max":
                found.scatter_reduce_(0, block.place.long(), terms, "amax")
            else:
                add_at(found, block.place, terms.abs_() if kind == "abs" else terms)
        return found[1:]
