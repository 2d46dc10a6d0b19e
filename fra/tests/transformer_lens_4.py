"""Lets SAELens be imported beside TransformerLens 4, which it does not support yet: a pytest plugin for CI.

SAELens (6.54) imports names that TransformerLens 4 has moved or removed. Those that were moved are given their old
place; those that are gone stand for classes of which there is no object. Nothing of `fra` is replaced.

    pytest claims -p fra.tests.transformer_lens_4 -k q01
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

import transformer_lens


class Gone:
    """In the place of a class that there is no more."""


def _module(name: str, **names: Any) -> None:
    """A module with these names where there is none."""
    made = ModuleType(f"transformer_lens.{name}")
    made.__path__ = []
    vars(made).update(names)
    sys.modules[made.__name__] = made
    vars(transformer_lens)[name.rpartition(".")[2]] = made


def stand_in() -> None:
    """Does nothing where TransformerLens still has what SAELens wants."""
    if int(version("transformer-lens").split(".")[0]) < 4:
        return
    utilities = import_module("transformer_lens.utilities")
    _module("utils", **{name: getattr(utilities, name) for name in dir(utilities) if not name.startswith("_")})
    _module(
        "HookedTransformer",
        HookedTransformer=Gone,
        HookedRootModule=transformer_lens.HookedRootModule,
        Loss=Any,
        Output=Any,
    )
    vars(transformer_lens).update(HookedTransformer=Gone, HookedRootModule=transformer_lens.HookedRootModule)
    _module("components")
    _module("components.mlps")
    _module("components.mlps.can_be_used_as_mlp", CanBeUsedAsMLP=Gone)


stand_in()
