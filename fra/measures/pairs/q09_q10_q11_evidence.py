"""Evidence for the claims about pairs of features on natural text: Q09, Q10 and Q11."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fra.measures.pairs.q09_q11_pairs import HeadPairs, LayerPairs
from fra.measures.pairs.q10_prediction import Prediction
from fra.report.pictures import STRONGEST
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Given, Sampled, decide, ranked
from fra.verdicts.jackknife import Jackknifed, power

Layers = Mapping[int, LayerPairs]


def _heads(
    claim: Claim, layers: Layers, of: Callable[[LayerPairs], list[Any] | str]
) -> tuple[dict[str, Any], dict[str, Evidence]]:
    """What `of` gives for every head of the layers that have it, and why the others' heads have none."""
    measured, cannot = {}, {}
    for layer, own in layers.items():
        got = of(own)
        for head in range(own.n_heads):
            name = f"L{layer}H{head}"
            if isinstance(got, str):
                cannot[name] = Evidence(claim=claim, head=name, cannot=got)
            else:
                measured[name] = got[head]
    return measured, cannot


def _decided(
    claim: Claim,
    layers: Layers,
    columns: Sequence[Sampled | Given],
    headline: Mapping[str, Jackknifed],
    detail: Callable[[str], dict[str, Any]],
) -> dict[str, Evidence]:
    level = claim.level / len(headline)
    rows = {
        name: Beside(
            n=max(layer.n_documents for layer in layers.values()),
            candidates=("pairs",),
            power=power(own, claim.bar, 0.0, level),
            detail=detail(name),
        )
        for name, own in headline.items()
    }
    return decide(claim, columns, rows)


def _pooled(every: Mapping[str, HeadPairs], name: str, which: str) -> list[float]:
    """The null draws of all heads of this head's layer."""
    layer = name.split("H")[0]
    return [value for other, own in every.items() if other.split("H")[0] == layer for value in getattr(own, which)]


def self_channels(claim: Claim, layers: Layers) -> dict[str, Evidence]:
    """Q09: share of self channels above what relabelled features have, above co-activation, rank among relabellings."""
    every: dict[str, HeadPairs]
    every, found = _heads(claim, layers, lambda own: own.pairs)
    if not every:
        return found
    relabelled = {name: _pooled(every, name, "self_shuffled") for name in every}
    null = {name: float(np.mean(draws)) for name, draws in relabelled.items()}
    excess = {name: own.self_share.less(null[name]) for name, own in every.items()}
    over = {name: own.self_share.less(own.self_coactive) for name, own in every.items()}
    ranks = {name: stats.rank_p(own.self_share.estimate, relabelled[name]) for name, own in every.items()}
    columns: list[Sampled | Given] = [
        Sampled(name="share above relabelled features", samples=excess),
        Sampled(name="over co-activation alone", samples=over),
        ranked(claim, "rank among relabelled features", ranks),
    ]

    def detail(name: str) -> dict[str, Any]:
        own = every[name]
        return _strongest(own) | {
            "share of self channels among the 50": own.self_share.estimate,
            "with relabelled features": null[name],
            "by co-activation alone": own.self_coactive.estimate,
            "strongest (query feature, key feature)": [list(pair) for pair in own.strongest[:10]],
        }

    return found | _decided(claim, layers, columns, excess, detail)


def _strongest(own: HeadPairs) -> dict[str, Any]:
    return {} if own.picture is None else {STRONGEST: own.picture}


def stability(claim: Claim, layers: Layers) -> dict[str, Evidence]:
    """Q11: Jaccard over halves against the bar, the same without any minimum, random atoms, and relabelled features."""
    every: dict[str, HeadPairs]
    every, found = _heads(claim, layers, lambda own: own.unstable or own.pairs)
    if not every:
        return found
    own = {name: pairs.stable for name, pairs in every.items()}
    loose = {name: p.stable.less(p.stable_any) for name, p in every.items() if p.stable_any is not None}
    atoms = {name: p.stable.less(p.stable_atoms) for name, p in every.items() if p.stable_atoms is not None}
    ranks = {
        name: stats.rank_p(p.stable.estimate, _pooled(every, name, "stable_shuffled")) for name, p in every.items()
    }
    columns: list[Sampled | Given] = [
        Sampled(name="Jaccard of the top 50", samples=own),
        Sampled(name="over no minimum", samples=loose),
        Sampled(name="over random atoms", samples=atoms),
        ranked(claim, "rank among relabelled features", ranks),
    ]

    def detail(name: str) -> dict[str, Any]:
        pairs = every[name]
        return _strongest(pairs) | {
            "Jaccard without a minimum": None if pairs.stable_any is None else pairs.stable_any.estimate,
            "Jaccard of random atoms": None if pairs.stable_atoms is None else pairs.stable_atoms.estimate,
            "Jaccard with relabelled features": float(np.mean(pairs.stable_shuffled)),
            "standard error (jackknife over sources)": pairs.stable.se,
        }

    return found | _decided(claim, layers, columns, own, detail)


def prediction(claim: Claim, layers: Layers) -> dict[str, Evidence]:
    """Q10: rank correlation against the bar, rank among matched permutations, spread of where the head looks."""
    every: dict[str, Prediction]
    every, found = _heads(claim, layers, lambda own: own.predictions)
    if not every:
        return found
    correlation = {name: one.correlation for name, one in every.items()}
    ranks = {name: stats.rank_p(one.correlation.estimate, one.matched) for name, one in every.items()}
    columns: list[Sampled | Given] = [
        Sampled(name="Spearman", samples=correlation),
        ranked(claim, "rank among matched pairs", ranks),
        Sampled(name="spread of the log ratio", samples={name: one.spread for name, one in every.items()}),
    ]

    def detail(name: str) -> dict[str, Any]:
        one = every[name]
        return {
            "G permuted among matched pairs, mean": float(np.mean(one.matched)),
            "standard error (jackknife over sources)": one.correlation.se,
        }

    return found | _decided(claim, layers, columns, correlation, detail)
