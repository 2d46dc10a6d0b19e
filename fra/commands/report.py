"""`fra report LEDGER.json -o FILE.html`."""

from pathlib import Path
from typing import Annotated

import typer

from fra.commands.options import Output


def command(
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
