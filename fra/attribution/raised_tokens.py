"""The token that a feature of head outputs, or of what attention writes, speaks for: the one whose logit it raises
most, straight through W_O (which the latter lie behind) and W_U.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.architecture import Model
from fra.architectures.known import architecture_of
from fra.dictionaries.codes import dictionary_hook
from fra.dictionaries.encoder import head_output_layer
from fra.dictionaries.hooks import is_attention_output

_FEATURES_AT_ONCE = 512


@torch.no_grad()
def direct_logits(model: Model, sae: Any, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_vocab"]:
    """d_f W_O W_U of chosen features (d_f W_U of a dictionary at hook_attn_out), with the weights of a norm after
    attention and of the final norm, and its centring, on the way; their scales, which change no feature's order, are
    left out.
    """
    own, layer = architecture_of(model), head_output_layer(sae)
    W_O, W_U = own.read_ov(layer).W_O.detach().flatten(0, 1), own.W_U
    direction, behind = sae.W_dec.detach()[features].to(W_O), is_attention_output(dictionary_hook(sae))
    written = direction if behind else direction @ W_O
    after, final = own.norm_after(layer), own.final_norm()
    if after is not None and not behind:
        written = written * after.weight_or_ones(written)
    if final is not None:
        written = written - written.mean(-1, keepdim=True) if final.centred else written
        written = written * final.weight_or_ones(written)
    logits: Tensor = written.to(W_U) @ W_U
    return logits


@torch.no_grad()
def raised_tokens(model: Model, sae: Any) -> Int[Tensor, " d_sae"]:
    """The token whose logit each feature raises most, straight through W_O and W_U (`direct_logits`)."""
    every = torch.arange(len(sae.W_dec), device=sae.W_dec.device)
    return torch.cat([direct_logits(model, sae, some).argmax(-1) for some in torch.split(every, _FEATURES_AT_ONCE)])
