"""How an object shows itself in a notebook."""

from __future__ import annotations

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
