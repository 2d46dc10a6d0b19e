"""`fra.explorer.explore` and its command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from fra.architectures.face import face
from fra.errors import FraError
from fra.explorer.pack import Precision
from fra.verdicts import files
from fra.verdicts.shown import print_anything

if TYPE_CHECKING:
    from fra.targets.target import Target

DOCUMENTS = 60


@face
def explore(
    target: Target | str,
    text: str,
    *,
    layer: int | None = None,
    heads: Sequence[str] | None = None,
    precision: str = "float16",
    documents: int = DOCUMENTS,
    output: str | Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> str:
    """One self-contained page that explores a layer's feature-resolved attention on a text; returned as HTML text, and
    written to `output` where that is given.

    target: a Target, or what `fra.load_target` takes. layer, or heads (names as "L1H4", all of one layer): what to
    show; neither: the layer of the head that attends most to induction keys, among those with a dictionary. precision:
    of the features' vectors in the page; scores and blocks are in float32 either way. documents: how many of the
    target's own to look through for where the features fire; 0 for none.

    Raises FraError (one sentence) for a head, layer or precision that is none, an empty text, and as `fra.resolve`
    does.
    """
    from fra.explorer.page import render
    from fra.targets.target import load_target

    if precision not in get_args(Precision):
        raise FraError(f"precision={precision!r} is unknown: choose one of {', '.join(get_args(Precision))}.")
    if documents < 0:
        raise FraError(f"documents={documents} is negative: give how many to look through, or 0.")
    if not text.strip():
        raise FraError("the text is empty: give a sentence to look at.")
    if output is not None:
        files.check_writable(Path(output))
    own = load_target(target) if isinstance(target, str) else target
    page = render(own, text, layer, heads, cast(Precision, precision), documents, progress)
    if output is not None:
        files.write_text(page, Path(output))
    return page


def run(
    target: str,
    text: str,
    output: Path,
    *,
    layer: int | None = None,
    heads: str | None = None,
    precision: str = "float16",
    documents: int = DOCUMENTS,
    device: str = "cpu",
    quiet: bool = False,
) -> Path:
    """Writes the page of a target given by name or file, as the command line asks: `heads` is a list with commas, what
    happens is said on stderr. Returns the file. Raises FraError.
    """
    from fra.targets.target import load_target

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    files.check_writable(output)
    names = None if heads is None else [name.strip() for name in heads.split(",") if name.strip()]
    options: dict[str, Any] = {"precision": precision, "documents": documents, "progress": say}
    explore(load_target(target, device=device), text, layer=layer, heads=names, output=output, **options)
    return output


def main(argv: list[str] | None = None) -> int:
    """Write the page: 0, or 2 with one sentence on stderr."""
    print_anything()
    parser = argparse.ArgumentParser(
        prog="python -m fra.explorer", description="One page that explores feature-resolved attention on a text."
    )
    parser.add_argument("target", metavar="TARGET", help="a preset or a target file")
    parser.add_argument("--text", required=True, help="the text to look at")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layer", type=int, help="all heads of this layer")
    which.add_argument("--heads", metavar="L1H4,...", help="these heads, of one layer")
    parser.add_argument("-o", "--output", metavar="FILE.html", type=Path, required=True)
    parser.add_argument("--precision", choices=get_args(Precision), default="float16")
    parser.add_argument(
        "--documents", type=int, default=DOCUMENTS, help="how many of the target's texts to look through for examples"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quiet", action="store_true")
    options = vars(parser.parse_args(argv))
    try:
        file = run(**options)
    except FraError as error:
        print(f"fra.explorer: {error}", file=sys.stderr)
        return 2
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0
