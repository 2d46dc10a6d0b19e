"""Where the cards of features lie: written beside the cards, read by the report, so that each can link to the other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fra.errors import FraError
from fra.verdicts.files import write_text

FILE = "features.json"
"""In the folder of one dictionary's cards: target, its fingerprint, hook, and the features of each page."""
_PAGE = re.compile(r"L\d+H\d+\.html")


@dataclass(frozen=True)
class CardLinks:
    """Addresses relative to a page."""

    indices: Mapping[str, str] = field(default_factory=dict)
    """By hook: the index of its dictionary's cards."""
    features: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """By hook and feature: its card."""


def relative(file: Path, page: Path) -> str:
    """The address of a file as a link on a page."""
    return quote(Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix())


def write(folder: Path, target: str, fingerprint: str, hook: str, pages: Mapping[str, Iterable[int]]) -> None:
    """Which features stand on which page of a folder of cards. Raises FraError where it cannot be written."""
    found = {"target": target, "fingerprint": fingerprint, "hook": hook}
    text = json.dumps(found | {"pages": {page: sorted(features) for page, features in pages.items()}})
    write_text(text + "\n", folder / FILE)


def read(folder: Path, page: Path, target: str, model: str | None) -> CardLinks:
    """Links from a page to the cards in the folders of `folder`, one folder a dictionary; empty where there are none.

    Only cards of this target, made with the weights that `model` (of a ledger's header) names by their fingerprint: of
    others the numbers mean other features. Raises FraError for a file that is none of ours.
    """
    indices: dict[str, str] = {}
    features: dict[tuple[str, str], str] = {}
    for file in sorted(folder.glob(f"*/{FILE}")):
        found = _read(file)
        if found["target"] != target or not found["fingerprint"] or found["fingerprint"] not in (model or ""):
            continue
        hook = found["hook"]
        indices[hook] = relative(file.parent / "index.html", page)
        for name, ids in found["pages"].items():
            address = relative(file.parent / name, page)
            features |= {(hook, str(feature)): f"{address}#f{feature}" for feature in ids}
    return CardLinks(indices, features)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
        fine = all(isinstance(found[name], str) for name in ("target", "fingerprint", "hook")) and all(
            _PAGE.fullmatch(name) and all(type(feature) is int for feature in ids)
            for name, ids in found["pages"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fine = False
    if not fine:
        raise FraError(f"{file} does not say where feature cards lie: make the cards again, or remove their folder")
    return dict(found)
