"""Evidence for the claims about what an induction head's family does to the loss (D09), and by which path (D10)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fra.measures.families.families import Families, LayerFamilies
from fra.measures.families.measures import Ablated, chosen_pairs, path_changes
from fra.measures.families.rows import NO_FAMILY, HeadNumbers, family_of, per_head
from fra.verdicts.bounds import MATCHED, difference
from fra.verdicts.claim import Claim, Evidence


def _ablated(layer: LayerFamilies, head: int, which: np.ndarray, features: np.ndarray, tag: str) -> Ablated:
    """Features ablated in documents of their own; `which` of the selection each of them stands for."""
    selection, documents = layer.selections[head], layer.documents
    pairs = chosen_pairs(layer.observed, features, (layer.target.name, selection.head, tag))
    changes = path_changes(
        layer.model, layer.dictionary, layer.layer, layer.observed, documents.tokens, pairs, features
    )
    home = changes.total.device
    tokens = torch.as_tensor(selection.tokens[which][pairs[:, 1]], device=home)
    doc = torch.as_tensor(pairs[:, 0], device=home)
    return Ablated(changes, doc, changes.next_token == tokens[:, None], len(documents))


def _family_and_matches(layer: LayerFamilies, head: int) -> tuple[Ablated, Ablated]:
    if head not in layer.ablated:
        selection, passed = layer.selections[head], layer.family(head)
        with_match = passed[selection.controls[passed] >= 0]
        _, first = np.unique(selection.controls[with_match], return_index=True)
        with_match = with_match[first]
        layer.ablated[head] = (
            _ablated(layer, head, passed, selection.features[passed], "family"),
            _ablated(layer, head, with_match, selection.controls[with_match], "matched"),
        )
    return layer.ablated[head]


def own_token_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D09: the share of the loss increase that falls on positions whose next token is the feature's."""

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        _, passed, detail = family_of(layer, head)
        n = len(layer.documents)
        if not len(passed):
            return HeadNumbers({}, (), n, detail=detail, undecided=NO_FAMILY)
        own, theirs = _family_and_matches(layer, head)
        (hit, up), (c_hit, c_up) = (
            (each.sums(each.changes.total.clamp(min=0) * each.right), each.sums(each.changes.total.clamp(min=0)))
            for each in (own, theirs)
        )
        if not up.sum() > 0 or not c_up.sum() > 0:
            what = "feature" if c_up.sum() > 0 else "matched feature"
            return HeadNumbers({}, (), n, detail=detail, undecided=f"no {what}'s ablation raises the loss anywhere")
        changes, right = own.changes, own.right
        fires_right, fires = own.sums(changes.fires & right), own.sums(changes.fires)
        net = own.sums(changes.total)
        return HeadNumbers(
            {
                "share of the increase": (hit, up),
                "over the base rate where it fires": difference(hit, up, fires_right, fires),
                MATCHED: difference(hit, up, c_hit, c_up),
            },
            layer.documents.sources,
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
            },
            ranges={"share of the increase": (0.0, 1.0), MATCHED: (-1.0, 1.0)},
        )

    return per_head(claim, families, measure, headline="share of the increase", null=0.0)


def path_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D10: loss changes by the direct path against those through the layer's MLP, on the rows where a feature fires."""

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        _, passed, detail = family_of(layer, head)
        n = len(layer.documents)
        if not len(passed):
            return HeadNumbers({}, (), n, detail=detail, undecided=NO_FAMILY)
        both = _family_and_matches(layer, head)
        (rows, size), (c_rows, c_size) = (
            tuple(
                each.sums(value * each.changes.fires)
                for value in (each.changes.real, each.changes.direct.abs() - each.changes.mlp.abs())
            )
            for each in both
        )
        if not c_rows.sum():
            return HeadNumbers({}, (), n, detail=detail, undecided="no matched feature fires")
        own = both[0]
        changes = own.changes

        def where_it_fires(values: Tensor) -> float:
            return float(own.sums(values * changes.fires).sum() / rows.sum())

        on_right = own.right & changes.fires
        return HeadNumbers(
            {
                "direct less MLP, size": (size, rows),
                "direct less MLP, own token": (
                    own.sums((changes.direct - changes.mlp) * on_right),
                    own.sums(on_right),
                ),
                MATCHED: difference(size, rows, c_size, c_rows),
            },
            layer.documents.sources,
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
                "pairs": len(own.doc),
            },
        )

    return per_head(claim, families, measure, headline="direct less MLP, size", null=None)
