"""Where in the target's own documents the features of the page fire, and how strongly while they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from fra.attribution.examples import examples_of
from fra.attribution.head_outputs import Live, observe
from fra.core.frozen import read_hooks
from fra.dictionaries.codes import codes, dictionary_hook
from fra.dictionaries.hooks import attention_input_layer, is_head_output
from fra.dictionaries.texts import text_of
from fra.report.tokens import AFTER, BEFORE
from fra.stimuli.natural import natural_documents

if TYPE_CHECKING:
    from fra.targets.target import Target

EXAMPLES = 3
"""Firings of a feature that the page shows, each from a document of its own."""


@torch.no_grad()
def firings(target: Target, sae: Any, documents: Sequence[Int[Tensor, " _pos"]]) -> Live:
    """Every firing of a dictionary (of attention inputs or head outputs) on the documents; their first positions, often
    sinks, are left out.
    """
    hook, parts = dictionary_hook(sae), []
    for number, ids in enumerate(documents):
        if is_head_output(hook):
            seen = observe(target.model, sae, ids).live
            pos, feature, value = seen.pos, seen.feature, seen.value
        else:
            x = read_hooks(target.model, ids[None], attention_input_layer(hook), {"x": hook})["x"]
            found = codes(sae, x)
            pos, feature, value = found.row, found.feature, found.value
        kept = pos > 0
        parts.append((torch.full_like(pos[kept], number), pos[kept], feature[kept], value[kept].float()))
    doc, pos, feature, value = (torch.cat(column) for column in zip(*parts, strict=True))
    return Live(doc, pos, feature, value)


def in_documents(
    target: Target, sae: Any, features: Int[Tensor, " n"], n_documents: int
) -> tuple[list[list[dict[str, Any]]], list[float | None]]:
    """Of each feature: its strongest firings (ids of the tokens around each, [place, activation] of those at which it
    fires, place of the strongest), and its mean activation while live, None where it never fires. Nothing where the
    target has no documents of its own, or `n_documents` is 0.
    """
    n = min(n_documents, len(target.documents())) if n_documents else 0
    if not n:
        return [[] for _ in features], [None for _ in features]
    documents = natural_documents(target, n)
    live = firings(target, sae, documents)
    total = torch.zeros(int(live.feature.max()) + 1 if len(live) else 1, dtype=torch.float64)
    total.index_add_(0, live.feature.cpu(), live.value.double().cpu())
    count = torch.bincount(live.feature.cpu(), minlength=len(total))
    ids = features.tolist()
    means = [float(total[i] / count[i]) if i < len(total) and count[i] else None for i in ids]
    chosen = live.where(torch.isin(live.feature, features.to(live.feature.device)))
    found = _drawn(chosen, documents)
    return [found.get(i, []) for i in ids], means


def words(target: Target, *of: list[list[dict[str, Any]]]) -> dict[int, str]:
    """The texts of all tokens in the examples of `in_documents`, by id: each travels once."""
    text = text_of(target.tokenizer)
    ids = {token for examples in of for own in examples for one in own for token in one["tokens"]}
    return {token: text(token) for token in sorted(ids)}


def _drawn(live: Live, documents: Sequence[Int[Tensor, " _pos"]]) -> dict[int, list[dict[str, Any]]]:
    """The strongest firings of each feature: tokens around each, with the activations there."""
    here: dict[tuple[int, int], dict[int, float]] = {}
    for doc, pos, feature, value in zip(
        live.doc.tolist(), live.pos.tolist(), live.feature.tolist(), live.value.tolist(), strict=True
    ):
        here.setdefault((feature, doc), {})[pos] = value
    found: dict[int, list[dict[str, Any]]] = {}
    at = examples_of(live, EXAMPLES)
    for doc, pos, feature in zip(at.doc.tolist(), at.pos.tolist(), at.feature.tolist(), strict=True):
        window = range(max(0, pos - BEFORE), min(len(documents[doc]), pos + AFTER + 1))
        values = here[feature, doc]
        found.setdefault(feature, []).append(
            {
                "tokens": documents[doc][window.start : window.stop].tolist(),
                "values": [[at, float(f"{values[k]:.3g}")] for at, k in enumerate(window) if k in values],
                "at": window.index(pos),
            }
        )
    return found
