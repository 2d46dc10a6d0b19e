"""The token that a head-output feature speaks for: the one whose logit it raises most, straight through W_O and W_U."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.attribution.upstream import norm_weight
from fra.core.weights import Model
from fra.dictionaries.encoder import head_output_layer

_FEATURES_AT_ONCE = 512


@torch.no_grad()
def direct_logits(model: Model, sae: Any, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_vocab"]:
    """d_f W_O W_U of chosen features, with the weights of a norm after attention and of the final norm, and its
    centring, on the way; their scales, which change no feature's order, are left out.
    """
    block: Any = model.blocks[head_output_layer(sae)]
    W_O = block.attn.W_O.detach().flatten(0, 1)
    W_U: Tensor = model.W_U.detach()
    final: Any = getattr(model, "ln_final", None)
    rms = bool(getattr(final, "uses_rms_norm", False)) or "RMS" in str(getattr(model.cfg, "normalization_type", ""))
    written = sae.W_dec.detach()[features].to(W_O) @ W_O
    if getattr(block, "ln1_post", None) is not None:
        written = written * norm_weight(model, block.ln1_post, written)
    if final is not None and model.cfg.normalization_type:
        written = written if rms else written - written.mean(-1, keepdim=True)
        written = written * norm_weight(model, final, written)
    logits: Tensor = written.to(W_U) @ W_U
    return logits


@torch.no_grad()
def raised_tokens(model: Model, sae: Any) -> Int[Tensor, " d_sae"]:
    """The token whose logit each feature raises most, straight through W_O and W_U (`direct_logits`)."""
    every = torch.arange(len(sae.W_dec), device=sae.W_dec.device)
    return torch.cat([direct_logits(model, sae, some).argmax(-1) for some in torch.split(every, _FEATURES_AT_ONCE)])
