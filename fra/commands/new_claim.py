"""`fra new-claim X02 "title"`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    name: Annotated[str, typer.Argument(metavar="ID", help="As X02.")],
    title: Annotated[str, typer.Argument(metavar="TITLE", help="The claim in a sentence.")],
    claims: Annotated[Path, typer.Option("--claims", help="The folder of claim files.")] = Path("claims"),
    tests: Annotated[Path, typer.Option("--tests", help="The folder for the test of what it measures.")] = Path(
        "tests"
    ),
) -> None:
    """Write a claim file with its fixture, ready to fill in, and a test that plants a yes and a no.

    Both run as they are: the claim that is written measures something, and the test shows that its bar tells heads
    with the effect from heads without. Replace what it measures and what the test plants; nothing that is there is
    overwritten.
    """
    from fra.scaffold import new_claim

    written, test = new_claim(name, title, claims, tests)
    print(f"wrote {written} and {test}")
    print(f"next: pytest {test}, and pytest {claims} --target TARGET -k {name.lower()}")
