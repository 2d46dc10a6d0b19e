"""Exact bounds where a bootstrap has none; differences and shares as means over documents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import stats as sps

from fra.verdicts import stats
from fra.verdicts.claim import Condition
from fra.verdicts.stats import Floats

MATCHED = "over matched features"
"""The condition that is a difference of two samples: linearised, its values by document have no bounds."""


def exact_where_unbounded(
    own: Condition,
    means: stats.ClusterMeans,
    bounded: tuple[float, float],
    level: float,
    heads: int,
    share: int,
    linearised: bool = False,
) -> tuple[Condition, float | None]:
    """A condition with Clopper-Pearson's bound in a direction in which the bootstrap has none, and its p of "mean <=
    bar" before it was adjusted over the heads, None where that stays the bootstrap's.

    Where nearly all clusters agree, resamples without a spread leave the bootstrap no bound, and where clusters are
    few, nothing but a range says that what they do not show cannot turn the mean (`fra.verdicts.unseen.RARE`); where
    all agree, the range says more than their number. If a cluster's value lies in [lo, hi] (`bounded`) and does not
    depend on its size, P(value >= c) >= q gives mean >= q c + (1 - q) lo, and q is Clopper-Pearson's bound for the
    clusters that reach c; likewise from above. c is the common value where all agree to the last, else halfway from
    the bar to that end of the range, at half the level.

    means: of one candidate. heads, share: what the condition was corrected for, as in `fra.verdicts.decide`.
    linearised: values have the range only where all agree.
    """
    live = means.counts.ravel() > 0
    values = means.sums.ravel()[live] / means.counts.ravel()[live]
    if len(values) < 2:
        return own, None
    constant = bool(np.ptp(values) <= 1e-9 * max(1.0, float(np.abs(values).max())))
    if np.isfinite(own.low) and np.isfinite(own.high) and not constant:
        return own, None
    if linearised and not constant:
        return own, None
    effect = float(values.mean()) if constant else own.effect
    raw: dict[str, float] = {}
    kept: dict[str, float | None] = {"low": own.low, "high": own.high, "p": own.p, "p_refute": own.p_refute}
    for sign, side, p_of in ((1, "low", "p"), (-1, "high", "p_refute")):
        if np.isfinite(float(kept[side] or 0.0)) and not constant:
            continue
        end, other = (bounded[1], bounded[0]) if sign > 0 else bounded
        among = 1 if sign > 0 else share  # any one of them may refute
        cut, alpha = (effect, level / heads / among) if constant else ((own.bar + end) / 2, level / heads / 2 / among)
        k, n = int((sign * values >= sign * cut - 1e-9).sum()), len(values)
        q = stats.clopper_pearson(k, n, alpha)[0]
        kept[side] = q * cut + (1 - q) * other
        if sign * cut > sign * own.bar and other != cut:
            needed = (own.bar - other) / (cut - other)
            p = float(sps.binom.sf(k - 1, n, needed)) if 0 <= needed <= 1 else float(needed > 1)
            raw[p_of] = min(1.0, p * (1 if constant else 2))
            kept[p_of] = min(1.0, p * (level / alpha)) if 0 <= needed <= 1 else p
        else:
            raw[p_of] = kept[p_of] = 1.0
    low, high = float(kept["low"] or 0.0), float(kept["high"] or 0.0)
    exact = replace(
        own, effect=effect, low=min(low, effect), high=max(high, effect), p=kept["p"], p_refute=kept["p_refute"]
    )
    return exact, raw.get("p")


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
