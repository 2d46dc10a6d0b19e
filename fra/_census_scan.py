"""The strongest channels of a corpus by several reductions and heads in one pass, within a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from fra._census_blocks import add_at
from fra._census_corpus import Corpus
from fra._census_observe import Layer
from fra._census_pairs import PAIR_BYTES
from fra._census_stripes import StripeChannels, n_stripe_pairs
from fra._census_tables import Kind, Tables, Where, count_dtype, shared
from fra._strongest import Strongest
from fra.errors import FraError

CensusReduce = Literal["sum", "abs", "max", "mean", "count", "contrast", "sensitivity", "mass"]
Source = tuple[CensusReduce, int]
"""A reduction and a head."""

_ROW_BYTES = 2 * 40
"""Of one channel in a result: head, ids, value, count, and as much again while they are ordered."""
_TABLE_BYTES = 1 << 24
"""Of one position part: few enough that it is still in a cache when it is multiplied, head by head."""
_COLUMNS = 128, 256
"""Key features at a time, at least and at most, where a table costs little to begin."""
_SCANNED_AT_ONCE = 1 << 19
"""Numbers in one tile of a table."""
_FIRST_SCANNED = 1 << 15
"""Numbers in the first, after which a threshold stands."""
_MOST_OFFSETS = 64
_SAMPLED_FEATURES = 256


@dataclass(frozen=True)
class Ask:
    """One question to a census."""

    reduces: tuple[CensusReduce, ...]
    n: int | None
    heads: tuple[int, ...]
    where: Where
    least: int
    documents: int = 1


class Scan:
    """Answers one question."""

    def __init__(self, layer: Layer, corpus: Corpus, ask: Ask, memory_budget: int):
        self.layer, self.corpus, self.ask, self.memory_budget = layer, corpus, ask, memory_budget
        self.sources = {(name, head): self._source(name, head) for name in ask.reduces for head in ask.heads}
        self._best = {source: Strongest(ask.n) for source in self.sources.values()}
        self._n_rows = 0
        offsets = sorted({offset for stripe in corpus.stripes for offset in stripe})
        self._offsets: list[int | None] = [None]
        if layer.rotary is not None and ask.where == "stripe":
            self._offsets = [k for k in offsets if k < (layer.weights.window or k + 1)] or [0]
        self.counted = self._must_count()
        """Whether counts of all channels are made; else values that are not zero are live, and counts of the strongest
        are left to the caller.
        """
        self._often = self._in_many_documents() if ask.documents > 1 else None

    def run(self) -> Mapping[Source, Strongest]:
        """The strongest of every source."""
        if self.ask.where == "stripe" and (self._often is not None or self._few_pairs()):
            self.counted = True
            self._over_channels()
        else:
            dense = [source for source in self._best if self._has_position_part(source)]
            narrow = [source for source in dense if shared(self._kind(source), self.corpus)]
            wide = [source for source in dense if source not in narrow]
            for sources in (narrow, wide):
                if sources:
                    self._over_tables(sources, wide=sources is wide)
            if len(dense) < len(self._best):
                self._over_terms([source for source in self._best if source not in dense])
        return self._best

    def _in_many_documents(self) -> StripeChannels:
        """Channels that meet on the stripes of enough documents."""
        needed = PAIR_BYTES * n_stripe_pairs(self.corpus, self.layer.weights.window)
        if needed > self.memory_budget:
            raise FraError(
                f"to count documents on the stripes takes {needed:,} bytes and memory_budget is "
                f"{self.memory_budget:,}: give more, or leave min_documents out."
            )
        self.counted = True
        return StripeChannels(self.layer, self.corpus, self.ask.documents)

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
        simple = all(name in ("sum", "abs") for name in ask.reduces)
        few = ask.n is not None and ask.n * len(ask.heads) * len(ask.reduces) < live // 4
        return not (simple and few and ask.least == 1 and not self.corpus.signed)

    @staticmethod
    def _kind(source: Source) -> Kind:
        return "sum" if source[0] == "mean" else source[0]

    def _has_position_part(self, source: Source) -> bool:
        kind = self._kind(source)
        if kind == "count":
            return True
        if self.layer.rotary is not None:
            return self.ask.where == "stripe" and kind in ("sum", "abs") and len(self._offsets) <= _MOST_OFFSETS
        return kind not in ("max", "mass")

    def _few_pairs(self) -> bool:
        """Whether it is cheaper to sort out the channels on the stripes than to make tables of all live ones."""
        n_pairs = n_stripe_pairs(self.corpus, self.layer.weights.window)
        n_live, n_heads = len(self.corpus.live), len(self.ask.heads)
        if n_pairs * (PAIR_BYTES + 4 * n_heads) > self.memory_budget // 2:
            return False
        # Nanoseconds, about, of one CPU core: what matters is which is larger by far.
        sparse = n_pairs * (60 + 8 * n_heads)
        dense = len(self._offsets) * n_live * (0.25 * len(self.corpus.feature) + 1.7 * n_live * n_heads)
        return sparse < dense or any(not self._has_position_part(source) for source in self._best)

    def _refuse(self, n_rows: int) -> None:
        self._n_rows += n_rows
        if self._n_rows * _ROW_BYTES > self.memory_budget:
            raise FraError(
                f"more than {self._n_rows:,} live channels would take {self._n_rows * _ROW_BYTES:,} bytes and "
                f"memory_budget is {self.memory_budget:,}: pass n= for the strongest, or min_count=."
            )

    def _over_channels(self) -> None:
        """On stripes, one channel after another, of a sorted list."""
        found, live = self._often or StripeChannels(self.layer, self.corpus), self.corpus.live
        if self.ask.n is None:
            self._refuse(int((found.count >= self.ask.least).sum()) * len(self.sources))
        code, at = live[found.q_slot] * self.layer.d_sae + live[found.k_slot], found.count.new_zeros(1)
        count, least = found.count[None], self.ask.least
        for heads in self._head_groups(list(self._best)):
            q_side = self.layer.all_directions("query", heads, live)
            k_side = self.layer.all_directions("key", heads, live)
            for name, head in self._best:
                if head not in heads:
                    continue
                if name == "count":
                    values: Tensor = count
                else:
                    place = heads.index(head)
                    values = found.values(self._kind((name, head)), head, q_side[place], k_side[place])[None]
                    values = values / count if name == "mean" else values
                self._best[name, head].offer_tile(values, at, code, count, least)

    def _head_groups(self, sources: Sequence[Source]) -> Iterator[list[int]]:
        """The heads, as many at a time as their directions take a quarter of the budget (one at least)."""
        heads = sorted({head for _, head in sources})
        of_one = 2 * len(self.corpus.live) * self.layer.d_head * self.corpus.value.itemsize
        at_once = max(1, self.memory_budget // 4 // of_one)
        for low in range(0, len(heads), at_once):
            yield heads[low : low + at_once]

    def _width(self, column: int, most: int) -> int:
        """Key features at a time, where each takes `column` bytes, within the budget and `most`."""
        if column > self.memory_budget:
            raise FraError(
                f"memory_budget={self.memory_budget:,} bytes holds not even one key feature's column of "
                f"{len(self.corpus.live):,} channels: give at least {column:,}."
            )
        return max(1, min(most, self.memory_budget // column))

    def _table_width(self, sources: Sequence[Source], wide: bool) -> int:
        n_live, size = len(self.corpus.live), self.corpus.value.itemsize
        # Position parts of every reduction, or one at a time.
        n_tables = 1 if wide else len({self._kind(source) for source in sources})
        cell = n_tables * len(self._offsets) * size + self.counted * count_dtype(self.corpus).itemsize
        least, best = _COLUMNS
        most = n_live if wide else max(least, min(best, _TABLE_BYTES // (n_live * size) // 64 * 64))
        return self._width(n_live * cell, most)

    def _over_terms(self, sources: Sequence[Source]) -> None:
        """What has no position part: tables of several heads at once, made from single terms."""
        live, size = self.corpus.live, self.corpus.value.itemsize
        tables = Tables(self.layer, self.corpus, live, live)
        # The heads' tables; a document's own, and the cells it goes to; what is added up; counts.
        one, more = len(live) * size, len(live) * (3 * size + 16 + self.counted * count_dtype(self.corpus).itemsize)
        # Every block of key features meets all query entries anew: better few heads than narrow blocks.
        at_once = max(1, min(len(sources), (self.memory_budget // 4 // len(live) - more) // one))
        for first in range(0, len(sources), at_once):
            some = sources[first : first + at_once]
            width = self._width(len(some) * one + more, len(live))
            for low in range(0, len(live), width):
                keys = slice(low, min(low + width, len(live)))
                count = self._count(tables, keys, len(some))
                found = tables.terms([(self._kind(source), source[1]) for source in some], self.ask.where, keys)
                for tile in _tiles(len(live), keys.stop - keys.start):
                    for source in some:
                        values = found[self._kind(source), source[1]][tile]
                        self._offer(source, values, live[tile], live[keys], None if count is None else count[tile])
        tables.check()

    def _count(self, tables: Tables, keys: slice, n_sources: int, wanted: bool = False) -> Tensor | None:
        """Counts of a block of key features, where they are needed; refuses where all of them would not fit."""
        if not (self.counted or wanted):
            return None
        count = tables.positions("count", self.ask.where, None, keys)
        if self._often is not None:
            q, k = self._often.q_slot, self._often.k_slot
            here = (k >= keys.start) & (k < keys.stop)
            often = torch.zeros_like(count)
            often[q[here], k[here] - keys.start] = 1
            count = count * often
        if self.ask.n is None:
            self._refuse(int((count >= self.ask.least).sum()) * n_sources)
        return count

    def _over_tables(self, sources: Sequence[Source], wide: bool) -> None:
        """Position parts times couplings of all live channels, block by block of key features."""
        live = self.corpus.live
        tables, width = Tables(self.layer, self.corpus, live, live), self._table_width(sources, wide)
        work = self.corpus.value.new_empty(_SCANNED_AT_ONCE + width)
        for heads in self._head_groups(sources):
            mine = [source for source in sources if source[1] in heads]
            q_side = self.layer.all_directions("query", heads, live)
            self._expect(mine, heads, q_side)
            for low in range(0, len(live), width):
                keys = slice(low, min(low + width, len(live)))
                count = self._count(tables, keys, len(mine), any(name == "count" for name, _ in mine))
                k_side = self.layer.all_directions("key", heads, live[keys])
                # Tables that heads do not share are made, and dropped, one after another.
                for batch in [[source] for source in mine] if wide else [mine]:
                    whole = _Kept(tables, self.ask.where, keys)
                    for tile in _tiles(len(live), keys.stop - low):
                        number = None if count is None else count[tile]
                        for source in batch:
                            place = heads.index(source[1])
                            if source[0] == "count":
                                assert number is not None
                                values = number
                            else:
                                values = self._multiplied(whole, source, tile, q_side[place], k_side[place], work)
                            self._offer(source, values, live[tile], live[keys], number)
        tables.check()

    def _expect(self, sources: Sequence[Source], heads: Sequence[int], q_side: Tensor) -> None:
        """Sets thresholds that the n strongest are known to reach: those of the busiest features' channels alone."""
        n, live, at_once = self.ask.n, self.corpus.live, _SAMPLED_FEATURES
        if (
            self._often is not None
            or n is None
            or n > at_once**2 // 16
            or len(live) < 4 * at_once
            or self.corpus.device.type != "cpu"
        ):
            return
        activity = self.corpus.value.new_zeros(self.layer.d_sae)
        add_at(activity, self.corpus.feature, self.corpus.value.abs())
        busiest = activity[live].topk(at_once).indices.sort().values
        ids = live[busiest]
        tables, every = Tables(self.layer, self.corpus, ids, ids), slice(0, at_once)
        whole, k_side = _Kept(tables, self.ask.where, every), self.layer.all_directions("key", heads, ids)
        count = tables.positions("count", self.ask.where, None, every)
        work = self.corpus.value.new_empty(at_once**2)
        for source in sources:
            if source[0] == "count":
                values = count
            elif shared(self._kind(source), self.corpus):
                place = heads.index(source[1])
                values = self._multiplied(whole, source, every, q_side[place][busiest], k_side[place], work)
                values = values / count.clamp(min=1) if source[0] == "mean" else values.clone()
            else:
                continue
            self._best[source].expect_some(values.abs().masked_fill(count < self.ask.least, -1.0))

    def _multiplied(
        self,
        whole: _Kept,
        source: Source,
        tile: slice,
        q_side: Float[Tensor, "live d_head"],
        k_side: Float[Tensor, "k d_head"],
        work: Float[Tensor, " work"],
    ) -> Float[Tensor, "rows k"]:
        """Position part times coupling."""
        kind, rotary, total = self._kind(source), self.layer.rotary, None
        into = work[: (tile.stop - tile.start) * len(k_side)].view(-1, len(k_side))
        for offset in self._offsets:
            q, k = q_side[tile], k_side
            if rotary is not None and offset is not None:
                q = rotary.rotate(q, torch.full((len(q),), offset, device=q.device))
                k = rotary.rotate(k, torch.zeros(len(k), dtype=torch.long, device=k.device))
            coupling = torch.mm(q, k.mT, out=into)
            terms = (coupling.abs_() if kind == "abs" else coupling).mul_(whole(kind, source[1], offset)[tile])
            if len(self._offsets) > 1:
                total = terms.clone() if total is None else total.add_(terms)
        return into if total is None else total

    def _offer(
        self, source: Source, values: Num[Tensor, "rows k"], q_ids: Tensor, k_ids: Tensor, count: Tensor | None
    ) -> None:
        if source[0] == "mean" and count is not None:
            values = values / count.clamp(min=1)
        counted = count if self.counted or source[0] == "count" else None
        q_code = q_ids * self.layer.d_sae  # int64: d_sae**2 passes 2**31 at 46 341
        self._best[source].offer_tile(values, q_code, k_ids, counted, self.ask.least)


class _Kept:
    """Position parts of one block of key features: made when first asked for, kept where heads share them."""

    def __init__(self, tables: Tables, where: Where, keys: slice):
        self._tables, self._where, self._keys = tables, where, keys
        self._found: dict[tuple[Kind, int | None, int | None], Tensor] = {}

    def __call__(self, kind: Kind, head: int, offset: int | None) -> Tensor:
        of = None if shared(kind, self._tables.corpus) else head
        kind = "sum" if kind == "abs" and not self._tables.corpus.signed else kind
        key = (kind, of, offset)
        if key not in self._found:
            self._found[key] = self._tables.positions(kind, self._where, head, self._keys, offset)
        return self._found[key]


def _tiles(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Some rows at a time, a few at first."""
    low, width = 0, max(1, _FIRST_SCANNED // n_columns)
    while low < n_rows:
        yield slice(low, min(low + width, n_rows))
        low, width = low + width, max(1, _SCANNED_AT_ONCE // n_columns)
