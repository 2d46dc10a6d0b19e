"""Evidence for the claims about pairs of features on natural text: Q09, Q10 and Q11."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fra.measures.pairs.q09_q11_pairs import HeadPairs, LayerPairs
from fra.measures.pairs.q10_prediction import Prediction
from fra.report.pictures import STRONGEST
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.conditions import rank_condition
from fra.verdicts.jackknife import Jackknifed, conditions, p_above, power

Layers = Mapping[int, LayerPairs]


def _heads(layers: Layers, of: Callable[[LayerPairs], list[Any] | str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What `of` gives for every head of the layers that have it, and why the others' heads have none."""
    measured, cannot = {}, {}
    for layer, own in layers.items():
        got = of(own)
        for head in range(own.n_heads):
            if isinstance(got, str):
                cannot[f"L{layer}H{head}"] = got
            else:
                measured[f"L{layer}H{head}"] = got[head]
    return measured, cannot


def _documents(layers: Layers) -> int:
    return max((own.n_documents for own in layers.values()), default=0)


def _assemble(
    claim: Claim,
    layers: Layers,
    columns: Mapping[str, Mapping[str, Condition]],
    headline: Mapping[str, Jackknifed],
    cannot: Mapping[str, str],
    detail: Callable[[str], dict[str, Any]],
) -> dict[str, Evidence]:
    found = {name: Evidence(claim=claim, head=name, cannot=why) for name, why in cannot.items()}
    heads = list(headline)
    q = stats.benjamini_hochberg([p_above(headline[name], claim.bar) for name in heads])
    for k, name in enumerate(heads):
        found[name] = Evidence(
            claim=claim,
            head=name,
            candidates={"pairs": tuple(column[name] for column in columns.values())},
            n=_documents(layers),
            power=power(headline[name], claim.bar, 0.0, claim.level / len(heads)),
            q=float(q[k]),
            detail=detail(name),
        )
    return found


def _pooled(ranked: Mapping[str, HeadPairs], name: str, which: str) -> list[float]:
    """The null draws of all heads of this head's layer."""
    layer = name.split("H")[0]
    return [value for other, own in ranked.items() if other.split("H")[0] == layer for value in getattr(own, which)]


def self_channels(claim: Claim, layers: Layers) -> dict[str, Evidence]:
    """Q09: share of self channels above what relabelled features have, above co-activation, rank among relabellings."""
    ranked: dict[str, HeadPairs]
    ranked, cannot = _heads(layers, lambda own: own.pairs)
    if not ranked:
        return _assemble(claim, layers, {}, {}, cannot, lambda _: {})
    null = {name: float(np.mean(_pooled(ranked, name, "self_shuffled"))) for name in ranked}
    excess = {name: own.self_share.less(null[name]) for name, own in ranked.items()}
    over = {name: own.self_share.less(own.self_coactive) for name, own in ranked.items()}
    name_of = ("share above relabelled features", "over co-activation alone", "rank among relabelled features")
    columns = {
        name_of[0]: conditions(name_of[0], claim.bar, excess, claim.level, 2),
        name_of[1]: conditions(name_of[1], claim.bars[name_of[1]], over, claim.level, 2),
        name_of[2]: {
            name: rank_condition(
                name_of[2],
                stats.rank_p(own.self_share.estimate, _pooled(ranked, name, "self_shuffled")),
                claim.level,
            )
            for name, own in ranked.items()
        },
    }

    def detail(name: str) -> dict[str, Any]:
        own = ranked[name]
        return _strongest(own) | {
            "share of self channels among the 50": own.self_share.estimate,
            "with relabelled features": null[name],
            "by co-activation alone": own.self_coactive.estimate,
            "strongest (query feature, key feature)": [list(pair) for pair in own.strongest[:10]],
        }

    return _assemble(claim, layers, columns, excess, cannot, detail)


def _strongest(own: HeadPairs) -> dict[str, Any]:
    return {} if own.picture is None else {STRONGEST: own.picture}


def stability(claim: Claim, layers: Layers) -> dict[str, Evidence]:
    """Q11: Jaccard over halves against the bar, the same without any minimum, random atoms, and relabelled features."""
    ranked: dict[str, HeadPairs]
    ranked, cannot = _heads(layers, lambda own: own.unstable or own.pairs)
    if not ranked:
        return _assemble(claim, layers, {}, {}, cannot, lambda _: {})
    own = {name: pairs.stable for name, pairs in ranked.items()}
    loose = {name: p.stable.less(p.stable_any) for name, p in ranked.items() if p.stable_any is not None}
    atoms = {name: p.stable.less(p.stable_atoms) for name, p in ranked.items() if p.stable_atoms is not None}
    titles = ("Jaccard of the top 50", "over no minimum", "over random atoms", "rank among relabelled features")
    columns = {
        titles[0]: conditions(titles[0], claim.bar, own, claim.level, 3),
        titles[1]: conditions(titles[1], claim.bars[titles[1]], loose, claim.level, 3),
        titles[2]: conditions(titles[2], claim.bars[titles[2]], atoms, claim.level, 3),
        titles[3]: {
            name: rank_condition(
                titles[3], stats.rank_p(p.stable.estimate, _pooled(ranked, name, "stable_shuffled")), claim.level
            )
            for name, p in ranked.items()
        },
    }

    def detail(name: str) -> dict[str, Any]:
        pairs = ranked[name]
        return _strongest(pairs) | {
            "Jaccard without a minimum": None if pairs.stable_any is None else pairs.stable_any.estimate,
            "Jaccard of random atoms": None if pairs.stable_atoms is None else pairs.stable_atoms.estimate,
            "Jaccard with relabelled features": float(np.mean(pairs.stable_shuffled)),
            "standard error (jackknife over sources)": pairs.stable.se,
        }

    return _assemble(claim, layers, columns, own, cannot, detail)


def prediction(claim: Claim, layers: Layers) -> dict[str, Evidence]:
    """Q10: rank correlation against the bar, rank among matched permutations, spread of where the head looks."""
    every: dict[str, Prediction]
    every, cannot = _heads(layers, lambda own: own.predictions)
    if not every:
        return _assemble(claim, layers, {}, {}, cannot, lambda _: {})
    correlation = {name: one.correlation for name, one in every.items()}
    spread = {name: one.spread for name, one in every.items()}
    titles = ("Spearman", "rank among matched pairs", "spread of the log ratio")
    columns = {
        titles[0]: conditions(titles[0], claim.bar, correlation, claim.level, 2),
        titles[1]: {
            name: rank_condition(titles[1], stats.rank_p(one.correlation.estimate, one.matched), claim.level)
            for name, one in every.items()
        },
        titles[2]: conditions(titles[2], claim.bars[titles[2]], spread, claim.level, 2),
    }

    def detail(name: str) -> dict[str, Any]:
        one = every[name]
        return {
            "G permuted among matched pairs, mean": float(np.mean(one.matched)),
            "standard error (jackknife over sources)": one.correlation.se,
        }

    return _assemble(claim, layers, columns, correlation, cannot, detail)
