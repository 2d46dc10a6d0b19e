"""`fra compare A.json B.json ...`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    given: Annotated[list[str], typer.Argument(metavar="LEDGER.json...", help="Or hub:OWNER/NAME, a data set's.")],
    tolerance: Annotated[float, typer.Option("--tolerance", help="Relative, of numbers; 0: to the last bit.")] = 0.0,
    expect_equal: Annotated[bool, typer.Option("--expect-equal", help="Exit with 1 where anything differs.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every difference of every row.")] = False,
    outputs: Annotated[
        list[Path], typer.Option("-o", "--output", help="Also write FILE.html, FILE.csv or FILE.parquet.")
    ] = [],  # noqa: B006
) -> None:
    """How ledgers differ: what was not measured alike, then verdicts, then numbers, row by row.

    Of several targets, or more than two ledgers, every claim by every ledger besides: in the terminal, as a table, and
    as a page with a heat map of verdicts and the effects of two runs against each other.
    """
    from fra.compare import run

    raise typer.Exit(run(given, tolerance=tolerance, expect_equal=expect_equal, every=every, outputs=outputs))
