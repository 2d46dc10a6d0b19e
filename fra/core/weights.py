"""The query and key maps of one attention layer, read out of a TransformerLens model.

TransformerBridge and HookedTransformer keep weights, norms, scales and windows in different places and conventions;
here they become the same few tensors, with centring and the norm's weight and bias folded in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge

from fra.dictionaries.hooks import attention_input_layer
from fra.errors import FraError

Model = TransformerBridge | HookedTransformer


def check_layer_and_head(model: Model, layer: int, head: int | None = None) -> None:
    """Raises FraError where the model has no such layer or query head."""
    for what, index, size in (("layer", layer, model.cfg.n_layers), ("head", head, model.cfg.n_heads)):
        if index is not None and not 0 <= index < size:
            raise FraError(f"{what} {index} is out of range: the model has {size} {what}s, 0 to {size - 1}.")


@dataclass(frozen=True)
class QKWeights:
    """The query and key maps of one layer, the norm's centring, weight and bias folded in; no tokens needed.

    q = input @ W_q + b_q, where input is what stands at the hook, divided by the norm's scale where the hook lies
    before the norm. Key heads are repeated over their groups. `norm_q`, `norm_k`: weight and epsilon of a QK-norm, not
    folded in here.
    """

    layer: int
    hook_name: str
    W_q: Float[Tensor, "n_heads d_model d_head"]
    W_k: Float[Tensor, "n_heads d_model d_head"]
    b_q: Float[Tensor, "n_heads d_head"]
    b_k: Float[Tensor, "n_heads d_head"]
    norm_q: tuple[Float[Tensor, " d_head"], float] | None
    norm_k: tuple[Float[Tensor, " d_head"], float] | None
    scale: float
    softcap: float | None
    window: int | None
    """Keys at a distance of `window` or more are masked (sliding-window layers)."""


def _bridge_qk_norm(attn: Any, name: str, offset: float, eps: float) -> tuple[Tensor, float] | None:
    if name not in attn.submodules or getattr(attn, name).original_component is None:
        return None
    norm = getattr(attn, name)
    own = getattr(norm.original_component, "variance_epsilon", getattr(norm.original_component, "eps", eps))
    return norm.weight.detach() + offset, float(own)


def raw_weights(model: Model, layer: int) -> dict[str, Any]:
    """What the model holds of a layer, nothing folded, whatever its class."""
    return _read_bridge(model, layer) if isinstance(model, TransformerBridge) else _read_hooked(model, layer)


def _read_bridge(model: TransformerBridge, layer: int) -> dict[str, Any]:
    """What TransformerBridge holds. Its cfg does not tell the truth about scale, rotary dimension and QK-norm: the
    components do.
    """
    attn: Any = model.blocks[layer].attn
    hf = attn.original_component
    groups = attn.W_Q.shape[0] // attn.W_K.shape[0]
    zeros = attn.W_Q.new_zeros(attn.W_Q.shape[0], attn.W_Q.shape[-1])
    d_head = attn.W_Q.shape[-1]
    scale = float(d_head**-0.5)
    if isinstance(attn, JointQKVAttentionBridge):
        if getattr(model.cfg, "scale_attn_by_inverse_layer_idx", False):
            scale /= layer + 1
    else:
        scale = float(getattr(hf, "scaling", scale))
    hf_cfg = getattr(hf, "config", None)
    window = (
        getattr(hf, "sliding_window", None)
        if hasattr(hf, "sliding_window")
        else getattr(hf_cfg, "sliding_window", None)
    )
    # Gemma-family norms store their weight minus one.
    offset = 1.0 if getattr(model.cfg, "rmsnorm_uses_offset", False) else 0.0
    ln: Any = getattr(model.blocks[layer], "ln1", None)
    weight = getattr(ln, "weight", None) if ln is not None else None
    return {
        "W_Q": attn.W_Q,
        "W_K": attn.W_K.repeat_interleave(groups, dim=0),
        "b_Q": zeros if attn.b_Q is None else attn.b_Q,
        "b_K": zeros if attn.b_K is None else attn.b_K.repeat_interleave(groups, dim=0),
        "centred": ln is not None and not ln.uses_rms_norm,
        "ln_w": None if weight is None else weight + offset,
        "ln_b": None if ln is None or ln.uses_rms_norm else getattr(ln.original_component, "bias", None),
        "norm_q": _bridge_qk_norm(attn, "q_norm", offset, model.cfg.eps),
        "norm_k": _bridge_qk_norm(attn, "k_norm", offset, model.cfg.eps),
        "scale": scale,
        "softcap": getattr(hf, "attn_logit_softcapping", None),
        "window": window,
    }


def _read_hooked(model: HookedTransformer, layer: int) -> dict[str, Any]:
    """What HookedTransformer holds (grouped keys already repeated, norm weights complete)."""
    attn: Any = model.blocks[layer].attn
    ln: Any = model.blocks[layer].ln1
    cfg = model.cfg
    qk_norm = attn.q_norm is not None
    return {
        "W_Q": attn.W_Q,
        "W_K": attn.W_K,
        "b_Q": attn.b_Q,
        "b_K": attn.b_K,
        "centred": (cfg.normalization_type or "").startswith("LN"),
        "ln_w": getattr(ln, "w", None),
        "ln_b": getattr(ln, "b", None),
        "norm_q": (attn.q_norm.w.detach(), float(cfg.eps)) if qk_norm else None,
        "norm_k": (attn.k_norm.w.detach(), float(cfg.eps)) if qk_norm else None,
        "scale": 1.0 / float(attn.attn_scale),
        "softcap": float(cfg.attn_scores_soft_cap) if cfg.attn_scores_soft_cap > 0 else None,
        "window": cfg.window_size if attn.attn_type == "local" else None,
    }


def working_dtype(model: Model, dtype: torch.dtype | None = None) -> torch.dtype:
    """The precision that is computed in: `dtype`, else the model's own, half precisions raised to float32."""
    own = dtype or next(model.parameters()).dtype
    return own if own in (torch.float32, torch.float64) else torch.float32


