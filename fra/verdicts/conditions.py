"""Conditions for the judge, made of samples: each is held against its bar in both directions, corrected over heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fra.verdicts import stats
from fra.verdicts.claim import Condition
from fra.verdicts.stats import by_source


def cluster_means(sums: np.ndarray, counts: np.ndarray, sources: Sequence[str], seed: int) -> stats.ClusterMeans:
    """Ratio means with the sources of the documents as clusters."""
    return stats.ClusterMeans(by_source(sums, sources), by_source(counts, sources), seed=seed)


def two_sided(
    name: str, bar: float, means: Mapping[str, stats.ClusterMeans], level: float, share: int, simultaneous: bool
) -> dict[str, list[Condition]]:
    """One condition for every candidate of every head.

    "effect <= bar" is Holm-adjusted across heads over the best candidate of each head (max-T within the head). "effect
    >= bar" is Bonferroni-adjusted over the heads and over the `share` conditions any one of which may refute a
    candidate. Bounds are at the level at which the head was tested.
    """
    heads = list(means)
    above = [means[h].p_above(bar, simultaneous) for h in heads]
    level_above = stats.holm_levels([float(p.min()) for p in above], level)
    adjusted = stats.holm_within(above, level)
    tests = share * len(heads)
    found: dict[str, list[Condition]] = {}
    for k, h in enumerate(heads):
        m = means[h]
        lower, upper = m.lower(level_above[k], simultaneous), m.upper(level / tests, simultaneous)
        below = m.p_below(bar, simultaneous)
        found[h] = [
            Condition(
                name,
                float(m.estimate[c]),
                float(lower[c]),
                float(upper[c]),
                bar,
                p=float(adjusted[k][c]),
                p_refute=float(min(1.0, below[c] * tests)),
            )
            for c in range(m.n_cand)
        ]
    return found


def false_discovery(
    heads: Sequence[str], means: Mapping[str, stats.ClusterMeans], bar: float, simultaneous: bool = False
) -> dict[str, float]:
    """q of every head (Benjamini-Hochberg) for "effect <= bar" of its best candidate, p = 1 for heads without one: from
    p-values that are not yet adjusted over the heads, or the adjustment would count twice.
    """
    p = [float(means[h].p_above(bar, simultaneous).min()) if h in means else 1.0 for h in heads]
    return dict(zip(heads, map(float, stats.benjamini_hochberg(p)), strict=True))


def rank_condition(name: str, p: float, level: float) -> Condition:
    """A condition that is a rank among nulls: 1 - p above 1 - level. It can be missed; it refutes nothing."""
    return Condition(name, 1 - p, 1 - p, 1.0, 1 - level, p=p, p_refute=1.0)


def exact(name: str, value: float, bar: float) -> Condition:
    """A condition on a number that is not estimated from the documents."""
    return Condition(name, value, value, value, bar)


def as_share(condition: Condition, of: float, part: float, bar: float) -> Condition:
    """A condition "part - bar * whole > 0" said as a share of the whole; `of` and `part` are its means."""
    if of <= 0:
        return Condition(condition.name, float("nan"), -np.inf, np.inf, bar)
    share = part / of
    ends = [share + (end - condition.effect) / of for end in (condition.low, condition.high)]
    return Condition(condition.name, share, ends[0], ends[1], bar, p=condition.p, p_refute=condition.p_refute)


def weakest(conditions: Sequence[Condition], name: str, bar: float) -> Condition:
    """Conditions that must all hold, said as one: it holds where the last of them does and fails where the first does.
    None is chosen by its estimate.
    """
    return Condition(
        name,
        np.min([c.effect for c in conditions]),  # NaN where one was not measured
        np.min([c.low for c in conditions]),
        np.min([c.high for c in conditions]),
        bar,
        p=max(c.p or 0.0 for c in conditions),
        p_refute=min(1.0 if c.p_refute is None else c.p_refute for c in conditions),
    )


def condition(name: str, means: stats.ClusterMeans, bar: float, level: float) -> Condition:
    """The first candidate of `means` against a bar, tested in both directions; no family."""
    return Condition(
        name,
        float(means.estimate[0]),
        float(means.lower(level, simultaneous=False)[0]),
        float(means.upper(level, simultaneous=False)[0]),
        bar,
        p=float(means.p_above(bar, simultaneous=False)[0]),
        p_refute=float(means.p_below(bar, simultaneous=False)[0]),
    )
