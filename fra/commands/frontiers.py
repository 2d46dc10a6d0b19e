"""`fra frontiers TARGET -o FILE.csv`."""

from typing import Annotated, Literal

import typer

from fra.commands.options import Device, Output, Target


def command(
    target: Target,
    output: Output,
    documents: Annotated[int, typer.Option("--documents", help="Half of them for L0, half for the loss.")] = 120,
    stimulus: Annotated[
        Literal["natural", "repeated_natural"], typer.Option("--stimulus", help="What is read.")
    ] = "repeated_natural",
    device: Device = "cpu",
) -> None:
    """L0 against loss recovered of every dictionary of a target's study, in total and by head, as CSV."""
    from fra.frontiers import run

    run(target, output, documents=documents, stimulus=stimulus, device=device)
