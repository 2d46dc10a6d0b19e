"""The report: a ledger as one self-contained HTML page. `python -m fra.report LEDGER.json -o FILE.html`; nothing is
measured again. Feature cards (`fra.cards`) that lie beside the page, in `cards`, are linked.

Everything in the ledger is data: jinja2 escapes it all, the page has no script and loads nothing. A verdict is told by
its glyph and word; colour only repeats it.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from fra.errors import FraError
from fra.report import card_links, drawings
from fra.report.card_links import CardLinks
from fra.report.tokens import SHADES, shaded
from fra.report.tokens import visible as visible  # what the terminal prints needs it too
from fra.verdicts import files
from fra.verdicts import ledger as ledgers
from fra.verdicts.claim import parse_head
from fra.verdicts.ledger import ClaimNote, Ledger, Row

GLYPHS = {
    "SUPPORTED": "✓",
    "REFUTED": "✗",
    "INCONCLUSIVE": "?",
    "CANNOT_RUN": "–",
    "BROKEN": "!",
    "NOT_APPLICABLE": "·",
}
"""One sign a verdict, so that colour is never needed."""
WITHOUT_NUMBERS = ("CANNOT_RUN", "NOT_APPLICABLE")
"""Verdicts whose rows fold into a line where they hold no numbers."""

DRAWN = ("maps", "strips", "pictures", "curves")
"""Shapes that stand first in a row's detail."""
_LONGEST_LABEL = 11
_NEURONPEDIA = "https://www.neuronpedia.org/"
_WIDTH, _MARGIN = 260.0, 8.0  # of an interval's drawing, in px


@dataclass(frozen=True)
class Axis:
    """Where a number lies in the drawings of one condition: the same scale for all heads that it decided at."""

    start: float
    end: float

    @classmethod
    def over(cls, rows: Iterable[Row]) -> "Axis":
        """Spans every effect, bar and finite bound. Bounds more than ten times as far out as effects and bars are cut,
        and drawn as arrows.
        """
        rows = list(rows)
        core = [x for r in rows for x in (r.effect, r.bar) if x is not None] or [0.0]
        low, high = min(core), max(core)
        reach = 10 * ((high - low) or abs(high) or 1.0)
        ends = [x for r in rows for x in (r.low, r.high) if x is not None and low - reach <= x <= high + reach]
        low, high = min([low, *ends]), max([high, *ends])
        pad = 0.05 * ((high - low) or abs(high) or 1.0)
        return cls(low - pad, high + pad)

    def __call__(self, x: float | None, otherwise: float) -> float:
        """Where a number lies, in px, never outside of the drawing; null lies at `otherwise`, a share of the width."""
        # Halves, so that numbers near the end of the float range do not overflow.
        share = otherwise if x is None else (x / 2 - self.start / 2) / (self.end / 2 - self.start / 2)
        share = share if math.isfinite(share) else otherwise
        return round(_MARGIN + min(max(share, 0.0), 1.0) * (_WIDTH - 2 * _MARGIN), 1)

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
            "says": f"effect {number(row.effect)}, interval {interval(row)}, bar {number(row.bar)}",
        }


def number(x: Any) -> str:
    """Four significant digits; an en dash for null, yes and no for truth values."""
    if x is None:
        return "–"
    if isinstance(x, bool):
        return "yes" if x else "no"
    if not isinstance(x, (int, float)):
        return str(x)
    return f"{x:d}" if isinstance(x, int) else f"{x:.4g}"


def interval(row: Row) -> str:
    """[low, high], with an infinity for a side that is open."""
    low = "−∞" if row.low is None else number(row.low)
    high = "∞" if row.high is None else number(row.high)
    return "–" if row.effect is None else f"[{low}, {high}]"


