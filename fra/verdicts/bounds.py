"""Conditions from sums and counts by cluster: ratio means against bars, differences, and exact bounds where a bootstrap
has none.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats as sps

from fra.verdicts import stats
from fra.verdicts.claim import Claim, Condition
from fra.verdicts.conditions import two_sided
from fra.verdicts.stats import Floats

MATCHED = "over matched features"
"""The condition that is a difference of two samples: linearised, its values by document have no bounds."""


def columns_tested(
    claim: Claim,
    name: str,
    columns: Mapping[str, tuple[Floats, ...]],
    target: str,
    n_conditions: int,
    many: bool = False,
    bounded: tuple[float, float] | None = None,
) -> tuple[dict[str, list[Condition]], dict[str, stats.ClusterMeans], dict[str, float]]:
    """One condition against its registered bar for every head, from sums and counts by cluster; beside it the means,
    and each head's p of its best candidate before it was adjusted over the heads.

    Where nearly all clusters agree, resamples without a spread leave the bootstrap no bound. If a cluster's value lies
    in [lo, hi] (`bounded`) and does not depend on its size, P(value >= c) >= q gives mean >= q c + (1 - q) lo, and q is
    Clopper-Pearson's bound for the clusters that reach c; likewise from above. c is the common value where all agree to
    the last, else halfway from the bar to that end of the range, at half the level.
    """
    bar = claim.bars.get(name, claim.bar)
    means = {
        h: stats.ClusterMeans(sums, counts, seed=stats.seed_of(claim.digest, target, h, name))
        for h, (sums, counts) in columns.items()
    }
    found = two_sided(name, bar, means, claim.level, n_conditions, many)
    raw = {h: float(m.p_above(bar, many).min()) for h, m in means.items()}
    for h, (sums, counts) in columns.items():
        if bounded is not None and means[h].n_cand == 1:
            live = counts.ravel() > 0
            values = sums.ravel()[live] / counts.ravel()[live]
            (own,) = found[h]
            exact, p = _exact_where_unbounded(own, values, bounded, claim.level, len(columns), n_conditions)
            found[h], raw[h] = [exact], raw[h] if p is None else p
    return found, means, raw


def _exact_where_unbounded(
    own: Condition, values: Floats, bounded: tuple[float, float], claim_level: float, heads: int, n_conditions: int
) -> tuple[Condition, float | None]:
    """The condition with Clopper-Pearson's bound in a direction in which the bootstrap has none, and its p of "mean <=
    bar" before it was adjusted over the heads, None where that stays the bootstrap's.
    """
    if len(values) < 2 or (np.isfinite(own.low) and np.isfinite(own.high)):
        return own, None
    level = claim_level / heads
    constant = bool(np.ptp(values) <= 1e-9 * max(1.0, float(np.abs(values).max())))
    effect = float(values.mean()) if constant else own.effect
    if own.name == MATCHED and not constant:
        return own, None  # a linearised difference of two samples has no bounded values
    raw: dict[str, float] = {}
    kept: dict[str, float | None] = {"low": own.low, "high": own.high, "p": own.p, "p_refute": own.p_refute}
    for sign, side, p_of in ((1, "low", "p"), (-1, "high", "p_refute")):
        if np.isfinite(float(kept[side] or 0.0)) and not constant:
            continue
        end, other = (bounded[1], bounded[0]) if sign > 0 else bounded
        share = 1 if sign > 0 else n_conditions  # any one of them may refute
        cut, alpha = (effect, level / share) if constant else ((own.bar + end) / 2, level / 2 / share)
        k, n = int((sign * values >= sign * cut - 1e-9).sum()), len(values)
        q = stats.clopper_pearson(k, n, alpha)[0]
        kept[side] = q * cut + (1 - q) * other
        if sign * cut > sign * own.bar and other != cut:
            needed = (own.bar - other) / (cut - other)
            p = float(sps.binom.sf(k - 1, n, needed)) if 0 <= needed <= 1 else float(needed > 1)
            raw[p_of] = min(1.0, p * (1 if constant else 2))
            kept[p_of] = min(1.0, p * (claim_level / alpha)) if 0 <= needed <= 1 else p
        else:
            raw[p_of] = kept[p_of] = 1.0
    low, high = float(kept["low"] or 0.0), float(kept["high"] or 0.0)
    exact = Condition(
        own.name, effect, min(low, effect), max(high, effect), own.bar, p=kept["p"], p_refute=kept["p_refute"]
    )
    return exact, raw.get("p")


def least_power(
    candidates: Mapping[str, tuple[Condition, ...]],
    means: Mapping[str, stats.ClusterMeans],
    null: float,
    level: float,
    heads: int,
) -> float | None:
    """The least power among the conditions that fail, to tell an effect at the bar from `null`; the headline's where
    none fails. The median over the candidates.

    At a bar that is `null` itself there is nothing to tell apart, and a sample that the bootstrap cannot test has an
    exact bound instead of a power: such conditions do not count, and None says that nothing is at issue.
    """
    rows = list(candidates.values())
    chance: dict[str, Floats] = {}
    for c in rows[0]:
        if c.bar != null and means[c.name].testable.any():
            chance[c.name] = stats.power_above(means[c.name], null, c.bar, level / heads, simultaneous=len(rows) > 1)
    fails = [[c.name for c in conditions if c.fails(level)] for conditions in rows]
    names = [own or ([rows[0][0].name] if not any(fails) else []) for own in fails]
    least = [[chance[name][n] for name in own if name in chance] for n, own in enumerate(names)]
    powers = [min(own) for own in least if own]
    return float(np.median(powers)) if powers else None


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
