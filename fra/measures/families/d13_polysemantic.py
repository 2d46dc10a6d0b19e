"""D13: features that need the induction head and fail induction."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fra.attribution.head_outputs import HeadOutputs, Live
from fra.attribution.planted import behaviour
from fra.measures.families.designs import NeedingFeatures
from fra.measures.families.families import Families, LayerFamilies
from fra.measures.families.measures import by_document, firing, head_means, losses_with, unseen_rows
from fra.measures.families.rows import HeadNumbers, family_of, per_head
from fra.statistics import stats
from fra.statistics.rules import RULES
from fra.statistics.stats import Floats
from fra.stimuli.padding import Texts
from fra.stimuli.sources import spread
from fra.verdicts.claim import Claim, Evidence

LOSS, OVER = "loss when the head is put out", "over another head"


def natural(layer: LayerFamilies, design: NeedingFeatures) -> Texts:
    """Natural documents, one of each source as far as there are so many; none of a source of the discovery documents,
    on which features were chosen.
    """
    target, seen = layer.target, set(layer.discovery.sources)
    texts = [text for text in target.documents() if text.source not in seen]
    names = [text.source for text in texts]
    chosen = [texts[k] for k in spread(names, min(design.documents, len(set(names))))]
    rows = [target.tokens(text.text, design.longest) for text in chosen]
    return Texts.of(rows, [text.source for text in chosen])


def needing(
    layer: LayerFamilies, head: int, design: NeedingFeatures
) -> tuple[Int[np.ndarray, " n_fails"], Int[np.ndarray, " n"]]:
    """Indices into the head's selection: of the features that fail the behaviour test for sure; and of those among them
    that are looked at, because they fire in enough discovery documents where induction has nothing to match, the most
    active first. No measured document is looked at.
    """
    selection, half = layer.selections[head], layer.choosing
    none = np.zeros(0, dtype=np.int64)
    if half is None:
        return none, none
    own = behaviour(half, selection.features, selection.tokens)
    least = layer.planting.hits_above
    upper = [
        stats.clopper_pearson(h, n, design.fails_level)[1]
        for h, n in zip(own.hits.tolist(), own.repeats.tolist(), strict=True)
    ]
    fails = np.flatnonzero((own.repeats > 0) & (np.asarray(upper) < least))
    at, which = _fresh(layer.found, layer.discovery.tokens, selection.features[fails])
    fires = np.zeros((len(fails), len(layer.discovery)), dtype=bool)
    fires[which.cpu().numpy(), at.doc.cpu().numpy()] = True
    enough = fails[fires.sum(1) >= design.least_documents]
    return fails, enough[np.argsort(-selection.rows[enough], kind="stable")][: design.candidates]


def _fresh(seen: HeadOutputs, tokens: Tensor, features: Int[np.ndarray, " n"]) -> tuple[Live, Tensor]:
    """Where the features fire on rows whose token has not stood before, and which of them."""
    at, which = firing(seen, features)
    rows = unseen_rows(tokens.to(at.doc.device))[at.doc, at.pos]
    return at.where(rows), which[rows]


def polysemantic_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D13: features of the head that fail induction, and the loss where they fire when the head is put out."""
    design = claim.designed(NeedingFeatures)

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        selection, _, detail = family_of(layer, head)
        fails, some = needing(layer, head, design)
        detail |= {"features that fail induction": len(fails), "of these active without induction": len(some)}
        if not len(some):
            said = "no feature of the selection fails induction for sure"
            if len(fails):
                said = (
                    f"{len(fails)} features fail induction for sure, and none of them fires on a token that is new in "
                    f"{design.least_documents} discovery documents: a wider dictionary or more text for discovery"
                )
            return HeadNumbers({}, (), 0, detail=detail, undecided=said)
        if len(layer.heads) == layer.found.n_heads:
            said = "every head of the layer is an induction head: there is no other to compare with"
            return HeadNumbers({}, (), 0, detail=detail, undecided=said)
        spread_of = layer.found.z[:, 1:][layer.found.real[:, 1:]].var(0).sum(-1)
        spread_of[layer.heads] = -1
        other = int(spread_of.argmax())
        texts, seen = layer.texts_of(design, natural)
        n = len(texts)
        clean = _losses(layer, texts, None, design)
        mine, theirs = (_losses(layer, texts, h, design) - clean for h in (head, other))
        at, which = _fresh(seen, texts.tokens, selection.features[some])
        kept = at.pos < clean.shape[1]
        at, which = at.where(kept), which[kept]

        def table(values: Tensor) -> Floats:
            return np.stack([by_document(values * (which == k), at.doc, n) for k in range(len(some))], axis=1)

        counts = table(torch.ones_like(at.value) * texts.real.to(at.doc.device)[at.doc, at.pos + 1])
        lost, beside = table(mine[at.doc, at.pos]), table(theirs[at.doc, at.pos])
        names = [str(int(f)) for f in selection.features[some]]
        return HeadNumbers(
            {LOSS: (lost, counts), OVER: (lost - beside, counts)},
            texts.sources,
            n,
            candidates=names,
            detail=detail
            | layer.picture(int(names[0]), {selection.head: head})
            | {
                "the other head": f"L{layer.layer}H{other}",
                "features": _features(claim, names, counts, lost, beside, len(families.heads)),
            },
        )

    return per_head(claim, families, measure)


def _losses(layer: LayerFamilies, texts: Texts, head: int | None, design: NeedingFeatures) -> Tensor:
    """Losses with a head at its mean over discovery documents, which two induction heads may share."""
    key = None if head is None else layer.layer, head, design
    if key not in layer.losses:
        value = None if head is None else head_means(layer.found)[head]
        layer.losses[key] = losses_with(layer.model, texts, layer.layer, head, value)
    return layer.losses[key]


def _features(
    claim: Claim, names: Sequence[str], counts: Floats, lost: Floats, beside: Floats, heads: int
) -> list[dict[str, object]]:
    """What each candidate shows, and about how many sources would decide it: those with which its distance from the
    bar, or what is worth seeing where that is less, would be as many standard errors as the test and its power ask for
    (normal, one candidate as good as all).
    """
    found: list[dict[str, object]] = []
    z = NormalDist().inv_cdf(1 - claim.level / (heads * len(names))) + NormalDist().inv_cdf(RULES.power)
    for k, name in enumerate(names):
        means = stats.ClusterMeans(lost[:, k], counts[:, k], seed=0, n_boot=1)
        rows = float(counts[:, k].sum())
        away = min(abs(float(means.estimate[0]) - claim.bar), claim.worth_of(LOSS) or np.inf)
        would = np.ceil(len(counts) * (z * float(means.se[0]) / away) ** 2) if away else np.inf
        found.append(
            {
                "feature": name,
                "rows": rows,
                "loss (nats)": float(lost[:, k].sum() / rows) if rows else None,
                "with the other head (nats)": float(beside[:, k].sum() / rows) if rows else None,
                "sources that would decide, about": int(would) if np.isfinite(would) else None,
            }
        )
    return found
