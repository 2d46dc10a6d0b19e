"""Evidence for the claims about removing CIH channels inside a forward pass (Q07, Q17), for the judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from fra.induction.cih import Screen, families
from fra.induction.outside import outside
from fra.induction.screen import SET_SIZES
from fra.measures.channels.details import best_channel
from fra.measures.channels.q07_q17_removal import (
    CIH,
    COPIES,
    DRAWS,
    EQUAL,
    FIRST,
    KL,
    LOGIT,
    LOSS,
    MEAN,
    MEASURES,
    SECOND,
    SUM,
    HeadRemoval,
)
from fra.report.pictures import CurvesPicture
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Given, Power, Sampled, decide, means_of, ranked

SHARE = "share of the head's"
OVER_SUM = "over the top set by plain sum"
OVER_RANDOM = {m: f"over random live sets: {name}" for m, name in enumerate(MEASURES)}
PER_ATTENTION = "over random live sets: logit per attention moved"
AGAINST_ABLATION = "off the stripe, against ablation at equal suppression"

Sums = Callable[[HeadRemoval], Float[np.ndarray, " n_documents"]]


def _means(
    claim: Claim, screened: Screen, found: Mapping[str, HeadRemoval], name: str, sums: Sums
) -> dict[str, stats.ClusterMeans]:
    return {h: means_of(claim, screened.target, h, name, sums(one), one.rows, one.sources) for h, one in found.items()}


def removal_evidence(claim: Claim, screened: Screen, found: Mapping[str, HeadRemoval]) -> dict[str, Evidence]:
    """Q07: what the removal of every TIH's CIH set does to the model on the second copies."""
    evidence = outside(claim, screened)
    found = {h: found[h] for h in families(screened)["TIH"]}
    if not found:
        return evidence

    def second(one: HeadRemoval, name: str, measure: int) -> np.ndarray:
        return np.asarray(one.outcomes[name][:, SECOND, measure])

    estimands: dict[str, Sums] = {
        "copied-token logit": lambda one: second(one, CIH, LOGIT),
        "loss": lambda one: second(one, CIH, LOSS),
        SHARE: lambda one: second(one, CIH, LOGIT) - claim.bars[SHARE] * second(one, MEAN, LOGIT),
        OVER_SUM: lambda one: second(one, CIH, LOGIT) - second(one, SUM, LOGIT),
    }
    against = {
        name: {h: (float(one.observed[m]), one.draws[:, m]) for h, one in found.items()}
        for m, name in OVER_RANDOM.items()
    }
    # sets are matched within 1 % and over both copies: what they do for what they move on second copies counts too
    against[PER_ATTENTION] = {
        h: (
            float(one.observed[LOGIT] / np.maximum(one.displaced[SECOND], 1e-9)),
            one.draws[:, LOGIT] / np.maximum(one.draws_displaced[:, SECOND], 1e-9),
        )
        for h, one in found.items()
    }
    shares = {
        h: (
            float(second(one, CIH, LOGIT).sum() / one.rows.sum()),
            float(second(one, MEAN, LOGIT).sum() / one.rows.sum()),
        )
        for h, one in found.items()
    }
    columns: list[Sampled | Given] = [
        *(
            Sampled(
                name=name,
                samples=_means(claim, screened, found, name, sums),
                shares=shares if name == SHARE else None,
            )
            for name, sums in estimands.items()
        ),
        *(
            ranked(claim, name, {h: stats.rank_p(*own) for h, own in by_head.items() if len(found[h].draws) >= DRAWS})
            for name, by_head in against.items()
        ),
    ]
    return evidence | decide(claim, columns, _rows(screened, found), power=Power("headline"))


