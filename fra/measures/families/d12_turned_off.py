"""D12: mean-ablating the induction head turns its family of features off."""

from __future__ import annotations

from typing import Any

import numpy as np

from fra.measures.families.families import Families, LayerFamilies
from fra.measures.families.measures import by_document, firing, head_means, turned_off
from fra.measures.families.rows import NO_FAMILY, HeadNumbers, family_of, per_head
from fra.verdicts.bounds import MATCHED, difference
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.stats import Floats

BY_MEAN, BY_ZERO, OVER_HEADS = "turned off by mean ablation", "turned off by zero ablation", "over other heads"


def ablation_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D12: how much of the family's firing a head's ablation turns off."""

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        selection, passed, detail = family_of(layer, head)
        n, means = len(layer.documents), head_means(layer.found)
        if len(means) < 2:
            return HeadNumbers(
                {}, (), n, detail=detail, undecided="the layer has one head: there is no other to put out"
            )
        at, _ = firing(layer.observed, selection.features[passed])
        controls = selection.controls[passed]
        matched, _ = firing(layer.observed, np.unique(controls[controls >= 0]))
        if not len(at) or not len(matched):
            said = "no matched feature fires" if len(at) else NO_FAMILY
            return HeadNumbers({}, (), n, detail=detail, undecided=said)
        ones = by_document(at.value * 0 + 1, at.doc, n)
        zero = means[head] * 0

        def off(entries: Any, h: int, value: Any) -> Floats:
            return by_document(turned_off(layer, entries, h, value), entries.doc, n)

        by_mean, by_zero = off(at, head, means[head]), off(at, head, zero)
        others = {h: off(at, h, means[h]) for h in range(len(means)) if h != head}
        worst = max(others, key=lambda h: float(others[h].sum()))
        theirs, count = off(matched, head, means[head]), by_document(matched.value * 0 + 1, matched.doc, n)
        rates = {f"L{layer.layer}H{h}": float(value.sum() / ones.sum()) for h, value in others.items()}
        return HeadNumbers(
            {
                BY_MEAN: (by_mean, ones),
                BY_ZERO: (by_zero, ones),
                OVER_HEADS: (by_mean - others[worst], ones),
                MATCHED: difference(by_mean, ones, theirs, count),
            },
            layer.documents.sources,
            n,
            detail=detail
            | {
                "firing rows": float(ones.sum()),
                "turned off by mean ablation of other heads": rates,
                "matched features turned off": float(theirs.sum() / count.sum()),
            },
            ranges={BY_MEAN: (0.0, 1.0), BY_ZERO: (0.0, 1.0), OVER_HEADS: (-1.0, 1.0), MATCHED: (-1.0, 1.0)},
        )

    return per_head(claim, families, measure, headline=BY_MEAN, null=0.0)
