"""What the report draws besides tables: maps of a document's positions and curves. Numbers in, coordinates out; no
colour alone, no script.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CELL = 8
"""Side of a map's cell, in px."""
_LABEL = 58.0  # room for the tokens beside and above a map
_FAINTEST = 0.03  # cells below this share of the largest are not drawn
_CURVE_WIDTH, _CURVE_HEIGHT, _CURVE_MARGIN = 340.0, 150.0, 46.0
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")


def is_maps(value: Any) -> bool:
    """Whether a value of `detail` is {"tokens": [str], "maps": {name: [[number]]}}, one row a token in every map."""
    if not isinstance(value, dict) or value.keys() != {"tokens", "maps"}:
        return False
    tokens, maps = value["tokens"], value["maps"]
    return (
        isinstance(tokens, list)
        and isinstance(maps, dict)
        and all(isinstance(rows, list) and len(rows) == len(tokens) for rows in maps.values())
        and all(isinstance(row, list) and len(row) <= len(tokens) for rows in maps.values() for row in rows)
    )


def is_curves(value: Any) -> bool:
    """Whether a value of `detail` is {"x": [number], "curves": {name: [number or null]}}."""
    return (
        isinstance(value, dict)
        and value.keys() == {"x", "curves"}
        and isinstance(value["x"], list)
        and len(value["x"]) > 1
        and all(_is_number(x) for x in value["x"])
        and isinstance(value["curves"], dict)
        and all(isinstance(y, list) and len(y) == len(value["x"]) for y in value["curves"].values())
    )


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def heat_map(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Cells of one map: queries downwards, keys to the right; opacity is the share of the largest absolute value.

    Returns size in px, the largest absolute value, and (x, y, opacity, negative) of every cell that can be seen.
    """
    largest = max((abs(v) for row in rows for v in row if _is_number(v)), default=0.0)

    def cells() -> Iterator[tuple[float, float, float, bool]]:
        for t, row in enumerate(rows):
            for s, value in enumerate(row):
                if _is_number(value) and largest > 0 and abs(value) >= _FAINTEST * largest:
                    yield _LABEL + s * CELL, _LABEL + t * CELL, round(abs(value) / largest, 2), value < 0

    return {
        "size": _LABEL + len(rows) * CELL,
        "label": _LABEL,
        "cell": CELL,
        "largest": largest,
        "cells": list(cells()),
    }


def curves(x: Sequence[float], series: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Polylines of every series over x (logarithmic where x is positive and spans more than a factor of 20), told
    apart by their dashes.
    """
    logarithmic = min(x) > 0 and max(x) > 20 * min(x)
    at = [math.log(v) for v in x] if logarithmic else list(x)
    values = [float(v) for y in series.values() for v in y if _is_number(v)] or [0.0]
    low, high = min(0.0, *values), max(0.0, *values)
    high = high if high > low else low + 1.0
    left, right = min(at), max(at)

    def px(v: float) -> float:
        return round(_CURVE_MARGIN + (v - left) / ((right - left) or 1.0) * (_CURVE_WIDTH - 1.5 * _CURVE_MARGIN), 1)

    def py(v: float) -> float:
        return round(8.0 + float(high - v) / float(high - low) * (_CURVE_HEIGHT - 30), 1)

    lines = []
    for number, (name, y) in enumerate(series.items()):
        points = [(px(a), py(v)) for a, v in zip(at, y, strict=True) if _is_number(v)]
        lines.append({"name": name, "points": points, "dash": _DASHES[number % len(_DASHES)]})
    return {
        "width": _CURVE_WIDTH,
        "height": _CURVE_HEIGHT,
        "lines": lines,
        "x": [(px(a), v) for a, v in zip(at, x, strict=True)],
        "y": [(py(v), v) for v in (low, high)],
        "zero": py(0.0),
        "left": px(left),
        "right": px(right),
    }


def link(text: str) -> bool:
    """Whether a text may stand as a link: an address on Neuronpedia and nothing else."""
    return text.startswith("https://www.neuronpedia.org/") and all(c.isalnum() or c in "-._/:" for c in text)
