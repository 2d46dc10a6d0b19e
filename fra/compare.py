"""`fra compare A.json B.json ...`: ledgers side by side.

Of two runs of one target what differs, row by row: first what the two were not measured with alike (model,
dictionaries, text), then verdicts, each with its numbers in both, then rows whose verdict stands and whose numbers
moved. When a run was made, how long it took and at which commit do not count. Of several targets, or of more ledgers
than two, every claim by every ledger besides. `hub:OWNER/NAME` stands for the ledgers of a data set on the hub.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from fra.errors import FraError
from fra.ledgers.compare import Difference, differences, inputs
from fra.ledgers.matrix import Matrix, matrix, named
from fra.verdicts import ledger as ledgers
from fra.verdicts.files import check_writable, write_text
from fra.verdicts.ledger import Ledger
from fra.verdicts.shown import print_anything

SHOWN = 20
HUB = "hub:"
WIDTH = 100
"""Columns that a terminal has, at least."""
OUTPUTS = (".html", ".csv", ".parquet")


def summary(found: list[Difference], n_rows: int, every: bool = False) -> list[str]:
    """The lines that are printed: changed verdicts, then one line a changed row, then a count.

    every: all differences, where otherwise a row shows its first and says how many more there are.
    """
    turned = [d for d in found if d.where == "verdict"]
    numbers = {(d.claim, d.head, d.where): d for d in found}
    lines = [f"{d}{_moved(d, numbers)}" for d in turned]
    moved = [d for d in found if d.where != "verdict"]
    rows = [list(own) for _, own in groupby(moved, key=lambda d: (d.claim, d.head))]
    for own in rows if every else rows[:SHOWN]:
        lines += [str(d) for d in own] if every else [f"{own[0]}" + (f" (and {len(own) - 1} more)" * (len(own) > 1))]
    if not every and len(rows) > SHOWN:
        lines.append(f"... and {len(rows) - SHOWN} more rows: --all shows everything")
    by = Counter(f"{d.one} -> {d.other}" for d in turned)
    said = f" ({', '.join(f'{n} {what}' for what, n in by.items())})" if by else ""
    differ = len({(d.claim, d.head) for d in found})
    lines.append(f"{n_rows} rows: {n_rows - differ} equal, {differ} differ, {len(turned)} in their verdict{said}")
    return lines


def _moved(turned: Difference, numbers: dict[tuple[str, str | None, str], Difference]) -> str:
    """The numbers of a row whose verdict changed, in both ledgers, as far as they differ."""
    of = [numbers.get((turned.claim, turned.head, name)) for name in ("effect", "low", "high", "bar", "p", "n")]
    told = [f"{d.where} {_brief(d.one)} -> {_brief(d.other)}" for d in of if d is not None]
    return f" ({', '.join(told)})" if told else ""


def _brief(x: object) -> str:
    return f"{x:.4g}" if isinstance(x, float) else "none" if x is None else str(x)


def read_all(given: Sequence[str | Path]) -> tuple[list[Ledger], list[str]]:
    """The ledgers that are named, and what each is called: files, and of `hub:OWNER/NAME` (or `...@REVISION`) all of
    the data set. Raises FraError for what is no ledger.
    """
    found: list[tuple[Ledger, str]] = []
    for one in map(str, given):
        if one.startswith(HUB):
            from fra.checkpoints.shared import fetch

            name, _, revision = one.removeprefix(HUB).partition("@")
            found += [
                (ledgers.read(path), f"{one}/{path.stem}") for path in fetch(name, "ledgers/*.json", revision or None)
            ]
        else:
            found.append((ledgers.read(one), one))
    if len(found) < 2:
        raise FraError(f"there {'is one ledger' if found else 'are no ledgers'} to compare: name two or more")
    return [ledger for ledger, _ in found], [source for _, source in found]


def table(found: Matrix, width: int = WIDTH) -> Iterator[str]:
    """The matrix in lines no wider than `width`: as many ledgers beside each other as fit, then the others below."""
    from fra.report.compared import shown

    cells = {line.claim: [shown(cell) for cell in line.cells] for line in found.lines}
    labels = [name if len(name) <= 24 else f"{name[:11]}..{name[-11:]}" for name in found.names]
    wide = [max([len(label), *(len(own[at]) for own in cells.values())]) for at, label in enumerate(labels)]
    low, first = 0, max(len(line.claim) for line in found.lines) + 1
    while low < len(labels):
        high = low + 1
        while high < len(labels) and first + sum(w + 2 for w in wide[low : high + 1]) <= width:
            high += 1
        yield "".ljust(first) + "".join(f"  {labels[at]:<{wide[at]}}" for at in range(low, high)).rstrip()
        for line in found.lines:
            name = line.claim + ("≠" if line.changed else "")
            yield (
                name.ljust(first) + "".join(f"  {cells[line.claim][at]:<{wide[at]}}" for at in range(low, high))
            ).rstrip()
        low = high
        if low < len(labels):
            yield ""


def run(
    given: Sequence[str | Path],
    *,
    tolerance: float = 0.0,
    expect_equal: bool = False,
    every: bool = False,
    outputs: Sequence[Path] = (),
) -> int:
    """Print how ledgers differ: 0; 1 where they do and `expect_equal` is asked for.

    tolerance: relative, of numbers. every: all differences of every row. outputs: files to write, the page (.html) or
    claims by ledgers as a table (.csv, .parquet). Raises FraError for a tolerance that is no share, for what is no
    ledger, and for a file of another kind.
    """
    if not 0 <= tolerance < 1:
        raise FraError(f"--tolerance is {tolerance}: it is a share, from 0 to below 1")
    for path in outputs:
        if path.suffix not in OUTPUTS:
            raise FraError(f"{path} is none of {', '.join(OUTPUTS)}: say by its ending what is to be written")
        check_writable(path)
    found, sources = read_all(given)
    names = named(found, [Path(source).stem for source in sources])
    several = len(found) > 2 or len({ledger.header.target for ledger in found}) > 1
    said: dict[str, list[str]] = {}
    equal = True
    for name, other in zip(names[1:], found[1:], strict=True):
        own = differences(found[0], other, tolerance)
        unlike = inputs(found[0], other)
        equal = equal and not own and not unlike
        if found[0].header.target == other.header.target:
            n_rows = len({(row.claim, row.head) for ledger in (found[0], other) for row in ledger.verdicts})
            said[name] = [*(f"not measured alike: {line}" for line in unlike), *summary(own, n_rows, every)]
        else:
            n = sum(d.where == "verdict" for d in own)
            said[name] = [
                f"another target, whose heads are others: {n} rows with another verdict, or in one ledger alone"
            ]
    whole = matrix(found, names)
    if several:
        print("\n".join([*table(whole), ""]))
    for name, lines in said.items():
        print("\n".join([*([f"{names[0]} -> {name}"] if several else []), *lines]))
    for path in outputs:
        _write(path, whole, found, sources, said)
        print(f"wrote {path}")
    return int(expect_equal and not equal)


def _write(
    path: Path, whole: Matrix, found: Sequence[Ledger], sources: Sequence[str], said: dict[str, list[str]]
) -> None:
    if path.suffix == ".html":
        from fra.report.compared import render

        write_text(render(whole, found, sources, said), path)
    elif path.suffix == ".csv":
        write_text(whole.to_frame().to_csv(index=False), path)
    else:
        try:
            whole.to_frame().to_parquet(path, index=False)
        except ImportError as error:
            raise FraError(f"{path} cannot be written: install pyarrow, or write .csv") from error
        except OSError as error:
            raise FraError(f"{path} cannot be written: {error.strerror or error}") from error


def main(argv: list[str] | None = None) -> int:
    """Print the differences: 0; 1 where there are some and --expect-equal is given; 2 with one sentence on stderr."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m fra.compare", description="How ledgers differ.")
    parser.add_argument("given", metavar="LEDGER.json", nargs="+", help="or hub:OWNER/NAME, a data set's")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative, of numbers (default: to the last bit)")
    parser.add_argument("--expect-equal", action="store_true", help="exit with 1 where anything differs")
    parser.add_argument("--all", dest="every", action="store_true", help="every difference of every row")
    parser.add_argument(
        "-o", "--output", dest="outputs", metavar="FILE", type=Path, action="append", default=[],
        help="also write the page (.html) or the matrix (.csv, .parquet); may be given again",
    )  # fmt: skip
    try:
        return run(**vars(parser.parse_args(argv)))
    except FraError as error:
        print(f"fra.compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
