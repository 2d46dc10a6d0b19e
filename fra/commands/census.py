"""`fra census TARGET --layer L -o FILE` and `fra census merge PART... -o FILE`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fra.commands.options import Device, Output, Quiet, Workers


def command(
    target: Annotated[
        list[str], typer.Argument(metavar="TARGET | merge PART...", help="A preset or target file; or shards to join.")
    ],
    output: Output,
    layer: Annotated[int | None, typer.Option("--layer", help="Attention layer, from 0.")] = None,
    heads: Annotated[str | None, typer.Option("--heads", help="As 3,5 or L1H3,L1H5 [all of the layer].")] = None,
    reduce: Annotated[
        str, typer.Option("--reduce", help="Of sum, abs, max, mean, count, contrast, sensitivity, mass; with commas.")
    ] = "sum",
    stripes: Annotated[
        str | None, typer.Option("--stripes", help="Offsets t - s, as 20,21, or a JSON file, a list a document.")
    ] = None,
    documents: Annotated[
        Path | None, typer.Option("--documents", help="A folder of .txt files, or one [the target's own text].")
    ] = None,
    longest: Annotated[
        int | None, typer.Option("--longest", min=1, help="Tokens of a document, at most [the model's context].")
    ] = None,
    shard: Annotated[str | None, typer.Option("--shard", metavar="K/N", help="Only the K-th of N shards.")] = None,
    workers: Workers = None,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Precision to measure in [the target's own].")] = None,
    quiet: Quiet = False,
) -> None:
    """All live channels of a layer's heads over many documents, kept in one file for `Census.load`.

    With `--shard K/N` some of the documents, so that N processes on any machines take the whole between them;
    `fra census merge PART... -o FILE` makes one census of their files, the same to the bit as that of one process. With
    `--workers` processes of Ray see the documents, on this machine or a cluster, and the file is the same again. The
    same command goes on where it was interrupted.
    """
    from fra import shards
    from fra.errors import FraError

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    name, *others = target
    if name == "merge":
        shards.merge([Path(part) for part in others], output, say)
        return
    if others:
        raise FraError(f"there is one target a census, and {others[0]!r} is a second one")
    if layer is None:
        raise FraError("a census is of one layer: give --layer")
    shards.run(
        name,
        layer,
        output,
        heads=heads,
        reduces=reduce,
        stripes=stripes,
        documents=documents,
        longest=longest,
        shard=shard,
        workers=workers,
        device=device,
        dtype=dtype,
        say=say,
    )
