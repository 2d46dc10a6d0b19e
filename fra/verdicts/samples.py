"""Evidence from documents measured under a claim and under its controls at once: paired differences, one a condition.

Every condition is a ratio mean over documents (fra.stats.ClusterMeans), sources of the documents as clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from fra.errors import FraError
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.conditions import cluster_means, false_discovery, two_sided

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


def family(
    claim: Claim,
    samples: Mapping[str, ArrayLike],
    *,
    target: str,
    null: float | None = 0.0,
    name: str = "effect",
    n_boot: int = 9_999,
) -> dict[str, Evidence]:
    """Evidence for every head of a family from one number a document and head: the simplest claim there is.

    The effect is the mean over documents. Each head is tested against `claim.bar` in both directions by a studentised
    bootstrap of its documents, seeded from (digest, target, head); Holm across the heads, each direction its own
    family; bounds at each head's own Holm level, so that they exclude the bar exactly where the test rejects; q by
    Benjamini-Hochberg.

    samples: per head, [n_docs] values in the bar's unit, one a document. A head with a value that is not finite comes
    out INCONCLUSIVE.
    target: the target's name, for seeds alone.
    null: power is the chance to tell an effect *at the bar* from this value, at the first Holm step. None: power is not
    at issue (a bar at zero, say).
    name: of the condition. n_boot: resamples.

    Raises FraError where a sample is not one number a document.
    """
    means: dict[str, stats.ClusterMeans] = {}
    values: dict[str, stats.Floats] = {}
    for head, sample in samples.items():
        values[head] = np.asarray(sample, dtype=np.float64)
        if values[head].ndim != 1 or not values[head].size:
            raise FraError(
                f"{claim.id} at {head}: a sample is one number a document, but has the shape {list(values[head].shape)}"
            )
        means[head] = stats.ClusterMeans(values[head], seed=stats.seed_of(claim.digest, target, head), n_boot=n_boot)
    if not means:
        return {}
    p_above = np.array([m.p_above(claim.bar, simultaneous=False)[0] for m in means.values()])
    p_below = np.array([m.p_below(claim.bar, simultaneous=False)[0] for m in means.values()])
    level_above, level_below = stats.holm_levels(p_above, claim.level), stats.holm_levels(p_below, claim.level)
    p, p_refute = stats.holm(p_above), stats.holm(p_below)
    q = stats.benjamini_hochberg(p_above if claim.above else p_below)
    if not claim.above:
        p, p_refute = p_refute, p
    out = {}
    for k, (head, m) in enumerate(means.items()):
        power = None
        if null is not None:
            # Told from `null` in the claim's own direction; below the bar is above it with the sign turned.
            toward = m if claim.above else stats.ClusterMeans(-values[head], seed=m.seed, n_boot=n_boot)
            sign = 1 if claim.above else -1
            power = float(
                stats.power_above(toward, sign * null, sign * claim.bar, claim.level / len(means), simultaneous=False)[
                    0
                ]
            )
        condition = Condition(
            name,
            effect=float(values[head].mean()),
            low=float(m.lower(level_above[k], simultaneous=False)[0]),
            high=float(m.upper(level_below[k], simultaneous=False)[0]),
            bar=claim.bar,
            p=float(p[k]),
            p_refute=float(p_refute[k]),
            above=claim.above,
        )
        out[head] = Evidence(
            claim=claim, head=head, candidates={name: (condition,)}, n=len(values[head]), power=power, q=float(q[k])
        )
    return out
