"""Context features of a head-output dictionary: what they fire after, and whether they fire there and nowhere else.

A context feature's *word* is the token at its strongest source (over all heads), where one token is that for at least
half of its firing on discovery documents. It is *local* where that source lies at most NEAR tokens back (median), else
*long-range*. Proxies are those of Kissane et al. (2024), with the word found by attribution and not by hand: local, at
most NEAR tokens after the word, up to the next punctuation mark; long-range, anywhere after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fra.measures.families.families import CONTROL_SHARE, Families, LayerFamilies, attribution_shares
from fra.measures.families.measures import Specificity, specificity, strict_induction
from fra.measures.families.rows import NO_FAMILY, HeadNumbers, family_of, per_head
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import WHOLE, Beside, Sampled, decide, means_of
from fra.verdicts.stats import Floats

UPPER, PERMUTED, MASS, MISSED = (
    "precision of the upper fifth",
    "over permuted documents",
    "activation mass",
    "missed",
)

NEAR = 10
LEAST_ROWS = 30
ENTRIES = 24
"""Firing rows of a feature, spread over discovery documents, whose sources are looked at."""
SOURCE_SHARE = 0.5
MOST = 40
"""Features of a layer and kind, those with the highest source share first."""
PUNCTUATION = frozenset(".,;:!?\"'()[]{}")


def context_features(layer: LayerFamilies) -> dict[str, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """(features, words) of the layer by kind, "local" and "long-range", from discovery documents alone.

    Features with CONTROL_SHARE or more of their attribution from an induction head are left out.
    """
    found = layer.found
    shares, rows = attribution_shares(found)
    eligible = (rows >= LEAST_ROWS) & ~(shares[:, layer.heads].amax(1) >= CONTROL_SHARE)
    live = found.live.where((found.live.pos > 0) & eligible[found.live.feature])
    order = torch.argsort(live.feature, stable=True)
    start = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(live.feature.cpu()).cumsum(0)])
    rank = torch.arange(len(order)) - start[live.feature[order].cpu()]
    count = rows.cpu()[live.feature[order].cpu()]
    picked = (rank * ENTRIES) // count != ((rank - 1) * ENTRIES) // count  # evenly spaced, ENTRIES of each
    chosen = torch.zeros(len(live), dtype=torch.bool)
    chosen[order.cpu()[picked]] = True
    at = live.where(chosen.to(live.pos.device))
    source = found.top_sources(at)[0][:, 0]
    token = layer.discovery.tokens.to(source.device)[at.doc, source]
    back = at.pos - source
    usable = (source > 0) & (back > 0)
    kinds: dict[str, list[tuple[float, int, int]]] = {"local": [], "long-range": []}
    for feature in torch.unique(at.feature).tolist():
        own = at.feature == feature
        words = token[own & usable]
        if not len(words):
            continue
        ids, counts = torch.unique(words, return_counts=True)
        share = float(counts.max()) / int(own.sum())
        if share >= SOURCE_SHARE:
            word = int(ids[counts.argmax()])
            median = float(back[own & usable & (token == word)].float().median())
            kinds["local" if median <= NEAR else "long-range"].append((-share, feature, word))
    return {
        kind: (np.asarray([f for _, f, _ in some], dtype=np.int64), np.asarray([w for *_, w in some], dtype=np.int64))
        for kind, some in ((kind, sorted(rows)[:MOST]) for kind, rows in kinds.items())
    }


def after_word(
    tokens: Int[Tensor, "batch pos"], word: int, stops: Bool[Tensor, "batch pos"] | None
) -> Bool[Tensor, "batch pos"]:
    """Rows after the word: anywhere, or, with `stops`, at most NEAR back and with no stop from there to the row."""
    is_word = tokens == word
    if stops is None:
        return (is_word.cumsum(1) - is_word.long()) > 0
    found = torch.zeros_like(is_word)
    open_ = is_word.clone()  # a word that no stop has closed, so many tokens back
    for _ in range(NEAR):
        open_ = torch.cat([torch.zeros_like(open_[:, :1]), open_[:, :-1]], dim=1) & ~stops
        found |= open_
    return found


def context_evidence(claim: Claim, families: Families, kind: str) -> Evidence:
    """D08.local and D08.context: all such features of the layers with families, on the measurement documents."""
    parts: list[Specificity] = []
    names: dict[str, list[str]] = {}
    sources: Sequence[str] = ()
    n = 0
    picture: dict[str, Any] = {}
    for number, layer in sorted(families.layers.items()):
        families.progress(f"{claim.id}: layer {number}")
        features, words = context_features(layer)[kind]
        if not len(features):
            continue
        tokens = layer.documents.tokens.to(layer.observed.z.device)
        stops = None
        if kind == "local":
            marks = torch.tensor([t for t in torch.unique(tokens).tolist() if _is_mark(layer, t)], dtype=torch.long)
            stops = torch.isin(tokens, marks.to(tokens.device))
        parts.append(specificity(layer, features, [after_word(tokens, int(w), stops) for w in words]))
        picture = picture or layer.picture(int(features[0]), {"all heads": None})
        text = layer.target.tokenizer.decode
        names[f"layer {number}"] = [f"{f}: {text([int(w)])!r}" for f, w in zip(features, words, strict=True)]
        sources, n = layer.documents.sources, len(layer.documents)
    if not families.layers:
        return Evidence(
            claim=claim, head=None, cannot="no layer has both an induction head and a dictionary of outputs"
        )
    if not parts:
        return Evidence(claim=claim, head=None, undecided=f"no {kind} context feature was found on discovery documents")

    def total(name: str) -> Floats:
        return np.asarray(sum(getattr(part, name) for part in parts))

    numbers = {
        UPPER: (total("upper_right"), total("upper")),
        PERMUTED: (total("upper_right") - total("upper_permuted"), total("upper")),
        MASS: (total("mass_right"), total("mass")),
        MISSED: (total("missed"), total("wanted")),
    }
    columns = [
        Sampled(
            name=name,
            samples={WHOLE: means_of(claim, families.target, WHOLE, name, *column, sources)},
            bounded=(-1.0 if name == PERMUTED else 0.0, 1.0),
        )
        for name, column in numbers.items()
    ]
    beside = Beside(
        n=min(n, claim.n),
        candidates=(f"{sum(map(len, names.values()))} features",),
        detail=picture
        | {
            "features and their words": names,
            "precision by fifth of activation": [part.precision_by_fifth for part in parts],
            "recall": 1 - float(total("missed").sum() / total("wanted").sum()) if total("wanted").sum() else None,
            "correlation with the proxy": [part.correlation for part in parts],
        },
    )
    return decide(claim, columns, {WHOLE: beside}, q_over=())[WHOLE]


def _is_mark(layer: LayerFamilies, token: int) -> bool:
    text = str(layer.target.tokenizer.decode([token])).strip()
    return bool(text) and set(text) <= PUNCTUATION


def specificity_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D08: the family's activations against strict induction of each feature's token."""

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        selection, passed, detail = family_of(layer, head)
        n = len(layer.documents)
        if not len(passed):
            return HeadNumbers({}, (), n, detail=detail, undecided=NO_FAMILY)
        tokens = layer.documents.tokens.to(layer.observed.z.device)
        proxies = list(strict_induction(tokens, selection.tokens[passed]))
        s = specificity(layer, selection.features[passed], proxies)
        if not s.upper.sum() or not s.wanted.sum():
            return HeadNumbers({}, (), n, detail=detail, undecided="the family hardly fires on these documents")
        return HeadNumbers(
            {
                UPPER: (s.upper_right, s.upper),
                PERMUTED: (s.upper_right - s.upper_permuted, s.upper),
                MASS: (s.mass_right, s.mass),
                MISSED: (s.missed, s.wanted),
            },
            layer.documents.sources,
            n,
            detail=detail
            | {
                "precision by fifth of activation": s.precision_by_fifth,
                "recall": 1 - float(s.missed.sum() / s.wanted.sum()),
                "correlation with the proxy, mean over features": s.correlation,
            },
            ranges=dict.fromkeys((UPPER, MASS, MISSED), (0.0, 1.0)),
        )

    return per_head(claim, families, measure, headline=UPPER, null=0.0)
