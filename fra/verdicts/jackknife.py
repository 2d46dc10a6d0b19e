"""Statistics that are no mean over documents (overlaps of top lists, rank correlations): the jackknife over sources.

Leave out one source of documents at a time: se^2 = (G-1)/G sum_k (theta_k - mean theta)^2 with G sources, and
(theta - truth)/se is taken as Student's t with G - 1 degrees of freedom (Efron and Tibshirani 1993, An Introduction to
the Bootstrap, ch. 11). It suits statistics that change smoothly with the documents; a list of fifty does, in steps, and
`least` keeps a statistic that happens not to move from looking certain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as sps

from fra.verdicts.stats import Floats


@dataclass(frozen=True)
class Jackknifed:
    """An estimate with its standard error, from what it is without each source."""

    estimate: float
    left_out: NDArray[np.float64]
    """[n_sources] the statistic without each source."""
    least: float = 0.0
    """The smallest standard error that is believed."""

    @property
    def se(self) -> float:
        """Standard error; NaN with fewer than three sources."""
        n = len(self.left_out)
        if n < 3:
            return float("nan")
        return max(self.least, float(np.sqrt((n - 1) / n * ((self.left_out - self.left_out.mean()) ** 2).sum())))

    @property
    def n_cand(self) -> int:
        """One: a sample of `fra.verdicts.decide`."""
        return 1

    def p_above(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "statistic <= bar"; 1 without a standard error."""
        return self._p(bar, 1.0)

    def p_below(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "statistic >= bar"; 1 without a standard error."""
        return self._p(bar, -1.0)

    def lower(self, level: float, simultaneous: bool = False) -> Floats:
        """[1] lower bound; -inf without a standard error."""
        return np.atleast_1d(self.estimate - self._reach(level))

    def upper(self, level: float, simultaneous: bool = False) -> Floats:
        """[1] upper bound; inf without a standard error."""
        return np.atleast_1d(self.estimate + self._reach(level))

    @property
    def n_docs(self) -> int:
        """Sources."""
        return len(self.left_out)

    def power(self, worth: float, level: float, above: bool = True, simultaneous: bool = False) -> Floats:
        """[1] chance to tell an effect `worth` beyond a bar from it, with this standard error (shifted t)."""
        df = len(self.left_out) - 1
        if not self.se > 0:
            return np.full(1, np.nan)
        return np.array([float(sps.t.sf(sps.t.isf(level, df) - worth / self.se, df))])

    def _p(self, bar: float, sign: float) -> Floats:
        if not self.se > 0:
            return np.ones(1)
        t = sign * (self.estimate - bar) / self.se
        return np.array([sps.t.sf(t, len(self.left_out) - 1)])

    def _reach(self, level: float) -> float:
        """How far a bound at a level lies from the estimate."""
        return float(sps.t.isf(level, len(self.left_out) - 1) * self.se) if self.se > 0 else np.inf

    def less(self, other: Jackknifed | float) -> Jackknifed:
        """The difference: of two statistics of the same documents, or to a fixed number."""
        if isinstance(other, Jackknifed):
            apart = self.left_out - other.left_out
            return Jackknifed(self.estimate - other.estimate, apart, max(self.least, other.least))
        return Jackknifed(self.estimate - other, self.left_out - other, self.least)


def jackknifed(estimate: float, left_out: ArrayLike, least: float = 0.0) -> Jackknifed:
    """From a number and a sequence."""
    return Jackknifed(float(estimate), np.asarray(left_out, dtype=np.float64), least)
