"""How an object shows itself in a notebook."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape


def as_html(title: str, facts: Mapping[str, object]) -> str:
    """A title above a small table of what there is to know; every text is escaped."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(str(name))}</th><td style='text-align:left'>{escape(str(value))}</td>"
        "</tr>"
        for name, value in facts.items()
    )
    return f"<b>{escape(title)}</b><table>{rows}</table>"


def visible(text: str) -> str:
    """Control and direction characters as escapes: a token may hold any, and a page must show it and not obey it."""
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]", lambda m: ascii(m[0])[1:-1], text
    )
