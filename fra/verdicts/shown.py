"""How an object shows itself in a notebook."""

from __future__ import annotations

import re
import sys
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


_OBEYED = r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
"""Control, format and direction characters of Unicode: nothing is seen of them, and a page or a terminal obeys them."""


def visible(text: str) -> str:
    """Control and direction characters as escapes: a token may hold any, and a page must show it and not obey it."""
    return re.sub(_OBEYED, _escaped, text)


def on_page(value: object) -> object:
    """What a template is given, texts with such characters as escapes, but for the line's end and the tab: the
    `finalize` of every jinja2 environment, so that no name, reason or path is forgotten.
    """
    if not isinstance(value, str):
        return value
    return type(value)(re.sub(rf"(?![\t\n]){_OBEYED}", _escaped, value))  # Markup stays Markup


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def print_anything() -> None:
    """Lets this process print on a terminal or into a file that has not all characters (LANG=C): those that are missing
    as escapes, where Python would stop with a UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
