"""Two ledgers row by row: which rows differ, and in what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fra.verdicts.ledger import DictionaryNote, Ledger, Row

ABSENT = "no such row"
ABSENT_INPUT = "none"


@dataclass(frozen=True)
class Difference:
    """One number or word of a row that is not the same in both ledgers."""

    claim: str
    head: str | None
    where: str
    """The name of the value within the row ("effect", "detail.candidates.channels.effect.low")."""
    one: Any
    other: Any

    def __str__(self) -> str:
        return f"{self.claim} {self.head or 'as a whole'}: {self.where}: {_short(self.one)} -> {_short(self.other)}"


def inputs(one: Ledger, other: Ledger) -> list[str]:
    """What two runs were not measured with alike: model, dictionaries (which, and how they fit), text; a line each.
    What a ledger does not say is not compared.
    """
    a, b = one.header, other.header
    found = []
    if a.model and b.model and _fingerprint(a.model) != _fingerprint(b.model):
        found.append(f"model and all that goes with it: {_short(a.model, 120)} -> {_short(b.model, 120)}")
    if a.dictionaries and b.dictionaries:
        pairs: dict[tuple[str, str, int], list[str]] = {}
        for k, notes in enumerate((a.dictionaries, b.dictionaries)):
            seen: dict[tuple[str, str], int] = {}
            for note in notes:
                number = seen[note.role, note.hook] = seen.get((note.role, note.hook), -1) + 1
                said = pairs.setdefault((note.role, note.hook, number), [ABSENT_INPUT, ABSENT_INPUT])
                said[k] = f"{note.source} (sha256 {(note.sha256 or 'unknown')[:12]})"
        found += [f"{role} at {hook}: {x} -> {y}" for (role, hook, _), (x, y) in pairs.items() if _own(x) != _own(y)]
        found += _fits(a.dictionaries, b.dictionaries)
    if a.text and b.text and a.text.sha256 != b.text.sha256:
        x, y = (f"{t.documents}, {t.n_documents} documents of {t.n_sources} sources" for t in (a.text, b.text))
        found.append(f"text: {x} (sha256 {a.text.sha256[:12]}) -> {y} (sha256 {b.text.sha256[:12]})")
    return found


_FIT = {"explained_variance": "explained variance", "loss_recovered": "loss recovered"}
_MOVED = 0.005
"""Of explained variance or of loss recovered: from where on two runs' dictionaries do not fit alike."""


def _fits(one: Sequence[DictionaryNote], other: Sequence[DictionaryNote]) -> list[str]:
    """What dictionaries of the same hook and role do not fit alike, where both ledgers say it."""
    before = {(note.role, note.hook): note for note in one}
    found = []
    for note in other:
        if (old := before.get((note.role, note.hook))) is None:
            continue
        for name, words in _FIT.items():
            x, y = getattr(old, name), getattr(note, name)
            if x is not None and y is not None and abs(x - y) > _MOVED:
                found.append(f"{note.role} at {note.hook}: {words} {x:.3f} -> {y:.3f}")
    return found


def _fingerprint(model: str) -> str:
    """The hash in what a header says of its model, where there is one: not the path."""
    return model.rpartition("sha256 ")[2]


def _own(said: str) -> str:
    """What tells one dictionary from another: its hash, not the path by which a target file names it."""
    return said if said.endswith("unknown)") else said.rpartition("(sha256 ")[2]


def differences(one: Ledger, other: Ledger, tolerance: float = 0.0) -> list[Difference]:
    """What is not the same in two ledgers, in the order of the first. The headers (when, how long, at which commit) are
    not compared.

    tolerance: numbers that differ by no more than this share of the larger are the same; 0 compares to the last bit.
    """
    rows: dict[tuple[str, str | None], list[Row | None]] = {}
    for k, ledger in enumerate((one, other)):
        for row in ledger.verdicts:
            rows.setdefault((row.claim, row.head), [None, None])[k] = row
    found: list[Difference] = []
    for (claim, head), (a, b) in rows.items():
        if a is None or b is None:
            row_or_not = [ABSENT if row is None else row.verdict for row in (a, b)]
            found.append(Difference(claim, head, "verdict", *row_or_not))
            continue
        pairs = _unequal(a.model_dump(mode="json"), b.model_dump(mode="json"), tolerance, "")
        found += [Difference(claim, head, where, x, y) for where, x, y in pairs]
    return found


def _unequal(a: Any, b: Any, tolerance: float, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            own, other = a.get(name, ABSENT), b.get(name, ABSENT)
            yield from _unequal(own, other, tolerance, f"{where}.{name}" if where else name)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _unequal(x, y, tolerance, f"{where}[{k}]")
    elif not _same(a, b, tolerance):
        yield where, a, b


def _same(a: Any, b: Any, tolerance: float) -> bool:
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    if numbers and tolerance:
        return math.isclose(a, b, rel_tol=tolerance)
    return type(a) is type(b) and bool(a == b) if not numbers else bool(a == b)


def _short(value: Any, longest: int = 60) -> str:
    text = str(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."
