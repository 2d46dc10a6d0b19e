"""The maps of one attention layer as they read a dictionary's hook: the norm's centring, weight and bias folded in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fra.architectures.architecture import Model, Norm, QKNorm
from fra.architectures.known import architecture_of, check_layer_and_head, working_dtype
from fra.dictionaries.hooks import attention_input_layer
from fra.errors import FraError

__all__ = [
    "Model",
    "OVWeights",
    "QKWeights",
    "check_layer_and_head",
    "ov_weights",
    "qk_weights",
    "raw_weights",
    "working_dtype",
]


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
    norm_q: QKNorm | None
    norm_k: QKNorm | None
    scale: float
    softcap: float | None
    window: int | None
    """Keys at a distance of `window` or more are masked (sliding-window layers)."""

    def mask(self, n_pos: int) -> Bool[Tensor, "pos pos"]:
        """True where the key may be attended."""
        pos = torch.arange(n_pos, device=self.W_q.device)
        ahead = pos[:, None] - pos
        return (ahead >= 0) & (ahead < (n_pos if self.window is None else self.window))


def raw_weights(model: Model, layer: int) -> dict[str, Any]:
    """What the model holds of a layer's queries and keys, nothing folded, whatever its class."""
    raw = architecture_of(model).read_qk(layer)
    norm = {"ln_w": raw.norm.weight, "ln_b": raw.norm.bias, "centred": raw.norm.centred}
    return {name: value for name, value in vars(raw).items() if name != "norm"} | norm


def _folded(norm: Norm, W: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Folding is done in double precision, so that it costs no accuracy (MPS has no float64)."""
    home = W.device
    work = torch.device("cpu") if home.type == "mps" else home
    W, b = norm.fold(W.detach().to(work, torch.float64), b.detach().to(work, torch.float64))
    return W.to(home, dtype), b.to(home, dtype)


def _check_hook(layer: int, hook_name: str) -> None:
    read_at = attention_input_layer(hook_name)
    if read_at != layer:
        raise FraError(f"{hook_name!r} is the attention input of layer {read_at}, not of layer {layer}.")


@torch.no_grad()
def qk_weights(model: Model, layer: int, hook_name: str, dtype: torch.dtype | None = None) -> QKWeights:
    """Query and key maps of every head of `layer`, as they read the activation at `hook_name`.

    Raises FraError where the layer does not exist, where the hook is not this layer's attention input, and for
    positions that enter the score otherwise than by rotation (ALiBi, relative position bias, shortformer).
    """
    check_layer_and_head(model, layer)
    _check_hook(layer, hook_name)
    raw = architecture_of(model).read_qk(layer)
    target = working_dtype(model, dtype)
    W_q, b_q = _folded(raw.norm, raw.W_Q, raw.b_Q, target)
    W_k, b_k = _folded(raw.norm, raw.W_K, raw.b_K, target)
    norms: list[QKNorm | None] = []
    for norm in (raw.norm_q, raw.norm_k):
        if norm is not None and norm[0].shape != (raw.W_Q.shape[-1],):
            raise FraError(
                f"the QK-norm of layer {layer} does not work head by head "
                f"(weight of shape {tuple(norm[0].shape)}): use another model."
            )
        norms.append(None if norm is None else (norm[0].to(W_q.device, target), norm[1]))
    return QKWeights(
        layer=layer,
        hook_name=hook_name,
        W_q=W_q,
        W_k=W_k,
        b_q=b_q,
        b_k=b_k,
        norm_q=norms[0],
        norm_k=norms[1],
        scale=raw.scale,
        softcap=raw.softcap,
        window=raw.window,
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
    _check_hook(layer, hook_name)
    raw, target = architecture_of(model).read_ov(layer), working_dtype(model, dtype)
    W_V, b_V = _folded(raw.norm, raw.W_V, raw.b_V, target)
    return OVWeights(W_V, b_V, raw.W_O.detach().to(W_V.device, target))
