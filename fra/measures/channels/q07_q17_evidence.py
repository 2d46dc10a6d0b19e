"""Evidence for the claims about removing CIH channels inside a forward pass (Q07, Q17), for the judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from fra.induction.cih import Screen, families
from fra.induction.screen import SET_SIZES
from fra.measures.channels.details import best_channel
from fra.measures.channels.q04_q05_sets import outside
from fra.measures.channels.q07_q17_removal import CIH, COPIES, DRAWS, EQUAL, MEAN, MEASURES, SUM, HeadRemoval
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.conditions import cluster_means, false_discovery, rank_condition, two_sided
from fra.verdicts.stats import ClusterMeans

LOGIT, LOSS, KL = range(len(MEASURES))
SECOND, FIRST = range(len(COPIES))
TENTH = "beyond a tenth of the head's"
OVER_SUM = "over the top set by plain sum"
OVER_RANDOM = tuple(f"over random live sets: {name}" for name in MEASURES)
PER_ATTENTION = "over random live sets: logit per attention moved"
AGAINST_ABLATION = "off the stripe, against ablation at equal suppression"

Sums = Callable[[HeadRemoval], Float[np.ndarray, " n_documents"]]


def _means(claim: Claim, screened: Screen, found: Mapping[str, HeadRemoval], name: str, sums: Sums) -> Any:
    return {
        h: cluster_means(
            sums(one)[:, None], one.rows[:, None], one.sources, stats.seed_of(claim.digest, screened.target, h, name)
        )
        for h, one in found.items()
    }


def removal_evidence(claim: Claim, screened: Screen, found: Mapping[str, HeadRemoval]) -> dict[str, Evidence]:
    """Q07: what the removal of every TIH's CIH set does to the model on the second copies."""
    heads = families(screened)["TIH"]
    evidence = outside(claim, screened, "TIH")
    if not heads:
        return evidence

    def second(one: HeadRemoval, name: str, measure: int) -> np.ndarray:
        return np.asarray(one.outcomes[name][:, SECOND, measure])

    estimands: dict[str, Sums] = {
        "copied-token logit": lambda one: second(one, CIH, LOGIT),
        "loss": lambda one: second(one, CIH, LOSS),
        TENTH: lambda one: second(one, CIH, LOGIT) - 0.1 * second(one, MEAN, LOGIT),
        OVER_SUM: lambda one: second(one, CIH, LOGIT) - second(one, SUM, LOGIT),
    }
    means = {name: _means(claim, screened, found, name, sums) for name, sums in estimands.items()}
    columns = [
        two_sided(name, claim.bars.get(name, claim.bar), means[name], claim.level, len(estimands), False)
        for name in estimands
    ]
    q = false_discovery(heads, means["copied-token logit"], claim.bar)
    for h in heads:
        one = found[h]
        against = dict(zip(OVER_RANDOM, zip(one.observed, one.draws.T, strict=True), strict=True))
        # sets are matched within 1 % and over both copies: what they do for what they move on second copies counts too
        against[PER_ATTENTION] = (
            one.observed[LOGIT] / np.maximum(one.displaced[SECOND], 1e-9),
            one.draws[:, LOGIT] / np.maximum(one.draws_displaced[:, SECOND], 1e-9),
        )
        ranked = tuple(
            rank_condition(name, stats.rank_p(float(observed), draws), claim.level)
            if len(one.draws) >= DRAWS
            else Condition(name, np.nan, -np.inf, np.inf, 1 - claim.level)
            for name, (observed, draws) in against.items()
        )
        headline = means["copied-token logit"][h]
        evidence[h] = Evidence(
            claim=claim,
            head=h,
            candidates={f"the {CIH} of the CIH set": (*(column[h][0] for column in columns), *ranked)},
            n=len(one.rows),
            power=float(stats.power_above(headline, 0.0, claim.bar, claim.level / len(heads), simultaneous=False)[0]),
            q=q[h],
            detail=best_channel(screened, h) | _detail(one),
        )
    return evidence


