"""The first screen: what was found, what is new or overturned against an earlier ledger, which rows are borderline, and
all verdicts as a wall, heads by claims.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fra.ledgers.compare import inputs
from fra.verdicts.claim import parse_head
from fra.verdicts.ledger import Ledger, Row

_WIDEST = 1166.0
"""Px that the wall has on a page of ordinary width."""
_CELL = (3.0, 22.0)
_HEIGHT = 15.0
_TOP, _FAMILY = 16.0, 16.0
_LETTER = 6.1
"""Width of a letter of a claim's name."""
_SHARES = {"SUPPORTED": (0.0, 1.0), "REFUTED": (0.5, 0.5), "INCONCLUSIVE": (0.36, 0.28), "CANNOT_RUN": (0.9, 0.1),
           "BROKEN": (0.0, 1.0)}  # fmt: skip
"""Where a verdict's mark begins in its cell, and how high it is: verdicts are told apart without colour."""
_TOLD = 40
"""Rows that a list names before it says how many more there are."""


@dataclass(frozen=True)
class Holding:
    """What one claim that is a finding says in sum."""

    claim: str
    title: str
    supported: list[str]
    """Heads, "family" for a claim without heads."""
    n_refuted: int
    n_undecided: int


@dataclass(frozen=True)
class Changed:
    """A row whose verdict is another than in the earlier ledger; `before` is None for a row that it had not."""

    row: Row
    before: str | None


@dataclass(frozen=True)
class Overview:
    """What a reader asks first."""

    found: list[Holding]
    none: int
    """Findings that no head supports."""
    overturned: list[Row]
    broken: list[Row]
    borderline: list[Row]
    changed: list[Changed] | None
    """None where there is no earlier ledger."""
    unlike: list[str]
    """What the two runs were not measured with alike."""

    @property
    def turns(self) -> dict[str, int]:
        """How often a verdict turned into which, the most frequent first."""
        turned = Counter(f"{one.before or 'no such row'} → {one.row.verdict}" for one in self.changed or [])
        return dict(turned.most_common())


def overview(ledger: Ledger, baseline: Ledger | None = None) -> Overview:
    """The ledger in sum, held against an earlier one where that is given."""
    by_claim: dict[str, list[Row]] = {}
    for row in ledger.verdicts:
        if ledger.kind_of(row.claim) == "finding":
            by_claim.setdefault(row.claim, []).append(row)
    found, none = [], 0
    for claim, rows in by_claim.items():
        counts = Counter(row.verdict for row in rows)
        note = ledger.header.claims.get(claim)
        heads = [row.head or "family" for row in rows if row.verdict == "SUPPORTED"]
        if heads:
            title = claim if note is None else note.title
            found.append(Holding(claim, title, heads, counts["REFUTED"], counts["INCONCLUSIVE"]))
        else:
            none += any(row.judged for row in rows)
    return Overview(
        found=found,
        none=none,
        overturned=[row for row in ledger.verdicts if "overturned" in row.detail],
        broken=[row for row in ledger.verdicts if row.verdict == "BROKEN"],
        borderline=[row for row in ledger.verdicts if "borderline" in row.detail],
        changed=None if baseline is None else _changed(ledger, baseline),
        unlike=[] if baseline is None else inputs(baseline, ledger),
    )


def _changed(ledger: Ledger, baseline: Ledger) -> list[Changed]:
    """Rows that were answered and whose answer is new, or another than before."""
    before = {(row.claim, row.head): row.verdict for row in baseline.verdicts}
    return [
        Changed(row, earlier)
        for row in ledger.verdicts
        if (earlier := before.get((row.claim, row.head))) != row.verdict
        and (row.judged or row.verdict == "BROKEN" or earlier in ("SUPPORTED", "REFUTED", "INCONCLUSIVE"))
    ]


def shortened(rows: Sequence[Any]) -> tuple[Sequence[Any], int]:
    """The first of a long list, and how many more there are."""
    return rows[:_TOLD], max(0, len(rows) - _TOLD)


