"""A sample of documents under several training runs: both vary, and both are in the interval."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats as sps

from fra.statistics import stats
from fra.statistics.stats import Floats

_QUANTILES_CELLS = 400
"""Points of the distribution of a variance, for power."""


class Crossed:
    """The mean over runs of a ratio mean over sources: E = mean_r (sum_s sums[s, r] / sum_s counts[s, r]).

    Sources (of text) and runs (of a training, with its own first weights, order of data and controls) are two samples,
    crossed. With m_s the margin of the studentised bootstrap of the sources for the mean over runs, and m_r =
    t_{R-1} sd_r(E_r) / sqrt(R) that of the runs, the bound lies sqrt(m_s^2 + m_r^2) from the estimate: Howe (1974, JASA
    69) for a sum of two means, which errs towards too wide for any two variances (its square is at least that of
    Cochran and Cox's margin), and counts what is peculiar to a source in a run in both. Runs are taken to be normal:
    three of them cannot show otherwise. With one run there is no bound.

    Parameters
    ----------
    sums, counts: [n_sources, n_runs]. seed, n_boot: of the bootstrap.

    """

    n_cand = 1

    def __init__(self, sums: ArrayLike, counts: ArrayLike, *, seed: int, n_boot: int) -> None:
        s, n = (np.asarray(each, dtype=np.float64) for each in (sums, counts))
        self.n_docs, self.n_runs = s.shape
        with np.errstate(divide="ignore", invalid="ignore"):
            self.by_run: Floats = s.sum(0) / n.sum(0)
            whole = n.sum(0)
            self.sources = stats.ClusterMeans((s / whole).mean(1), (n / whole).mean(1), seed=seed, n_boot=n_boot)
        """The mean over runs, sources alone varying."""
        self._n_boot = n_boot

    @property
    def estimate(self) -> float:
        """The mean over runs; NaN where it cannot be tested."""
        return float(self.sources.estimate[0])

    @property
    def run_error(self) -> float:
        """Standard error of the mean over runs, by the runs alone; NaN with one."""
        return float(self.by_run.std(ddof=1) / np.sqrt(self.n_runs)) if self.n_runs > 1 else float("nan")

    def lower(self, level: ArrayLike | float, simultaneous: bool = False) -> Floats:
        """[1] lower bound, one-sided; -inf with one run."""
        return np.array([self._lower(self._steps(level), self.sources)])

    def upper(self, level: ArrayLike | float, simultaneous: bool = False) -> Floats:
        """[1] upper bound."""
        return np.array([-self._lower(self._steps(level), self._turned)])

    def p_above(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "E <= bar": the smallest level whose lower bound lies above the bar."""
        return np.array([self._p(float(bar), self.sources)])

    def p_below(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "E >= bar"."""
        return np.array([self._p(-float(bar), self._turned)])

    def power(self, worth: float, level: float, above: bool = True, simultaneous: bool = False) -> Floats:
        """[1] the chance that an effect `worth` beyond a bar is told from it: the estimate normal with both variances,
        the runs' own estimate of theirs as scattered as that of so few is. The variance between runs is taken at its
        median-unbiased estimate: of two degrees of freedom the plain one is too small in five cases of eight.
        """
        if self.n_runs < 2 or not self.sources.testable[0]:
            return np.zeros(1)
        sample = self.sources if above else self._turned
        margin = float(sample.estimate[0] - sample.lower(level, False)[0])
        free = self.n_runs - 1
        seen = sps.chi2.ppf((np.arange(_QUANTILES_CELLS) + 0.5) / _QUANTILES_CELLS, free) / free
        between = self.run_error / np.sqrt(sps.chi2.median(free) / free)
        needed = np.sqrt(margin**2 + (sps.t.isf(level, free) * between) ** 2 * seen)
        error = float(np.hypot(sample.se[0], between))
        return np.array([float(sps.norm.sf((needed - worth) / error).mean())])

    @cached_property
    def _turned(self) -> stats.ClusterMeans:
        return self.sources.turned()

    def _steps(self, level: ArrayLike | float) -> int:
        """The level in units of the smallest p that the bootstrap can give."""
        return int(np.floor(float(np.ravel(level)[0]) * (1 + self._n_boot) * (1 + 1e-12)))

    def _lower(self, steps: int, sources: stats.ClusterMeans) -> float:
        if steps < 1 or self.n_runs < 2 or not sources.testable[0]:
            return -np.inf
        level = min(steps / (1 + self._n_boot), 0.5)  # beyond it a bound would pass the estimate
        estimate = float(sources.estimate[0])
        margin = max(0.0, estimate - float(sources.lower(level * (1 + 1e-12), False)[0]))
        return estimate - float(np.hypot(margin, sps.t.isf(level, self.n_runs - 1) * self.run_error))

    def _p(self, bar: float, sources: stats.ClusterMeans) -> float:
        """By bisection: bounds rise with the level."""
        low, high = 0, self._n_boot + 1
        if not self._lower(high, sources) > bar:
            return 1.0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._lower(middle, sources) > bar else (middle, high)
        return high / (1 + self._n_boot)


def over_runs(
    by_run: Sequence[tuple[Float[np.ndarray, " n_documents"], Float[np.ndarray, " n_documents"]]],
    sources: Sequence[str],
    *,
    seed: int,
    n_boot: int,
) -> Crossed:
    """From (sums, counts) of every run, one number a document; documents of one source as one."""
    sums, counts = (np.stack([stats.by_source(pair[k], sources) for pair in by_run], axis=1) for k in (0, 1))
    return Crossed(sums, counts, seed=seed, n_boot=n_boot)
