"""`fra cards TARGET --hook HOOK -o FOLDER`."""

from pathlib import Path
from typing import Annotated

import typer

from fra.commands.options import Device, Output, Quiet, Target


def command(
    target: Target,
    hook: Annotated[str, typer.Option("--hook", help="Where the dictionary was trained, as blocks.1.attn.hook_z.")],
    output: Output,
    report: Annotated[Path | None, typer.Option("--report", help="A report for the cards to link back to.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="Features' names: Neuronpedia's export, JSON, or CSV feature,label."),
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="Pages for the channels that its rows name, too.")
    ] = None,
    strongest: Annotated[int, typer.Option("--strongest", help="Channels of a head that get a page.")] = 40,
    documents: Annotated[
        int | None, typer.Option("--documents", help="How many of the target's texts [all; 60 at an attention input].")
    ] = None,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Cards of a dictionary's features, with an index in which one jumps to a number.

    Of head outputs: when each feature fires, which tokens and heads make it fire, and what it writes. Of attention
    inputs: a page for each channel that is strong in a head, with where it contributes most, its coupling G and the
    heads it is strong in; every feature's strongest partners; all features of a head. The pages open offline, and the
    report links to them where they lie in `cards/HOOK` beside it.
    """
    from fra.cards import run

    run(
        target, hook, output, report=report, labels=labels, ledger=ledger, strongest=strongest, documents=documents,
        device=device, quiet=quiet,
    )  # fmt: skip