@torch.no_grad()
def qk_weights(model: Model, layer: int, hook_name: str, dtype: torch.dtype | None = None) -> QKWeights:
    """Query and key maps of every head of `layer`, as they read the activation at `hook_name`.

    Raises FraError where the layer does not exist, where the hook is not this layer's attention input, and for
    positions that enter the score otherwise than by rotation (ALiBi, relative position bias, shortformer).
    """
    check_layer_and_head(model, layer)
    read_at = attention_input_layer(hook_name)
    if read_at != layer:
        raise FraError(f"{hook_name!r} is the attention input of layer {read_at}, not of layer {layer}.")
    kind = getattr(model.cfg, "positional_embedding_type", "standard")
    if kind in ("alibi", "relative_positional_bias", "shortformer"):
        raise FraError(
            f"positions of type {kind!r} add to the scores or the attention input, which is not resolved: use another "
            f"model."
        )
    if getattr(model.blocks[layer], "attn", None) is None:
        raise FraError(f"layer {layer} has no attention component.")
    raw = raw_weights(model, layer)
    target = working_dtype(model, dtype)
    home = raw["W_Q"].device
    # Folding is done once in double precision, so that it costs no accuracy (MPS has no float64).
    work = torch.device("cpu") if home.type == "mps" else home

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().to(work, torch.float64)

    folded = {}
    for side in ("Q", "K"):
        W, b = wide(raw[f"W_{side}"]), wide(raw[f"b_{side}"])
        if raw["ln_b"] is not None:
            b = b + wide(raw["ln_b"]) @ W
        if raw["ln_w"] is not None:
            W = wide(raw["ln_w"])[:, None] * W
        if raw["centred"]:
            W = W - W.mean(dim=1, keepdim=True)
        folded[side] = W.to(home, target), b.to(home, target)
    norms = {}
    for name in ("norm_q", "norm_k"):
        norm = raw[name]
        if norm is not None and norm[0].shape != (raw["W_Q"].shape[-1],):
            raise FraError(
                f"the QK-norm of layer {layer} does not work head by head (weight of shape {tuple(norm[0].shape)}): "
                f"use another model."
            )
        norms[name] = None if norm is None else (norm[0].to(home, target), norm[1])
    return QKWeights(
        layer=layer,
        hook_name=hook_name,
        W_q=folded["Q"][0],
        W_k=folded["K"][0],
        b_q=folded["Q"][1],
        b_k=folded["K"][1],
        norm_q=norms["norm_q"],
        norm_k=norms["norm_k"],
        scale=raw["scale"],
        softcap=raw["softcap"],
        window=raw["window"],
    )


@dataclass(frozen=True)
class OVWeights:
    """v = (input @ W_V + b_V) and result = z @ W_O for every head of a layer; centring and the norm's weight and bias
    are folded into W_V and b_V, key-value heads repeated over their groups.
    """

    W_V: Float[Tensor, "n_heads d_model d_head"]
    b_V: Float[Tensor, "n_heads d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]


@torch.no_grad()
def ov_weights(model: Model, layer: int, hook_name: str, dtype: torch.dtype | None = None) -> OVWeights:
    """Value and output maps of every head of `layer`, as they read the activation at `hook_name`.

    Raises FraError where the layer does not exist or the hook is not its attention input.
    """
    check_layer_and_head(model, layer)
    if attention_input_layer(hook_name) != layer:
        raise FraError(
            f"{hook_name!r} is the attention input of layer {attention_input_layer(hook_name)}, not of layer {layer}."
        )
    raw = raw_weights(model, layer)
    attn: Any = model.blocks[layer].attn
    home, target = attn.W_V.device, working_dtype(model, dtype)
    work = torch.device("cpu") if home.type == "mps" else home

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().to(work, torch.float64)

    groups = len(attn.W_O) // len(attn.W_V)
    W = wide(attn.W_V).repeat_interleave(groups, dim=0)
    b = wide(attn.W_V.new_zeros(len(attn.W_O), W.shape[-1])) if attn.b_V is None else wide(attn.b_V)
    b = b.repeat_interleave(len(W) // len(b), dim=0)
    if raw["ln_b"] is not None:
        b = b + wide(raw["ln_b"]) @ W
    if raw["ln_w"] is not None:
        W = wide(raw["ln_w"])[:, None] * W
    if raw["centred"]:
        W = W - W.mean(dim=1, keepdim=True)
    return OVWeights(W.to(home, target), b.to(home, target), attn.W_O.detach().to(home, target))
