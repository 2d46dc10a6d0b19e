"""Differences and shares as means over documents; the power of an exact bound."""

from __future__ import annotations

import numpy as np
from scipy import stats as sps

from fra.statistics.stats import Floats

MATCHED = "over matched features"
"""The condition that is a difference of two samples: linearised, its values by document have no bounds."""


def power_of_share(
    n: int, bar: float, effect: float, level: float, bounded: tuple[float, float] = (0.0, 1.0), above: bool = True
) -> float:
    """The chance that Clopper-Pearson's bound of a mean of n values, each at one end of the range or at the other,
    lies beyond the bar at this level if the true mean is `effect`.

    With q = (mean - lo) / (hi - lo), at the far end for the direction: P(K >= k) under the effect's q, where k is the
    least count that P(K >= k) <= level under the bar's.
    """
    lo, hi = bounded if above else (-bounded[1], -bounded[0])
    sign = 1 if above else -1
    at_bar, at_effect = ((sign * x - lo) / (hi - lo) for x in (bar, effect))
    if not 0 <= at_bar <= 1 or not 0 <= at_effect <= 1:
        return float("nan")
    least = int(sps.binom.isf(level, n, at_bar)) + 1
    return float(sps.binom.sf(least - 1, n, at_effect))


def difference(a: Floats, n_a: Floats, b: Floats, n_b: Floats) -> tuple[Floats, Floats]:
    """Two ratio means' difference as one mean over documents: the value of each document is its linearised share, so
    that the mean is the difference and the spread is that of the delta method (Cochran 1977, ch. 6). NaN without rows.
    """
    total_a, total_b = n_a.sum(), n_b.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_a, mean_b = a.sum() / total_a, b.sum() / total_b
        n = len(a)
        own = n * ((a - mean_a * n_a) / total_a - (b - mean_b * n_b) / total_b) + mean_a - mean_b
    return own, np.ones(n)


def above_share(part: Floats, whole: Floats, bar: float) -> tuple[Floats, Floats]:
    """`part > bar * whole`, where the whole may be negative in a document: a linear form, tested against zero."""
    return part - bar * whole, np.ones_like(part)
