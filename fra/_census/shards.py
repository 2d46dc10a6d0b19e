"""A census in shards, taken apart from each other and put together: what a part says of itself, which parts make a
whole, and how their files become one.

A census keeps the live entries of its documents and adds nothing up, so that there is nothing to round when parts meet:
a shard observes consecutive batches of the plan that one run would have, and the whole is its parts in that order. It
is one run's to the bit, for any number of shards, where each process has as many threads on the same kind of device
as the one run (matrix products depend on both). The price is that parts are as large as what they saw: 8 bytes a live
entry.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor

from fra._census.corpus import FORMAT, look_into, read, whole_file
from fra._census.follow import Followed
from fra.errors import FraError

_LIBRARIES = ("fra", "torch", "transformer_lens", "sae_lens", "transformers")
_DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.int32: "I32", torch.float32: "F32"}
"""Of the tensors of a census, in safetensors' words; wider ones come first in a file, so that all are aligned."""
_NAMED = 8
"""Parts that an error names, at most."""

_TENSORS = {"number", "length", "n_offsets", "offset", "per_row", "feature", "value"}

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Which shard a census is, and of what."""

    number: int
    """From 1 to `of`."""
    of: int
    n_documents: int
    """Of the whole, as everything below."""
    n_batches: int
    longest: int
    """Tokens of the longest document."""
    documents: str
    """sha256 of the tokens and stripes of all documents, in order."""
    versions: Mapping[str, str]
    """Of the libraries, and the kind of device."""

    def __str__(self) -> str:
        return f"shard {self.number}/{self.of}"

    def about(self) -> dict[str, object]:
        """As it stands in a file."""
        return asdict(self)

    @classmethod
    def of_about(cls, about: Any) -> Shard | None:
        """The inverse; None of what is no shard. Raises FraError for one that another version wrote."""
        if about is None:
            return None
        kinds = {"documents": str, "versions": dict}
        names = {field.name: kinds.get(field.name, int) for field in fields(cls)}
        fits = isinstance(about, dict) and about.keys() == names.keys()
        if not fits or any(type(about[name]) is not kind for name, kind in names.items()):
            raise FraError("it is a shard that another version of fra wrote: take it anew.")
        check_shard((about["number"], about["of"]))
        return cls(**about)


def check_shard(shard: Any) -> tuple[int, int]:
    """Number and count of a shard. Raises FraError for what is none."""
    fits = isinstance(shard, (tuple, list)) and len(shard) == 2 and all(type(part) is int for part in shard)
    if not fits or not 1 <= shard[0] <= shard[1]:
        raise FraError(f"shard={shard!r} is no shard: give (k, n), the k-th of n with 1 <= k <= n.")
    return shard[0], shard[1]


def cut(batches: Sequence[T], number: int, of: int) -> list[T]:
    """The batches of one shard: consecutive, as many as of any other or one more; perhaps none."""
    n = len(batches)
    return list(batches[n * (number - 1) // of : n * number // of])


def versions(device: torch.device) -> dict[str, str]:
    """What the bits of a part depend on beside weights and documents, as far as it has a name; without local versions,
    which name the build.
    """
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in _LIBRARIES}
    return {**found, "device": device.type}


class Described(NamedTuple):
    """A part by its header alone."""

    name: str
    """What errors call it."""
    shard: Shard
    of: Mapping[str, object]
    """What it is a census of, its place among the shards aside: the same for all of one whole."""


def described(name: str, about: Mapping[str, object]) -> Described:
    """The part that a header describes. Raises FraError for a census that is no shard."""
    try:
        shard = Shard.of_about(about.get("shard"))
    except FraError as error:
        raise FraError(f"{name} cannot be merged: {error}") from error
    if shard is None:
        raise FraError(f"{name} is a whole census and no shard: leave it out (Census.merge joins whole ones).")
    whole = {key: value for key, value in shard.about().items() if key not in ("number", "of")}
    same = {key: value for key, value in about.items() if key != "shard"}
    return Described(name, shard, {**same, **whole})


_SAID = {
    "fingerprint": "weights, dictionary, layer or precision",
    "documents": "documents or stripes",
    "n_documents": "documents",
    "n_batches": "documents or versions",
    "longest": "documents",
    "heads": "heads",
    "reduces": "reductions",
    "versions": "library versions or device",
    "follow": "followed channels",
}


def in_order(parts: Sequence[Described]) -> list[int]:
    """Places of the parts in the order of the whole. Raises FraError, naming parts, where they are not of one whole, or
    some of it are missing or there twice.
    """
    first, found = parts[0], dict[int, int]()
    for at, part in enumerate(parts):
        if part.shard.of != first.shard.of:
            raise FraError(
                f"{first.name} is {first.shard} and {part.name} is {part.shard}: give the shards of one division."
            )
        if said := other_than(first, part):
            raise FraError(f"{first.name} and {part.name} are of other {said}: take one of them anew.")
        if part.shard.number in found:
            twice = parts[found[part.shard.number]].name
            raise FraError(f"{part.shard} is there twice ({twice} and {part.name}): leave one out.")
        found[part.shard.number] = at
    missing = [number for number in range(1, first.shard.of + 1) if number not in found]
    if missing:
        names = ", ".join(f"{number}/{first.shard.of}" for number in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise FraError(f"shards are missing: {names}{more}; take them, then merge.")
    return [found[number] for number in sorted(found)]


def other_than(one: Described, other: Described) -> str | None:
    """What two parts are not of alike, in words; None where they are of one census."""
    for key in dict.fromkeys([*one.of, *other.of]):
        a, b = one.of.get(key), other.of.get(key)
        if a != b:
            return _SAID.get(key, key) + (f" ({_differ(a, b)})" if key == "versions" else "")
    return None


def _differ(one: object, other: object) -> str:
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return f"{one} and {other}"
    keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
    return ", ".join(f"{key} {one.get(key)} and {other.get(key)}" for key in keys)


class _Header(NamedTuple):
    described: Described
    path: Path
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    about: Mapping[str, object]


def read_header(path: Path) -> tuple[dict[str, object], dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """What a census in a file is of, and the shapes of its tensors; none of them is read. Raises FraError for what is
    no census.
    """
    kinds = {kind: dtype for dtype, kind in _DTYPES.items()}

    def look(file: Any) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        return {name: (kinds.get(one.get_dtype()), tuple(one.get_shape())) for name, one in slices.items()}

    about, shapes = look_into(path, look)
    known = {name: (dtype, shape) for name, (dtype, shape) in shapes.items() if dtype is not None}
    if len(known) < len(shapes) or not known.keys() >= _TENSORS:
        raise FraError(f"the census {path} is damaged (its tensors are none of a census): take it anew.")
    return about, known


def merge_files(paths: Sequence[str | Path], output: str | Path) -> int:
    """Joins the files of all shards of a census, given in any order, into the file that one run would have saved;
    complete or absent. Returns its number of documents.

    No model is loaded, and of the parts one is in memory at a time (of the others some 6 kB each). Raises FraError,
    naming files, where parts are missing, there twice, damaged, or not of one census.
    """
    if not paths:
        raise FraError("there are no parts to merge: name the files of all shards.")
    headers = []
    for path in map(Path, paths):
        about, shapes = read_header(path)
        headers.append(_Header(described(str(path), about), path, shapes, about))
    ordered = [headers[at] for at in in_order([header.described for header in headers])]
    if not any(header.shapes["feature"][1][0] for header in ordered):
        raise FraError("no feature of the dictionary is live on any position (L0 is zero): wrong weights or hook.")
    about = {key: value for key, value in ordered[0].about.items() if key not in ("shard", "follow")}
    followed, frames = _followed(ordered), {}
    for name, (dtype, shape) in ordered[0].shapes.items():
        along = _along(name)
        if along is not None:
            total = sum(header.shapes[name][1][along] for header in ordered)
            frames[name] = dtype, (*shape[:along], total, *shape[along + 1 :])
    frames |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in followed.items()}
    with whole_file(Path(output)) as unfinished, unfinished.open("wb") as file:
        starts = _begin(file, frames, about)
        for name, tensor in followed.items():
            file.seek(starts[name])
            file.write(tensor.contiguous().numpy().tobytes())
        _copy(file, ordered, frames, starts)
    return ordered[0].described.shard.n_documents


def _along(name: str) -> int | None:
    """The dimension in which parts are joined; None for what is joined otherwise."""
    return None if name.startswith("follow_") else 1 if name.startswith("gain") else 0


def _begin(
    file: BinaryIO, frames: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], about: Mapping[str, object]
) -> dict[str, int]:
    """Writes the header of a safetensors file and makes the file as long as it will be; where each tensor begins.

    The library's own writer wants all tensors in memory.
    """
    ranks = list(_DTYPES)
    header: dict[str, object] = {
        "__metadata__": {"format": FORMAT, "about": json.dumps(about, sort_keys=True)},
    }
    starts, at = {}, 0
    for name in sorted(frames, key=lambda name: (ranks.index(frames[name][0]), name)):
        dtype, shape = frames[name]
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        starts[name] = at
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + at)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def _copy(
    file: BinaryIO,
    ordered: Sequence[_Header],
    frames: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    starts: Mapping[str, int],
) -> None:
    """Puts the tensors of every part into their places. Raises FraError for parts that are damaged, or that together
    are not all documents once.
    """
    seen = torch.zeros(ordered[0].described.shard.n_documents, dtype=torch.bool)
    done = dict.fromkeys(starts, 0)
    for header in ordered:
        corpus, about, _ = read(header.path)
        tensors, number = corpus.tensors(), corpus.number
        if about != header.about or any(tuple(tensors[name].shape) != header.shapes[name][1] for name in tensors):
            raise FraError(f"{header.path} changed while it was merged: merge again.")
        fits = not len(number) or (int(number.min()) >= 0 and int(number.max()) < len(seen))
        if not fits or bool(seen[number].any()) or len(torch.unique(number)) < len(number):
            raise FraError(f"{header.path} holds documents of other shards: take it anew.")
        seen[number] = True
        for name, tensor in tensors.items():
            along, wide = _along(name), frames[name][1]
            assert along is not None
            rows = [tensor] if along == 0 else list(tensor)
            one = torch.Size(wide[along + 1 :]).numel() * tensor.dtype.itemsize
            for row, values in enumerate(rows):
                file.seek(starts[name] + (row * wide[along] + done[name]) * one)
                file.write(values.contiguous().numpy().tobytes())
            done[name] += tensor.shape[along]
    if not bool(seen.all()):
        raise FraError(
            f"document {int((~seen).nonzero()[0])} is in none of the shards: one of them is damaged, take them anew."
        )


def _followed(ordered: Sequence[_Header]) -> dict[str, Tensor]:
    """What all parts hold of followed channels, to be saved; nothing where none were followed."""
    found: Followed | None = None
    for own in _each_followed(ordered):
        if found is not None and not found.same(own):
            raise FraError("the shards follow other channels, or other numbers of examples: take them anew.")
        found = own if found is None else found.merge(own)
    return {} if found is None else found.tensors()


def _each_followed(ordered: Sequence[_Header]) -> Iterator[Followed]:
    for header in ordered:
        if "follow_channels" in header.shapes and (own := Followed.of_tensors(read(header.path)[2])) is not None:
            yield own
