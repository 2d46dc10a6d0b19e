"""Evidence for the claims about what an induction head's family does, and where it comes from: D08 to D11, D13."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fra.measures.families.families import Families, LayerFamilies
from fra.measures.families.measures import (
    by_document,
    chosen_pairs,
    path_changes,
)
from fra.measures.families.rows import NO_FAMILY, Measured, family_of, per_head
from fra.verdicts.bounds import MATCHED, difference
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.stats import Floats


def _changes(layer: LayerFamilies, head: int, which: np.ndarray, features: np.ndarray, tag: str) -> Any:
    """Path changes of chosen pairs, the pairs, and the token of each pair's family feature."""
    selection = layer.selections[head]
    seed_parts = (layer.target.name, selection.head, tag)
    pairs = chosen_pairs(layer.observed, features, seed_parts)
    found = path_changes(
        layer.model, layer.dictionary, layer.layer, layer.observed, layer.documents.tokens, pairs, features
    )
    return found, pairs, selection.tokens[which][pairs[:, 1]] if len(pairs) else np.zeros(0, dtype=np.int64)


def _both_changes(layer: LayerFamilies, head: int) -> Any:
    """The family's changes and those of its matches: measured once for D09 and D10."""
    kept = layer.__dict__.setdefault("_changes", {})
    if head not in kept:
        selection, passed = layer.selections[head], layer.family(head)
        with_match = passed[selection.controls[passed] >= 0]
        _, first = np.unique(selection.controls[with_match], return_index=True)
        with_match = with_match[first]
        kept[head] = (
            _changes(layer, head, passed, selection.features[passed], "family"),
            _changes(layer, head, with_match, selection.controls[with_match], "matched"),
        )
    return kept[head]


def own_token_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D09: the share of the loss increase that falls on positions whose next token is the feature's."""

    def measure(layer: LayerFamilies, head: int) -> Measured:
        _, passed, detail = family_of(layer, head)
        n = len(layer.documents)
        if not len(passed):
            return Measured({}, (), n, detail=detail, undecided=NO_FAMILY)
        (own, pairs, tokens), (theirs, their_pairs, their_tokens) = _both_changes(layer, head)

        def shares(changes: Any, pairs: Any, tokens: Any) -> tuple[Floats, ...]:
            doc = torch.as_tensor(pairs[:, 0], device=changes.total.device)
            right = changes.next_token == torch.as_tensor(tokens, device=changes.total.device)[:, None]
            up = changes.total.clamp(min=0)
            every = (
                (up * right).sum(1), up.sum(1), (changes.fires & right).sum(1), changes.fires.sum(1),
                (changes.total * right).sum(1), changes.total.sum(1),
                (changes.real & right).sum(1), changes.real.sum(1),
            )  # fmt: skip
            return tuple(by_document(value, doc, n) for value in every)

        hit, up, fires_right, fires, net_hit, net, right, real = shares(own, pairs, tokens)
        c_hit, c_up, *_ = shares(theirs, their_pairs, their_tokens)
        if not up.sum() > 0 or not c_up.sum() > 0:
            what = "feature" if c_up.sum() > 0 else "matched feature"
            return Measured({}, (), n, detail=detail, undecided=f"no {what}'s ablation raises the loss anywhere")
        return Measured(
            {
                "share of the increase": (hit, up),
                "over the base rate where it fires": difference(hit, up, fires_right, fires),
                MATCHED: difference(hit, up, c_hit, c_up),
            },
            layer.documents.sources,
            int((up > 0).sum()),
            detail=detail
            | {
                "base rate of the token": float(right.sum() / real.sum()),
                "base rate where the feature fires": float(fires_right.sum() / fires.sum()),
                "share of the net change (decreases kept)": float(net_hit.sum() / net.sum()) if net.sum() else None,
                "net change in all (nats)": float(net.sum()),
                "increase in all (nats)": float(up.sum()),
                "matched features: share": float(c_hit.sum() / c_up.sum()),
                "pairs": len(pairs),
            },
            ranges={"share of the increase": (0.0, 1.0), MATCHED: (-1.0, 1.0)},
        )

    return per_head(claim, families, measure, headline="share of the increase", null=0.0)


def path_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D10: loss changes by the direct path against those through the layer's MLP, on the rows where a feature fires."""

    def measure(layer: LayerFamilies, head: int) -> Measured:
        _, passed, detail = family_of(layer, head)
        n = len(layer.documents)
        if not len(passed):
            return Measured({}, (), n, detail=detail, undecided=NO_FAMILY)
        (own, pairs, tokens), (theirs, their_pairs, _) = _both_changes(layer, head)

        def sums(changes: Any, pairs: Any, values: Any) -> Floats:
            doc = torch.as_tensor(pairs[:, 0], device=changes.total.device)
            return by_document((values * changes.fires).sum(1), doc, n)

        size = own.direct.abs() - own.mlp.abs()
        rows, c_rows = sums(own, pairs, own.real * 1.0), sums(theirs, their_pairs, theirs.real * 1.0)
        if not c_rows.sum():
            return Measured({}, (), n, detail=detail, undecided="no matched feature fires")
        right = own.next_token == torch.as_tensor(tokens, device=own.total.device)[:, None]
        right_rows = sums(own, pairs, right * 1.0)
        means = {
            name: float(sums(own, pairs, value).sum() / rows.sum())
            for name, value in (
                ("direct, size", own.direct.abs()),
                ("MLP, size", own.mlp.abs()),
                ("direct", own.direct),
                ("MLP", own.mlp),
                ("in the model", own.total),
            )
        }
        c_size = sums(theirs, their_pairs, theirs.direct.abs() - theirs.mlp.abs())
        return Measured(
            {
                "direct less MLP, size": (sums(own, pairs, size), rows),
                "direct less MLP, own token": (sums(own, pairs, (own.direct - own.mlp) * right), right_rows),
                MATCHED: difference(sums(own, pairs, size), rows, c_size, c_rows),
            },
            layer.documents.sources,
            int((rows > 0).sum()),
            detail=detail | {"mean change where it fires (nats)": means, "pairs": len(pairs)},
        )

    return per_head(claim, families, measure, headline="direct less MLP, size", null=None)
