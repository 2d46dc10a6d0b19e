"""Evidence from one number a document: `family` for a claim of your own, `paired_evidence` for sums and counts.

Every condition is a mean over documents, sources of the documents as clusters; `fra.verdicts.decide` decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from fra.errors import FraError
from fra.statistics import stats
from fra.statistics.rules import RULES
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Column, Sampled, decide, means_of, ranked

NO_INPUT_DICTIONARY = "the target has no dictionary at this layer's attention input"


@dataclass(frozen=True)
class ByDocument:
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
    claim: Claim, target: str, heads: Iterable[str], measured: Mapping[str, ByDocument]
) -> dict[str, Evidence]:
    """Evidence for every head of a family from paired samples; one candidate that must meet all conditions.

    heads: all of the target; those not measured CANNOT_RUN for want of a dictionary.
    """
    found = {h: Evidence(claim=claim, head=h, cannot=NO_INPUT_DICTIONARY) for h in heads if h not in measured}
    if not measured:
        return found
    columns = [
        Sampled(
            name=name,
            samples={
                h: means_of(claim, target, h, name, m.sums[name], m.counts[name], m.sources)
                for h, m in measured.items()
            },
        )
        for name in (claim.condition, *claim.bars)
    ]
    rows = {h: Beside(undecided=m.undecided, detail=m.detail) for h, m in measured.items()}
    return found | decide(claim, columns, rows)


def family(
    claim: Claim,
    samples: Mapping[str, ArrayLike] | Mapping[str, Mapping[str, ArrayLike]],
    *,
    target: str,
    sources: Sequence[str] | None,
    ranks: Mapping[str, Mapping[str, tuple[float, ArrayLike]]] | None = None,
    n_boot: int = RULES.resamples,
) -> dict[str, Evidence]:
    """Evidence for every head of a family from one number a document and head, or from several, one a condition.

    The effect of a condition is its mean over documents, documents of one source as one, tested against its bar in both
    directions by a studentised bootstrap of the sources; corrected over conditions and heads as `fra.verdicts.decide`
    says.

    samples: per head, [n_docs] values in the bar's unit, one a document; or per condition such a mapping. A head with a
    value that is not finite comes out INCONCLUSIVE.
    target: the target's name, for seeds alone.
    sources: [n_docs] where each document comes from (`Document.source`): what comes from one source is not independent.
    None: every document is a source of its own.
    ranks: further conditions, by name and head (the head's number, draws of a null): its rank among them, 1 - p, must
    reach `claim.bars[name]`, which is 1 - level; it can deny and never refutes. One over the number of heads, over the
    level, is the least number of draws with which any head can pass: 480 for 24 heads.
    n_boot: resamples.

    Raises FraError where a sample is not one number a document, or a condition is missing.
    """
    table = _by_condition(samples, claim.condition)
    if not table or not next(iter(table.values())):
        return {}
    heads = list(next(iter(table.values())))
    columns: list[Column] = []
    for condition in (claim.condition, *(name for name in claim.bars if name not in (ranks or {}))):
        means = {}
        for head in heads:
            values = _checked(claim, head, condition, table.get(condition, {}).get(head))
            clustered = values if sources is None else stats.by_source(values, sources)
            counts = None if sources is None else stats.by_source(np.ones_like(values), sources)
            seed = stats.seed_of(claim.digest, target, head, condition)
            means[head] = stats.ClusterMeans(clustered, counts, seed=seed, n_boot=n_boot)
        columns.append(Sampled(name=condition, samples=means))
    for condition, own in (ranks or {}).items():
        columns.append(ranked(claim, condition, {h: own[h][0] for h in heads}, {h: own[h][1] for h in heads}))
    if unknown := sorted(table.keys() - {claim.condition, *claim.bars}):
        raise FraError(f"{claim.id}: {unknown[0]!r} was measured and is no condition that the claim registers")
    return decide(claim, columns, {h: Beside() for h in heads})


def _by_condition(
    samples: Mapping[str, ArrayLike] | Mapping[str, Mapping[str, ArrayLike]], name: str
) -> Mapping[str, Mapping[str, ArrayLike]]:
    if all(isinstance(own, Mapping) for own in samples.values()):
        return samples  # type: ignore[return-value]
    return {name: samples}  # type: ignore[dict-item]


def _checked(claim: Claim, head: str, condition: str, sample: ArrayLike | None) -> Float[np.ndarray, " n_docs"]:
    if sample is None:
        raise FraError(f"{claim.id} at {head}: {condition!r} was not measured there")
    values = np.asarray(sample, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise FraError(
            f"{claim.id} at {head}: a sample is one number a document, but has the shape {list(values.shape)}"
        )
    return values
