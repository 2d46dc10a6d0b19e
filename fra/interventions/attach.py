"""How an intervention attaches to a model: hooks that come off again, and what one forward pass shows to its edits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from fra.architectures.architecture import ANGLES, UNHEARD, Architecture, Model
from fra.architectures.known import architecture_of
from fra.core.frozen import FrozenLayer, freeze, seen_layer
from fra.core.weights import QKWeights
from fra.dictionaries.hooks import LayerHooks, layer_of
from fra.errors import CannotLoad, FraError
from fra.verdicts.shown import as_html

Hook: TypeAlias = tuple[str, Callable[..., Any]]
"""Name of a hook point, and a function (activation, hook) -> new activation or None."""
Rows: TypeAlias = slice | Tensor
"""Some documents of a batch."""


class Intervention:
    """A change to the model's forward pass: a context manager, or a list of hooks.

    `with intervention: model(tokens)` changes every pass inside and leaves the model as it was, after an exception too.
    Interventions nest, and add up: each takes away its own share, so what two of them name is taken away twice.
    `hooks` is for `model.run_with_hooks(tokens, fwd_hooks=intervention.hooks)` and `model.hooks`; there, hooks run in
    the order of the list, so an edit of the activation that this intervention reads has to stand before it.
    """

    def __init__(self, model: Model, readers: Sequence[Hook], edits: Sequence[Hook]) -> None:
        """Hooks by their names in TransformerLens' words (in `hooks` by the model's own). `readers` only look, and see
        what all other hooks at their point have left. Raises FraError for a hook that the model does not have.
        """
        own, points = architecture_of(model), model.hook_dict
        missing = [name for name, _ in (*readers, *edits) if not own.has(name)]
        if missing:
            raise FraError(f"the model has no hook {missing[0]!r}: it cannot be changed there.")
        for name, _ in (*readers, *edits):
            layer = layer_of(name)
            attention = () if layer is None else (LayerHooks(layer).attn_scores, LayerHooks(layer).pattern)
            if layer is not None and name in attention and own.fires_afterwards(layer):
                raise CannotLoad(
                    f"layer {layer} of a {type(model).__name__} cannot be changed by way of {name!r}: {UNHEARD}."
                )
        readers, edits = ([(own.point(name), function) for name, function in hooks] for hooks in (readers, edits))
        self.hooks: list[Hook] = [*readers, *edits]
        self._attachments = [(points[name], function, True) for name, function in readers]
        self._attachments += [(points[name], function, False) for name, function in edits]
        self._entered: list[ExitStack] = []

    def __repr__(self) -> str:
        reads, edits = self._points()
        return f"Intervention(changes {', '.join(edits) or 'nothing'}; reads {', '.join(reads) or 'nothing'})"

    def _repr_html_(self) -> str:
        reads, edits = self._points()
        facts = {"changes": ", ".join(edits) or "nothing", "reads": ", ".join(reads) or "nothing"}
        return as_html("Intervention", {**facts, "in force": "yes" if self._entered else "no"})

    def _points(self) -> tuple[list[str], list[str]]:
        """Names of the points that it reads, and of those that it changes, each once."""
        n_readers = sum(last for _, _, last in self._attachments)
        parts = self.hooks[:n_readers], self.hooks[n_readers:]
        reads, edits = (list(dict.fromkeys(name for name, _ in part)) for part in parts)
        return reads, edits

    def __enter__(self) -> Intervention:
        with ExitStack() as stack:
            for point, function, last in self._attachments:
                _attach(stack, point, function, last)
            self._entered.append(stack.pop_all())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().close()


def _attach(stack: ExitStack, point: Any, function: Callable[..., Any], last: bool) -> None:
    """Adds a hook to a point until `stack` closes; where `last`, it runs after the hooks that are added later, too."""
    point.add_hook(function)
    handle = point.fwd_hooks[-1]

    def detach() -> None:
        handle.hook.remove()
        point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]

    def move(module: Any, inputs: Any) -> None:
        if handle.hook.id in point._forward_hooks:
            point._forward_hooks.move_to_end(handle.hook.id)

    stack.callback(detach)
    if last:
        stack.callback(point.register_forward_pre_hook(move).remove)


@contextmanager
def unhooked(model: Model) -> Iterator[None]:
    """The model without the hooks that are on it (permanent ones stay): what a clean pass is taken under."""
    points = {id(point): point for point in model.hook_dict.values()}
    with ExitStack() as stack:
        for point in points.values():
            kept: Any = point._forward_hooks
            permanent = {handle.hook.id for handle in point.fwd_hooks if handle.is_permanent}
            stack.callback(setattr, point, "_forward_hooks", kept)
            point._forward_hooks = OrderedDict((key, hook) for key, hook in kept.items() if key in permanent)
        yield


_CHECKED: WeakKeyDictionary[Architecture, dict[tuple[int, str], bool]] = WeakKeyDictionary()


def check_layer(model: Model, layer: int, hook_name: str) -> None:
    """Raises FraError where this layer's scores hook is not what its name says, or its scores cannot be reproduced, as
    `fra.resolve` does. Tried once for a model and layer, on a few tokens.
    """
    _rotates(model, layer, hook_name)


def _rotates(model: Model, layer: int, hook_name: str) -> bool:
    """Whether positions rotate in this layer, as it does when it is checked."""
    own = architecture_of(model)
    checked = _CHECKED.setdefault(own, {})
    if (layer, hook_name) not in checked:
        with unhooked(model):
            frozen = freeze(model, torch.arange(min(12, own.n_ctx, own.d_vocab))[None], layer, hook_name)
        checked[layer, hook_name] = frozen.rotary is not None
    return checked[layer, hook_name]


class Pass:
    """What the current forward pass has shown at some hooks, for an edit further down to take."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        self._seen: dict[str, Tensor] = {}

    def readers(self) -> list[Hook]:
        """A hook for every name."""

        def reader(key: str) -> Callable[..., None]:
            def read(activation: Tensor, hook: Any) -> None:
                self._seen[key] = activation.detach()

            return read

        return [(name, reader(key)) for key, name in self._names.items()]

    def take(self) -> dict[str, Tensor]:
        """Everything read in this pass, once. Raises FraError where a hook has not fired."""
        seen, self._seen = self._seen, {}
        for key, name in self._names.items():
            if key not in seen:
                raise FraError(
                    f"{name!r} did not fire before the hook that needs it: give all hooks of an intervention to the "
                    f"same pass, and run the model from its tokens."
                )
        return seen


