"""A forward pass of which only some hooks are wanted, and which goes no further than they need."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from fra.architectures.architecture import Model
from fra.architectures.known import architecture_of


class _AllSeen(Exception):
    """Ends a forward pass after which nothing is wanted."""


def seen(model: Model, tokens: Tensor, layer: int, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The named hooks of one forward pass, which ends where the last of them has fired; all are known to fire, in
    `layer` or below.
    """
    got: dict[str, Tensor] = {}

    def keep(key: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            got[key] = tensor.detach()
            if len(got) == len(names):
                raise _AllSeen

        return hook

    own = architecture_of(model)
    with model.hooks(fwd_hooks=[(own.point(name), keep(key)) for key, name in names.items()]), suppress(_AllSeen):
        model(tokens.to(own.device), **own.until(layer))
    return got
