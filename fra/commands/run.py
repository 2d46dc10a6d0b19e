"""`fra run TARGET... -o DIR`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fra.commands.options import Output, Quiet, Workers


def command(
    targets: Annotated[list[str], typer.Argument(metavar="TARGET...", help="Presets or target files.")],
    output: Output,
    select: Annotated[
        str | None, typer.Option("-k", metavar="EXPR", help="Only claims that pytest's -k selects [all].")
    ] = None,
    workers: Workers = None,
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|cuda[:N]|mps", help="Where to measure.")
    ] = "auto",
    claims: Annotated[Path, typer.Option("--claims", help="The folder of claim files.")] = Path("claims"),
    quiet: Quiet = False,
) -> None:
    """Every claim on several targets: one `pytest claims` and one ledger a target, in a folder.

    One target after another, or on `--workers` of Ray with a target and a GPU each. A summary as it goes; what was
    interrupted goes on, and a target whose ledger has the same weights, text, code and options is not run again. The
    exit status is 1 where claims fail, 4 where a target could not be measured.
    """
    from fra.runs import run

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    raise typer.Exit(run(targets, output, select=select, workers=workers, device=device, claims=claims, say=say))
