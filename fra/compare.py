"""`python -m fra.compare A.json B.json`: what differs between two ledgers, row by row.

First what the two were not measured with alike (model, dictionaries, text), then verdicts, then rows whose verdict
stands and whose numbers moved. When a run was made, how long it took and at which commit do not count.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

from fra.errors import FraError
from fra.verdicts import ledger as ledgers
from fra.verdicts.compare import Difference, differences, inputs

SHOWN = 20


def summary(found: list[Difference], n_rows: int, every: bool = False) -> list[str]:
    """The lines that are printed: changed verdicts, then one line a changed row, then a count.

    every: all differences, where otherwise a row shows its first and says how many more there are.
    """
    turned = [d for d in found if d.where == "verdict"]
    lines = [str(d) for d in turned]
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


def run(one: Path, other: Path, *, tolerance: float = 0.0, expect_equal: bool = False, every: bool = False) -> int:
    """Print the differences of two ledgers: 0; 1 where there are some and `expect_equal` is asked for.

    tolerance: relative, of numbers. every: all differences of every row. Raises FraError for a tolerance that is no
    share, and for what is no ledger.
    """
    if not 0 <= tolerance < 1:
        raise FraError(f"--tolerance is {tolerance}: it is a share, from 0 to below 1")
    left, right = ledgers.read(one), ledgers.read(other)
    found = differences(left, right, tolerance)
    n_rows = len({(row.claim, row.head) for ledger in (left, right) for row in ledger.verdicts})
    unlike = inputs(left, right)
    print("\n".join([*(f"not measured alike: {line}" for line in unlike), *summary(found, n_rows, every)]))
    return int(expect_equal and bool(found or unlike))


def main(argv: list[str] | None = None) -> int:
    """Print the differences: 0; 1 where there are some and --expect-equal is given; 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m fra.compare", description="What differs between two ledgers.")
    parser.add_argument("one", metavar="A.json", type=Path)
    parser.add_argument("other", metavar="B.json", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative, of numbers (default: to the last bit)")
    parser.add_argument("--expect-equal", action="store_true", help="exit with 1 where anything differs")
    parser.add_argument("--all", dest="every", action="store_true", help="every difference of every row")
    try:
        return run(**vars(parser.parse_args(argv)))
    except FraError as error:
        print(f"fra.compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
