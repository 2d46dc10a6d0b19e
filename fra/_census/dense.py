"""Tables over all live features, block by block of key features, scanned for the strongest channels.

Position parts times couplings where terms have them, single terms elsewhere. Features stand in the order of
`fra._census.bounds.Staircase`, and of a block only the query features are taken that can still have a channel among the
strongest; the bounds of key features fall from block to block, until nothing is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from fra._census.bounds import Staircase, staircase
from fra._census.job import Job, Source, kind_of
from fra._census.tables import Kind, Tables, Where, count_dtype, shared

_TABLE_BYTES = 1 << 24
"""Of one position part: few enough that it is still in a cache when it is multiplied, head by head."""
COLUMNS = 128, 1024
"""Key features at a time, at least and at most, where a table costs little to begin."""
TERM_COLUMNS = 256
"""At least, where every block meets all documents anew."""
_STEP = 0.5
"""A block ends where so few of its first column's query features can still reach a threshold."""
SCANNED_AT_ONCE = 1 << 19
"""Numbers in one tile of a table."""
FIRST_SCANNED = 1 << 15
"""Numbers in the first, after which a threshold stands."""
SAMPLED_FEATURES = 256


@dataclass(frozen=True)
class _Laid:
    """Some sources with the live features in the order of their staircase."""

    sources: list[Source]
    heads: list[int]
    steps: Staircase
    tables: Tables
    q_side: Float[Tensor, "heads live d_head"]
    k_side: Float[Tensor, "heads live d_head"]

    def rows(self, column: int, job: Job, among: Sequence[Source]) -> int:
        """Query features that any of these sources needs from this key feature on."""
        return max((self.steps.rows(source, column, job.best[source]) for source in among), default=0)

    def columns(self, low: int, rows: int, job: Job, least: int, most: int) -> int:
        """Where a block should end that begins at `low` with so many rows."""
        width, end = least, min(low + most, len(self.tables.k_ids))
        while low + width < end and self.rows(low + width, job, self.sources) >= _STEP * rows:
            width *= 2
        return min(low + width, end)


