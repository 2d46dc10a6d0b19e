"""D08: whether strong activations are specific, of induction families on planted documents and of context features on
natural ones.

A context feature's *word* is the token at its strongest source (over all heads), where one token is that for at least
half of its firing on discovery documents. It is *local* where that source lies near (median), else *long-range*
(`ContextFeatures` has the numbers). Proxies are those of Kissane et al. (2024), with the word found by attribution and
not by hand: local, near after the word, up to the next punctuation mark; long-range, anywhere after it. A second copy
has every word before it, so that first copies alone count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fra.attribution.head_outputs import HeadOutputs
from fra.attribution.planted import scales
from fra.measures.families.designs import ContextFeatures, OwnScale
from fra.measures.families.families import Families, LayerFamilies, attribution_shares
from fra.measures.families.measures import firing
from fra.measures.families.rows import HeadNumbers, family_of, per_head, too_few
from fra.measures.families.specific import MASS, MISSED, PERMUTED, RANGES, planted_specificity
from fra.statistics.stats import Floats, seed_of
from fra.stimuli.repeated import Batch
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import WHOLE, Beside, Sampled, decide, means_of

UPPER, POSITIONS = "precision of upper activations", "over permuted positions"
_PUNCTUATION = frozenset(".,;:!?\"'()[]{}")


def first_copies(batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Rows of the first copy, BOS left out."""
    pos = torch.arange(batch.tokens.shape[1])
    return (pos >= 1) & (pos <= batch.periods[:, None])


def context_features(
    layer: LayerFamilies, design: ContextFeatures
) -> dict[str, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """(features, words) of the layer by kind, "local" and "long-range", from discovery documents alone.

    Features with control_share or more of their attribution from an induction head are left out.
    """
    found = layer.found
    shares, _ = attribution_shares(found)
    rows_of = first_copies(layer.discovery).to(found.z.device)
    every = found.live.where(rows_of[found.live.doc, found.live.pos])
    rows = torch.bincount(every.feature, minlength=found.encoder.d_sae)
    eligible = (rows >= design.least_rows) & ~(shares[:, layer.heads].amax(1) >= layer.selecting.control_share)
    live = every.where(eligible[every.feature])
    order = torch.argsort(live.feature, stable=True)
    start = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(live.feature.cpu()).cumsum(0)])
    rank = torch.arange(len(order)) - start[live.feature[order].cpu()]
    count, n = rows.cpu()[live.feature[order].cpu()], design.entries
    picked = (rank * n) // count != ((rank - 1) * n) // count  # evenly spaced, n of each
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
        if share >= design.source_share:
            word = int(ids[counts.argmax()])
            median = float(back[own & usable & (token == word)].float().median())
            kinds["local" if median <= design.near else "long-range"].append((-share, feature, word))
    return {
        kind: (np.asarray([f for _, f, _ in some], dtype=np.int64), np.asarray([w for *_, w in some], dtype=np.int64))
        for kind, some in ((kind, sorted(rows)[: design.most]) for kind, rows in kinds.items())
    }


def after_word(
    is_word: Bool[Tensor, "batch pos"], stops: Bool[Tensor, "batch pos"] | None, near: int
) -> Bool[Tensor, "batch pos"]:
    """Rows after the word: anywhere, or, with `stops`, at most `near` back and with no stop from there to the row."""
    if stops is None:
        return (is_word.cumsum(1) - is_word.long()) > 0
    found = torch.zeros_like(is_word)
    open_ = is_word.clone()  # a word that no stop has closed, so many tokens back
    for _ in range(near):
        open_ = torch.cat([torch.zeros_like(open_[:, :1]), open_[:, :-1]], dim=1) & ~stops
        found |= open_
    return found


