"""Samples with exact tests: shares of independent tries, and values of a known range where a bootstrap has no bound."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy import stats as sps

from fra.statistics import stats
from fra.statistics.bounds import power_of_share
from fra.statistics.stats import Floats

_PLAIN = 0.05
"""A bootstrap that has a bound at this level is left to itself."""
_CELLS = 250
"""Cells of the nuisance share in which a probability is bounded: more of them cost time and tighten p-values."""
_STEPS = 40
"""Halvings that find a bound: to 2e-12."""


@dataclass(frozen=True)
class Proportion:
    """k of n independent tries; binomial tests, Clopper-Pearson's bounds."""

    k: int
    n: int

    n_cand = 1

    @property
    def n_docs(self) -> int:
        """Tries."""
        return self.n

    @property
    def estimate(self) -> float:
        """NaN without tries."""
        return self.k / self.n if self.n else float("nan")

    def p_above(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "share <= bar"."""
        return np.array([float(sps.binom.sf(self.k - 1, self.n, np.clip(bar, 0, 1))) if bar < 1 else 1.0])

    def p_below(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "share >= bar"."""
        return np.array([float(sps.binom.cdf(self.k, self.n, np.clip(bar, 0, 1))) if bar > 0 else 1.0])

    def lower(self, level: float, simultaneous: bool = False) -> Floats:
        """[1] lower bound."""
        return np.array([stats.clopper_pearson(self.k, self.n, level)[0]])

    def upper(self, level: float, simultaneous: bool = False) -> Floats:
        """[1] upper bound."""
        return np.array([stats.clopper_pearson(self.k, self.n, level)[1]])

    def power(self, worth: float, level: float, above: bool = True, simultaneous: bool = False) -> Floats:
        """[1] the chance that a share `worth` beyond one half is told from one half: the hardest place."""
        if not self.n:
            return np.full(1, np.nan)
        return np.array([power_of_share(self.n, 0.5, min(1.0, 0.5 + worth), level)])


@dataclass(frozen=True)
class TwoShares:
    """k of n independent tries less k_other of n_other: the difference of two shares.

    Tests are exact and unconditional, outcomes ordered by Fisher's one-sided p (Boschloo 1970, Statistica Neerlandica
    24): p of "difference <= bar" is the largest chance, over all pairs of shares that differ by the bar, of an outcome
    that Fisher orders as far out as the one seen. That chance grows with the first share and falls with the second, so
    that over a cell of shares [a, b] it is at most the one at (b + bar, a): p-values are bounded from above, not
    searched for. They grow with the bar, and the bounds are where they cross the level.
    """

    k: int
    n: int
    k_other: int
    n_other: int

    n_cand = 1

    @property
    def n_docs(self) -> int:
        """Tries of both."""
        return self.n + self.n_other

    @property
    def estimate(self) -> float:
        """NaN where either has no tries."""
        return self.k / self.n - self.k_other / self.n_other if self.n and self.n_other else float("nan")

    def p_above(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "difference <= bar"."""
        return np.array([self._p(float(bar))])

    def p_below(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "difference >= bar"."""
        return np.array([self._turned._p(-float(bar))])

    def lower(self, level: float, simultaneous: bool = False) -> Floats:
        """[1] lower bound: above the bar exactly where `p_above` is at most the level."""
        return np.array([self._bound(level)])

    def upper(self, level: float, simultaneous: bool = False) -> Floats:
        """[1] upper bound."""
        return np.array([-self._turned._bound(level)])

    def power(self, worth: float, level: float, above: bool = True, simultaneous: bool = False) -> Floats:
        """[1] the chance that Fisher's test tells from the other share, where it lies as seen, one `worth` beyond it;
        Fisher's is no more powerful than the test itself.
        """
        if not self.n or not self.n_other:
            return np.full(1, np.nan)
        near = self.k_other / self.n_other
        far = min(1.0, near + worth) if above else max(0.0, near - worth)
        p = fisher_table(self.n, self.n_other) if above else fisher_table(self.n_other, self.n).T
        own = sps.binom.pmf(np.arange(self.n + 1), self.n, far)
        other = sps.binom.pmf(np.arange(self.n_other + 1), self.n_other, near)
        return np.array([float(own @ (p <= level) @ other)])

    @cached_property
    def _turned(self) -> TwoShares:
        return TwoShares(self.k_other, self.n_other, self.k, self.n)

    @cached_property
    def _reach(self) -> Floats:
        """[n + 1] for each count of the first, the largest of the second that is ordered as far out as the one seen; -1
        where none is.
        """
        table = fisher_table(self.n, self.n_other)
        far = table <= table[self.k, self.k_other] * (1 + 1e-9)
        return np.asarray(far.sum(1) - 1, dtype=np.float64)

    def _p(self, bar: float) -> float:
        if not self.n or not self.n_other:
            return 1.0
        edges = np.linspace(max(0.0, -bar), min(1.0, 1 - bar), _CELLS + 1)
        if bar >= 1 or edges[-1] < edges[0]:
            return 1.0
        if bar <= -1:
            return 0.0
        first, second = np.clip(edges[1:] + bar, 0, 1)[:, None], edges[:-1][:, None]
        reach = self._reach
        k = np.flatnonzero(reach >= 0)
        chance = special.xlogy(k, first) + special.xlog1py(self.n - k, -first)
        chance = np.exp(chance + _log_choose(self.n, k))
        below = special.bdtr(reach[k], self.n_other, second)
        return float(min(1.0, (chance * below).sum(1).max()))

    def _bound(self, level: float) -> float:
        low, high = -1.0, 1.0
        if not self.n or not self.n_other:
            return low
        high = self.estimate
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._p(middle) <= level else (low, middle)
        return low


def fisher_table(n: int, n_other: int) -> Floats:
    """[n + 1, n_other + 1] Fisher's p of "the first share is no larger": the chance, with the margins held, of as many
    of the first or more.
    """
    k, m = np.arange(n + 1)[:, None], np.arange(n + n_other + 1)[None, :]
    there = (m >= k) & (m - k <= n_other)
    rest = np.where(there, m - k, 0)

    chance = np.where(there, np.exp(_log_choose(n, k) + _log_choose(n_other, rest) - _log_choose(n + n_other, m)), 0.0)
    more = chance[::-1].cumsum(0)[::-1]
    return np.asarray(np.take_along_axis(more, k + np.arange(n_other + 1)[None, :], axis=1))


def _log_choose(of: int, some: ArrayLike) -> Floats:
    """The logarithm of the ways to choose some of `of`."""
    return np.asarray(
        special.gammaln(of + 1) - special.gammaln(np.add(some, 1)) - special.gammaln(np.subtract(of + 1, some))
    )


class Bounded:
    """Means of values that lie in [lo, hi], one a cluster, for one candidate, whose clusters nearly all agree, so that
    resamples without a spread leave the bootstrap no bound.

    If a cluster's value lies in the range and does not depend on its size, P(value >= c) >= q gives
    mean >= q c + (1 - q) lo, and q is Clopper-Pearson's bound for the clusters that reach c; likewise from above. c is
    the common value where all agree to the last, else halfway from the bar to that end of the range, at half the level.
    """

    n_cand = 1

    def __init__(self, values: Floats, lo: float, hi: float) -> None:
        self.values, self.lo, self.hi = values, lo, hi
        self.n_docs = len(values)
        self.constant = bool(np.ptp(values) <= 1e-9 * max(1.0, float(np.abs(values).max())))

    @property
    def estimate(self) -> float:
        """The mean."""
        return float(self.values.mean())

    def p_above(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "mean <= bar"."""
        return np.array([self._p(bar, self.values, self.lo, self.hi)])

    def p_below(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "mean >= bar"."""
        return np.array([self._p(-bar, -self.values, -self.hi, -self.lo)])

    def lower(self, level: float, simultaneous: bool = False) -> Floats:
        """[1] lower bound, by bisection of `p_above`: it lies above the bar exactly where that is at most the level."""
        return np.array([self._bound(level, self.values, self.lo, self.hi)])

    def upper(self, level: float, simultaneous: bool = False) -> Floats:
        """[1] upper bound, by bisection of `p_below`."""
        return np.array([-self._bound(level, -self.values, -self.hi, -self.lo)])

    def power(self, worth: float, level: float, above: bool = True, simultaneous: bool = False) -> Floats:
        """[1] the chance that clusters at one end of the range, so often that their mean lies `worth` from the other
        end, are told from that end plus nothing: a binomial test of as many clusters.
        """
        share = min(1.0, worth / (self.hi - self.lo))
        return Proportion(0, self.n_docs).power(share / 2, level)

    def _p(self, bar: float, values: Floats, lo: float, hi: float) -> float:
        mean = float(values.mean())
        cut = mean if self.constant else (bar + hi) / 2
        if cut <= bar or cut <= lo:
            return 1.0
        k, needed = int((values >= cut - 1e-9).sum()), (bar - lo) / (cut - lo)
        if not 0 <= needed < 1:
            return 0.0 if needed < 0 else 1.0
        return min(1.0, float(sps.binom.sf(k - 1, self.n_docs, needed)) * (1 if self.constant else 2))

    def _bound(self, level: float, values: Floats, lo: float, hi: float) -> float:
        low, high = lo, float(values.mean())
        if self._p(low, values, lo, hi) > level:
            return lo
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._p(middle, values, lo, hi) <= level else (low, middle)
        return high


def exact_where_unbounded(
    means: stats.ClusterMeans, bounded: tuple[float, float], linearised: bool = False
) -> Bounded | None:
    """The exact sample in the place of a bootstrap of one candidate that has no bound in some direction, or all of
    whose clusters agree, where the range says more than their number; None elsewhere, or where too few are live.

    linearised: values have the range only where all agree.
    """
    live = means.counts.ravel() > 0
    values = means.sums.ravel()[live] / means.counts.ravel()[live]
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    found = Bounded(values, *bounded)
    bounds = means.lower(_PLAIN, False)[0], means.upper(_PLAIN, False)[0]
    if found.constant:
        return found
    return None if linearised or np.isfinite(bounds).all() else found
