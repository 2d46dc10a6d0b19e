"""D07: features that an induction head makes are induction features, by what they do on planted documents."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from fra.attribution.planted import Behaviour, PlantedHalf, behaviour, scales
from fra.dictionaries.codes import neuronpedia
from fra.dictionaries.texts import text_of
from fra.measures.families.designs import OwnScale
from fra.measures.families.families import Families, LayerFamilies, Selection
from fra.measures.families.rows import FEATURES, about, outside, shown, too_few, undecided
from fra.statistics import stats
from fra.statistics.bounds import MATCHED
from fra.statistics.exact import Proportion, TwoShares
from fra.stimuli.designs import PlantedTokens
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Sampled, decide, means_of

SHARE, SOURCE = "share that passes", "source is the earlier token"
KNOWS = "share that knows its token"
_LISTED_AT_ONCE = 50


def behaviour_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D07: the share of the selection that passes, against the matches, with the source of what fired.

    The unit of the pass rate is the feature (binomial test; Fisher's order against the matches); that of the source is
    the planted document.
    """
    found = outside(claim, families)
    design = claim.designed(PlantedTokens)
    shares: dict[str, Proportion] = {}
    matched: dict[str, TwoShares] = {}
    sources: dict[str, stats.ClusterMeans] = {}
    rows: dict[str, Beside] = {}
    for head in families.heads:
        families.progress(f"{claim.id}: {head}")
        layer, number = families.of(head)
        selection, half = layer.selections[number], layer.measured
        n = 0 if half is None else int(np.isin(selection.tokens, half.seconds[2]).sum())
        if half is None or n < claim.gates[FEATURES]:
            said = (
                f"{n} features draw most of their attribution from the head and have a token that can be planted, "
                f"where {claim.gates[FEATURES]:g} are needed: a wider dictionary"
            )
            found[head] = undecided(claim, families, head, said, {})
            continue
        own = behaviour(half, selection.features, selection.tokens)
        both, theirs = _of_matches(half, selection)
        passes, tested = own.passes(design), own.repeats > 0
        others = np.unique(both.features)
        passing = np.unique(both.features[both.passes(design)])
        shares[head] = Proportion(int(passes[tested].sum()), int(tested.sum()))
        matched[head] = TwoShares(shares[head].k, shares[head].n, len(passing), len(others))
        sourced, hits = (part.sum(0) for part in (own.sourced_by_document, own.hits_by_document))
        sources[head] = means_of(claim, families.target, head, SOURCE, sourced, hits)
        rows[head] = Beside(
            n=min(len(half.documents), claim.n),
            candidates=("the selection",),
            detail=shown(layer, number)
            | {
                "passed": f"{shares[head].k} of {shares[head].n}",
                "matches passed": f"{len(passing)} of {len(others)}",
                "matches of each, at most": max(map(len, selection.matches), default=0),
            }
            | _behaviour_detail(layer, own, both, theirs, selection)
            | about(families, head),
        )
    columns = [
        Sampled(name=SHARE, samples=shares),
        Sampled(name=MATCHED, samples=matched),
        Sampled(name=SOURCE, samples=sources, bounded=(0.0, 1.0)),
    ]
    return found | decide(claim, columns, rows, q_over=()) if rows else found


