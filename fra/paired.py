"""Evidence from documents measured under a claim and under its controls at once: paired differences, one a condition.

Every condition is a ratio mean over documents (fra.stats.ClusterMeans), sources of the documents as clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from fra import stats
from fra.claim import Claim, Condition, Evidence
from fra.evidence import cluster_means, false_discovery, two_sided

NO_DICTIONARY = "the target has no dictionary at this layer's attention input"


@dataclass(frozen=True)
class Measured:
    """What was measured at one head: per condition, sums and counts of every document."""

    sums: Mapping[str, Float[np.ndarray, " n_docs"]]
    counts: Mapping[str, Float[np.ndarray, " n_docs"]]
    """Weights: the effect of a condition is the sum of its sums over the sum of its counts."""
    sources: Sequence[str]
    undecided: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


def mean_of(values: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Sums and counts of conditions whose effect is a plain mean over documents."""
    sums = {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}
    return sums, {name: np.ones_like(value) for name, value in sums.items()}


def paired_evidence(
    claim: Claim,
    target: str,
    heads: Iterable[str],
    measured: Mapping[str, Measured],
    *,
    below: Sequence[str] = (),
    null: float | None = None,
) -> dict[str, Evidence]:
    """Evidence for every head of a family from paired samples; one candidate that must meet all conditions.

    The first condition of a head is the claim's headline and is held against `claim.bar`; the others against
    `claim.bars`. "Effect <= bar" is Holm-adjusted across heads; "effect >= bar" Bonferroni-adjusted over heads and
    conditions, any one of which may refute. heads: all of the target; those not measured CANNOT_RUN for want of a
    dictionary. below: conditions that say effect < bar. null: power is the chance to tell the headline's bar from this
    value; None where power is not at issue.
    """
    found = {h: Evidence(claim=claim, head=h, cannot=NO_DICTIONARY) for h in heads if h not in measured}
    if not measured:
        return found
    names = list(next(iter(measured.values())).sums)
    columns: dict[str, dict[str, Condition]] = {}
    power: dict[str, float | None] = dict.fromkeys(measured)
    q: dict[str, float] = {}
    for name in names:
        sign = -1.0 if name in below else 1.0
        bar = claim.bar if name == names[0] else claim.bars[name]
        means = {
            h: cluster_means(
                sign * m.sums[name], m.counts[name], m.sources, stats.seed_of(claim.digest, target, h, name)
            )
            for h, m in measured.items()
        }
        column = two_sided(name, sign * bar, means, claim.level, len(names), simultaneous=False)
        columns[name] = {h: _turned(c) if sign < 0 else c for h, (c,) in column.items()}
        if name == names[0]:
            q = false_discovery(list(means), means, sign * bar)
        if name == names[0] and null is not None:
            for h, sample in means.items():
                chance = stats.power_above(
                    sample, sign * null, sign * bar, claim.level / len(means), simultaneous=False
                )
                power[h] = float(chance[0])
    for h, m in measured.items():
        found[h] = Evidence(
            claim=claim,
            head=h,
            candidates={"every condition": tuple(columns[name][h] for name in names)},
            n=len(m.sources),
            power=power[h],
            q=q[h],
            undecided=m.undecided,
            detail=m.detail,
        )
    return found


def _turned(c: Condition) -> Condition:
    """A condition on -E > -bar said again as one on E < bar."""
    return replace(c, effect=-c.effect, low=-c.high, high=-c.low, bar=-c.bar, above=False)
