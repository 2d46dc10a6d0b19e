"""What the page shows of a ledger: a section a claim, with an axis for each deciding condition, and a view a head."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fra.plot import drawings
from fra.verdicts import ledger as ledgers
from fra.verdicts.claim import parse_head
from fra.verdicts.ledger import ClaimNote, Ledger, Row

WIDTH = 260.0
"""Of an interval's drawing, in px."""
_MARGIN = 8.0


@dataclass(frozen=True)
class Axis:
    """Where a number lies in the drawings of one condition: the same scale for all heads that it decided at."""

    start: float
    end: float

    @classmethod
    def over(cls, rows: Iterable[Row]) -> Axis:
        """Spans effects, bars and finite bounds. An effect or bound that lies far beyond all others
        (`drawings.full_scale`) and bounds more than ten times as far out as effects and bars are cut, and drawn as
        arrows.
        """
        rows = list(rows)
        core = _together([(r.effect, r.bar) for r in rows])
        low, high = min(core), max(core)
        reach = 10 * ((high - low) or abs(high) or 1.0)
        ends = [
            x
            for x in _together([(x, r.bar) for r in rows for x in (r.low, r.high)])
            if low - reach <= x <= high + reach
        ]
        low, high = min([low, *ends]), max([high, *ends])
        pad = 0.05 * ((high - low) or abs(high) or 1.0)
        return cls(low - pad, high + pad)

    def __call__(self, x: float | None, otherwise: float) -> float:
        """Where a number lies, in px, never outside of the drawing; null lies at `otherwise`, a share of the width."""
        # Halves, so that numbers near the end of the float range do not overflow.
        share = otherwise if x is None else (x / 2 - self.start / 2) / (self.end / 2 - self.start / 2)
        share = share if math.isfinite(share) else otherwise
        return round(_MARGIN + min(max(share, 0.0), 1.0) * (WIDTH - 2 * _MARGIN), 1)

    def drawing(self, row: Row) -> dict[str, Any] | None:
        """Coordinates of a row's interval, effect and bar; None where there is nothing to draw."""
        if row.effect is None or row.bar is None:
            return None
        return {
            "low": self(row.low, 0.0),
            "high": self(row.high, 1.0),
            "effect": self(row.effect, 0.5),
            "bar": self(row.bar, 0.5),
            "open_low": row.low is None or row.low < self.start,
            "open_high": row.high is None or row.high > self.end,
            "beyond": "" if self.start <= row.effect <= self.end else "high" if row.effect > self.end else "low",
        }


def _together(numbers: Sequence[tuple[float | None, float | None]]) -> list[float]:
    """The bars, and the numbers that are held against them but for those that lie far beyond all others."""
    given = [(x, bar) for x, bar in numbers if x is not None and bar is not None]
    far = drawings.full_scale([abs(x / 2 - bar / 2) for x, bar in given])  # halves: near the end of the float range
    near = [x for x, bar in given if abs(x / 2 - bar / 2) <= far]
    return [*near, *(bar for _, bar in numbers if bar is not None)] or [0.0]


def _layers(rows: list[Row]) -> list[tuple[int, list[Row | None]]]:
    """The grid of a claim: (layer, a row a head or None)."""
    placed = {parse_head(row.head): row for row in rows if row.head is not None}
    n_heads = max((head for _, head in placed), default=-1) + 1
    return [
        (layer, [placed.get((layer, head)) for head in range(n_heads)])
        for layer in sorted({layer for layer, _ in placed})
    ]


@dataclass(frozen=True)
class Section:
    """One claim's part of the page."""

    id: str
    note: ClaimNote | None
    rows: list[Row]
    layers: list[tuple[int, list[Row | None]]]
    family: Row | None
    counts: dict[str, int]
    axes: dict[str, Axis]
    """By the name of the condition that decided: each has its own unit."""

    def drawing(self, row: Row) -> dict[str, Any] | None:
        """Coordinates of a row's interval, effect and bar; None where there is nothing to draw."""
        return self.axes[_decided(row)].drawing(row)


def sections(ledger: Ledger) -> list[Section]:
    """The ledger by claim."""
    out = []
    for name, group in groupby(ledger.verdicts, key=lambda row: row.claim):
        rows = list(group)
        family = next((row for row in rows if row.head is None), None)
        axes = {of: Axis.over(row for row in rows if _decided(row) == of) for of in {_decided(row) for row in rows}}
        out.append(Section(name, ledger.header.claims.get(name), rows, _layers(rows), family, count(rows), axes))
    return out


def _decided(row: Row) -> str:
    return str(row.detail.get("decided", ""))


def count(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows have each verdict, in the order of the verdict table, zeros left in."""
    counts = Counter(row.verdict for row in rows)
    return {word: counts[word] for word in ledgers.WORDS}


@dataclass(frozen=True)
class HeadView:
    """What all claims say of one head."""

    name: str
    rows: list[Row]
    counts: dict[str, int]
    outside: list[str]
    """Claims that are not about it."""


def head_views(ledger: Ledger) -> list[HeadView]:
    """A view for every head, by layer and head."""
    by_head: dict[str, list[Row]] = {}
    for row in ledger.verdicts:
        if row.head is not None:
            by_head.setdefault(row.head, []).append(row)
    return [
        HeadView(
            name,
            [row for row in rows if row.verdict != "NOT_APPLICABLE"],
            count(rows),
            [row.claim for row in rows if row.verdict == "NOT_APPLICABLE"],
        )
        for name, rows in sorted(by_head.items(), key=lambda item: parse_head(item[0]))
    ]
