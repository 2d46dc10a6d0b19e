"""Changes of a head's weights that its function does not feel, and which attributions move under them.

A score is a product of a query and a key, and softmax ignores what is constant along a row. So other weights do the
same, and what changes from one to the other says nothing about the head (a *gauge*):

- `key_bias`: b_K += v adds q_t . v to a whole row. No rotary positions (or v where they do not turn), no softcap, no
  QK-norm.
- `mean_direction`: W_K += (1/w) c^T, b_K -= (sum b/w) c, with w and b the weight and bias of a LayerNorm, whose output
  before them sums to zero: the keys stay.
- `basis`: W_Q M and W_K M^-T. No rotary positions, no QK-norm.

Every edit is of the model's own weights, of all key heads of a layer at once, and is taken back at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fra.architectures.architecture import Model, RawQK
from fra.architectures.known import architecture_of
from fra.core.frozen import freeze
from fra.core.weights import qk_weights
from fra.dictionaries.hooks import LayerHooks
from fra.errors import FraError


def parameter(model: Model, layer: int, name: str) -> Float[Tensor, "heads *size"]:  # noqa: F821
    """W_Q, W_K, b_Q or b_K as the model holds it: a view, so that writing to it changes the model."""
    held = architecture_of(model).held(layer, name)
    if held is None:
        raise FraError(f"layer {layer} has no {name}: there is no such gauge.")
    return held


@contextmanager
def _added(model: Model, layer: int, changes: Mapping[str, Tensor]) -> Iterator[None]:
    """Adds to the layer's weights, and puts them back. Raises FraError where what is written is not what is read."""
    with ExitStack() as stack, torch.no_grad():
        for name, change in changes.items():
            held = parameter(model, layer, name)
            before = held.clone()
            stack.callback(held.copy_, before)
            held += change
            if not torch.equal(parameter(model, layer, name), before + change):
                raise FraError(f"{name} of layer {layer} cannot be written in this model class: use another.")
        yield


def key_bias(model: Model, layer: int, v: Float[Tensor, "n_kv d_head"]) -> Any:
    """b_K += v, as a context manager. Raises FraError where that is no gauge: see `why_not`."""
    _must(why_not(model, layer, "key_bias", v))
    return _added(model, layer, {"b_K": v})


def mean_direction(model: Model, layer: int, c: Float[Tensor, "n_kv d_head"]) -> Any:
    """W_K += (1/w) c^T and b_K -= (sum b/w) c, as a context manager. Raises FraError where that is no gauge."""
    _must(why_not(model, layer, "mean_direction"))
    return rank_one(model, layer, c.new_ones(architecture_of(model).read_qk(layer).W_K.shape[1]), c)


def rank_one(model: Model, layer: int, direction: Float[Tensor, " d_model"], c: Float[Tensor, "n_kv d_head"]) -> Any:
    """W_K += (direction / w) c^T and b_K -= (sum direction b/w) c: a gauge for the direction of ones alone; for any
    other, the control that shows what `mean_direction` would look like if it were none.
    """
    w, b = norm(model, layer)
    changes = {"W_K": (direction / w)[:, None] * c[:, None, :]}
    if bool((b != 0).any()):
        changes["b_K"] = -(direction * b / w).sum() * c
    return _added(model, layer, changes)


def basis(model: Model, layer: int, M: Float[Tensor, "n_heads d_head d_head"]) -> Any:
    """W_Q M and W_K M^-T with their biases, as a context manager. Raises FraError where that is no gauge."""
    _must(why_not(model, layer, "basis"))
    changes = {}
    for side, turn in (("Q", M), ("K", torch.linalg.inv(M).mT)):
        for name in (f"W_{side}", f"b_{side}"):
            if name.startswith("b") and architecture_of(model).held(layer, name) is None:
                continue
            held = parameter(model, layer, name)
            after = held @ turn if held.ndim == 3 else (held[:, None] @ turn)[:, 0]
            changes[name] = after - held
    return _added(model, layer, changes)


def _must(problem: str | None) -> None:
    if problem is not None:
        raise FraError(problem)


def norm(model: Model, layer: int) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Weight and bias of the LayerNorm; ones and zeros where they are folded in."""
    raw = architecture_of(model).read_qk(layer)
    ones = raw.W_Q.detach().new_ones(raw.W_Q.shape[1])
    return raw.norm.weight_or_ones(ones), 0 * ones if raw.norm.bias is None else raw.norm.bias.detach().to(ones)


def why_not(model: Model, layer: int, gauge: str, v: Tensor | None = None) -> str | None:
    """Why `gauge` (key_bias, mean_direction or basis) is none for this layer, in a sentence; None where it is one."""
    weights = qk_weights(model, layer, LayerHooks(layer).normalized)
    raw = architecture_of(model).read_qk(layer)
    rotary = turned(model, layer)
    if gauge == "mean_direction":
        if not raw.norm.centred:
            return "the norm before this attention does not centre (RMSNorm, or none): no direction of W_K is idle"
        if bool((norm(model, layer)[0] == 0).any()):
            return "the LayerNorm's weight has a zero: ones cannot be written below it"
        return "the model has no key bias to take the LayerNorm's own up" if _lacks_bias(model, layer, raw) else None
    if weights.norm_k is not None:
        return "a QK-norm stands between the weights and the score"
    if gauge == "basis":
        if raw.W_K.shape != parameter(model, layer, "W_K").shape:
            return "query heads share key heads: one basis for all of a group is needed"
        return "rotary positions fix the basis of queries and keys" if rotary else None
    if weights.softcap is not None:
        return "a softcap feels what is constant along a row"
    if architecture_of(model).held(layer, "b_K") is None:
        return "the model has no key bias"
    if rotary == weights.W_k.shape[-1] or (rotary and v is not None and bool((v[..., :rotary] != 0).any())):
        return "rotary positions turn a key bias with its key: it is not constant along a row"
    return None


def _lacks_bias(model: Model, layer: int, raw: RawQK) -> bool:
    needs = raw.norm.bias is not None and bool((raw.norm.bias != 0).any())
    return needs and architecture_of(model).held(layer, "b_K") is None


def turned(model: Model, layer: int) -> int:
    """How many dimensions of a head rotary positions turn: as the layer does, since a Bridge's cfg may not know."""
    rotary = freeze(model, torch.zeros(1, 1, dtype=torch.long), layer, LayerHooks(layer).resid_pre).rotary
    return 0 if rotary is None else rotary.cos.shape[-1]
