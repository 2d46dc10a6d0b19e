"""Evidence for the claims about what an induction head's family does, and where it comes from: D08 to D11, D13."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fra import _family_upstream as upstream
from fra._family_measures import (
    by_document,
    chosen_pairs,
    firing,
    head_means,
    natural_losses,
    path_changes,
    specificity,
    strict_induction,
    unseen_rows,
)
from fra.family import Families, LayerFamilies
from fra.family_evidence import NO_FAMILY, Measured, family_of, per_head
from fra.verdicts import stats
from fra.verdicts.bounds import MATCHED, above_share, difference
from fra.verdicts.claim import Claim, Evidence, parse_head
from fra.verdicts.stats import Floats

MOST_CANDIDATES = 20
LEAST_DOCUMENTS = 10


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


def specificity_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D08: the family's activations against strict induction of each feature's token."""

    def measure(layer: LayerFamilies, head: int) -> Measured:
        selection, passed, detail = family_of(layer, head)
        n = len(layer.documents)
        if not len(passed):
            return Measured({}, (), n, detail=detail, undecided=NO_FAMILY)
        tokens = layer.documents.tokens.to(layer.observed.z.device)
        proxies = list(strict_induction(tokens, selection.tokens[passed]))
        s = specificity(layer, selection.features[passed], proxies)
        if not s.upper.sum() or not s.wanted.sum():
            return Measured({}, (), n, detail=detail, undecided="the family hardly fires on these documents")
        return Measured(
            {
                "precision of the upper fifth": (s.upper_right, s.upper),
                "over permuted documents": (s.upper_right - s.upper_permuted, s.upper),
                "activation mass": (s.mass_right, s.mass),
                "missed": (s.missed, s.wanted),
            },
            layer.documents.sources,
            n,
            detail=detail
            | {
                "precision by fifth of activation": s.precision_by_fifth,
                "recall": 1 - float(s.missed.sum() / s.wanted.sum()),
                "correlation with the proxy, mean over features": s.correlation,
            },
            ranges={"precision of the upper fifth": (0.0, 1.0), "activation mass": (0.0, 1.0), "missed": (0.0, 1.0)},
        )

    return per_head(claim, families, measure, headline="precision of the upper fifth", null=0.0)


def polysemantic_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D13: features of the head that fail induction, and the loss where they fire when the head is put out."""

    def measure(layer: LayerFamilies, head: int) -> Measured:
        selection, _, detail = family_of(layer, head)
        n = len(layer.documents)
        if head not in layer.behaviours:
            return Measured({}, (), n, detail=detail, undecided="the head has no selection")
        own = layer.behaviours[head][0]
        fails = [
            k
            for k in np.argsort(-selection.rows, kind="stable").tolist()
            if own.repeats[k] and stats.clopper_pearson(int(own.hits[k]), int(own.repeats[k]), claim.level)[1] < 0.6
        ][:MOST_CANDIDATES]
        detail |= {"features that fail induction": len(fails)}
        if not fails:
            return Measured({}, (), n, detail=detail, undecided="no feature of the selection fails induction for sure")
        if len(layer.heads) == layer.found.n_heads:
            said = "every head of the layer is an induction head: there is no other to compare with"
            return Measured({}, (), n, detail=detail, undecided=said)
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
            return Measured({}, (), n, detail=detail, undecided="none of them fires in enough natural documents")
        lost, beside = table(mine[at.doc, at.pos]), table(theirs[at.doc, at.pos])
        names = [str(int(selection.features[fails[k]])) for k in kept]
        detail |= layer.picture(int(names[0]), {selection.head: head}, at)
        return Measured(
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


def upstream_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D11: what patching single heads upstream does to the family's pre-activation, both ways."""

    def measure(layer: LayerFamilies, head: int) -> Measured:
        selection, passed, detail = family_of(layer, head)
        if not len(passed):
            return Measured({}, (), 0, detail=detail, undecided=NO_FAMILY)
        if layer.layer == 0:
            return Measured({}, (), 0, detail=detail, undecided="nothing is upstream of layer 0")
        previous = {h: s.stripes["previous"] for h, s in families.status.items() if parse_head(h)[0] < layer.layer}
        if len(previous) < 2:
            return Measured({}, (), 0, detail=detail, undecided="one head stands upstream, and no other beside it")
        given = upstream.prompts(
            selection.features[passed],
            selection.tokens[passed],
            layer.pool,
            layer.target.bos,
            (layer.target.name, selection.head, "upstream"),
        )
        got = upstream.patch_upstream(layer.model, layer.observed, given)
        whole = got.clean - got.corrupted
        n = len(whole)
        top = max(previous, key=lambda h: previous[h])
        noised = {name: got.clean - value for name, value in got.noised.items()}
        denoised = {name: value - got.corrupted for name, value in got.denoised.items()}
        rivals = [h for h in previous if h != top]
        rival = max(rivals, key=lambda h: float(noised[h].sum()))
        if not whole.mean() > 2 * whole.std(ddof=1) / n**0.5:
            said = "the corrupted prompts do not lower the family's pre-activations, so nothing can be patched"
            return Measured({}, (), n, detail=detail, undecided=said)
        total = whole.sum()
        share = {h: [float(noised[h].sum() / total), float(denoised[h].sum() / total)] for h in noised}
        return Measured(
            {
                "noising, beyond half": above_share(noised[top], whole, 0.5),
                "denoising, beyond half": above_share(denoised[top], whole, 0.5),
                "over other heads": (noised[top] - noised[rival], np.ones(n)),
                "attention over MLP": (noised["attention"] - noised["MLP"], np.ones(n)),
            },
            [f"prompt-{k}" for k in range(n)],
            n,
            detail=detail
            | {
                "previous-token head": top,
                "its previous-token score": previous[top],
                "clean less corrupted pre-activation": float(whole.mean()),
                "share by noising and denoising": dict(sorted(share.items(), key=lambda item: -item[1][0])),
            },
        )

    return per_head(claim, families, measure, headline="noising, beyond half", null=None)
