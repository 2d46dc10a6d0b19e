"""What a head shows of itself in a notebook: HTML with its pattern as SVG. Numbers and texts in, markup out; every text
is escaped, and nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fra.plot.drawings import HOLLOW, heat_map
from fra.verdicts.shown import as_html, visible

LABELLED = 48
"""Tokens of a pattern that has them beside it; a longer one has numbers, every so many."""
_EVERY = 16
POSITIVE, NEGATIVE = "#3b7dd8", "#d8703b"
_LONGEST = 12
_CELL = "padding:0 .6em 0 0;text-align:left"
_BAR = 90


def pattern_svg(rows: Sequence[Sequence[float]], tokens: Sequence[str], title: str) -> str:
    """Where a head attends: queries downwards, keys to the right, the darker the more."""
    at = heat_map(rows, tokens)
    cell, margin, size = at["cell"], at["label"], at["size"]
    labelled = len(tokens) <= LABELLED
    parts = []
    for n, token in enumerate(tokens):
        if not labelled and n % _EVERY:
            continue
        text = visible(token) if labelled else str(n)
        text = escape(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")
        y = margin + (n + 0.8) * cell
        style = 'font-size="9" fill="currentColor"'
        parts.append(f'<text x="{margin - 3:g}" y="{y:g}" text-anchor="end" {style}>{text}</text>')
        parts.append(f'<text transform="translate({y:g} {margin - 3:g}) rotate(-90)" {style}>{text}</text>')
    parts.append(cells(at))
    name = escape(title)
    return (
        f'<svg viewBox="0 0 {size:g} {size:g}" width="{size:g}" height="{size:g}" style="max-width:100%" role="img" '
        f'font-family="sans-serif"><title>{name}</title>{"".join(parts)}</svg>'
    )


def cells(at: Mapping[str, Any], positive: str = POSITIVE, negative: str = NEGATIVE) -> str:
    """The cells of a `heat_map`, whose paths are in units of a cell: strokes along the middle of each row where they
    are positive, outlines where they are not.
    """
    parts = []
    for opacity, below, path in at["paths"]:
        place = f"translate({HOLLOW} {HOLLOW})" if below else "translate(0 .5)"
        stroke = f'stroke="{negative}" stroke-width=".18"' if below else f'stroke="{positive}" stroke-width="1"'
        parts.append(f'<path d="{path}" transform="{place}" {stroke} stroke-opacity="{opacity:g}" fill="none"/>')
    margin, cell = at["label"], at["cell"]
    return f'<g transform="translate({margin:g} {margin:g}) scale({cell:g})">{"".join(parts)}</g>'


def bars(values: Mapping[str, float], unit: str) -> str:
    """Positive numbers by name, with a bar each."""
    most = max(values.values(), default=0.0) or 1.0
    rows = [
        f'<tr><td style="{_CELL}">{escape(name)}</td><td style="{_CELL}">'
        f'<span style="display:inline-block;background:{POSITIVE};height:.7em;width:{value / most * _BAR:.0f}px">'
        f"</span> {value:.2f}</td></tr>"
        for name, value in values.items()
    ]
    return f"<table>{''.join(rows)}</table><small>{escape(unit)}</small>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain table."""
    head = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(visible(str(value)))}</td>' for value in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def head_html(
    name: str,
    facts: Mapping[str, object],
    pattern: str,
    blocks: Mapping[str, float],
    channels: Iterable[Sequence[object]],
) -> str:
    """A head on a document: what it is, where it attends, what its scores are made of, its strongest channels."""
    strongest = table(("query feature", "key feature", "loudest at", "sum", "pairs"), channels)
    parts = [
        as_html(name, facts),
        "<b>Scores</b>",
        bars(blocks, "mean size over attended pairs, in nats: query part, then key part"),
        "<b>Strongest channels</b>",
        strongest,
    ]
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:1.5em;align-items:flex-start">'
        f"<div>{pattern}</div><div>{''.join(parts)}</div></div>"
    )
