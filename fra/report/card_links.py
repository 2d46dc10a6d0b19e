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
"""In the folder of one dictionary's cards: target, its fingerprint, hook, the features of each page, the channels that
have pages, and labels of features."""
_PAGE = re.compile(r"(L\d+H\d+|features-\d+)\.html")


@dataclass(frozen=True)
class CardLinks:
    """Addresses relative to a page."""

    indices: Mapping[str, str] = field(default_factory=dict)
    """By hook: the index of its dictionary's cards."""
    features: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """By hook and feature: its card."""
    channels: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """By layer ("1") and channel ("1575 -> 1794"): its page."""
    labels: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """By hook and feature: its label."""
    names: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """By layer and channel: its features' labels, in words."""

    def channel(self, head: str | None, text: object) -> str:
        """The page of a channel that a row of this head speaks of; empty where it has none."""
        return self.channels.get(_layer_and(head, text), "")

    def named(self, head: str | None, text: object) -> str:
        """The labels of a channel's two features; empty where they have none."""
        return self.names.get(_layer_and(head, text), "")


def channels_of(head: str | None, detail: Mapping[str, Any]) -> str:
    """The head of whose layer's dictionary a row's channels are; empty for a row that compares dictionaries of several
    seeds, where a number means a feature of another one.
    """
    return "" if any("seed" in key for key in detail) else head or ""


def _layer_and(head: str | None, text: object) -> tuple[str, str]:
    return ((head or "").removeprefix("L").split("H")[0], str(text))


def relative(file: Path, page: Path) -> str:
    """The address of a file as a link on a page."""
    return quote(Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix())


def write(
    folder: Path,
    target: str,
    fingerprint: str,
    hook: str,
    pages: Mapping[str, Iterable[int]],
    channels: Iterable[tuple[int, int]] = (),
    labels: Mapping[int, str] | None = None,
    layer: int | None = None,
) -> None:
    """Which features stand on which page of a folder of cards, and which channels have a page of their own; layer:
    of these channels' heads. Raises FraError where it cannot be written.
    """
    found = {"target": target, "fingerprint": fingerprint, "hook": hook}
    more = {
        "pages": {page: sorted(features) for page, features in pages.items()},
        "layer": layer,
        "channels": sorted(map(list, channels)),
        "labels": {str(feature): label for feature, label in sorted((labels or {}).items())},
    }
    write_text(json.dumps(found | more) + "\n", folder / FILE)


def read(folder: Path, page: Path, target: str, model: str | None) -> CardLinks:
    """Links from a page to the cards in the folders of `folder`, one folder a dictionary; empty where there are none.

    Only cards of this target, made with the weights that `model` (of a ledger's header) names by their fingerprint: of
    others the numbers mean other features. Raises FraError for a file that is none of ours.
    """
    indices: dict[str, str] = {}
    features: dict[tuple[str, str], str] = {}
    labels: dict[tuple[str, str], str] = {}
    channels: dict[tuple[str, str], str] = {}
    names: dict[tuple[str, str], str] = {}
    twice: set[str] = set()
    seen: set[str] = set()
    for file in sorted(folder.glob(f"*/{FILE}")):
        found = _read(file)
        if found["target"] != target or not found["fingerprint"] or found["fingerprint"] not in (model or ""):
            continue
        hook = found["hook"]
        indices[hook] = relative(file.parent / "index.html", page)
        for name, ids in found["pages"].items():
            address = relative(file.parent / name, page)
            features |= {(hook, str(feature)): f"{address}#f{feature}" for feature in ids}
        said = found.get("labels", {})
        labels |= {(hook, feature): label for feature, label in said.items()}
        if not found.get("channels"):
            continue
        layer = str(found["layer"])
        twice |= seen & {layer}
        seen.add(layer)
        for i, j in found["channels"]:
            place = layer, f"{i} -> {j}"
            channels[place] = relative(file.parent / f"c{i}-{j}.html", page)
            if told := [f"{at}: {said[str(at)]}" for at in dict.fromkeys((i, j)) if str(at) in said]:
                names[place] = "; ".join(told)
    # Rows name a channel's layer and not its dictionary: where a layer has cards of two, none is linked.
    channels, names = ({at: v for at, v in of.items() if at[0] not in twice} for of in (channels, names))
    return CardLinks(indices, features, channels, labels, names)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
        fine = all(isinstance(found[name], str) for name in ("target", "fingerprint", "hook")) and all(
            _PAGE.fullmatch(name) and all(type(feature) is int for feature in ids)
            for name, ids in found["pages"].items()
        )
        fine = fine and all(type(i) is int and type(j) is int for i, j in found.get("channels", []))
        fine = fine and (not found.get("channels") or type(found["layer"]) is int)
        labels = found.get("labels", {})
        fine = fine and all(key.isdigit() and isinstance(label, str) for key, label in labels.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fine = False
    if not fine:
        raise FraError(f"{file} does not say where feature cards lie: make the cards again, or remove their folder")
    return dict(found)
