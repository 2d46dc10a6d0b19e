"""Samples with exact tests: shares of independent tries, and values of a known range where a bootstrap has no bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats as sps

from fra.verdicts import stats
from fra.verdicts.bounds import power_of_share
from fra.verdicts.stats import Floats

_PLAIN = 0.05
"""A bootstrap that has a bound at this level is left to itself."""


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
    """The exact sample in the place of a bootstrap of one candidate that has no bound in some direction, or all of whose
    clusters agree, where the range says more than their number; None elsewhere, or where too few clusters are live.

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
