"""What a model loses on its next tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.face import face


@face
def losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos_less_1"]:
    """Loss of every next token, in nats: entry t is what position t says about the token at t + 1."""
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().to(logits.device), reduction="none"
    )
    return flat.view(len(tokens), -1)
