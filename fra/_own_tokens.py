"""The token that a head-output feature speaks for: the one whose logit it raises most, straight through W_O and W_U."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fra._encoder import head_output_layer
from fra._heads import Model
from fra._recursive import norm_weight

_FEATURES_AT_ONCE = 512


@torch.no_grad()
def own_tokens(model: Model, sae: Any) -> Int[Tensor, " d_sae"]:
    """argmax of d_f W_O W_U, with the weights of a norm after attention and of the final norm, and its centring, on the
    way; their scales, which change no feature's order, are left out.
    """
    layer = head_output_layer(sae)
    block: Any = model.blocks[layer]
    W_O = block.attn.W_O.detach().flatten(0, 1)
    decoder = sae.W_dec.detach().to(W_O)
    W_U: Tensor = model.W_U.detach()
    final: Any = getattr(model, "ln_final", None)
    rms = bool(getattr(final, "uses_rms_norm", False)) or "RMS" in str(getattr(model.cfg, "normalization_type", ""))
    found = []
    for start in range(0, len(decoder), _FEATURES_AT_ONCE):
        written = decoder[start : start + _FEATURES_AT_ONCE] @ W_O
        if getattr(block, "ln1_post", None) is not None:
            written = written * norm_weight(model, block.ln1_post, written)
        if final is not None and model.cfg.normalization_type:
            written = written if rms else written - written.mean(-1, keepdim=True)
            written = written * norm_weight(model, final, written)
        found.append((written.to(W_U) @ W_U).argmax(-1))
    return torch.cat(found)
