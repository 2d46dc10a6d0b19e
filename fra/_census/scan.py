"""The strongest channels of a corpus by several reductions and heads in one pass, within a budget of memory."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fra._census.corpus import Corpus
from fra._census.dense import DenseScan
from fra._census.job import Ask, Job, Source, StripeChannels, kind_of, n_stripe_pairs
from fra._census.observe import Layer
from fra._census.tables import shared
from fra.core.meetings import PAIR_BYTES
from fra.core.strongest import Strongest
from fra.errors import FraError

_MOST_OFFSETS = 64


class Scan:
    """Answers one question."""

    def __init__(self, layer: Layer, corpus: Corpus, ask: Ask, memory_budget: int):
        self.layer, self.corpus, self.ask = layer, corpus, ask
        self.job = Job(layer, corpus, ask, memory_budget)
        if ask.documents > 1:
            self.job.often, self.job.counted = self._in_many_documents(), True

    def run(self) -> Mapping[Source, Strongest]:
        """The strongest of every source."""
        job = self.job
        if self.ask.where == "stripe" and (job.often is not None or self.few_pairs()):
            job.counted = True
            self._over_channels()
        else:
            dense, scan = [source for source in job.best if self._has_position_part(source)], DenseScan(job)
            narrow = [source for source in dense if shared(kind_of(source), self.corpus)]
            wide = [source for source in dense if source not in narrow]
            for sources in (narrow, wide):
                if sources:
                    scan.over_tables(sources, wide=sources is wide)
            if len(dense) < len(job.best):
                scan.over_terms([source for source in job.best if source not in dense])
        return job.best

    def _in_many_documents(self) -> StripeChannels:
        """Channels that meet on the stripes of enough documents."""
        needed = PAIR_BYTES * n_stripe_pairs(self.corpus, self.layer.weights.window)
        if needed > self.job.memory_budget:
            raise FraError(
                f"to count documents on the stripes takes {needed:,} bytes and memory_budget is "
                f"{self.job.memory_budget:,}: give more, or leave min_documents out."
            )
        return StripeChannels(self.layer, self.corpus, self.ask.documents)

    def _has_position_part(self, source: Source) -> bool:
        kind = kind_of(source)
        if kind == "count":
            return True
        if self.layer.rotary is not None:
            return self.ask.where == "stripe" and kind in ("sum", "abs") and len(self.job.offsets) <= _MOST_OFFSETS
        return kind not in ("max", "mass")

    def few_pairs(self) -> bool:
        """Whether it is cheaper to sort out the channels on the stripes than to make tables of all live ones."""
        n_pairs = n_stripe_pairs(self.corpus, self.layer.weights.window)
        n_live, n_heads = len(self.corpus.live), len(self.ask.heads)
        if n_pairs * (PAIR_BYTES + 4 * n_heads) > self.job.memory_budget // 2:
            return False
        # Nanoseconds, about, of one CPU core: what matters is which is larger by far.
        sparse = n_pairs * (60 + 8 * n_heads)
        dense = len(self.job.offsets) * n_live * (0.25 * len(self.corpus.feature) + 1.7 * n_live * n_heads)
        return sparse < dense or any(not self._has_position_part(source) for source in self.job.best)

    def _over_channels(self) -> None:
        """On stripes, one channel after another, of a sorted list."""
        job, live = self.job, self.corpus.live
        found = job.often or StripeChannels(self.layer, self.corpus)
        if self.ask.n is None:
            job.refuse(int((found.count >= self.ask.least).sum()) * len(job.sources))
        code, at = live[found.q_slot] * self.layer.d_sae + live[found.k_slot], found.count.new_zeros(1)
        count, least = found.count[None], self.ask.least
        for heads in job.head_groups(list(job.best)):
            q_side, k_side = self.layer.both_directions(heads, live)
            for name, head in job.best:
                if head not in heads:
                    continue
                if name == "count":
                    values: Tensor = count
                else:
                    place = heads.index(head)
                    values = found.values(kind_of((name, head)), head, q_side[place], k_side[place])[None]
                    values = values / count if name == "mean" else values
                job.best[name, head].offer_tile(values, at, code, count, least)