def permuted_rows(
    rows: Bool[Tensor, "batch pos"], draws: int, seed_parts: Sequence[str]
) -> list[Int[Tensor, "batch pos"]]:
    """Draws of where each position's token goes: every document's rows among themselves, its own way in every draw."""
    rng = np.random.default_rng(seed_of(*seed_parts))
    here = rows.cpu().numpy()
    found = []
    for _ in range(draws):
        keys = np.where(here, rng.random(here.shape), 2.0)
        to = np.tile(np.arange(here.shape[1]), (len(here), 1))
        for number, own in enumerate(here):
            at = np.flatnonzero(own)
            to[number, at] = at[np.argsort(keys[number, at])]
        found.append(torch.from_numpy(to))
    return found


def upper_cuts(
    found: HeadOutputs, features: Int[np.ndarray, " n"], rows: Bool[Tensor, "batch pos"], quantile: float
) -> Floats:
    """The quantile of each feature's activations on some rows of documents that are not measured."""
    at, which = firing(found, features)
    kept = rows.to(at.pos.device)[at.doc, at.pos]
    own = [at.value[kept & (which == k)].double().cpu() for k in range(len(features))]
    return np.asarray([float(np.quantile(part, quantile)) if len(part) else np.nan for part in own])


def context_numbers(
    layer: LayerFamilies,
    features: Int[np.ndarray, " n"],
    words: Int[np.ndarray, " n"],
    kind: str,
    design: ContextFeatures,
) -> dict[str, tuple[Floats, Floats]]:
    """(sums, counts) by document of every condition, over all of the features together.

    The control puts the word's occurrences at other positions of the same document, drawn anew for every document and
    draw: what a feature gets that fires anywhere in it, as late as this one does.
    """
    seen, n = layer.observed, len(layer.documents)
    tokens, rows = layer.documents.tokens.cpu(), first_copies(layer.documents)
    stops = None
    if kind == "local":
        marks = [t for t in torch.unique(tokens).tolist() if _is_mark(layer, t)]
        stops = torch.isin(tokens, torch.tensor(marks, dtype=torch.long))
    cuts = upper_cuts(layer.found, features, first_copies(layer.discovery), design.upper)
    drawn = permuted_rows(rows, design.permutations, (layer.target.name, str(layer.layer), kind, "positions"))
    at, which = firing(seen, features)
    doc, pos, value = (part.cpu() for part in (at.doc, at.pos, at.value.double()))
    which, first = which.cpu(), rows[doc, pos]
    longer = rows.sum(0)
    sums = {name: np.zeros(n) for name in ("upper", "right", "elsewhere", "moved", "mass", "held", "wanted", "missed")}
    for k, word in enumerate(words.tolist()):
        mine = first & (which == k)
        if not np.isfinite(cuts[k]) or not bool(mine.any()):
            continue
        is_word = (tokens == word) & rows
        proxy = after_word(is_word, stops, design.near) & rows
        d, p, size = doc[mine], pos[mine], value[mine].numpy() / cuts[k]
        right = proxy[d, p].numpy().astype(float)
        upper = size >= 1 - 1e-6  # equal activations are all upper
        away = np.zeros(len(d))
        for to in drawn:
            away += (after_word(is_word.gather(1, to), stops, design.near)[d, p]).numpy()
        others = (proxy.sum(0)[p].numpy() - right) / (longer[p] - 1).clamp(min=1).numpy()
        fires = torch.zeros_like(proxy)
        fires[d, p] = True
        for name, values in (
            ("upper", upper), ("right", upper * right), ("elsewhere", upper * others), ("mass", size),
            ("moved", upper * away / len(drawn)), ("held", size * right),
        ):  # fmt: skip
            np.add.at(sums[name], d.numpy(), values)
        sums["wanted"] += proxy.sum(1).numpy()
        sums["missed"] += (proxy & ~fires).sum(1).numpy()
    return {
        UPPER: (sums["right"], sums["upper"]),
        POSITIONS: (sums["right"] - sums["moved"], sums["upper"]),
        PERMUTED: (sums["right"] - sums["elsewhere"], sums["upper"]),
        MASS: (sums["held"], sums["mass"]),
        MISSED: (sums["missed"], sums["wanted"]),
    }


