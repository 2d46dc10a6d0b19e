"""Parts of a large page that are not laid out before somebody opens them: they travel compressed, and the page's script
unpacks them. A page of 10,000 rows then opens as soon as one of a few hundred.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator

from markupsafe import Markup


class Packed:
    """HTML by name and number, given out while the page is drawn and written at its end."""

    def __init__(self, active: bool) -> None:
        self.active = active
        """Whether parts are packed at all: a small page has them in place, and does without its script."""
        self._parts: dict[str, list[str]] = {}

    def add(self, name: str, html: Markup) -> int:
        """Keeps a part; returns its number under this name."""
        own = self._parts.setdefault(name, [])
        own.append(str(html).strip())
        return len(own) - 1

    def blocks(self) -> Iterator[tuple[str, Markup]]:
        """Each name with its parts: a JSON list, gzip, base64. The same parts give the same text."""
        for name, parts in self._parts.items():
            raw = gzip.compress(json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode(), mtime=0)
            yield name, Markup(base64.b64encode(raw).decode())