def selectivity_evidence(claim: Claim, screened: Screen, found: Mapping[str, HeadRemoval]) -> dict[str, Evidence]:
    """Q17: how little the removal of every TIH's CIH set does where there is nothing to copy yet."""
    evidence = outside(claim, screened)
    found = {h: found[h] for h in families(screened)["TIH"]}
    if not found:
        return evidence
    gate, level = claim.bars["gate: copied-token logit"], claim.level / len(found)
    on: Sums = lambda one: one.outcomes[CIH][:, SECOND, KL]  # noqa: E731
    off: Sums = lambda one: one.outcomes[CIH][:, FIRST, KL]  # noqa: E731
    ablated: Sums = lambda one: one.outcomes[EQUAL][:, FIRST, KL]  # noqa: E731

    def less_than(name: str, bar: float, over: Sums, under: Sums) -> Sampled:
        """A condition "over < bar * under"."""
        per_row = {h: (over(one).sum() / one.rows.sum(), under(one).sum() / one.rows.sum()) for h, one in found.items()}
        means = _means(claim, screened, found, name, lambda one: over(one) - bar * under(one))
        return Sampled(name=name, samples=means, shares=per_row, bar=bar, above=False)

    columns = [
        less_than("off the stripe, against on it", claim.bar, off, on),
        less_than(AGAINST_ABLATION, claim.bars[AGAINST_ABLATION], off, ablated),
    ]
    suppressed = _means(claim, screened, found, "gate", lambda one: one.outcomes[CIH][:, SECOND, LOGIT])
    # the power to tell a removal at the bar from one that does as much off the stripe as on it
    apart = _means(claim, screened, found, "power", lambda one: on(one) - off(one))
    undecided, power = {}, {}
    for h, one in found.items():
        at_bar = (1 - claim.bar) * float(on(one).sum() / one.rows.sum())
        power[h] = float(stats.power_above(apart[h], 0.0, at_bar, level, simultaneous=False)[0])
        lower = float(suppressed[h].lower(level, simultaneous=False)[0])
        if not lower > gate:
            undecided[h] = (
                f"removal lowers the copied token's logit by {float(suppressed[h].estimate[0]):.2f} (lower bound "
                f"{lower:.2f}): above {gate:g} is needed before it can be selective about it"
            )
    return evidence | decide(claim, columns, _rows(screened, found, power, undecided))


def _rows(
    screened: Screen,
    found: Mapping[str, HeadRemoval],
    power: Mapping[str, float] | None = None,
    undecided: Mapping[str, str] | None = None,
) -> dict[str, Beside]:
    return {
        h: Beside(
            n=len(one.rows),
            candidates=(f"the {CIH} of the CIH set",),
            power=(power or {}).get(h),
            undecided=(undecided or {}).get(h),
            detail=best_channel(screened, h) | _detail(one),
        )
        for h, one in found.items()
    }


def _detail(one: HeadRemoval) -> dict[str, Any]:
    """Everything that was done to the head, and what random sets do."""
    n = one.rows.sum()
    per_row = {name: sums.sum(0) / n for name, sums in one.outcomes.items()}
    whole = float(per_row[MEAN][SECOND, LOGIT])
    table: list[dict[str, Any]] = [
        {"done to the head": name}
        | {
            f"{measure}, {copy}": float(values[c, m])
            for c, copy in enumerate(COPIES)
            for m, measure in enumerate(MEASURES)
        }
        | {"share of the head's induction": float(values[SECOND, LOGIT]) / whole if whole > 0 else None}
        for name, values in per_row.items()
    ]
    sizes = [size for size in SET_SIZES if f"{size} channels" in per_row]
    curves = {
        f"{measure}, {copy}": [float(per_row[f"{size} channels"][c, m]) for size in sizes]
        for c, copy in enumerate(COPIES)
        for m, measure in enumerate(MEASURES)
    }
    detail: dict[str, Any] = {
        "channels removed together and what that does (a row)": CurvesPicture(x=sizes, curves=curves),
        "removals (a row)": table,
        "the head's induction": "fall of the copied token's logit, and its share of what mean ablation does",
        "ablation at equal suppression goes this far to the mean": one.suppression,
        "on the rank documents": dict(zip(MEASURES, map(float, one.observed), strict=True)),
        "attention moved there (a row)": dict(zip(COPIES, map(float, one.displaced), strict=True)),
    }
    if len(one.draws):
        moved, own = one.draws_displaced[:, SECOND], float(one.displaced[SECOND])
        detail["random live sets"] = {
            "number": len(one.draws),
            "taken out this many times over": _quantiles(one.scales),
            "attention moved on second copies (a row)": _quantiles(moved),
            "logit per attention moved there": _quantiles(one.draws[:, LOGIT] / np.maximum(moved, 1e-9)),
            **{name: _quantiles(one.draws[:, m]) for m, name in enumerate(MEASURES)},
        }
        detail["logit per attention moved there"] = float(one.observed[LOGIT]) / max(own, 1e-9)
    return detail


def _quantiles(values: Float[np.ndarray, " n"]) -> dict[str, float]:
    names = {"smallest": 0.0, "median": 0.5, "95th percentile": 0.95, "largest": 1.0}
    return {name: float(np.quantile(values, share)) for name, share in names.items()}
