"""Feature cards as pages. Every token is text: escaped, control characters shown as escapes; nothing is loaded, and the
one script, by which an index jumps to a number, is the only one that the page's policy lets run.

A cell's shade is its share of the largest; what pulls a feature down is underlined and bracketed as well as coloured,
so that colour is never needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup

from fra.report import card_links
from fra.report.page import number, script, templates
from fra.report.tokens import AFTER, AROUND, BEFORE, SHADES, shaded
from fra.verdicts import files
from fra.verdicts.shown import visible


@dataclass(frozen=True)
class CardExample:
    """One firing of a feature."""

    tokens: Sequence[str]
    pos: int
    activation: Mapping[int, float]
    """Of the feature in this document, by position; zero where it is silent."""
    sources: Sequence[float]
    """DFA by source position, 0..pos."""

    @property
    def value(self) -> float:
        """The activation at `pos`."""
        return self.activation[self.pos]

    @property
    def strongest(self) -> int:
        """The position of the largest contribution."""
        return max(range(len(self.sources)), key=lambda s: self.sources[s])

    def firing(self) -> Markup:
        """The window around the firing, shaded by activation."""
        window = range(max(0, self.pos - BEFORE), min(len(self.tokens), self.pos + AFTER + 1))
        return self._strip(window, self.activation, max(self.activation.values()), self.pos)

    def source(self) -> Markup:
        """The window around the strongest source, shaded by contribution."""
        at = self.strongest
        window = range(max(0, at - AROUND), min(len(self.sources), at + AROUND + 1))
        return self._strip(window, dict(enumerate(self.sources)), max(map(abs, self.sources)), at)

    def _strip(self, window: range, values: Mapping[int, float], largest: float, marked: int) -> Markup:
        tokens, shown = [self.tokens[at] for at in window], [values.get(at, 0.0) for at in window]
        return shaded(tokens, shown, window.index(marked), largest)


@dataclass(frozen=True)
class Card:
    """What is known of one feature."""

    feature: int
    density: float
    """Share of positions on which it fires."""
    documents: int
    largest: float
    histogram: Sequence[int]
    """Firings by activation, equal bins from 0 to the largest."""
    edge: float
    """Upper end of the first bin."""
    share: Sequence[float]
    """Of each head in the norms of the decoder; they add up to one."""
    top: Sequence[tuple[str, float]]
    bottom: Sequence[tuple[str, float]]
    examples: Sequence[CardExample]


@cache
def _pages() -> Environment:
    environment = templates()
    environment.filters |= {"number": number, "visible": visible}
    environment.globals["script"], environment.globals["script_hash"] = script("cards.js")
    return environment


def pages_of(name: str) -> Template:
    """A template of cards, with what all of them use."""
    return _pages().get_template(name)


def render_head(cards: Sequence[Card], head: int, *, labels: Mapping[int, str] | None = None, **about: Any) -> str:
    """The page of one head; the index where head is -1."""
    on_page = {
        f"L{about['layer']}H{head}.html": [card.feature for card in own] for head, own in about["by_head"].items()
    }
    return pages_of("cards.html.j2").render(
        cards=cards, head=head, shades=range(1, SHADES + 1), labels=labels or {}, on_page=on_page, **about
    )


def write_pages(
    by_head: Mapping[int, Sequence[Card]],
    folder: Path,
    target: str,
    hook: str,
    layer: int,
    d_sae: int,
    *,
    fingerprint: str = "",
    report: Path | None = None,
    labels: Mapping[int, str] | None = None,
) -> int:
    """index.html and one page a head; returns how many. Beside them lies which feature stands where, for a report's
    links. Raises FraError where the folder cannot be written.

    fingerprint: of the target; without it no report links the cards. report: the pages link back to it. labels: of
    features, shown beside their numbers.
    """
    back = "" if report is None else card_links.relative(report, folder / "index.html")
    about: dict[str, Any] = {
        "target": target,
        "hook": hook,
        "layer": layer,
        "d_sae": d_sae,
        "by_head": by_head,
        "report": back,
    }
    about |= {"labels": labels or {}}
    pages = {f"L{layer}H{head}.html": render_head(own, head, **about) for head, own in by_head.items()}
    pages["index.html"] = render_head([], -1, **about)
    for name, text in pages.items():
        files.write_text(text, folder / name)
    on_page = {f"L{layer}H{head}.html": [card.feature for card in own] for head, own in by_head.items()}
    card_links.write(folder, target, fingerprint, hook, on_page, labels=labels or {})
    return len(pages)
