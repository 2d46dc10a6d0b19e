"""Evidence for the claims about removing CIH channels inside a forward pass (Q07, Q17), for the judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from fra.induction.cih import Screen, families
from fra.induction.outside import outside
from fra.measures.channels.details import best_channel
from fra.measures.channels.q07_q17_reading import COPIES, FIRST, KL, LOGIT, LOSS, MEASURES, SECOND
from fra.measures.channels.q07_q17_removal import CIH, EQUAL, MEAN, SUM, HeadRemoval, OnRanked, Plan
from fra.measures.channels.transfer_designs import ChannelSet, MatchedSets, Removal
from fra.report.pictures import CurvesPicture
from fra.statistics import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Drawn, Sampled, decide, means_of

FALL, RISE = "copied-token logit", "loss"
SHARE = "share of the head's"
OVER_SUM = "over the top set by plain sum"
OVER_RANDOM = {m: f"over random live sets: {name}" for m, name in enumerate(MEASURES)}
PER_ATTENTION = "over random live sets: logit per attention moved"
OFF, AGAINST_ABLATION = "off the stripe, against on it", "off the stripe, against ablation at equal suppression"

Sums = Callable[[HeadRemoval], Float[np.ndarray, " n_documents"]]


def plan_of(claim: Claim) -> Plan:
    """What the claim has registered of the measurement."""
    return Plan(claim.designed(ChannelSet), claim.designed(Removal), claim.designed(MatchedSets))


def _means(
    claim: Claim, screened: Screen, found: Mapping[str, HeadRemoval], name: str, sums: Sums
) -> dict[str, stats.ClusterMeans]:
    return {h: means_of(claim, screened.target, h, name, sums(one), one.rows, one.sources) for h, one in found.items()}


def _per_row(found: Mapping[str, HeadRemoval], part: Sums, whole: Sums) -> dict[str, tuple[float, float]]:
    return {h: (part(one).sum() / one.rows.sum(), whole(one).sum() / one.rows.sum()) for h, one in found.items()}


def _of(name: str, copy: int, measure: int) -> Sums:
    return lambda one: np.asarray(one.outcomes[name][:, copy, measure])


def ranks(one: OnRanked | None) -> dict[str, float]:
    """What is ranked of one set, by condition; not a number for a draw without a set, which counts against. Sets are
    matched over both copies and up to a tolerance: what they do for what they move on second copies counts too.
    """
    if one is None:
        return dict.fromkeys((*OVER_RANDOM.values(), PER_ATTENTION), np.nan)
    moved = float(one.displaced[SECOND])
    per_attention = float(one.effects[LOGIT]) / moved if moved > 0 else np.nan
    return {name: float(one.effects[m]) for m, name in OVER_RANDOM.items()} | {PER_ATTENTION: per_attention}


def removal_evidence(claim: Claim, screened: Screen, found: Mapping[str, HeadRemoval]) -> dict[str, Evidence]:
    """Q07: what the removal of every TIH's CIH set does to the model on the second copies."""
    evidence = outside(claim, screened)
    found = {h: found[h] for h in families(screened)["TIH"]}
    if not found:
        return evidence
    fall, by_mean, by_sum = (_of(name, SECOND, LOGIT) for name in (CIH, MEAN, SUM))
    estimands: dict[str, Sums] = {
        FALL: fall,
        RISE: _of(CIH, SECOND, LOSS),
        SHARE: lambda one: fall(one) - claim.bars[SHARE] * by_mean(one),
        OVER_SUM: lambda one: fall(one) - by_sum(one),
    }
    drawn: dict[str, list[OnRanked]] = {h: [] for h in found}

    def draw(head: str, number: int) -> dict[str, float]:
        random = found[head].random
        one = None if random is None else random(number)
        drawn[head] += [] if one is None else [one]
        return ranks(one)

    own = {h: ranks(one.ranked) for h, one in found.items() if one.random is not None}
    columns: list[Sampled | Drawn] = [
        *(
            Sampled(
                name=name,
                samples=_means(claim, screened, found, name, sums),
                shares=_per_row(found, fall, by_mean) if name == SHARE else None,
            )
            for name, sums in estimands.items()
        ),
        Drawn(observed={name: {h: of[name] for h, of in own.items()} for name in ranks(None)}, draw=draw),
    ]
    decided = decide(claim, columns, _rows(screened, found))
    return evidence | {h: replace(e, detail={**e.detail, **_null(found[h], drawn[h])}) for h, e in decided.items()}


