"""Whole heads put out or replaced, the baselines that feature-resolved interventions are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.architecture import Model
from fra.architectures.face import face
from fra.architectures.known import architecture_of, check_layer_and_head, check_tokens, place_of
from fra.core.frozen import read_hooks
from fra.core.output import by_head
from fra.dictionaries.hooks import LayerHooks, layer_of
from fra.errors import FraError
from fra.interventions.arguments import Positions, chosen_positions
from fra.interventions.attach import Intervention, fitting, unhooked, with_head


@face
def set_output(
    model: Model,
    value: Float[Tensor, "*batch_pos d_head"],
    *,
    layer: int | None = None,
    head: int | str | None = None,
    rows: Positions = None,
    share: float = 1.0,
) -> Intervention:
    """Puts `value` ([d_head], [pos, d_head] or [batch, pos, d_head]) in place of a head's output at hook_z.

    layer and head: by number, or the head alone by name (head="L1H4"). share: how much of the way from the head's own
    output to `value`; 1 replaces it, 0 changes nothing.
    Raises FraError for a layer or head that the model does not have, and in the pass where `value` does not fit.
    """
    at, number = place_of(layer, head)
    check_layer_and_head(model, at, number)

    def edit(z: Tensor, hook: Any) -> Tensor:
        def change(own: Tensor) -> Tensor:
            chosen = chosen_positions("rows", rows, len(own), own.shape[1], own.device)[..., None]
            moved = own + share * (fitting(value, own) - own) if share != 1 else fitting(value, own)
            return torch.where(chosen, moved, own)

        return with_head(z, number, architecture_of(model).n_heads, change)

    return Intervention(model, [], [(LayerHooks(at).z, edit)])


@face
def zero_ablate(
    model: Model, *, layer: int | None = None, head: int | str | None = None, rows: Positions = None, share: float = 1.0
) -> Intervention:
    """Puts zero in place of a head's output; arguments as for `set_output`."""
    value = torch.zeros(architecture_of(model).d_head, device=architecture_of(model).device)
    return set_output(model, value, layer=layer, head=head, rows=rows, share=share)


@face
def mean_ablate(
    model: Model,
    reference: Int[Tensor, "batch pos"],
    *,
    layer: int | None = None,
    head: int | str | None = None,
    reference_rows: Positions = None,
    by_position: bool = False,
    rows: Positions = None,
    share: float = 1.0,
) -> Intervention:
    """Puts the head's mean output over reference documents in place of its output.

    reference_rows: which of their positions count (leave out padding and, if you wish, BOS); all where None.
    by_position: a mean for each position, over documents. Raises FraError where no position counts; otherwise as
    `set_output`.
    """
    z = head_outputs(model, reference, layer=layer, head=head)
    chosen = chosen_positions("reference_rows", reference_rows, len(z), z.shape[1], z.device).expand(z.shape[:2])
    dims = (0,) if by_position else (0, 1)
    count = chosen.sum(dims)
    if not bool((count > 0).all()):
        raise FraError("no reference position counts, so there is no mean: choose some in reference_rows.")
    mean = (z * chosen[..., None]).sum(dims) / count[..., None]
    return set_output(model, mean, layer=layer, head=head, rows=rows, share=share)


@face
def patch_output(
    model: Model,
    source: Int[Tensor, "batch pos"],
    *,
    layer: int | None = None,
    head: int | str | None = None,
    rows: Positions = None,
    share: float = 1.0,
) -> Intervention:
    """Puts the head's output on `source` (documents of the same shape) in place of its output, position by position;
    otherwise as `set_output`.
    """
    z = head_outputs(model, source, layer=layer, head=head)
    return set_output(model, z, layer=layer, head=head, rows=rows, share=share)


@face
def patch_pattern(
    model: Model,
    source: Int[Tensor, "batch pos"],
    *,
    layer: int | None = None,
    head: int | str | None = None,
    rows: Positions = None,
) -> Intervention:
    """Puts the head's attention pattern on `source` (documents of the same shape) in place of its own."""
    at, number = place_of(layer, head)
    name = LayerHooks(at).pattern
    patterns = _clean(model, source, at, number, name)[:, number]

    def edit(pattern: Tensor, hook: Any) -> Tensor:
        own = pattern[:, number]
        chosen = chosen_positions("rows", rows, len(own), own.shape[1], own.device)[..., None]
        changed = pattern.clone()
        changed[:, number] = torch.where(chosen, fitting(patterns, own), own)
        return changed

    return Intervention(model, [], [(name, edit)])


@face
def head_outputs(
    model: Model, tokens: Int[Tensor, "batch pos"], *, layer: int | None = None, head: int | str | None = None
) -> Float[Tensor, "batch pos d_head"]:
    """A head's output at hook_z on these documents, as the model is without hooks."""
    at, number = place_of(layer, head)
    z = _clean(model, tokens, at, number, LayerHooks(at).z)
    return by_head(z, architecture_of(model).n_heads)[:, :, number]


@face
def freeze_scales(model: Model, tokens: Int[Tensor, "batch pos"], *, layer: int) -> Intervention:
    """Holds every normalisation scale downstream of attention layer `layer` at its value on `tokens`, as the model is
    without hooks: what a change in that layer does then reaches the logits without rescaling.

    Run the model on documents of the same shape. Raises FraError for a layer that the model does not have.
    """
    check_layer_and_head(model, layer)
    check_tokens(model, tokens)
    own = architecture_of(model)

    def downstream(hook: str) -> bool:
        at = layer_of(hook)
        return at is None or at > layer or (at == layer and not hook.startswith(LayerHooks(layer).attention))

    points = {id(point): own.hook(name) for name, point in model.hook_dict.items()}
    names = [own.point(hook) for hook in points.values() if hook.endswith("hook_scale") and downstream(hook)]
    with unhooked(model), torch.no_grad():
        _, cache = model.run_with_cache(tokens.to(own.device), names_filter=names)

    def holding(value: Tensor) -> Callable[..., Tensor]:
        def hold(scale: Tensor, hook: Any) -> Tensor:
            return fitting(value, scale)

        return hold

    return Intervention(model, [], [(name, holding(cache[name])) for name in names if name in cache])


def _clean(model: Model, tokens: Tensor, layer: int, head: int, name: str) -> Tensor:
    """One hook's activation on these tokens, as the model is without hooks."""
    check_layer_and_head(model, layer, head)
    check_tokens(model, tokens)
    with unhooked(model), torch.no_grad():
        return read_hooks(model, tokens.to(architecture_of(model).device), layer, {"it": name})["it"]
