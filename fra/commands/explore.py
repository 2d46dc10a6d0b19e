"""`fra explore TARGET --text "..." -o FILE.html`."""

from importlib import import_module
from typing import Annotated, Literal

import typer

from fra.commands.options import Device, Output, Quiet, Target

NEEDS = "fra.explorer.command"
"""The room that it runs: without it there is no such subcommand."""


def command(
    target: Target,
    text: Annotated[str, typer.Option("--text", help="The text to look at.")],
    output: Output,
    layer: Annotated[int | None, typer.Option("--layer", help="All heads of this layer.")] = None,
    heads: Annotated[
        str | None, typer.Option("--heads", metavar="L1H4,...", help="These heads, of one layer; instead of --layer.")
    ] = None,
    precision: Annotated[
        Literal["float16", "float32"], typer.Option("--precision", help="Of the vectors in the page.")
    ] = "float16",
    documents: Annotated[
        int, typer.Option("--documents", help="How many of the target's texts to look through for examples.")
    ] = 60,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """One page on which a layer's feature-resolved attention on a text is looked at, exactly and offline.

    Pick a head, a score, a channel, a feature; switch channels off and see the attention change. The page is one file
    that loads nothing: keep it, mail it. Without --layer and --heads it shows the layer of the head that attends most
    to induction keys.
    """
    run = import_module(NEEDS).run
    file = run(
        target, text, output, layer=layer, heads=heads, precision=precision, documents=documents, device=device,
        quiet=quiet,
    )  # fmt: skip
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
