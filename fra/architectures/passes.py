"""A forward pass of which only some hooks are wanted, and which goes no further than they need."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from fra.architectures.architecture import Model
from fra.architectures.known import architecture_of

_PASSES: WeakKeyDictionary[Model, RLock] = WeakKeyDictionary()
_MADE = Lock()


def _passes_of(model: Model) -> RLock:
    """One pass of a model at a time: hooks are the model's, so that a pass in another thread would show itself in the
    cache of this one.
    """
    with _MADE:
        return _PASSES.setdefault(model, RLock())


class _AllSeen(Exception):
    """Ends a forward pass after which nothing is wanted."""


def seen(model: Model, tokens: Tensor, layer: int, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Of the named hooks, which the model has, those that fire in one forward pass up to `layer`; it ends where the
    last of them has fired: behind attention scores follow an MLP, and in the last layer the unembedding.
    """
    got: dict[str, Tensor] = {}

    def keep(key: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            got[key] = tensor.detach()
            if len(got) == len(names):
                raise _AllSeen

        return hook

    own = architecture_of(model)
    hooks: list[Any] = [(own.point(name), keep(key)) for key, name in names.items()]
    with _passes_of(model), model.hooks(fwd_hooks=hooks), suppress(_AllSeen):
        model(tokens.to(own.device), **own.until(layer))
    return got
