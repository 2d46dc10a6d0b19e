"""Batches in which one document is padded on the left: each document is changed as it is when it runs alone.

In float32: in float64 the Bridge makes NaN of padding, and of what attends to it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fra
from fra import interventions as iv
from fra.architectures.known import architecture_of
from fra.errors import FraError
from fra.tests.intervening import HEAD, LAYER, SCORES, at
from fra.tests.models import random_tokens, tiny

LONG, SHORT = random_tokens(20, 1), random_tokens(12, 2)
PADDING = len(LONG) - len(SHORT)
BATCH = torch.stack([torch.cat((torch.zeros(PADDING, dtype=torch.long), SHORT)), LONG])
MASK = torch.ones(2, len(LONG), dtype=torch.long)
MASK[0, :PADDING] = 0
Z = f"blocks.{LAYER}.attn.hook_z"


def changes(kind: str) -> list[iv.Intervention]:
    model, place = tiny(kind), at(kind)
    head = fra.resolve(model, place["dictionary"], LONG, LAYER, HEAD)
    channels, features = head.channels("abs", n=60), head.codes.feature.unique()[::2]
    return [
        fra.remove(model, channels, **place),
        iv.keep_only(model, channels, **place),
        iv.scale_blocks(model, [("feature", "bias"), ("error", "feature")], -1.0, **place),
        iv.scale_features(model, features, "query", 3.0, **place),
        iv.scale_features(model, features, "key", **place),
        iv.remove_output(model, features, terms=("bias",), **place),
    ]


def taken(model: Any, change: iv.Intervention, tokens: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """What a change does to the scores (where they are attended) and the outputs of all heads."""
    seen: list[torch.Tensor] = []
    hooks: Any = [(SCORES, lambda x, hook: seen.append(x.tril())), (Z, lambda x, hook: seen.append(x.flatten(2)))]
    for context in (iv.Intervention(model, [], []), change):
        with torch.no_grad(), context, model.hooks(fwd_hooks=hooks):
            model(tokens, attention_mask=mask)
    return [torch.nan_to_num(after - before) for before, after in zip(seen[:2], seen[2:], strict=True)]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "pythia", "qwen3", "gemma2", "gpt_neo"])
def test_a_document_beside_a_padded_one_is_changed_as_alone(kind: str) -> None:
    model = tiny(kind)
    for number, change in enumerate(changes(kind)):
        both = taken(model, change, BATCH, MASK)
        for row, tokens in ((0, SHORT), (1, LONG)):
            alone = taken(model, change, tokens[None], torch.ones(1, len(tokens), dtype=torch.long))
            size = max(float(part.abs().max()) for part in alone)
            assert size > 0.01
            scores, z = (part[row] for part in both)
            apart = scores[:, -len(tokens) :, -len(tokens) :] - alone[0][0], z[-len(tokens) :] - alone[1][0]
            assert max(float(part.abs().max()) for part in apart) < 2e-4 * size, (number, row)


def test_rows_and_entries_are_of_their_document() -> None:
    """`rows` and `entries` given by document go with it, whichever documents share its angles."""
    model, place = tiny("llama"), at("llama")
    channels = fra.resolve(model, place["dictionary"], LONG, LAYER, HEAD).channels("abs", n=60)
    rows = torch.zeros(2, len(LONG), dtype=torch.bool)
    rows[0, -3:] = rows[1, 10] = True
    entries = rows[:, :, None].expand(-1, -1, len(LONG))
    places: list[Any] = [{"rows": rows}, {"entries": entries}]
    for where in places:
        scores = taken(model, fra.remove(model, channels, **place, **where), BATCH, MASK)[0][:, HEAD]
        assert torch.equal((scores != 0).any(-1), rows)


def test_what_needs_one_rotation_for_all_documents_refuses_several() -> None:
    model = tiny("llama")
    own = architecture_of(model)
    seen: dict[str, torch.Tensor] = {}
    hooks: Any = [
        (name, lambda x, hook, key=key: seen.update({key: x})) for key, name in own.rotary_hooks(LAYER).items()
    ]
    with model.hooks(fwd_hooks=hooks):
        model(BATCH, attention_mask=MASK)
    with pytest.raises(FraError, match=r"rotated by different angles in layer 1 .*pad on the right"):
        own.rotary(LAYER, seen, len(LONG), torch.float32)