def selectivity_evidence(claim: Claim, screened: Screen, found: Mapping[str, HeadRemoval]) -> dict[str, Evidence]:
    """Q17: how little the removal of every TIH's CIH set does where there is nothing to copy yet."""
    evidence = outside(claim, screened)
    found = {h: found[h] for h in families(screened)["TIH"]}
    if not found:
        return evidence
    gate, level = claim.gates[FALL], claim.level / len(found)
    on, off, ablated = _of(CIH, SECOND, KL), _of(CIH, FIRST, KL), _of(EQUAL, FIRST, KL)

    def less_than(name: str, over: Sums, under: Sums) -> Sampled:
        """A condition "over < bar * under"."""
        bar = claim.bar_of(name)
        means = _means(claim, screened, found, name, lambda one: over(one) - bar * under(one))
        return Sampled(name=name, samples=means, shares=_per_row(found, over, under))

    columns = [less_than(OFF, off, on), less_than(AGAINST_ABLATION, off, ablated)]
    suppressed = _means(claim, screened, found, "gate", _of(CIH, SECOND, LOGIT))
    undecided = {}
    for h in found:
        lower = float(suppressed[h].lower(level, simultaneous=False)[0])
        if not lower > gate:
            undecided[h] = (
                f"removal lowers the copied token's logit by {float(suppressed[h].estimate[0]):.2f} (lower bound "
                f"{lower:.2f}): above {gate:g} is needed before it can be selective about it"
            )
    return evidence | decide(claim, columns, _rows(screened, found, undecided))


def _rows(
    screened: Screen, found: Mapping[str, HeadRemoval], undecided: Mapping[str, str] | None = None
) -> dict[str, Beside]:
    return {
        h: Beside(
            candidates=(f"the {CIH}",),
            undecided=(undecided or {}).get(h),
            detail=best_channel(screened, h) | _detail(one),
        )
        for h, one in found.items()
    }


def _detail(one: HeadRemoval) -> dict[str, Any]:
    """Everything that was done to the head."""
    per_row = {name: one.per_row(name) for name in one.outcomes}
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
    sizes = sorted({one.size} | {int(name.split()[0]) for name in per_row if name.endswith(" channels")})
    curves = {
        f"{measure}, {copy}": [float(per_row[CIH if n == one.size else f"{n} channels"][c, m]) for n in sizes]
        for c, copy in enumerate(COPIES)
        for m, measure in enumerate(MEASURES)
    }
    return {
        "channels removed together and what that does (a row)": CurvesPicture(x=sizes, curves=curves),
        "removals (a row)": table,
        "the head's induction": "fall of the copied token's logit, and its share of what mean ablation does",
        "ablation at equal suppression goes this far to the mean": one.suppression,
    }


def _null(one: HeadRemoval, drawn: list[OnRanked]) -> dict[str, Any]:
    """What the set and random live sets do on the ranked documents."""
    found: dict[str, Any] = {
        "on the ranked documents (a row)": dict(zip(MEASURES, map(float, one.ranked.effects), strict=True)),
        "attention moved there (a row)": dict(zip(COPIES, map(float, one.ranked.displaced), strict=True)),
        "logit per attention moved there": ranks(one.ranked)[PER_ATTENTION],
    }
    if one.random is None:
        return found | {"random live sets": "none: too few move as much of the head's attention"}
    if not drawn:
        return found
    return found | {
        "random live sets": {
            "number": len(drawn),
            "taken out this many times over": _quantiles([own.scale for own in drawn]),
            "attention moved on second copies (a row)": _quantiles([float(own.displaced[SECOND]) for own in drawn]),
            "logit per attention moved there": _quantiles([ranks(own)[PER_ATTENTION] for own in drawn]),
            **{name: _quantiles([float(own.effects[m]) for own in drawn]) for m, name in enumerate(MEASURES)},
        }
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    names = {"smallest": 0.0, "median": 0.5, "95th percentile": 0.95, "largest": 1.0}
    return {name: float(np.quantile(values, share)) for name, share in names.items()}
