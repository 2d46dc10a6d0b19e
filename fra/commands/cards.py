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
    documents: Annotated[int | None, typer.Option("--documents", help="How many of the target's texts [all].")] = None,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Feature cards of a head-output dictionary: a page a head, and an index.

    When each feature fires, which tokens and heads make it fire, and what it writes. The pages open offline, and the
    report links to them where they lie in `cards/HOOK` beside it.
    """
    from fra.cards import run

    run(target, hook, output, report=report, documents=documents, device=device, quiet=quiet)
