"""A sentence put out of sight: its tokens are no keys any more for what comes after."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fra.architectures.architecture import Model
from fra.architectures.face import face
from fra.architectures.known import architecture_of
from fra.core.sentences import Segments
from fra.dictionaries.hooks import LayerHooks
from fra.errors import FraError
from fra.interventions.attach import Intervention


@face
def suppress(
    model: Model, segments: Segments, segment: int | Collection[int], *, layers: Collection[int] | None = None
) -> Intervention:
    """Masks a segment's tokens as keys at every row after it, in every head of these layers (all where None); the rest
    of each row's attention is renormalised, by the model's own softmax. Rows up to the segment's end stay as they are,
    and no key that a row could not see becomes visible.

    segment: its number, or several, each masked at the rows after its own end. What else the model is asked (as many
    documents as you like, but as long as `segments`) is masked at the same positions.
    Raises FraError for a segment or layer that is not there, and in the pass where it has another length.
    """
    chosen = sorted({segment} if isinstance(segment, int) else set(segment))
    if wrong := [one for one in chosen if not 0 <= one < len(segments)]:
        raise FraError(f"segment {wrong[0]} is not there: the document has {len(segments)}, numbered from 0.")
    n_layers = architecture_of(model).n_layers
    wanted = range(n_layers) if layers is None else sorted(set(layers))
    if missing := [layer for layer in wanted if not 0 <= layer < n_layers]:
        raise FraError(f"layer {missing[0]} is out of range: the model has {n_layers} layers.")
    hidden = hidden_keys(segments, chosen)

    def edit(scores: Tensor, hook: Any) -> Tensor:
        if tuple(scores.shape[-2:]) != tuple(hidden.shape):
            raise FraError(
                f"this pass has scores of shape {list(scores.shape)}, and the segments are of {len(hidden)} tokens: "
                "run documents of that length, without a key-value cache."
            )
        return scores.masked_fill(hidden.to(scores.device), -torch.inf)

    return Intervention(model, [], [(LayerHooks(layer).attn_scores, edit) for layer in wanted])


def hidden_keys(segments: Segments, chosen: Collection[int]) -> Tensor:
    """[q_pos, k_pos]: true where the key is of a chosen segment and the row stands after it."""
    at = segments.segment
    mine = torch.isin(at, torch.tensor(list(chosen), dtype=at.dtype))
    return (at[:, None] > at[None, :]) & mine[None, :]
