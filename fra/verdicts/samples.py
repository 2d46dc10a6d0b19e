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
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Given, Power, Sampled, decide, means_of, ranked

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
    claim: Claim,
    target: str,
    heads: Iterable[str],
    measured: Mapping[str, ByDocument],
    *,
    below: Sequence[str] = (),
    null: float | None = None,
) -> dict[str, Evidence]:
    """Evidence for every head of a family from paired samples; one candidate that must meet all conditions.

    The first condition of a head is the claim's headline and is held against `claim.bar`; the others against
    `claim.bars`. heads: all of the target; those not measured CANNOT_RUN for want of a dictionary. below: conditions
    that say effect < bar. null: power is the chance to tell the headline's bar from this value; None where power is not
    at issue.
    """
    found = {h: Evidence(claim=claim, head=h, cannot=NO_INPUT_DICTIONARY) for h in heads if h not in measured}
    if not measured:
        return found
    names = list(next(iter(measured.values())).sums)
    columns = [
        Sampled(
            name=name,
            samples={
                h: means_of(claim, target, h, name, m.sums[name], m.counts[name], m.sources)
                for h, m in measured.items()
            },
            bar=claim.bar if name == names[0] else claim.bars[name],
            above=name not in below,
        )
        for name in names
    ]
    rows = {h: Beside(n=len(m.sources), undecided=m.undecided, detail=m.detail) for h, m in measured.items()}
    return found | decide(claim, columns, rows, power=None if null is None else Power("headline", null))


def family(
    claim: Claim,
    samples: Mapping[str, ArrayLike] | Mapping[str, Mapping[str, ArrayLike]],
    *,
    target: str,
    null: float | None = 0.0,
    name: str = "effect",
    below: Sequence[str] = (),
    ranks: Mapping[str, Mapping[str, tuple[float, ArrayLike]]] | None = None,
    sources: Sequence[str] | None = None,
    n_boot: int = 9_999,
) -> dict[str, Evidence]:
    """Evidence for every head of a family from one number a document and head, or from several, one a condition.

    The effect of a condition is its mean over documents, tested against its bar in both directions by a studentised
    bootstrap of the documents, seeded from (digest, target, head) and, of several conditions, the condition; Holm
    across the heads. Of one condition the opposite direction is its own family of Holm's; of several, any of which may
    refute, it is adjusted by Bonferroni over heads and conditions. Bounds are at each head's own level, so that they
    exclude the bar exactly where the test rejects; q by Benjamini-Hochberg.

    samples: per head, [n_docs] values in the bar's unit, one a document; or per condition such a mapping, the headline
    first (held against `claim.bar`, the others against `claim.bars` by name). A head with a value that is not finite
    comes out INCONCLUSIVE.
    target: the target's name, for seeds alone.
    null: power is the chance to tell a headline *at the bar* from this value, at the first Holm step. None: power is
    not at issue (a bar at zero, say).
    name: of the condition, where there is one. below: conditions that say effect < bar, beside the headline, which
    looks where the claim does.
    ranks: further conditions, by name and head (the head's number, draws of a null): its rank among them, 1 - p, must
    exceed `claim.bars[name]`, which is 1 - level; it can deny and never refutes.
    sources: [n_docs] names; documents of one source are resampled together. n_boot: resamples.

    Raises FraError where a sample is not one number a document.
    """
    table = _by_condition(samples, name)
    if not table or not next(iter(table.values())):
        return {}
    headline = next(iter(table))
    heads = list(table[headline])
    columns: list[Sampled | Given] = []
    for condition, by_head in table.items():
        means = {}
        for head in heads:
            values = _checked(claim, head, condition, by_head.get(head))
            parts = (claim.digest, target, head) if len(table) == 1 else (claim.digest, target, head, condition)
            clustered = values if sources is None else stats.by_source(values, sources)
            counts = None if sources is None else stats.by_source(np.ones_like(values), sources)
            means[head] = stats.ClusterMeans(clustered, counts, seed=stats.seed_of(*parts), n_boot=n_boot)
        looks = claim.above if condition == headline else condition not in below
        bar = claim.bar if condition == headline else claim.bars[condition]
        columns.append(Sampled(name=condition, samples=means, bar=bar, above=looks))
    for condition, own in (ranks or {}).items():
        columns.append(ranked(claim, condition, {h: stats.rank_p(*own[h]) for h in heads}))
    candidate = headline if len(columns) == 1 else "every condition"
    rows = {h: Beside(n=np.size(table[headline][h]), candidates=(candidate,)) for h in heads}
    return decide(
        claim,
        columns,
        rows,
        power=None if null is None else Power("headline", null),
        refuting="holm" if len(columns) == 1 else "bonferroni",
    )


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
