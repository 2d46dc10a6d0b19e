"""Evidence for the claims about what an induction head's family does to the loss (D09), and by which path (D10)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fra.attribution.planted import PlantedHalf
from fra.measures.families.designs import AblatedPairs
from fra.measures.families.families import Families, LayerFamilies, Selection
from fra.measures.families.measures import Ablated, path_changes
from fra.measures.families.rows import HeadNumbers, family_of, per_head, too_few
from fra.statistics.bounds import MATCHED, difference
from fra.statistics.stats import seed_of
from fra.verdicts.claim import Claim, Evidence

INCREASE, BASE = "share of the increase", "over the base rate where it fires"
DIRECT, OWN = "share of the direct path", "direct less MLP, own token"


def chosen_pairs(
    half: PlantedHalf, selection: Selection, which: Int[np.ndarray, " n"], n: int, seed_parts: tuple[str, ...]
) -> Int[np.ndarray, "n_pairs 3"]:
    """At most n (document, index into the selection, matched feature): feature after feature a document that holds its
    token and in which it fires, a document of its own as far as there are so many. The matched feature is drawn among
    those of the feature that fire in the document; -1 where none does.
    """
    rng = np.random.default_rng(seed_of(*seed_parts))
    doc, feature = (part.cpu().numpy() for part in (half.live.doc, half.live.feature))
    firing = [set(feature[doc == d].tolist()) for d in range(len(half.documents))]
    mine = []
    for k in which.tolist():
        held = half.holding(int(selection.tokens[k]))
        mine.append([d for d in rng.permutation(held).tolist() if int(selection.features[k]) in firing[d]])
    used: set[int] = set()
    pairs: list[tuple[int, int, int]] = []
    while any(mine) and len(pairs) < n:
        for k, documents in zip(which.tolist(), mine, strict=True):
            if not documents or len(pairs) == n:
                continue
            own = next((d for d in documents if d not in used), documents[0])
            documents.remove(own)
            used.add(own)
            matches = [m for m in selection.matches[k].tolist() if m in firing[own]]
            pairs.append((own, k, matches[int(rng.integers(len(matches)))] if matches else -1))
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 3)


def _family_and_matches(layer: LayerFamilies, head: int, design: AblatedPairs) -> tuple[Ablated, Ablated]:
    """What ablating the family did, and its matches in the same documents, for the same tokens."""
    selection, half = layer.selections[head], layer.measured
    key = selection.head, design
    if key not in layer.ablated:
        assert half is not None
        parts = (layer.target.name, selection.head, "ablated pairs")
        pairs = chosen_pairs(half, selection, layer.family(head), design.pairs, parts)
        features = np.stack([selection.features[pairs[:, 1]], pairs[:, 2]], axis=1)
        arms = path_changes(layer.model, layer.dictionary, layer.layer, half.live, half.texts, pairs[:, 0], features)
        home = arms[0].total.device
        tokens = torch.as_tensor(selection.tokens[pairs[:, 1]], device=home)
        doc = torch.as_tensor(pairs[:, 0], device=home)
        own, theirs = (Ablated(arm, doc, arm.next_token == tokens[:, None], len(half.documents)) for arm in arms)
        layer.ablated[key] = own, theirs
    return layer.ablated[key]


def own_token_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D09: the share of the loss increase that falls on positions whose next token is the feature's."""
    design = claim.designed(AblatedPairs)

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        _, _, detail = family_of(layer, head)
        if (few := too_few(claim, layer, head)) is not None:
            return HeadNumbers({}, (), 0, detail=detail, undecided=few)
        own, theirs = _family_and_matches(layer, head, design)
        assert layer.measured is not None
        (hit, up), (c_hit, c_up) = (
            (each.sums(each.changes.total.clamp(min=0) * each.right), each.sums(each.changes.total.clamp(min=0)))
            for each in (own, theirs)
        )
        if not up.sum() > 0 or not c_up.sum() > 0:
            what = "feature" if c_up.sum() > 0 else "matched feature"
            return HeadNumbers({}, (), 0, detail=detail, undecided=f"no {what}'s ablation raises the loss anywhere")
        changes, right = own.changes, own.right
        fires_right, fires = own.sums(changes.fires & right), own.sums(changes.fires)
        net = own.sums(changes.total)
        return HeadNumbers(
            {
                INCREASE: (hit, up),
                BASE: difference(hit, up, fires_right, fires),
                MATCHED: difference(hit, up, c_hit, c_up),
            },
            layer.measured.sources,
            int((up > 0).sum()),
            detail=detail
            | {
                "base rate of the token": float(own.sums(changes.real & right).sum() / own.sums(changes.real).sum()),
                "base rate where the feature fires": float(fires_right.sum() / fires.sum()),
                "share of the net change (decreases kept)": (
                    float(own.sums(changes.total * right).sum() / net.sum()) if net.sum() else None
                ),
                "net change in all (nats)": float(net.sum()),
                "increase in all (nats)": float(up.sum()),
                "matched features: share": float(c_hit.sum() / c_up.sum()),
                "pairs": len(own.doc),
                "draws of the control": "a matched feature for each pair",
            },
            ranges={INCREASE: (0.0, 1.0), MATCHED: (-1.0, 1.0)},
        )

    return per_head(claim, families, measure)


def path_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D10: loss changes by the direct path against those through the layer's MLP, on the rows where a feature fires."""
    design = claim.designed(AblatedPairs)

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        _, _, detail = family_of(layer, head)
        if (few := too_few(claim, layer, head)) is not None:
            return HeadNumbers({}, (), 0, detail=detail, undecided=few)
        both = _family_and_matches(layer, head, design)
        assert layer.measured is not None
        (direct, whole), (c_direct, c_whole) = (
            tuple(
                each.sums(value * each.changes.fires)
                for value in (each.changes.direct.abs(), each.changes.direct.abs() + each.changes.mlp.abs())
            )
            for each in both
        )
        if not c_whole.sum() > 0:
            return HeadNumbers({}, (), 0, detail=detail, undecided="no matched feature does anything")
        own = both[0]
        changes = own.changes
        rows = own.sums(changes.fires)

        def where_it_fires(values: Tensor) -> float:
            return float(own.sums(values * changes.fires).sum() / rows.sum())

        on_right = own.right & changes.fires
        return HeadNumbers(
            {
                DIRECT: (direct, whole),
                OWN: (own.sums((changes.direct - changes.mlp) * on_right), own.sums(on_right)),
                MATCHED: difference(direct, whole, c_direct, c_whole),
            },
            layer.measured.sources,
            int((rows > 0).sum()),
            detail=detail
            | {
                "mean change where it fires (nats)": {
                    "direct, size": where_it_fires(changes.direct.abs()),
                    "MLP, size": where_it_fires(changes.mlp.abs()),
                    "direct": where_it_fires(changes.direct),
                    "MLP": where_it_fires(changes.mlp),
                    "in the model": where_it_fires(changes.total),
                },
                "matched features: share": float(c_direct.sum() / c_whole.sum()),
                "pairs": len(own.doc),
                "draws of the control": "a matched feature for each pair",
            },
            ranges={DIRECT: (0.0, 1.0), MATCHED: (-1.0, 1.0)},
        )

    return per_head(claim, families, measure)
