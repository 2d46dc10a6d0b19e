"""D13: features that need the induction head and fail induction."""

from __future__ import annotations

from typing import Any

import numpy as np

from fra.measures.families.families import Families, LayerFamilies
from fra.measures.families.measures import by_document, firing, head_means, natural_losses, unseen_rows
from fra.measures.families.rows import HeadNumbers, family_of, per_head
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.stats import Floats

MOST_CANDIDATES = 20


LEAST_DOCUMENTS = 10


def polysemantic_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D13: features of the head that fail induction, and the loss where they fire when the head is put out."""

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        selection, _, detail = family_of(layer, head)
        n = len(layer.documents)
        if head not in layer.behaviours:
            return HeadNumbers({}, (), n, detail=detail, undecided="the head has no selection")
        own = layer.behaviours[head][0]
        fails = [
            k
            for k in np.argsort(-selection.rows, kind="stable").tolist()
            if own.repeats[k] and stats.clopper_pearson(int(own.hits[k]), int(own.repeats[k]), claim.level)[1] < 0.6
        ][:MOST_CANDIDATES]
        detail |= {"features that fail induction": len(fails)}
        if not fails:
            return HeadNumbers(
                {}, (), n, detail=detail, undecided="no feature of the selection fails induction for sure"
            )
        if len(layer.heads) == layer.found.n_heads:
            said = "every head of the layer is an induction head: there is no other to compare with"
            return HeadNumbers({}, (), n, detail=detail, undecided=said)
        spread = layer.found.z[:, 1:][layer.found.real[:, 1:]].var(0).sum(-1)
        spread[layer.heads] = -1
        other, means = int(spread.argmax()), head_means(layer.found)
        clean = natural_losses(layer, None, None)
        mine, theirs = (natural_losses(layer, h, means[h]) - clean for h in (head, other))
        at, which = firing(layer.observed, selection.features[fails])
        tokens = layer.documents.tokens.to(clean.device)
        periods = layer.documents.periods.to(clean.device)
        rows = (at.pos < periods[at.doc]) & unseen_rows(tokens)[at.doc, at.pos]
        at, which = at.where(rows), which[rows]

        def table(values: Any) -> Floats:
            return np.stack([by_document(values * (which == k), at.doc, n) for k in range(len(fails))], axis=1)

        counts = table(at.value * 0 + 1)
        kept = np.flatnonzero((counts > 0).sum(0) >= LEAST_DOCUMENTS)
        if not len(kept):
            return HeadNumbers({}, (), n, detail=detail, undecided="none of them fires in enough natural documents")
        lost, beside = table(mine[at.doc, at.pos]), table(theirs[at.doc, at.pos])
        names = [str(int(selection.features[fails[k]])) for k in kept]
        detail |= layer.picture(int(names[0]), {selection.head: head}, at)
        return HeadNumbers(
            {
                "loss when the head is put out": (lost[:, kept], counts[:, kept]),
                "over another head": ((lost - beside)[:, kept], counts[:, kept]),
            },
            layer.documents.sources,
            n,
            candidates=names,
            detail=detail
            | {
                "the other head": f"L{layer.layer}H{other}",
                "features": [
                    {
                        "feature": name,
                        "hits": f"{own.hits[fails[k]]} of {own.repeats[fails[k]]}",
                        "rows": float(counts[:, k].sum()),
                        "loss (nats)": float(lost[:, k].sum() / counts[:, k].sum()),
                        "with the other head (nats)": float(beside[:, k].sum() / counts[:, k].sum()),
                    }
                    for name, k in zip(names, kept.tolist(), strict=True)
                ],
            },
        )

    return per_head(claim, families, measure, headline="loss when the head is put out", null=0.0)