def _of_matches(half: PlantedHalf, selection: Selection) -> tuple[Behaviour, Int[np.ndarray, " n_own"]]:
    """The matched features on the tokens of the features that they stand for and on their own; and which rows are on
    their own.
    """
    tokens = zip(selection.matches, selection.tokens.tolist(), strict=True)
    pairs = {(int(m), t) for some, t in tokens for m in some} | set(selection.token_of.items())
    table = np.asarray(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    own = [k for k, (feature, token) in enumerate(table.tolist()) if selection.token_of[feature] == token]
    return behaviour(half, table[:, 0], table[:, 1]), np.asarray(own, dtype=np.int64)


def token_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D07.token: of the family, the share that are strong before the second occurrences of their own token and not of
    others, in units of each feature's scale.
    """
    found = outside(claim, families)
    samples: dict[str, Proportion] = {}
    rows: dict[str, Beside] = {}
    for head in families.heads:
        layer, number = families.of(head)
        half = layer.measured
        few = too_few(claim, layer, number)
        if half is None or few is not None:
            found[head] = undecided(claim, families, head, few or "no token can be planted", {})
            continue
        own, others, above, knows = knowing(layer, number, claim.designed(OwnScale))
        samples[head] = Proportion(int(knows.sum()), len(knows))
        rows[head] = Beside(
            n=min(len(half.documents), claim.n),
            candidates=("the family",),
            detail=shown(layer, number)
            | {
                "features": f"{int(knows.sum())} of {len(knows)}",
                "strong before its own token's second occurrence": _spread(own),
                "strong before another token's": _spread(others),
                "chance that an activation before its own exceeds one before another's": _spread(above),
            }
            | about(families, head),
        )
    columns = [Sampled(name=KNOWS, samples=samples)]
    return found | decide(claim, columns, rows, q_over=()) if rows else found


def knowing(
    layer: LayerFamilies, head: int, design: OwnScale
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"], Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Of every feature of the family, on the measured half: the shares of its own token's and of other tokens' second
    occurrences before which it is strong; the chance that an activation before one of the former exceeds one before one
    of the latter (ties count half); and whether it knows its token.
    """
    assert layer.choosing is not None and layer.measured is not None
    selection, passed = layer.selections[head], layer.family(head)
    features, tokens = selection.features[passed], selection.tokens[passed]
    scale = scales(layer.choosing, features, tokens)
    values = layer.measured.before_seconds(features)
    mine = layer.measured.seconds[2][:, None] == tokens
    strong = values >= design.strong * scale
    own = (strong & mine).sum(0) / mine.sum(0)
    others = (strong & ~mine).sum(0) / (~mine).sum(0)
    above = [stats_of_pairs(values[mine[:, k], k], values[~mine[:, k], k]) for k in range(len(features))]
    knows = (others < design.others_below) & (own > design.own_above)
    return own, others, np.asarray(above), knows


def stats_of_pairs(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> float:
    """The share of pairs in which a's exceeds b's, ties counted half (Mann and Whitney's U over n m)."""
    order = np.sort(b)
    less, upto = np.searchsorted(order, a, "left"), np.searchsorted(order, a, "right")
    return float((less + upto).mean() / (2 * len(b)))


def _spread(values: Float[np.ndarray, " n"]) -> dict[str, float]:
    return {"mean": float(values.mean()), "lowest": float(values.min()), "highest": float(values.max())}


def _behaviour_detail(
    layer: LayerFamilies, own: Behaviour, both: Behaviour, theirs: Int[np.ndarray, " n"], selection: Selection
) -> dict[str, Any]:
    def rate(part: np.ndarray, of: np.ndarray) -> float | None:
        return float(part.sum() / of.sum()) if of.sum() else None

    text, page = text_of(layer.target.tokenizer), neuronpedia(layer.dictionary)
    return {
        "fires before the second occurrence": rate(own.hits, own.repeats),
        "fires before the first occurrence": rate(own.firsts, own.repeats),
        "matches, their own token: before the second": rate(both.hits[theirs], both.repeats[theirs]),
        "matches, their own token: before the first": rate(both.firsts[theirs], both.repeats[theirs]),
        "features": [
            {"feature": int(f), "token": int(t), "text": text(int(t)), "share": float(s)}
            | {"hits": int(h), "firsts": int(x), "of": int(n)}
            | ({} if page is None else {"page": f"{page}/{int(f)}"})
            for f, t, s, h, x, n in zip(
                own.features, own.tokens, selection.shares, own.hits, own.firsts, own.repeats, strict=True
            )
        ][:_LISTED_AT_ONCE],
    }
