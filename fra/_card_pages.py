"""Feature cards as pages. Every token is text: escaped, control characters shown as escapes; no script, nothing
loaded.

A cell's shade is its share of the largest; what pulls a feature down is underlined and bracketed as well as coloured,
so that colour is never needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fra import ledger
from fra.report import number, visible

BEFORE, AFTER = 12, 4
"""Tokens shown before and after the one that fires."""
AROUND = 5
"""Tokens shown on either side of the strongest source."""
_SHADES = 10


@dataclass(frozen=True)
class Example:
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
        parts = []
        for at in window:
            value = values.get(at, 0.0)
            shade = round(_SHADES * abs(value) / largest) if largest > 0 else 0
            token = escape(visible(self.tokens[at]))
            inner = Markup("<b>{}</b>").format(token) if at == marked else token
            if not shade:
                parts.append(inner)
            else:
                kind = "n" if value < 0 else "p"
                parts.append(Markup('<i class="{}{}" title="{}">{}</i>').format(kind, shade, f"{value:.3g}", inner))
        return Markup("").join(parts)


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
    examples: Sequence[Example]


@cache
def _pages() -> Environment:
    environment = Environment(
        loader=PackageLoader("fra", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "visible": visible}
    return environment


def render_head(cards: Sequence[Card], head: int, **about: Any) -> str:
    """The page of one head."""
    return _pages().get_template("cards.html.j2").render(cards=cards, head=head, shades=range(1, _SHADES + 1), **about)


def write_pages(
    by_head: Mapping[int, Sequence[Card]], folder: Path, target: str, hook: str, layer: int, d_sae: int
) -> int:
    """index.html and one page a head; returns how many. Raises FraError where the folder cannot be written."""
    about = {"target": target, "hook": hook, "layer": layer, "d_sae": d_sae, "by_head": by_head}
    pages = {f"L{layer}H{head}.html": render_head(own, head, **about) for head, own in by_head.items()}
    pages["index.html"] = render_head([], -1, **about)
    for name, text in pages.items():
        ledger.write_text(text, folder / name)
    return len(pages)