def layer_names(model: Model, layer: int, hook_name: str) -> dict[str, str]:
    """The hooks that freeze a layer within a pass; those of angles only where the layer rotates. Raises FraError as
    `check_layer` does.
    """
    rotates = _rotates(model, layer, hook_name)
    names = architecture_of(model).input_hooks(layer, hook_name)
    return {key: name for key, name in names.items() if rotates or key not in ANGLES}


def alike(model: Model, layer: int, seen: Mapping[str, Tensor]) -> Iterator[tuple[Rows, dict[str, Tensor]]]:
    """The documents of a pass in groups that are rotated by the same angles, with what was seen of each: one group of
    all, unless some are padded on the left or have positions of their own.
    """
    names = [name for name in architecture_of(model).rotary_hooks(layer) if name in seen]
    each = [seen[name].flatten(1) for name in names if len(seen[name]) > 1]
    if all(bool((rows == rows[:1]).all()) for rows in each):
        yield slice(None), dict(seen)
        return
    _, group = torch.unique(torch.cat(each, dim=1), dim=0, return_inverse=True)
    for number in range(int(group.max()) + 1):
        rows = (group == number).nonzero()[:, 0]
        yield rows, {key: value if len(value) == 1 else value[rows] for key, value in seen.items()}


def frozen_in_pass(model: Model, weights: QKWeights, seen: Mapping[str, Tensor], scores: Tensor) -> FrozenLayer:
    """The layer, frozen as this very pass has it.

    `scores`: the layer's hook_attn_scores (or its pattern) in this pass; only its shape is used for more than a record.
    """
    batch, pos, _ = seen["x"].shape
    if tuple(scores.shape) != (batch, len(weights.W_q), pos, pos):
        raise FraError(
            f"this pass has scores of shape {list(scores.shape)} for an input of "
            f"{pos} positions: run whole documents, without a key-value cache."
        )
    unknown = weights.W_q.new_zeros(()).expand(scores.shape)  # the pattern of this pass is still to come
    return seen_layer(model, weights, seen, scores.to(weights.W_q.dtype), unknown)


def fitting(value: Tensor, own: Tensor) -> Tensor:
    """`value` in the precision and on the device of `own`. Raises FraError where it cannot stand in its place."""
    missing = own.ndim - value.ndim
    tail = max(missing, 1)
    fits = missing >= 0 and value.shape[tail - missing :] == own.shape[tail:]
    if not fits or (missing == 0 and value.shape[0] not in (1, own.shape[0])):
        raise FraError(
            f"a value of shape {list(value.shape)} cannot stand where this pass "
            f"has {list(own.shape)}: run the model on documents of the same shape."
        )
    return value.to(own)


def with_head(z: Tensor, head: int, n_heads: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """hook_z with one head's output changed; z is [batch, pos, n_heads, d_head], or flattened in the last two."""
    changed = z.flatten(2).view(*z.shape[:2], n_heads, -1).clone()
    changed[:, :, head] = change(changed[:, :, head].clone())
    return changed.view_as(z)


def before_cap(
    frozen: FrozenLayer, head: int, scores: Float[Tensor, "batch pos pos"]
) -> Float[Tensor, "batch pos pos"]:
    """Scores as they were before softcap, with whatever other hooks have changed in them.

    The cap is inverted where that is well conditioned. Near saturation, where rounding has eaten the difference, the
    score is computed anew from the layer's input, unless another hook has changed it.
    """
    if frozen.softcap is None:
        return scores
    cap, eps = frozen.softcap, torch.finfo(scores.dtype).eps
    share = (scores.to(frozen.x) / cap).clamp(-1 + eps, 1 - eps)
    anew = frozen.scores(head).masked_fill(~frozen.mask, 0.0)
    unchanged = (frozen.cap(anew) - scores.to(frozen.x)).abs() <= 16 * eps * cap
    return torch.where((1 - share.square() < eps**0.25) & unchanged, anew, cap * torch.atanh(share))