def context_evidence(claim: Claim, families: Families, kind: str) -> Evidence:
    """D08.local and D08.context: all such features of the layers with families, on the measurement documents."""
    families.registered_by(claim)
    design = claim.designed(ContextFeatures)
    parts: list[dict[str, tuple[Floats, Floats]]] = []
    names: dict[str, list[str]] = {}
    sources: Sequence[str] = ()
    picture: dict[str, Any] = {}
    for number, layer in sorted(families.layers.items()):
        families.progress(f"{claim.id}: layer {number}")
        features, words = context_features(layer, design)[kind]
        if not len(features):
            continue
        parts.append(context_numbers(layer, features, words, kind, design))
        picture = picture or layer.picture(int(features[0]), {"all heads": None})
        text = layer.target.tokenizer.decode
        names[f"layer {number}"] = [f"{f}: {text([int(w)])!r}" for f, w in zip(features, words, strict=True)]
        sources = layer.documents.sources
    if not families.layers:
        return Evidence(
            claim=claim, head=None, cannot="no layer has both an induction head and a dictionary of outputs"
        )
    n_features, least = sum(map(len, names.values())), claim.gates["features"]
    if n_features < least:
        said = f"{n_features} {kind} context features were found on discovery documents, where {least:g} are needed"
        return Evidence(claim=claim, head=None, undecided=f"{said}: a wider dictionary")
    sums, counts = ({name: np.asarray(sum(part[name][side] for part in parts)) for name in parts[0]} for side in (0, 1))
    columns = [
        Sampled(
            name=name,
            samples={WHOLE: means_of(claim, families.target, WHOLE, name, sums[name], counts[name], sources)},
            bounded=(-1.0 if name in (PERMUTED, POSITIONS) else 0.0, 1.0),
        )
        for name in (claim.condition, *claim.bars)
    ]
    missed, wanted = sums[MISSED], counts[MISSED]
    beside = Beside(
        candidates=(f"{n_features} features",),
        detail=picture
        | {
            "features and their words": names,
            "recall": 1 - float(missed.sum() / wanted.sum()) if wanted.sum() else None,
            "draws of the control": design.permutations,
        },
    )
    return decide(claim, columns, {WHOLE: beside}, q_over=())[WHOLE]


def _is_mark(layer: LayerFamilies, token: int) -> bool:
    text = str(layer.target.tokenizer.decode([token])).strip()
    return bool(text) and set(text) <= _PUNCTUATION


def specificity_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D08: the family's activations against strict induction of each feature's token, on planted documents."""
    strong = claim.designed(OwnScale).strong

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        selection, passed, detail = family_of(layer, head)
        if (few := too_few(claim, layer, head)) is not None:
            return HeadNumbers({}, (), 0, detail=detail, undecided=few)
        assert layer.choosing is not None and layer.measured is not None
        features, tokens = selection.features[passed], selection.tokens[passed]
        scale = scales(layer.choosing, features, tokens)
        s = planted_specificity(layer.measured, features, tokens, scale, strong)
        by_strength = {}
        for share in claim.designed(OwnScale).shown:
            other = planted_specificity(layer.measured, features, tokens, scale, share)
            by_strength[f"{share:g} of its scale"] = {
                "precision": float(other.right.sum() / other.strong.sum()) if other.strong.sum() else None,
                "recall": 1 - float(other.missed.sum() / other.wanted.sum()),
            }
        rows = np.asarray(layer.measured.texts.lengths) - 1
        return HeadNumbers(
            s.columns(),
            layer.measured.sources,
            int((s.wanted > 0).sum()),
            detail=detail
            | {
                "base rate that planting fixes": float(s.wanted.sum() / (s.wanted * rows).sum()),
                "by strength, from": by_strength,
            },
            ranges=RANGES,
        )

    return per_head(claim, families, measure)
