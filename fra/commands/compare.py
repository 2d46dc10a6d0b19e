"""`fra compare A.json B.json`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    one: Annotated[Path, typer.Argument(metavar="A.json")],
    other: Annotated[Path, typer.Argument(metavar="B.json")],
    tolerance: Annotated[float, typer.Option("--tolerance", help="Relative, of numbers; 0: to the last bit.")] = 0.0,
    expect_equal: Annotated[bool, typer.Option("--expect-equal", help="Exit with 1 where anything differs.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every difference of every row.")] = False,
) -> None:
    """What differs between two ledgers: what was not measured alike, then verdicts, then numbers, row by row."""
    from fra.compare import run

    raise typer.Exit(run(one, other, tolerance=tolerance, expect_equal=expect_equal, every=every))
