"""Samples of many heads and conditions, resampled together: one bootstrap in the place of hundreds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from fra.statistics import stats
from fra.statistics.stats import ClusterMeans, Floats
from fra.tests.samples import Sample


class _Drawn(stats.Tail):
    """A test whose resamples were drawn together with other columns'."""

    def __init__(self, whole: stats.Tail, t: Floats, columns: slice) -> None:
        self.estimate, self.se = whole.estimate[columns], whole.se[columns]
        self._n_boot, self._sorted, self._t = whole._n_boot, {}, t[:, columns]

    def resamples(self, some: slice) -> Iterator[Floats]:
        yield self._t[:, some]


class Together:
    """Samples of equally many documents side by side: one sample, resampled once for all of them."""

    def __init__(self, samples: Sequence[Sample], rows: np.ndarray | slice, seed: int, n_boot: int) -> None:
        sums, counts = (np.hstack([getattr(s, part)[rows] for s in samples]) for part in ("sums", "counts"))
        self.means = ClusterMeans(sums, counts, seed=seed, n_boot=n_boot)
        ends = np.cumsum([0, *(s.sums.shape[1] for s in samples)])
        self.columns = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self._place = np.concatenate([[0], np.cumsum(self.means.testable)])
        self._t: dict[str, Floats] = {}
        self._tails: dict[tuple[str, int], _Drawn] = {}

    def tail(self, side: str, k: int) -> _Drawn:
        """The test `side` (an attribute of ClusterMeans) of the k-th sample."""
        if (side, k) not in self._tails:
            whole: stats.Tail = getattr(self.means, side)
            if side not in self._t:
                self._t[side] = np.concatenate(list(whole.resamples(slice(None))))
            own = slice(self._place[self.columns[k].start], self._place[self.columns[k].stop])
            self._tails[side, k] = _Drawn(whole, self._t[side], own)
        return self._tails[side, k]

    def part(self, k: int, moved: Floats | float = 0.0) -> Shifted:
        """The k-th sample, every effect of a candidate moved by a constant ([n_cand])."""
        return Shifted(self, k, moved)


class Shifted(ClusterMeans):
    """One of several samples that are resampled together, its effects moved.

    A constant on every effect moves estimate and bounds by as much and changes nothing else, so the sample as it is is
    asked at the bar moved back. (A factor on every effect would change nothing at all: the tests are studentised.)
    """

    def __init__(self, together: Together, k: int, moved: Floats | float) -> None:
        own = together.columns[k]
        whole = together.means
        self._together, self._k = together, k
        self.n_docs, self.seed, self.n_boot = whole.n_docs, whole.seed, whole.n_boot
        self.testable, self.se, self.n_live = whole.testable[own], whole.se[own], whole.n_live[own]
        self.constant = whole.constant[own]
        self.n_cand = len(self.testable)
        self.moved = np.broadcast_to(np.asarray(moved, dtype=np.float64), (self.n_cand,))
        self.estimate = whole.estimate[own] + self.moved
        self.sums, self.counts = whole.sums[:, own], whole.counts[:, own]  # as they are: bars are moved back

    @property
    def _above(self) -> stats.Tail:  # type: ignore[override]
        return self._together.tail("_above", self._k)

    @property
    def _below(self) -> stats.Tail:  # type: ignore[override]
        return self._together.tail("_below", self._k)

    @property
    def _unguarded_below(self) -> stats.Tail:  # type: ignore[override]
        return self._together.tail("_unguarded_below", self._k)

    def p_above(self, bar: float, simultaneous: bool = True) -> Floats:  # type: ignore[override]
        return super().p_above(bar - self.moved, simultaneous)

    def p_below(self, bar: float, simultaneous: bool = True) -> Floats:  # type: ignore[override]
        return super().p_below(bar - self.moved, simultaneous)

    def lower(self, level: float, simultaneous: bool = True) -> Floats:  # type: ignore[override]
        return super().lower(level, simultaneous) + self.moved

    def upper(self, level: float, simultaneous: bool = True) -> Floats:  # type: ignore[override]
        return super().upper(level, simultaneous) + self.moved
