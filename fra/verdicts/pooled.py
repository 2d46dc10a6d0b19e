"""Conditions of claims that speak about every head-output dictionary of a target at once: the worst of them decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fra.verdicts import stats
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.stats import by_source

if TYPE_CHECKING:
    pass

NO_DICTIONARY = "the target has no dictionary of head outputs (blocks.L.attn.hook_z)"


@dataclass(frozen=True)
class Measured:
    """One condition's numbers, by dictionary: ratio means over documents, sources as clusters."""

    name: str
    bar: float
    means: Mapping[str, stats.ClusterMeans | float]
    """A number where every document gives the same (L0 under TopK, say): it has no interval to test."""
    null: float | None = None
    """Power is the chance to tell an effect at the bar from this; None: power is not at issue."""
    above: bool = True


def clustered(
    sums: np.ndarray, counts: np.ndarray, sources: Sequence[str], seed_parts: Sequence[str]
) -> stats.ClusterMeans:
    """The ratio mean sum / count over documents [n_documents], sources as clusters."""
    return stats.ClusterMeans(by_source(sums, sources), by_source(counts, sources), seed=stats.seed_of(*seed_parts))


def clustered_or_number(
    sums: np.ndarray, counts: np.ndarray, sources: Sequence[str], seed_parts: Sequence[str]
) -> stats.ClusterMeans | float:
    """The same, or the ratio itself where all documents that have rows agree on it to rounding."""
    ratios = sums[counts > 0] / counts[counts > 0]
    if len(ratios) and float(np.ptp(ratios)) <= 1e-9 * float(np.abs(ratios).max()):
        return float(ratios.mean())
    return clustered(sums, counts, sources, seed_parts)


def differences(
    own: tuple[np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray],
    sources: Sequence[str],
    seed_parts: Sequence[str],
) -> stats.ClusterMeans:
    """The mean over documents of one ratio less another, each a (sums, counts) [n_documents]; documents in which either
    has no rows are left out.
    """
    both = (own[1] > 0) & (other[1] > 0)
    ratios = [np.divide(sums, counts, out=np.zeros(len(sums)), where=both) for sums, counts in (own, other)]
    return clustered(ratios[0] - ratios[1], both.astype(float), sources, seed_parts)


def worst(measured: Measured, level: float, tests: int) -> Condition:
    """The condition for every dictionary together: "effect <= bar" is rejected where it is for each of them (their
    largest p), "effect >= bar" where it is for one, Bonferroni-adjusted over dictionaries and over the `tests`
    conditions any of which may refute. A number that does not vary decides by itself.
    """
    tests = tests * len(measured.means)
    sign = 1 if measured.above else -1
    effects: list[float] = []
    lows: list[float] = []
    highs: list[float] = []
    p: list[float] = []
    p_refute: list[float] = []
    for m in measured.means.values():
        if isinstance(m, float):
            beyond = sign * (m - measured.bar)
            p.append(0.0 if beyond > 0 else 1.0)
            p_refute.append(0.0 if beyond < 0 else 1.0)
            for column in (effects, lows, highs):
                column.append(m)
            continue
        above, below = (m.p_above, m.p_below) if measured.above else (m.p_below, m.p_above)
        p.append(float(above(measured.bar, False)[0]))
        p_refute.append(min(1.0, float(below(measured.bar, False)[0]) * tests))
        low_level, high_level = (level, level / tests) if measured.above else (level / tests, level)
        effects.append(float(m.estimate[0]))
        lows.append(float(m.lower(low_level, False)[0]))
        highs.append(float(m.upper(high_level, False)[0]))
    pick = min if sign > 0 else max
    finite = all(np.isfinite(effects))
    exact = all(isinstance(m, float) for m in measured.means.values())
    return Condition(
        measured.name,
        pick(effects) if finite else float("nan"),
        pick(lows),
        pick(highs),
        measured.bar,
        p=None if exact else max(p),
        p_refute=None if exact else min(p_refute),
        above=measured.above,
    )


def evidence(
    claim: Claim, measured: Sequence[Measured], n: int, detail: Mapping[str, Any], head: str | None = None
) -> Evidence:
    """One row's evidence: all of these conditions, of all dictionaries. Its power is the least among the conditions
    that would refute.
    """
    tests = len(measured)
    conditions = tuple(worst(each, claim.level, tests) for each in measured)
    powers = [
        float(stats.power_above(m, each.null, each.bar, claim.level, simultaneous=False)[0])
        for each, condition in zip(measured, conditions, strict=True)
        if each.null is not None and condition.fails(claim.level)
        for m in each.means.values()
        if not isinstance(m, float)
    ]
    return Evidence(
        claim=claim,
        head=head,
        candidates={"every dictionary": conditions},
        n=n,
        power=min(powers, default=None),
        detail=dict(detail),
    )


def by_dictionary(measured: Sequence[Measured], level: float) -> dict[str, dict[str, list[float]]]:
    """[estimate, lower, upper] of every condition and dictionary, for the detail; bounds one-sided at `level`."""
    return {
        each.name: {
            hook: [m] * 3
            if isinstance(m, float)
            else [float(x[0]) for x in (m.estimate, m.lower(level, False), m.upper(level, False))]
            for hook, m in each.means.items()
        }
        for each in measured
    }
