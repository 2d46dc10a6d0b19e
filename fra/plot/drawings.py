"""What the report draws besides tables: maps of a document's positions and curves. Numbers in, coordinates out; no
colour alone, no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_SIZES = ((40, 11, 66.0), (48, 9, 58.0), (10**9, 8, 58.0))
"""For maps of so many tokens at most: side of a cell, and room for the tokens beside and above, in px. Two maps of 48
tokens stand side by side on a page of ordinary width.
"""
FAINTEST = 0.03
"""Cells below this share of a map's largest are not drawn."""
HOLLOW = 0.14
"""A negative cell is drawn as an outline, this share of a cell inside."""
_ALONE, _FEW = 4.0, 3
_STEPS = 20
_TOLD = 3
_CURVE_WIDTH, _CURVE_HEIGHT, _CURVE_MARGIN = 340.0, 150.0, 46.0
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")


def is_maps(value: Any) -> bool:
    """Whether a value of `detail` holds {"tokens": [str], "maps": {name: rows}}, one row a token in every map: a list
    of numbers, or a text of them parted by spaces. What else it holds says what is drawn.
    """
    if not isinstance(value, dict) or not {"tokens", "maps"} <= value.keys():
        return False
    tokens, maps = value["tokens"], value["maps"]
    return (
        _are_texts(tokens)
        and isinstance(maps, dict)
        and all(isinstance(rows, list) and len(rows) == len(tokens) for rows in maps.values())
        and all(_is_row(row, len(tokens)) for rows in maps.values() for row in rows)
    )


def is_strips(value: Any) -> bool:
    """Whether a value of `detail` holds {"strips": {name: {"tokens": [str], "values": text of numbers, "marked":
    index}}}, a number a token. What else it holds says what is drawn.
    """
    strips = value.get("strips") if isinstance(value, dict) else None
    return isinstance(strips, dict) and all(
        isinstance(strip, dict)
        and strip.keys() == {"tokens", "values", "marked"}
        and _are_texts(strip["tokens"])
        and _is_row(strip["values"], len(strip["tokens"]))
        and len(numbers(strip["values"])) == len(strip["tokens"])
        and isinstance(strip["marked"], int)
        for strip in strips.values()
    )


def numbers(row: Any) -> list[Any]:
    """A row of numbers: a list as it is, a text of numbers parted by spaces as floats. Raises ValueError for others."""
    return [float(part) for part in row.split()] if isinstance(row, str) else list(row)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_row(value: Any, longest: int) -> bool:
    if not isinstance(value, (str, list)):
        return False
    try:
        return len(numbers(value)) <= longest
    except ValueError:
        return False


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


def full_scale(sizes: Sequence[float]) -> float:
    """The size that a drawing's scale reaches: the largest, unless it and at most two others are outliers, more than
    four times all the rest: few should not flatten all others. At most one of every five is an outlier.
    """
    down = sorted(sizes, reverse=True)
    for few in range(min(_FEW, len(down) // 5), 0, -1):
        if down[few - 1] > _ALONE * down[few] > 0:
            return down[few]
    return down[0] if down else 0.0


def heat_map(rows: Sequence[Any], tokens: Sequence[str]) -> dict[str, Any]:
    """Cells of one map: queries downwards, keys to the right; opacity is the share of the full scale (`full_scale`), in
    steps of a twentieth, so that cells of one opacity make one path, in units of a cell.

    Returns size in px, the largest absolute value and the full scale, (opacity, negative, path) of the cells that can
    be seen, and the strongest of them in words.
    """
    seen = [(t, s, value) for t, row in enumerate(rows) for s, value in enumerate(numbers(row)) if _is_number(value)]
    largest = max((abs(value) for _, _, value in seen), default=0.0)
    full = full_scale([abs(value) for _, _, value in seen if value])
    cell, margin = next((side, margin) for most, side, margin in _SIZES if len(rows) <= most)
    seen = [(t, s, value) for t, s, value in seen if full > 0 and abs(value) >= FAINTEST * full]
    groups: dict[tuple[float, bool], list[tuple[int, int]]] = {}
    for t, s, value in seen:
        opacity = max(1, min(_STEPS, round(abs(value) / full * _STEPS))) / _STEPS
        groups.setdefault((opacity, value < 0), []).append((t, s))
    told = [entry for entry in seen if entry[0] > 0] or seen  # the first query has one key to attend to
    top = sorted(told, key=lambda entry: -abs(entry[2]))[:_TOLD]
    return {
        "size": margin + len(rows) * cell,
        "label": margin,
        "cell": cell,
        "largest": largest,
        "full": full,
        "paths": [
            (opacity, negative, _hollow(cells) if negative else _filled(cells))
            for (opacity, negative), cells in sorted(groups.items())
        ],
        "strongest": [{"query": (t, tokens[t]), "key": (s, tokens[s]), "value": value} for t, s, value in top],
    }


def _filled(cells: Sequence[tuple[int, int]]) -> str:
    """A path along (row, column) cells, to be drawn as wide as a cell: a stroke for neighbours in a row, every start
    told from the last stroke's end.
    """
    strokes: list[list[int]] = []
    for t, s in cells:
        if strokes and strokes[-1][0] == t and strokes[-1][2] == s:
            strokes[-1][2] = s + 1
        else:
            strokes.append([t, s, s + 1])
    ends = [[0, 0, 0], *strokes]
    return "".join(
        f"m{start - x} {t - y}h{end - start}" for (t, start, end), (y, _, x) in zip(strokes, ends, strict=False)
    )


def _hollow(cells: Sequence[tuple[int, int]]) -> str:
    """A path around (row, column) cells, to be moved by HOLLOW."""
    side = f"{1 - 2 * HOLLOW:g}".removeprefix("0")
    return "".join(f"M{s} {t}h{side}v{side}h-{side}z" for t, s in cells)


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
