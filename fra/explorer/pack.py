"""Arrays as a page carries them: base64 of little-endian numbers, with what is needed to read them again.

A float16 array goes row by row, each row divided by its largest magnitude and that kept in float32: whatever the size
of a vector, its numbers keep eleven bits.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Precision = Literal["float16", "float32"]


class Pack:
    """Arrays that travel together in one block of base64 text, by name."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self.index: dict[str, dict[str, Any]] = {}
        """By name: kind ("f32", "i32" or "rows"), shape, and where in the block it begins."""

    def _add(self, data: np.ndarray) -> int:
        at, raw = self._size, data.tobytes()
        raw += b"\0" * (-len(raw) % 8)  # typed arrays must begin at a multiple of their number's size
        self._parts.append(raw)
        self._size += len(raw)
        return at

    def integers(self, name: str, values: Tensor) -> None:
        """Whole numbers, as int32."""
        data = values.detach().cpu().numpy().astype("<i4")
        self.index[name] = {"kind": "i32", "shape": list(values.shape), "at": self._add(data)}

    def numbers(self, name: str, values: Tensor) -> None:
        """Numbers in float32."""
        data = values.detach().cpu().numpy().astype("<f4")
        self.index[name] = {"kind": "f32", "shape": list(values.shape), "at": self._add(data)}

    def rows(self, name: str, values: Tensor, precision: Precision) -> None:
        """A matrix of vectors [n, d], in float32 or in float16 with a scale for each row."""
        if precision == "float32":
            self.numbers(name, values)
            return
        largest = values.detach().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        data = (values.detach() / largest[:, None]).cpu().numpy().astype("<f2")
        scale = largest.cpu().numpy().astype("<f4")
        self.index[name] = {
            "kind": "rows",
            "shape": list(values.shape),
            "at": self._add(data),
            "scale": self._add(scale),
        }

    def text(self) -> str:
        """The block."""
        return base64.b64encode(b"".join(self._parts)).decode()
