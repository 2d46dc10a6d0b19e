"""Layers of a target on the documents of one stimulus: measured when they are asked for, kept while there is room."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

from fra.core.coded import Arm
from fra.core.frozen import FrozenLayer
from fra.dictionaries.codes import Codes
from fra.search.channels import Arms
from fra.search.screen import LayerScreen

_KEPT_BYTES = 2 * 2**30


class Layers:
    """A null that is drawn for one head needs its layer's documents again, long after the layer was screened."""

    def __init__(self, measure: Callable[[int], LayerScreen], most_bytes: int = _KEPT_BYTES) -> None:
        self._measure, self._most_bytes = measure, most_bytes
        self._kept: OrderedDict[int, tuple[LayerScreen, int]] = OrderedDict()

    def __call__(self, layer: int) -> LayerScreen:
        """The layer; measured again where it had to make room."""
        if layer not in self._kept:
            self.keep(self._measure(layer))
        self._kept.move_to_end(layer)
        return self._kept[layer][0]

    def keep(self, screen: LayerScreen) -> None:
        """Keeps a layer, and lets those go that were not asked for longest while all are too large."""
        size = sum(map(_bytes, _arms(screen)))
        self._kept[screen.discovery.frozen.layer] = screen, size
        while len(self._kept) > 1 and sum(own for _, own in self._kept.values()) > self._most_bytes:
            self._kept.popitem(last=False)


def lean(arm: Arm, *, patterns: bool = False) -> Arm:
    """The arm without the model's own scores of all heads and, unless asked for, their patterns, by far its largest
    part: a screen shows patterns of the repeated arm, and nothing else looks at them.
    """
    frozen = arm.frozen
    empty = frozen.x.new_zeros(()).expand(frozen.model_scores.shape)
    pattern = frozen.pattern if patterns else empty
    return Arm(dataclasses.replace(frozen, model_scores=empty, pattern=pattern), arm.codes)


def lean_arms(arms: Arms, *, patterns: bool = False) -> Arms:
    """Both arms likewise; patterns of the repeated one where asked for."""
    return Arms(arms.batch, lean(arms.repeated, patterns=patterns), lean(arms.control))


def _arms(screen: LayerScreen) -> list[Arm]:
    both = [screen.confirmation] + ([screen.sets] if screen.tih else [])
    control = [] if screen.chosen_on is None else [screen.chosen_on.control]
    return [screen.discovery, *control, *(arm for arms in both for arm in (arms.repeated, arms.control))]


def _bytes(arm: Arm) -> int:
    parts: tuple[FrozenLayer, Codes] = (arm.frozen, arm.codes)
    tensors = [
        value
        for part in parts
        for field in dataclasses.fields(part)
        if isinstance(value := getattr(part, field.name), Tensor)
    ]
    return sum(value.untyped_storage().nbytes() for value in tensors)
