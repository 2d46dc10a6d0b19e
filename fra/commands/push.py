"""`fra push OWNER/NAME LEDGER.json...`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
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