class DenseScan:
    """Goes over tables for one question."""

    def __init__(self, job: Job):
        self.job, self.layer, self.corpus, self.where = job, job.layer, job.corpus, job.ask.where

    def over_tables(self, sources: Sequence[Source], wide: bool) -> None:
        """Position parts times couplings. wide: for tables that heads do not share, which are made, and dropped, one
        after another.
        """
        job, size = self.job, self.corpus.value.itemsize
        count_size = job.counted * count_dtype(self.corpus).itemsize
        for heads in job.head_groups(sources):
            mine = [source for source in sources if source[1] in heads]
            laid = self._laid(mine, heads, terms=False)
            n_tables = 1 if wide else len({kind_of(source) for source in mine})
            work = self.corpus.value.new_empty(0)
            low, n_live = 0, len(self.corpus.live)
            while rows := laid.rows(low, job, mine):
                most = job.width(rows * (n_tables * len(job.offsets) * size + count_size), n_live)
                if not wide:
                    fits = max(COLUMNS[0], _TABLE_BYTES // (rows * size) // 64 * 64)
                    most = laid.columns(low, rows, job, min(most, COLUMNS[0]), min(most, fits, COLUMNS[1])) - low
                keys = slice(low, min(low + most, n_live))
                width = keys.stop - low
                if len(work) < SCANNED_AT_ONCE + width:
                    work = self.corpus.value.new_empty(SCANNED_AT_ONCE + width)
                count = self._count(laid.tables, keys, rows, len(mine))
                for batch in [[source] for source in mine] if wide else [mine]:
                    self._multiply(laid, batch, keys, count, work)
                low = keys.stop
            laid.tables.check()

    def _multiply(self, laid: _Laid, batch: Sequence[Source], keys: slice, count: Tensor | None, work: Tensor) -> None:
        job, whole, rows = self.job, _Kept(laid.tables, self.where, keys), laid.rows(keys.start, self.job, batch)
        for source in batch:
            whole.need(kind_of(source), laid.rows(keys.start, job, [source]))
        for tile in _tiles(rows, keys.stop - keys.start):
            for source in batch:
                # Thresholds rise on the way.
                mine = slice(tile.start, min(tile.stop, laid.rows(keys.start, job, [source])))
                if mine.start < mine.stop:
                    number = None if count is None else count[mine]
                    place = laid.heads.index(source[1])
                    if source[0] == "count":
                        values = number = whole("count", source[1], None)[mine] if number is None else number
                    else:
                        k_side = laid.k_side[place][keys]
                        values = self._multiplied(whole, source, mine, laid.q_side[place], k_side, work)
                    job.offer(source, values, laid.tables.q_ids[mine], laid.tables.k_ids[keys], number)

    def over_terms(self, sources: Sequence[Source]) -> None:
        """What has no position part: tables of several heads at once, made from single terms."""
        job, size = self.job, self.corpus.value.itemsize
        counts = job.counted * count_dtype(self.corpus).itemsize
        for heads in job.head_groups(sources):
            mine = [source for source in sources if source[1] in heads]
            laid = self._laid(mine, heads, terms=True)
            low, n_live = 0, len(self.corpus.live)
            while rows := laid.rows(low, job, mine):
                # The heads' tables; a document's own, and the cells it goes to; what is added up; counts.
                one, more = rows * size, rows * (3 * size + 16 + counts)
                # Every block of key features meets query entries anew: better few heads than narrow blocks.
                stop = laid.columns(low, rows, job, TERM_COLUMNS, n_live)
                at_once = (job.memory_budget // 4 // (stop - low) - more) // one
                at_once = max(1, min(len(mine), at_once))
                keys = slice(low, min(low + job.width(at_once * one + more, stop - low), n_live))
                count = self._count(laid.tables, keys, rows, len(mine))
                for first in range(0, len(mine), at_once):
                    self._add_up(laid, mine[first : first + at_once], keys, count)
                low = keys.stop
            laid.tables.check()

    def _add_up(self, laid: _Laid, some: Sequence[Source], keys: slice, count: Tensor | None) -> None:
        job = self.job
        rows = laid.rows(keys.start, job, some)
        if not rows:
            return
        sides = {head: (laid.q_side[at], laid.k_side[at]) for at, head in enumerate(laid.heads)}
        found = laid.tables.terms([(kind_of(source), source[1]) for source in some], self.where, keys, sides, rows)
        for tile in _tiles(rows, keys.stop - keys.start):
            for source in some:
                mine = slice(tile.start, min(tile.stop, laid.rows(keys.start, job, [source])))
                if mine.start < mine.stop:
                    values, number = found[kind_of(source), source[1]][mine], None if count is None else count[mine]
                    job.offer(source, values, laid.tables.q_ids[mine], laid.tables.k_ids[keys], number)

    def _count(self, tables: Tables, keys: slice, rows: int, n_sources: int) -> Tensor | None:
        """Counts of a block of key features, where they are needed; refuses where all of them would not fit."""
        job = self.job
        if not job.counted:
            return None
        count = tables.positions("count", self.where, None, keys, n_first=rows)
        if job.often is not None:
            q, k = job.often.q_slot, job.often.k_slot
            here = (k >= keys.start) & (k < keys.stop)
            often = torch.zeros_like(count)
            often[q[here], k[here] - keys.start] = 1
            count = count * often
        if job.ask.n is None:
            job.refuse(int((count >= job.ask.least).sum()) * n_sources)
        return count

    def _laid(self, sources: list[Source], heads: list[int], terms: bool) -> _Laid:
        live, layer = self.corpus.live, self.layer
        q_side, k_side = layer.both_directions(heads, live)
        norms = [dict(zip(heads, side.norm(dim=-1), strict=True)) for side in (q_side, k_side)]
        steps = staircase(self.corpus, sources, *norms)
        if self.job.often is None:
            self._expect(sources, heads, steps, (q_side, k_side), terms)
            steps.arrange(self.job.best)
            for side, order in ((q_side, steps.q_order), (k_side, steps.k_order)):
                for directions in side:  # one head after another: no second copy of all of them
                    directions.copy_(directions[order])
        else:  # pairs that meet often enough are numbered by the features as they stand
            steps.leave_in_place()
        return _Laid(
            sources, heads, steps, Tables(layer, self.corpus, live[steps.q_order], live[steps.k_order]), q_side, k_side
        )

    def _expect(
        self,
        sources: Sequence[Source],
        heads: Sequence[int],
        steps: Staircase,
        sides: tuple[Tensor, Tensor],
        terms: bool,
    ) -> None:
        """Sets thresholds that the n strongest are known to reach: those of the channels with the largest bounds."""
        job, live, every = self.job, self.corpus.live, slice(0, SAMPLED_FEATURES)
        n = job.ask.n
        if n is None or n > SAMPLED_FEATURES**2 // 16 or len(live) < 4 * SAMPLED_FEATURES:
            return
        known = [source for source in sources if steps.bounded(source) and (terms or self._shared(source))]
        if not known:
            return
        q, k = steps.q_order[every], steps.k_order[every]
        tables = Tables(self.layer, self.corpus, live[q], live[k])
        count = self._count(tables, every, SAMPLED_FEATURES, 0)
        found: Mapping[tuple[Kind, int], Tensor] = {}
        if terms:
            of_heads = {head: (sides[0][at][q], sides[1][at][k]) for at, head in enumerate(heads)}
            found = tables.terms([(kind_of(source), source[1]) for source in known], self.where, every, of_heads)
        whole = _Kept(tables, self.where, every)
        work = self.corpus.value.new_empty(SAMPLED_FEATURES**2)
        for source in known:
            place = heads.index(source[1])
            if terms:
                values = found[kind_of(source), source[1]]
            elif source[0] == "count":
                values = whole("count", source[1], None)
            else:
                values = self._multiplied(whole, source, every, sides[0][place][q], sides[1][place][k], work)
            if source[0] == "mean" and count is not None:
                values = values / count.clamp(min=1)
            values = values.abs()
            job.best[source].expect_some(values if count is None else values.masked_fill(count < job.ask.least, -1))
        tables.check()

    def _shared(self, source: Source) -> bool:
        return shared(kind_of(source), self.corpus)

    def _multiplied(
        self,
        whole: _Kept,
        source: Source,
        rows: slice,
        q_side: Float[Tensor, "live d_head"],
        k_side: Float[Tensor, "k d_head"],
        work: Float[Tensor, " work"],
    ) -> Float[Tensor, "rows k"]:
        """Position part times coupling."""
        kind, rotary, total = kind_of(source), self.layer.rotary, None
        into = work[: (rows.stop - rows.start) * len(k_side)].view(-1, len(k_side))
        for offset in self.job.offsets:
            q, k = q_side[rows], k_side
            if rotary is not None and offset is not None:
                q = rotary.rotate(q, torch.full((len(q),), offset, device=q.device))
                k = rotary.rotate(k, torch.zeros(len(k), dtype=torch.long, device=k.device))
            coupling = torch.mm(q, k.mT, out=into)
            terms = (coupling.abs_() if kind == "abs" else coupling).mul_(whole(kind, source[1], offset)[rows])
            if len(self.job.offsets) > 1:
                total = terms.clone() if total is None else total.add_(terms)
        return into if total is None else total


class _Kept:
    """Position parts of one block of key features: made when first asked for, kept where heads share them."""

    def __init__(self, tables: Tables, where: Where, keys: slice):
        self._tables, self._where, self._keys = tables, where, keys
        self._rows: dict[Kind, int] = {}
        self._found: dict[tuple[Kind, int | None, int | None], Tensor] = {}

    def _same(self, kind: Kind) -> Kind:
        """Whose position part it has: where no value is negative, sums and absolute sums have one."""
        return "sum" if kind == "abs" and not self._tables.corpus.signed else kind

    def need(self, kind: Kind, rows: int) -> None:
        """Says beforehand that so many query features will do; else all are taken."""
        self._rows[self._same(kind)] = max(self._rows.get(self._same(kind), 0), rows)

    def __call__(self, kind: Kind, head: int, offset: int | None) -> Num[Tensor, "q k"]:
        kind = self._same(kind)
        key = (kind, None if shared(kind, self._tables.corpus) else head, offset)
        if key not in self._found:
            rows = self._rows.get(kind)
            self._found[key] = self._tables.positions(kind, self._where, head, self._keys, offset, rows)
        return self._found[key]


def _tiles(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Some rows at a time, a few at first."""
    low, width = 0, max(1, FIRST_SCANNED // n_columns)
    while low < n_rows:
        yield slice(low, min(low + width, n_rows))
        low, width = low + width, max(1, SCANNED_AT_ONCE // n_columns)