def shape(value: Any) -> str:
    """How a value of `detail` is laid out: "maps", "strips", "pictures" (several of these by name), "curves" (all
    drawn), "table" (records of alike keys), "list" (scalars), "items" (mixed), "map", "link", "text" or "scalar".
    """
    if drawings.is_maps(value):
        return "maps"
    if drawings.is_strips(value):
        return "strips"
    if drawings.is_curves(value):
        return "curves"
    if isinstance(value, dict):
        if value and all(drawings.is_maps(inner) or drawings.is_strips(inner) for inner in value.values()):
            return "pictures"
        alike = len(value) > 1 and _alike(value.values())
        return "named table" if alike else "map"
    if isinstance(value, list):
        if not any(isinstance(v, (dict, list)) for v in value):
            return "list"
        return "table" if _alike(value) else "items"
    if isinstance(value, str):
        return "link" if drawings.link(value) else "text"
    return "scalar"


def label(token: str) -> str:
    """A token as a map's margin has room for it."""
    shown = visible(token)
    return shown if len(shown) <= _LONGEST_LABEL else shown[: _LONGEST_LABEL - 1] + "…"


def line_of(strip: dict[str, Any]) -> Markup:
    """A strip of `detail` as a line of shaded tokens; numbers that are not finite shade nothing."""
    values = [value if math.isfinite(value) else 0.0 for value in drawings.numbers(strip["values"])]
    return shaded(strip["tokens"], values, strip["marked"])


def columns(records: Iterable[dict[str, Any]]) -> list[str]:
    """Every key of the records, in the order of first appearance."""
    return list(dict.fromkeys(key for record in records for key in record))


def _alike(values: Iterable[Any]) -> bool:
    """Whether all are mappings that share their keys, so that they make the rows of a table that is not wider than a
    page.
    """
    rows = list(values)
    return (
        bool(rows)
        and all(isinstance(v, dict) and v and v.keys() == rows[0].keys() for v in rows)
        and len(rows[0]) <= 12
    )


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


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("fra.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "visible": visible,
        "shape": shape,
        "columns": columns,
        "label": label,
        "shaded": line_of,
        "candidates": ledgers.candidates_of,
        "page": lambda address: address.removeprefix(_NEURONPEDIA),
    }
    environment.globals |= {
        "interval": interval,
        "without": WITHOUT_NUMBERS,
        "glyphs": GLYPHS,
        "width": _WIDTH,
        "drawn": DRAWN,
        "shades": range(1, SHADES + 1),
        "heat_map": drawings.heat_map,
        "curves": drawings.curves,
    }
    return environment.get_template("report.html.j2")


def render(ledger: Ledger, cards: CardLinks | None = None) -> str:
    """The page, as HTML text. A function of the ledger and of where feature cards lie alone."""
    return _template().render(
        header=ledger.header,
        sections=sections(ledger),
        totals={
            ledgers.PLURAL[kind]: {word: n for word, n in count(rows).items() if word in ledgers.COUNTED}
            for kind, rows in ledger.by_kind().items()
        },
        digest_of={row.claim: row.digest for row in ledger.verdicts},
        cards=cards or CardLinks(),
    )


def page(ledger: Ledger, file: Path, cards: Path | None = None) -> str:
    """The page as it is to stand in `file`, with links to the feature cards in the folder `cards` (`cards` beside the
    file, where it is not given).

    Raises FraError for a folder that is named and not there, and for cards that cannot be read.
    """
    if cards is not None and not cards.is_dir():
        raise FraError(f"there is no folder {cards}: `python -m fra.cards` makes feature cards")
    folder = file.parent / "cards" if cards is None else cards
    return render(ledger, card_links.read(folder, file, ledger.header.target, ledger.header.model))


def main(argv: list[str] | None = None) -> int:
    """Rebuild the page from a ledger: 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m fra.report", description="Rebuild the HTML report of a ledger; nothing is measured."
    )
    parser.add_argument("ledger", metavar="LEDGER.json", type=Path)
    parser.add_argument("-o", "--output", metavar="FILE.html", type=Path, required=True)
    parser.add_argument(
        "--cards", metavar="DIR", type=Path, help="link the feature cards in the folders of DIR (default: cards beside)"
    )
    options = parser.parse_args(argv)
    try:
        files.write_text(page(ledgers.read(options.ledger), options.output, options.cards), options.output)
    except FraError as error:
        print(f"fra.report: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