def selectivity_evidence(claim: Claim, screened: Screen, found: Mapping[str, HeadRemoval]) -> dict[str, Evidence]:
    """Q17: how little the removal of every TIH's CIH set does where there is nothing to copy yet."""
    heads = families(screened)["TIH"]
    evidence = outside(claim, screened, "TIH")
    if not heads:
        return evidence
    gate = claim.bars["gate: copied-token logit"]
    suppressed = _means(claim, screened, found, "gate", lambda one: one.outcomes[CIH][:, SECOND, LOGIT])
    on: Sums = lambda one: one.outcomes[CIH][:, SECOND, KL]  # noqa: E731
    off: Sums = lambda one: one.outcomes[CIH][:, FIRST, KL]  # noqa: E731
    ablated: Sums = lambda one: one.outcomes[EQUAL][:, FIRST, KL]  # noqa: E731
    headline, p = _ratios(claim, screened, found, "off the stripe, against on it", claim.bar, off, on)
    against, _ = _ratios(claim, screened, found, AGAINST_ABLATION, claim.bars[AGAINST_ABLATION], off, ablated)
    q = dict(zip(p, stats.benjamini_hochberg(list(p.values())), strict=True))
    for h in heads:
        one = found[h]
        per_row = float(on(one).sum() / one.rows.sum())
        # Of telling a removal at the bar from one that does as much off the stripe as on it.
        apart = _means(claim, screened, {h: one}, "power", lambda one: on(one) - off(one))[h]
        power = stats.power_above(apart, 0.0, (1 - claim.bar) * per_row, claim.level / len(heads), simultaneous=False)
        lower = float(suppressed[h].lower(claim.level / len(heads), simultaneous=False)[0])
        undecided = None
        if not lower > gate:
            undecided = (
                f"removal lowers the copied token's logit by {float(suppressed[h].estimate[0]):.2f} (lower bound "
                f"{lower:.2f}): above {gate:g} is needed before it can be selective about it"
            )
        evidence[h] = Evidence(
            claim=claim,
            head=h,
            candidates={f"the {CIH} of the CIH set": (headline[h], against[h])},
            n=len(one.rows),
            power=float(power[0]),
            q=float(q[h]),
            undecided=undecided,
            detail=best_channel(screened, h) | _detail(one),
        )
    return evidence


def _ratios(
    claim: Claim, screened: Screen, found: Mapping[str, HeadRemoval], name: str, bar: float, over: Sums, under: Sums
) -> tuple[dict[str, Condition], dict[str, float]]:
    """One condition "ratio < bar" a head, tested as over - bar * under < 0: Holm across heads; the opposite, which any
    of two conditions may show, Bonferroni. Beside it, the p-values before they are adjusted.
    """
    means: dict[str, ClusterMeans] = _means(claim, screened, found, name, lambda one: over(one) - bar * under(one))
    heads = list(means)
    below = [float(means[h].p_below(0.0, simultaneous=False)[0]) for h in heads]
    levels, adjusted = stats.holm_levels(below, claim.level), stats.holm(below)
    tests = 2 * len(heads)
    conditions = {}
    for k, h in enumerate(heads):
        m, one = means[h], found[h]
        size = float(under(one).sum() / one.rows.sum())
        bounds = m.lower(claim.level / tests, simultaneous=False)[0], m.upper(levels[k], simultaneous=False)[0]
        low, high = (bar + float(end) / size if size > 0 else np.nan for end in bounds)
        conditions[h] = Condition(
            name,
            float(over(one).sum() / under(one).sum()) if size > 0 else np.nan,
            low,
            high,
            bar,
            p=float(adjusted[k]),
            p_refute=float(min(1.0, tests * m.p_above(0.0, simultaneous=False)[0])),
            above=False,
        )
    return conditions, dict(zip(heads, below, strict=True))


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
        "channels removed together and what that does (a row)": {"x": sizes, "curves": curves},
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
