"""What is done with ledgers: `fra report LEDGER.json -o FILE.html`, `fra compare A.json B.json ...` and
`fra push OWNER/NAME LEDGER.json...`.
"""

from pathlib import Path
from typing import Annotated

import typer

from fra.commands.options import Output


def report(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER.json", help="What `pytest claims/ --ledger` has written.")],
    output: Output,
    cards: Annotated[
        Path | None, typer.Option("--cards", help="Link the feature cards in the folders of this one [cards, beside].")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="An earlier ledger: the page says what is new since.")
    ] = None,
) -> None:
    """Draw the report of a ledger: one self-contained page. Nothing is measured."""
    from fra.report.page import run

    run(ledger, output, cards=cards, baseline=baseline)


def compare(
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


def push(
    name: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="A data set on the hub, made where it is not there.")
    ],
    ledgers: Annotated[list[Path], typer.Argument(metavar="LEDGER.json...", help="What claims were written to.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new data set private.")] = False,
) -> None:
    """Put ledgers and their reports into a data set on the Hugging Face hub, in one commit.

    `fra compare hub:OWNER/NAME` reads them. Log in with `hf auth login` first.
    """
    from fra.share import run

    run(name, ledgers, private=private)