def wall(ledger: Ledger) -> dict[str, Any] | None:
    """Every verdict of every head in one drawing: claims downwards, heads to the right, layers apart; None without
    heads. Cells become narrow where heads are many, so that 270 fit on a page.

    Returns width and height in px; for each claim its name, place and (verdict, path of its marks) by verdict; layers
    with their places; and what the page's script needs to find a row: heads, where each begins, the width of a cell.
    """
    heads = sorted({row.head for row in ledger.verdicts if row.head is not None}, key=parse_head)
    if not heads:
        return None
    layers = sorted({parse_head(head)[0] for head in heads})
    gap = 3.0
    left = 8 + round(_LETTER * max(len(row.claim) for row in ledger.verdicts))
    room = _WIDEST - left - _FAMILY - gap * len(layers)
    cell = max(_CELL[0], min(_CELL[1], room / len(heads)))
    cell = float(int(cell)) if cell >= 6 else int(10 * cell) / 10
    start: dict[str | None, float] = {None: float(left)}
    x, starts = left + _FAMILY, []
    for layer in layers:
        starts.append((layer, x))
        for head in (head for head in heads if parse_head(head)[0] == layer):
            start[head] = round(x, 1)
            x += cell
        x += gap
    by_claim: dict[str, list[Row]] = {}
    for row in ledger.verdicts:
        by_claim.setdefault(row.claim, []).append(row)
    rows = []
    for number, (claim, own) in enumerate(by_claim.items()):
        y = _TOP + number * _HEIGHT
        rows.append({"claim": claim, "y": y, "paths": _marks(own, start, y, cell)})
    return {
        "width": round(x, 1),
        "height": _TOP + len(rows) * _HEIGHT + 2,
        "rows": rows,
        "layers": starts,
        "cell": cell,
        "row": _HEIGHT,
        "top": _TOP,
        "heads": [(head or "family", at) for head, at in start.items()],
        "n_heads": len(heads),
    }


def _marks(rows: Iterable[Row], start: dict[str | None, float], y: float, cell: float) -> list[tuple[str, str]]:
    paths: dict[str, str] = {}
    inner = _HEIGHT - 3
    for row in rows:
        if row.verdict not in _SHARES:
            continue
        at, share = _SHARES[row.verdict]
        width = (_FAMILY - 4 if row.head is None else cell) - (1 if cell >= 6 else 0.6)
        place = f"M{start[row.head]:g} {y + at * inner:.1f}h{width:g}v{share * inner:.1f}h-{width:g}z"
        paths[row.verdict] = paths.get(row.verdict, "") + place
        if "overturned" in row.detail:
            paths["overturned"] = (
                paths.get("overturned", "") + f"M{start[row.head]:g} {y:g}h{width:g}v{inner:g}h-{width:g}z"
            )
    return list(paths.items())


FOREST = 240.0
"""Width of a condition's drawing, in px; its bar stands in the middle."""
_EDGE = 8.0


def forest(conditions: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every condition of a candidate as a line of a forest plot: each on a scale of its own, because units differ, with
    its bar in the middle and the claimed side to the right.

    Returns name, numbers, and where interval and effect lie in px; "at" is None where nothing was measured.
    """
    lines = []
    for name, c in conditions.items():
        numbers = [x for x in (c["effect"], c["low"], c["high"]) if x is not None]
        sign = 1.0 if c["above"] else -1.0
        at = None
        if c["effect"] is not None and c["bar"] is not None:
            # Halves, so that numbers near the end of the float range do not overflow.
            reach = max(abs(x / 2 - c["bar"] / 2) for x in numbers) or 1.0

            def px(
                x: float | None, end: float, reach: float = reach, sign: float = sign, bar: float = c["bar"]
            ) -> float:
                share = end if x is None else sign * (x / 2 - bar / 2) / reach
                return round(FOREST / 2 + max(-1.0, min(1.0, share)) * (FOREST / 2 - _EDGE), 1)

            at = {"low": px(c["low"], -sign), "high": px(c["high"], sign), "effect": px(c["effect"], 0.0)}
        lines.append({"name": name, "at": at} | c)
    return lines
