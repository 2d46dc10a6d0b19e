"""D12: ablating the induction head turns its family of features off, and ablating another one as much does not."""

from __future__ import annotations

import torch
from torch import Tensor

from fra.attribution.head_outputs import HeadOutputs, Live
from fra.measures.families.families import Families, LayerFamilies
from fra.measures.families.measures import by_document, equal_change, firing, head_means, turned_off
from fra.measures.families.rows import HeadNumbers, family_of, per_head, too_few
from fra.statistics.bounds import MATCHED, difference
from fra.statistics.stats import Floats
from fra.verdicts.claim import Claim, Evidence

OVER_HEADS, BY_MEAN, BY_ZERO = (
    "over other heads, at equal change",
    "turned off by mean ablation",
    "turned off by zero ablation",
)


def ablation_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D12: how much of the family's firing a head's ablation turns off.

    Means, and the other head that does most at equal change of the layer's output, come from discovery documents.
    """

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        selection, passed, detail = family_of(layer, head)
        if (few := too_few(claim, layer, head)) is not None:
            return HeadNumbers({}, (), 0, detail=detail, undecided=few)
        n, means = len(layer.documents), head_means(layer.found)
        if len(means) < 2:
            said = "the layer has one head: there is no other to put out"
            return HeadNumbers({}, (), n, detail=detail, undecided=said)
        at, _ = firing(layer.observed, selection.features[passed])
        controls = selection.matched(passed)
        matched, _ = firing(layer.observed, controls)
        if not len(at) or not len(matched):
            said = "no matched feature fires" if len(at) else "the family never fires on these documents"
            return HeadNumbers({}, (), n, detail=detail, undecided=said)
        W_O = layer.model.blocks[layer.layer].attn.W_O.detach()

        def alike(seen: HeadOutputs, entries: Live, other: int) -> Tensor:
            return turned_off(
                layer.dictionary, seen, entries, other, lambda z: equal_change(W_O, z, means, head, other)
            )

        def off(entries: Live, value: Tensor) -> Floats:
            return by_document(turned_off(layer.dictionary, layer.observed, entries, head, value), entries.doc, n)

        before, _ = firing(layer.found, selection.features[passed])
        rates = {h: float(alike(layer.found, before, h).double().mean()) for h in range(len(means)) if h != head}
        rival = max(rates, key=lambda h: rates[h])
        ones, count = (by_document(torch.ones_like(e.value), e.doc, n) for e in (at, matched))
        by_mean, by_zero = off(at, means[head]), off(at, torch.zeros_like(means[head]))
        others, theirs = by_document(alike(layer.observed, at, rival), at.doc, n), off(matched, means[head])
        return HeadNumbers(
            {
                OVER_HEADS: (by_mean - others, ones),
                BY_MEAN: (by_mean, ones),
                BY_ZERO: (by_zero, ones),
                MATCHED: difference(by_mean, ones, theirs, count),
            },
            layer.documents.sources,
            len(set(layer.documents.sources)),
            detail=detail
            | {
                "firing rows": float(ones.sum()),
                "the other head, by discovery documents": f"L{layer.layer}H{rival}",
                "turned off by the other head at equal change": float(others.sum() / ones.sum()),
                "turned off by each at equal change, on discovery documents": {
                    f"L{layer.layer}H{h}": rate for h, rate in rates.items()
                },
                "matched features": len(controls),
                "matched features turned off": float(theirs.sum() / count.sum()),
            },
            ranges={OVER_HEADS: (-1.0, 1.0), BY_MEAN: (0.0, 1.0), BY_ZERO: (0.0, 1.0), MATCHED: (-1.0, 1.0)},
        )

    return per_head(claim, families, measure)
