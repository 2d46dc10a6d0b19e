"""What around a model, and not in its architecture, makes its numbers other than its weights say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fra.architectures.architecture import Model
from fra.architectures.known import architecture_of
from fra.dictionaries.hooks import layer_of


def attached(model: Model) -> str | None:
    """A sentence where SAELens' own dictionaries are attached: they take hook points away and give others."""
    saes: Any = getattr(model, "_acts_to_saes", None) or getattr(model, "acts_to_saes", None)
    if not saes:
        return None
    return (
        f"a dictionary is attached to the model at {next(iter(saes))!r} (SAELens' add_sae): take it off "
        "(model.reset_saes()) and give the dictionary to fra."
    )


def circumstance(model: Model, layer: int, shown: Iterable[Tensor]) -> str | None:
    """Why a layer's own numbers may differ from those of its weights, in a sentence, where it is nothing in them: an
    attached dictionary, hooks that change activations, dropout, numbers too large for float16. shown: what its points
    showed.
    """
    if found := attached(model):
        return found
    hooked = _hooked(model, layer)
    if hooked:
        return (
            f"other hooks are on the model at {hooked!r} and change what layer {layer} computes: take them off "
            "(model.reset_hooks(), or leave the `with` block) and call again."
        )
    if any(
        type(module).__name__.startswith("Dropout") and module.training and _p(module) for module in model.modules()
    ):
        return f"the model is in training mode and drops activations at random in layer {layer}: call model.eval()."
    tensors = list(shown)
    if any(tensor.dtype == torch.float16 for tensor in [*tensors, next(model.parameters())]) and not all(
        bool(tensor.isfinite().any(-1).all()) for tensor in tensors
    ):
        return (
            f"numbers of layer {layer} are too large for float16 and overflow: load the model in bfloat16 or float32."
        )
    return None


def _hooked(model: Model, layer: int) -> str | None:
    """The first point up to this layer that somebody's hook is on."""
    for name, point in model.hook_dict.items():
        at = layer_of(architecture_of(model).hook(name))
        if point._forward_hooks and (at is None or at <= layer):
            return str(name)
    return None


def _p(module: Any) -> bool:
    return bool(getattr(module, "p", 0.0))
