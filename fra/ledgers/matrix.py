"""Many ledgers side by side: what each says of every claim, and rows whose effects can be held against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fra.verdicts.claim import Kind
from fra.verdicts.ledger import COUNTED, Ledger, Row

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Cell:
    """What one ledger says of one claim."""

    counts: Mapping[str, int]
    """Rows of each verdict that counts, zeros left out."""
    digests: frozenset[str]

    @property
    def share(self) -> float | None:
        """SUPPORTED among the rows that say yes or no; None where none does."""
        yes, no = self.counts.get("SUPPORTED", 0), self.counts.get("REFUTED", 0)
        return yes / (yes + no) if yes + no else None


@dataclass(frozen=True)
class Line:
    """One claim over all ledgers."""

    claim: str
    title: str
    kind: Kind
    cells: tuple[Cell | None, ...]
    """A cell a ledger; None where it does not have the claim."""

    @property
    def changed(self) -> bool:
        """Whether the ledgers measured several versions of the claim: their verdicts answer other questions."""
        return len(frozenset().union(*(cell.digests for cell in self.cells if cell is not None))) > 1


@dataclass(frozen=True)
class Matrix:
    """Claims by ledgers."""

    names: tuple[str, ...]
    """Of the ledgers: their targets, and where two are of one, which."""
    lines: tuple[Line, ...]

    def to_frame(self) -> pd.DataFrame:
        """A row a claim: claim, title, kind, and of each ledger the numbers of its rows by verdict, in columns such as
        "mini SUPPORTED"; missing where a ledger does not have the claim.
        """
        import pandas as pd

        rows = []
        for line in self.lines:
            row: dict[str, object] = {"claim": line.claim, "title": line.title, "kind": line.kind}
            for name, cell in zip(self.names, line.cells, strict=True):
                row |= {f"{name} {word}": None if cell is None else cell.counts.get(word, 0) for word in COUNTED}
            rows.append(row)
        found = pd.DataFrame(rows)
        return found.astype(dict.fromkeys(found.columns[3:], "Int64"))


def named(ledgers: Sequence[Ledger], sources: Sequence[str]) -> tuple[str, ...]:
    """A name for each ledger: its target; where several are of one, with what tells their sources apart."""
    targets = [ledger.header.target for ledger in ledgers]
    names: list[str] = []
    for target, source in zip(targets, sources, strict=True):
        name = target if targets.count(target) == 1 else f"{target} ({source})"
        k = sum(other == name or other.startswith(f"{name} #") for other in names)
        names.append(name if not k else f"{name} #{k + 1}")
    return tuple(names)


def matrix(ledgers: Sequence[Ledger], names: Sequence[str]) -> Matrix:
    """All claims of all ledgers, by their ids. Rows of heads that a claim is not about are not counted."""
    found: dict[str, dict[int, list[Row]]] = {}
    for at, ledger in enumerate(ledgers):
        for row in ledger.verdicts:
            found.setdefault(row.claim, {}).setdefault(at, []).append(row)
    lines = []
    for claim in sorted(found):
        having = [ledgers[at] for at in found[claim]]
        notes = [note for ledger in having if (note := ledger.header.claims.get(claim)) is not None]
        cells = [_cell(found[claim].get(at)) for at in range(len(ledgers))]
        title = notes[-1].title if notes else ""
        lines.append(Line(claim, title, having[-1].kind_of(claim), tuple(cells)))
    return Matrix(tuple(names), tuple(lines))


def _cell(rows: Sequence[Row] | None) -> Cell | None:
    if rows is None:
        return None
    counts = Counter(row.verdict for row in rows)
    return Cell({word: counts[word] for word in COUNTED if counts[word]}, frozenset(row.digest for row in rows))


def pairs(one: Ledger, other: Ledger) -> Iterator[tuple[Row, Row]]:
    """Rows whose effects are in one unit and of one thing: the same version of a claim, decided by the same condition,
    at the same head. Heads of different targets are different things: of these only the rows of whole families.
    """
    same = one.header.target == other.header.target
    there = {(row.claim, row.head, row.digest, row.detail.get("decided")): row for row in other.verdicts}
    for row in one.verdicts:
        mate = there.get((row.claim, row.head, row.digest, row.detail.get("decided")))
        if mate is None or row.effect is None or mate.effect is None or not (same or row.head is None):
            continue
        yield row, mate
