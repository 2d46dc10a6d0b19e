"""`fra structured [TARGET]`."""

from pathlib import Path
from typing import Annotated

import typer

from fra.commands.options import Target


def command(
    target: Target = "mini",
    n: Annotated[int, typer.Option("-n", help="Sentences of each kind.")] = 24,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also write all rows as JSON.")] = None,
) -> None:
    """Which channels carry brackets, quotes and names. Exploratory: nothing is tested."""
    from fra.structured import run

    run(target, n=n, output=output)
