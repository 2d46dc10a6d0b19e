"""`fra doctor [TARGET]`."""

import json
import sys
from typing import Annotated, Literal

import typer

from fra.commands.options import Device, Quiet


def command(
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help="A preset or a target file; none: the machine alone.")
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Precision to measure in [the target's own]."),
    ] = None,
    documents: Annotated[int, typer.Option("--documents", help="How many texts, 128 tokens of each.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """What is odd? Versions, device and threads; then whether a target's model, dictionaries and text fit together.

    The model is tried with either weight processing against the dictionaries, whatever the target file says. Paste
    what this prints into an issue. The exit status is 1 where something is wrong with the target.
    """
    from fra.doctor import examine, screen

    def say(line: str) -> None:
        if not (quiet or as_json):
            print(line, file=sys.stderr, flush=True)

    found = examine(target, device=device, dtype=dtype, documents=documents, progress=say)
    print(json.dumps(found.as_dict(), indent=1) if as_json else "\n".join(screen(found)))
    raise typer.Exit(int(found.wrong))
