"""Running text with its tokens shaded: where a feature fires, and which source positions make it fire. For the report
and for feature cards alike.

A token's shade is its share of the largest value; what is negative is underlined and bracketed as well as coloured, so
that colour is never needed. Every token is text: escaped, control characters shown as escapes.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from fra.verdicts.shown import visible

BEFORE, AFTER = 12, 4
"""Tokens shown before and after the one that fires."""
AROUND = 5
"""Tokens shown on either side of the strongest source."""
SHADES = 10
"""Classes p1 to p10 (positive) and n1 to n10 (negative) of the page's style sheet."""


def shaded(tokens: Sequence[str], values: Sequence[float], marked: int, largest: float | None = None) -> Markup:
    """The tokens as a line of text, each shaded by its value's share of `largest` (of the largest shown, where that is
    None), numbers on hover; the token at index `marked` is outlined.
    """
    most = max(map(abs, values), default=0.0) if largest is None else largest
    parts = []
    for at, (text, value) in enumerate(zip(tokens, values, strict=True)):
        token = escape(visible(text))
        inner = Markup("<b>{}</b>").format(token) if at == marked else token
        shade = min(SHADES, round(SHADES * abs(value) / most)) if most > 0 else 0
        kind = "n" if value < 0 else "p"
        shown = Markup('<i class="{}{}" title="{}">{}</i>').format(kind, shade, f"{value:.3g}", inner)
        parts.append(shown if shade else inner)
    return Markup("").join(parts)
