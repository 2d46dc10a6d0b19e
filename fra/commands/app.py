"""`fra`: what its subcommands are, and what happens to what they raise."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated

import typer

import fra
from fra.errors import FraError
from fra.verdicts.shown import print_anything

COMMANDS = {
    "explore": "fra.commands.explore",
    "cards": "fra.commands.cards",
    "report": "fra.commands.ledgers:report",
    "census": "fra.commands.census",
    "run": "fra.commands.run",
    "compare": "fra.commands.ledgers:compare",
    "push": "fra.commands.ledgers:push",
    "frontiers": "fra.commands.frontiers",
    "structured": "fra.commands.structured",
    "doctor": "fra.commands.doctor",
    "new-claim": "fra.commands.new_claim",
}
"""Subcommand and module, in the order of the help. Each module has a function `command` (or that after the colon),
whose signature makes options and whose docstring the help, and imports nothing heavy before that is called; one that is
not there, or whose NEEDS (another module) is not, is left out.
"""
REFUSED = 4
"""Exit status for bad input, as that of `pytest claims/`."""


def build() -> typer.Typer:
    """The whole command."""
    app = typer.Typer(
        name="fra",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in COMMANDS:
        if (command := command_of(name)) is not None:
            app.command(name)(command)
    return app


def command_of(name: str) -> Callable[..., None] | None:
    """The function of a subcommand; None where it, or what it needs, is not there."""
    module, _, function = COMMANDS[name].partition(":")
    if not _is_there(module):
        return None
    own = import_module(module)
    found: Callable[..., None] = getattr(own, function or "command")
    return found if _is_there(getattr(own, "NEEDS", module)) else None


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _version(asked: bool | None) -> None:
    if asked:
        print(f"fra {fra.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool | None, typer.Option("--version", help="Say which version this is.", callback=_version, is_eager=True)
    ] = None,
) -> None:
    """Feature-resolved attention: which pairs of SAE features make a head look where it looks.

    A target is a model with its dictionaries and its text: a preset such as `mini`, which comes with the clone, or a
    target file of your own. Claims about its heads are tested by `pytest claims/`. Begin with `fra doctor mini`.
    """


def main(arguments: list[str] | None = None) -> int:
    """Run `fra`: 0, or what the subcommand says; 2 for a wrong option, 4 with one sentence for bad input."""
    print_anything()
    try:
        try:
            build()(args=arguments, prog_name="fra")
        finally:
            sys.stdout.flush()
    except FraError as error:
        print(f"fra: {error}", file=sys.stderr)
        return REFUSED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the end of the process would try once more, and complain
        if error.errno != errno.EPIPE:  # whoever read has seen enough
            print(f"fra: what is printed cannot be written: {error.strerror}.", file=sys.stderr)
        return REFUSED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
