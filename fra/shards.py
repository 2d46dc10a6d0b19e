"""A census as a file: `fra census`. What a target and its text make of it, in one process or in shards that know
nothing of each other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fra._census.census import gather, prepare
from fra._census.job import CensusReduce
from fra._census.result import about_of
from fra._census.shards import check_shard, described, merge_files, other_than, read_header
from fra.errors import FraError
from fra.verdicts.files import check_writable
from fra.workers.cluster import parse_workers

Say = Callable[[str], None]
EVERY = 256
"""Documents between two savings of what a run has seen."""


def run(
    target: str,
    layer: int,
    output: Path,
    *,
    heads: str | None = None,
    reduces: str = "sum",
    stripes: str | None = None,
    documents: Path | None = None,
    longest: int | None = None,
    shard: str | None = None,
    workers: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    say: Say = lambda _: None,
) -> None:
    """Takes the census of a target's layer, or one shard of it, and writes it to `output`, whole or not at all.

    heads: numbers or names with commas between. stripes: offsets likewise, for every document as far as it is long
    enough, or a JSON file with a list of offsets for each document. documents: a folder of .txt files or one such file
    in place of the target's text; longest: tokens of each at most. shard: "K/N". workers: processes of Ray that see the
    documents, "auto" or a number; the file is that of this process on one thread. What was seen before an interruption
    is kept beside `output` and gone on with; a shard that is there already is not taken again.

    Raises FraError as `load_target` and `fra.census` do, for options that are none, and where `output` is a shard of
    something else or another process is at work on it.
    """
    from fra.targets.target import load_target

    which = None if shard is None else parse_shard(shard)
    asked = parse_reduces(reduces)
    crew = parse_workers(workers)
    check_writable(output)
    if crew is not None:
        torch.set_num_threads(1)  # as each worker has: the last bits of what this process computes depend on it, too
    loaded = load_target(target, device=device, dtype=dtype)
    _, sae = loaded.dictionary_for(layer)
    tokens = [loaded.tokens(text, longest) for text in _texts(loaded, documents)]
    offsets = None if stripes is None else parse_stripes(stripes, tokens)
    with torch.no_grad():
        planned = prepare(loaded.model, sae, tokens, layer, parse_heads(heads, layer), asked, offsets, shard=which)
        n = len(planned.order)
        where = f"{planned.shard}: " if planned.shard is not None else ""
        if planned.shard is not None and output.exists():
            there = described(str(output), read_header(output)[0])
            about = about_of(planned.observer.fingerprint(), planned.heads, planned.reduces, None, planned.shard)
            mine = described("this shard", about)
            other = other_than(there, mine)
            if other or (there.shard.number, there.shard.of) != (mine.shard.number, mine.shard.of):
                what = f"of other {other}" if other else f"{there.shard} and not {mine.shard}"
                raise FraError(f"{output} is there and is {what}: delete it, or write to another file.")
            say(f"{where}{output} is there already")
            return
        going = output.with_name(f".{output.name}.going")
        say(f"{where}{n} of {len(tokens)} documents of {sum(map(len, tokens))} tokens, {len(planned.batches)} passes")
        found = gather(planned, going, EVERY, progress=_progress(say, where, n), workers=crew, say=say)
    found.save(output)
    shutil.rmtree(going, ignore_errors=True)
    say(f"{where}wrote {output}: {found.n_documents} documents, {found.n_entries} live entries")


def merge(parts: Sequence[Path], output: Path, say: Say = lambda _: None) -> None:
    """Joins the files of all shards into one census. Raises FraError, naming files, where they make no whole."""
    check_writable(output)
    n = merge_files(parts, output)
    say(f"wrote {output}: {n} documents of {len(parts)} shards")


def _progress(say: Say, where: str, n: int) -> Callable[[int], None]:
    """Says how far a run is, in steps of a tenth."""
    told = 0

    def seen(done: int) -> None:
        nonlocal told
        if done * 10 // n > told:
            told = done * 10 // n
            say(f"{where}{done} of {n} documents")

    return seen


def _texts(loaded: Any, documents: Path | None) -> list[str]:
    from fra.targets.documents import read_documents
    from fra.targets.file import TextTable

    if documents is None:
        return [document.text for document in loaded.documents()]
    if not documents.exists():
        raise FraError(f"there are no documents at {documents}: name a folder of .txt files, or one such file.")
    table = TextTable(documents=str(documents), sources="document")
    return [document.text for document in read_documents(loaded.name, table, documents)]


def parse_shard(text: str) -> tuple[int, int]:
    """Number and count of "K/N". Raises FraError for anything else."""
    try:
        number, of = (int(part) for part in text.split("/"))
        return check_shard((number, of))
    except (ValueError, FraError) as error:
        raise FraError(f"--shard {text} is no shard: say K/N, the K-th of N, from 1/N to N/N.") from error


def parse_reduces(text: str) -> tuple[CensusReduce, ...]:
    """Reductions with commas between. Raises FraError for one that there is not."""
    known: dict[str, CensusReduce] = {name: name for name in get_args(CensusReduce)}
    names = [part.strip() for part in text.split(",")]
    wrong = [name for name in names if name not in known]
    if wrong:
        raise FraError(f"--reduce {wrong[0]!r} is unknown: choose of {', '.join(known)}.")
    return tuple(known[name] for name in dict.fromkeys(names))


def parse_heads(text: str | None, layer: int) -> list[int] | None:
    """Heads by number or name ("L1H3"), with commas between; None for all. Raises FraError for what is no head, and for
    one of another layer.
    """
    from fra.architectures.known import place_of

    if text is None:
        return None
    return [place_of(layer, int(part) if part.strip().isdigit() else part.strip())[1] for part in text.split(",")]


def parse_stripes(text: str, documents: Sequence[Tensor]) -> list[list[int]]:
    """The offsets of each document: numbers with commas between, of every document those that it is long enough for;
    or a JSON file with a number or list a document. Raises FraError for anything else.
    """
    try:
        if not text.endswith(".json"):
            every = [int(part) for part in text.split(",")]
            if min(every) < 0:
                raise ValueError
            return [[offset for offset in every if offset < len(tokens)] for tokens in documents]
        found = json.loads(Path(text).read_bytes())
        lists = [[one] if isinstance(one, int) else list(one) for one in found]
    except OSError as error:
        raise FraError(f"--stripes {text} cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError) as error:
        raise FraError(
            f"--stripes {text} is none: say offsets t - s, as 20,21, or a JSON file with a list of them a document."
        ) from error
    if any(type(offset) is not int for offsets in lists for offset in offsets):
        raise FraError(f"--stripes {text} holds what is no whole number: give offsets t - s.")
    return lists
