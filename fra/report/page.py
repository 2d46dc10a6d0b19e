"""The report: a ledger as one self-contained HTML page. `python -m fra.report LEDGER.json -o FILE.html`; nothing is
measured again. Feature cards (`fra.cards`) that lie beside the page, in `cards`, are linked.

Everything in the ledger is data: jinja2 escapes it all, and the page loads nothing. Its one script (`report.js`:
search, filters, order) is the only one that the page's policy lets run, and nothing is missing where none runs. A
verdict is told by its glyph and word; colour only repeats it.
"""

import argparse
import base64
import hashlib
import math
import sys
from collections.abc import Iterable
from functools import cache
from importlib import resources
from itertools import count as numbered
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from fra.errors import FraError
from fra.plot import drawings
from fra.report import card_links
from fra.report import overview as overviews
from fra.report.card_links import CardLinks
from fra.report.packed import Packed
from fra.report.tokens import SHADES, shaded
from fra.report.views import WIDTH, count, head_views, sections
from fra.report.words import GLOSSARY, glossed, grouped
from fra.verdicts import files
from fra.verdicts import ledger as ledgers
from fra.verdicts.ledger import Ledger, Row
from fra.verdicts.shown import on_page, print_anything, visible

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
_CANDIDATES = 20
_NEURONPEDIA = "https://www.neuronpedia.org/"


_FOLDS = 8
"""Heads that cannot run for one reason and stand in its line; more fold away."""
MANY = 1500
"""Rows of a page whose details lie in place, to be read and printed without its script; those of more are packed."""


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


def closest(candidates: dict[str, dict[str, Any]], best: str | None) -> dict[str, dict[str, Any]]:
    """The candidates that meet most conditions, twenty at most, the best among them, in the order of the ledger."""
    met = {name: sum(shown["holds"] for shown in conditions.values()) for name, conditions in candidates.items()}
    kept = sorted(met, key=lambda name: (name != best, -met[name]))[:_CANDIDATES]
    return {name: conditions for name, conditions in candidates.items() if name in kept}


_TITLES = {
    "best channels": "channels by effect, the largest first",
    "best channel on a document": "the channel of the largest effect, on a document",
}
"""What says more than the name in the ledger: "best" is the candidate that a verdict rests on."""


def titled(key: str) -> Markup:
    """A name in `detail`, as the page shows it."""
    return glossed(_TITLES.get(key, key))


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


def script(name: str) -> tuple[Markup, str]:
    """A script of this room, and its hash as a page's policy names it."""
    text = resources.files("fra.report").joinpath(name).read_text(encoding="utf-8")
    return Markup(text), "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def templates() -> Environment:
    """Where the pages of this room come from: everything that they are given is escaped, and nothing may be missing."""
    return Environment(
        loader=PackageLoader("fra.report", "."),
        autoescape=True,
        finalize=on_page,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _template() -> Template:
    environment = templates()
    environment.filters |= {
        "number": number,
        "visible": visible,
        "shape": shape,
        "columns": columns,
        "label": label,
        "shaded": line_of,
        "candidates": ledgers.candidates_of,
        "closest": closest,
        "brief": "{:.3g}".format,
        "glossed": glossed,
        "titled": titled,
        "grouped": grouped,
        "forest": overviews.forest,
        "shortened": overviews.shortened,
        "page": lambda address: address.removeprefix(_NEURONPEDIA),
    }
    environment.globals |= {
        "channels_of": card_links.channels_of,
        "interval": interval,
        "without": WITHOUT_NUMBERS,
        "folds": _FOLDS,
        "glyphs": GLYPHS,
        "width": WIDTH,
        "drawn": DRAWN,
        "hollow": drawings.HOLLOW,
        "shades": range(1, SHADES + 1),
        "heat_map": drawings.heat_map,
        "curves": drawings.curves,
        "glossary": GLOSSARY,
        "forest_width": overviews.FOREST,
    }
    environment.globals["script"], environment.globals["script_hash"] = script("report.js")
    return environment.get_template("report.html.j2")


def render(ledger: Ledger, cards: CardLinks | None = None, baseline: Ledger | None = None) -> str:
    """The page, as HTML text. A function of the ledger, of an earlier one that it is held against, and of where feature
    cards lie alone.
    """
    return _template().render(
        header=ledger.header,
        sections=sections(ledger),
        heads=head_views(ledger),
        overview=overviews.overview(ledger, baseline),
        baseline=None if baseline is None else baseline.header,
        wall=overviews.wall(ledger),
        chapters=sorted({row.claim[:1] for row in ledger.verdicts}),
        plural=ledgers.PLURAL,
        mark=numbered(1).__next__,
        totals={
            ledgers.PLURAL[kind]: {word: n for word, n in count(rows).items() if word in ledgers.COUNTED}
            for kind, rows in ledger.by_kind().items()
        },
        digest_of={row.claim: row.digest for row in ledger.verdicts},
        cards=cards or CardLinks(),
        packed=Packed(len(ledger.verdicts) > MANY),
    )


def page(ledger: Ledger, file: Path, cards: Path | None = None, baseline: Ledger | None = None) -> str:
    """The page as it is to stand in `file`, with links to the feature cards in the folder `cards` (`cards` beside the
    file, where it is not given).

    Raises FraError for a folder that is named and not there, and for cards that cannot be read.
    """
    if cards is not None and not cards.is_dir():
        raise FraError(f"there is no folder {cards}: `python -m fra.cards` makes feature cards")
    folder = file.parent / "cards" if cards is None else cards
    return render(ledger, card_links.read(folder, file, ledger.header.target, ledger.header.model), baseline)


def run(ledger: Path, output: Path, *, cards: Path | None = None, baseline: Path | None = None) -> None:
    """Rebuild the page from a ledger and say where it is; baseline: an earlier ledger, against which the page says what
    is new. Raises FraError for what is no ledger, as `page` does, and where the file cannot be written.
    """
    earlier = None if baseline is None else ledgers.read(baseline)
    files.write_text(page(ledgers.read(ledger), output, cards, earlier), output)
    print(f"wrote {output}")


def main(argv: list[str] | None = None) -> int:
    """Rebuild the page from a ledger: 0, or 2 with one sentence on stderr."""
    print_anything()
    parser = argparse.ArgumentParser(
        prog="python -m fra.report", description="Rebuild the HTML report of a ledger; nothing is measured."
    )
    parser.add_argument("ledger", metavar="LEDGER.json", type=Path)
    parser.add_argument("-o", "--output", metavar="FILE.html", type=Path, required=True)
    parser.add_argument(
        "--cards", metavar="DIR", type=Path, help="link the feature cards in the folders of DIR (default: cards beside)"
    )
    parser.add_argument("--baseline", metavar="LEDGER.json", type=Path, help="an earlier ledger: say what is new since")
    try:
        run(**vars(parser.parse_args(argv)))
    except FraError as error:
        print(f"fra.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
