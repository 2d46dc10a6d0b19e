"""Options that several subcommands share."""

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[str, typer.Argument(metavar="TARGET", help="A preset, such as mini, or a target file.")]
Device = Annotated[str, typer.Option("--device", metavar="cpu|cuda[:N]|mps", help="Where to measure.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="What to write.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers", metavar="auto|N", help="Processes of Ray: N, or one a core or GPU [none: this process alone]."
    ),
]
