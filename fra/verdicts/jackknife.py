"""Statistics that are no mean over documents (overlaps of top lists, rank correlations): the jackknife over sources.

Leave out one source of documents at a time: se^2 = (G-1)/G sum_k (theta_k - mean theta)^2 with G sources, and
(theta - truth)/se is taken as Student's t with G - 1 degrees of freedom (Efron and Tibshirani 1993, An Introduction to
the Bootstrap, ch. 11). It suits statistics that change smoothly with the documents; a list of fifty does, in steps, and
`least` keeps a statistic that happens not to move from looking certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as sps

from fra.verdicts import stats
from fra.verdicts.claim import Condition


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

    def less(self, other: Jackknifed | float) -> Jackknifed:
        """The difference: of two statistics of the same documents, or to a fixed number."""
        if isinstance(other, Jackknifed):
            apart = self.left_out - other.left_out
            return Jackknifed(self.estimate - other.estimate, apart, max(self.least, other.least))
        return Jackknifed(self.estimate - other, self.left_out - other, self.least)


def jackknifed(estimate: float, left_out: ArrayLike, least: float = 0.0) -> Jackknifed:
    """From a number and a sequence."""
    return Jackknifed(float(estimate), np.asarray(left_out, dtype=np.float64), least)


def p_above(found: Jackknifed, bar: float) -> float:
    """p of "statistic <= bar"; NaN without a standard error."""
    t = (found.estimate - bar) / found.se if found.se > 0 else np.nan
    return float(sps.t.sf(t, len(found.left_out) - 1))


def conditions(
    name: str, bar: float, found: Mapping[str, Jackknifed], level: float, share: int = 1
) -> dict[str, Condition]:
    """One condition for every head: "statistic <= bar" by Holm over the heads, "statistic >= bar" by Bonferroni over
    the heads and over the `share` conditions any of which may refute. Bounds at the level at which the head was tested.
    """
    heads = list(found)
    t = {h: (j.estimate - bar) / j.se if j.se > 0 else np.nan for h, j in found.items()}
    above = np.array([p_above(found[h], bar) for h in heads])
    adjusted, levels = stats.holm(above), stats.holm_levels(above, level)
    out = {}
    for k, h in enumerate(heads):
        own, df = found[h], len(found[h].left_out) - 1
        low = own.estimate - sps.t.isf(levels[k], df) * own.se
        high = own.estimate + sps.t.isf(level / (len(heads) * share), df) * own.se
        below = sps.t.cdf(t[h], df)
        unknown = not np.isfinite(t[h])
        out[h] = Condition(
            name,
            own.estimate,
            -np.inf if unknown else float(low),
            np.inf if unknown else float(high),
            bar,
            p=1.0 if unknown else float(adjusted[k]),
            p_refute=1.0 if unknown else float(min(1.0, below * len(heads) * share)),
        )
    return out


def power(found: Jackknifed, bar: float, null: float, level: float) -> float:
    """Chance to tell an effect at the bar from `null` at `level`, with this standard error (shifted t)."""
    df = len(found.left_out) - 1
    if not found.se > 0:
        return float("nan")
    return float(sps.t.sf(sps.t.isf(level, df) - (bar - null) / found.se, df))
