"""Many ledgers on one self-contained page: a heat map of verdicts, claims by targets, and effects against each other.

As in the report: everything in a ledger is data, the page loads nothing, its one script puts lines in order and is all
that its policy lets run, and a sign tells what colour repeats.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import groupby

from jinja2 import Template
from markupsafe import Markup

from fra.ledgers.matrix import Cell, Matrix, pairs
from fra.report.page import GLYPHS, number, templates
from fra.verdicts.ledger import Ledger, Row
from fra.verdicts.shown import visible

SIDE = 200.0
"""Of a scatter, in px."""
_MARGIN = 12.0


@dataclass(frozen=True)
class EffectPair:
    """One row in two ledgers, in px: x the first's effect, y the other's, and both intervals."""

    x: float
    y: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    said: str
    turned: bool
    """Whether the verdicts differ."""


@dataclass(frozen=True)
class Scatter:
    """The effects of one claim and condition in two ledgers, on one scale in both directions."""

    claim: str
    condition: str
    low: float
    high: float
    bar: float | None
    """In px from the left, and from the bottom."""
    points: tuple[EffectPair, ...]


def scatters(one: Ledger, other: Ledger) -> list[Scatter]:
    """A scatter for each claim and deciding condition that both ledgers have (`fra.ledgers.matrix.pairs`)."""

    def of(pair: tuple[Row, Row]) -> tuple[str, str]:
        return pair[0].claim, str(pair[0].detail.get("decided", ""))

    return [_scatter(*key, list(own)) for key, own in groupby(sorted(pairs(one, other), key=of), key=of)]


def _scatter(claim: str, condition: str, rows: Sequence[tuple[Row, Row]]) -> Scatter:
    middle = [x for pair in rows for row in pair for x in (row.effect, row.bar) if x is not None]
    low, high = min(middle), max(middle)
    # Bounds that lie far out would press all points together: they are cut at the edge.
    reach = 2 * ((high - low) or abs(high) or 1.0)
    ends = [x for pair in rows for row in pair for x in (row.low, row.high) if x is not None]
    near = [x for x in ends if low - reach <= x <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.05 * ((high - low) or abs(high) or 1.0)
    low, high = low - pad, high + pad

    def at(x: float | None, otherwise: float) -> float:
        share = otherwise if x is None else (x / 2 - low / 2) / (high / 2 - low / 2)
        share = share if math.isfinite(share) else otherwise
        return round(_MARGIN + min(max(share, 0.0), 1.0) * (SIDE - 2 * _MARGIN), 1)

    points = []
    for a, b in rows:
        words = f"{a.verdict}" if a.verdict == b.verdict else f"{a.verdict} -> {b.verdict}"
        said = f"{a.head or 'as a whole'}: {number(a.effect)} -> {number(b.effect)}, {words}"
        ends_of = (at(a.low, 0.0), at(a.high, 1.0), SIDE - at(b.low, 0.0), SIDE - at(b.high, 1.0))
        points.append(EffectPair(at(a.effect, 0.5), SIDE - at(b.effect, 0.5), *ends_of, said, a.verdict != b.verdict))
    bar = rows[0][0].bar
    return Scatter(claim, condition, low, high, None if bar is None else at(bar, 0.5), tuple(points))


def shown(cell: Cell | None) -> str:
    """A cell in signs: how many rows of each verdict, or the sign alone of a single row."""
    if cell is None:
        return ""
    if sum(cell.counts.values()) == 1:
        return GLYPHS[next(iter(cell.counts))]
    return " ".join(f"{GLYPHS[word]}{n}" for word, n in cell.counts.items())


def _told(cell: Cell) -> str:
    return ", ".join(f"{n} {word}" for word, n in cell.counts.items()) or "not asked of any head"


def _shade(cell: Cell) -> str:
    """What a cell's colour says: the share of SUPPORTED among yes and no, in ten steps; none where nobody says."""
    return "none" if cell.share is None else f"s{round(10 * cell.share)}"


def _order(cell: Cell | None) -> float:
    """What a column is sorted by: the share of SUPPORTED, then how many said so; what says nothing last."""
    if cell is None:
        return -2.0
    return -1.0 if cell.share is None else cell.share + 1e-6 * sum(cell.counts.values())


@cache
def _template() -> Template:
    environment = templates()
    text = resources.files("fra.report").joinpath("compared.js").read_text(encoding="utf-8")
    environment.filters |= {
        "number": number,
        "visible": visible,
        "cell": shown,
        "told": _told,
        "shade": _shade,
        "order": _order,
    }
    environment.globals |= {"glyphs": GLYPHS, "side": SIDE, "margin": _MARGIN, "script": Markup(text)}
    environment.globals["script_hash"] = "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment.get_template("compared.html.j2")


def render(
    table: Matrix, ledgers: Sequence[Ledger], sources: Sequence[str], differences: Mapping[str, Sequence[str]]
) -> str:
    """The page, as HTML text. differences: lines about each ledger but the first, against it, by name."""
    return _template().render(
        matrix=table,
        headers=list(zip(table.names, sources, [ledger.header for ledger in ledgers], strict=True)),
        figures=list(_figures(table, ledgers)),
        differences=differences,
    )


def _figures(table: Matrix, ledgers: Sequence[Ledger]) -> Iterator[tuple[str, list[Scatter]]]:
    for name, other in zip(table.names[1:], ledgers[1:], strict=True):
        found = scatters(ledgers[0], other)
        if found:
            yield name, found
