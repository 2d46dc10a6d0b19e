"""What a census keeps of its documents: the live entries, and little else.

Every reduction over channels is a function of these, so that two corpora merge by concatenation, exactly, and a census
that was interrupted goes on where it stood.
"""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fra.errors import FraError

FORMAT = "fra-census/1"
_OPTIONAL = ("gain_q", "gain_k", "inputs")
T = TypeVar("T")
_ON_CPU = ("number", "length", "n_offsets", "offset")


@dataclass(frozen=True)
class Corpus:
    """Live entries of documents that stand one after another, in rows (positions) and entries; nothing is padded.

    8 bytes an entry in float32 (int32 feature, value), 4 a position; with a QK-norm 8 more for each head and position,
    and where attention patterns are needed 4 * d_model a position.
    """

    number: Int[Tensor, " docs"]
    """Each document's number as it was given."""
    length: Int[Tensor, " docs"]
    n_offsets: Int[Tensor, " docs"]
    offset: Int[Tensor, " offsets"]
    """The stripes t - s of each document, `n_offsets` of them each. These four stay on the CPU."""
    per_row: Int[Tensor, " rows"]
    """Live features of each position."""
    feature: Int[Tensor, " entries"]
    value: Float[Tensor, " entries"]
    """The code times the dictionary's gain, over the norm's scale."""
    gain_q: Float[Tensor, "n_heads rows"] | None
    gain_k: Float[Tensor, "n_heads rows"] | None
    """The QK-norm's gains; None without one."""
    inputs: Float[Tensor, "rows d_model"] | None
    """The attention input, from which patterns are computed anew; None where no reduction needs them."""

    @property
    def device(self) -> torch.device:
        """Where entries are."""
        return self.value.device

    def to(self, device: torch.device) -> Corpus:
        """The same with entries on another device."""
        moved = {k: v if k in _ON_CPU else v.to(device) for k, v in self.tensors().items()}
        return Corpus(**{field.name: moved.get(field.name) for field in fields(self)})  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is there, by name."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    @cached_property
    def row_start(self) -> list[int]:
        """First row of each document, and the end."""
        return [0, *self.length.cumsum(0).tolist()]

    @cached_property
    def entry_start(self) -> Int[Tensor, " rows_and_end"]:
        """First entry of each row, and the end, on the CPU: loops look bounds up without asking the device."""
        return torch.cat((torch.zeros(1, dtype=torch.long), self.per_row.cpu().long().cumsum(0)))

    @cached_property
    def stripes(self) -> list[list[int]]:
        """Offsets of each document."""
        ends = [0, *self.n_offsets.cumsum(0).tolist()]
        offsets = self.offset.tolist()
        return [offsets[low:high] for low, high in pairwise(ends)]

    @cached_property
    def live(self) -> Int[Tensor, " live"]:
        """Ids of the features that are live anywhere, ascending."""
        live: Tensor = torch.unique(self.feature).long()
        return live

    @cached_property
    def signed(self) -> bool:
        """Whether some value is negative."""
        return len(self.value) > 0 and bool(self.value.min() < 0)

    def parts(self, rows: int) -> Iterator[Part]:
        """Consecutive documents, at most `rows` padded positions at a time (at least one document)."""
        lengths = self.length.tolist()
        first, longest = 0, 0
        for doc, length in enumerate(lengths):
            if doc > first and (doc + 1 - first) * max(longest, length) > rows:
                yield Part(self, first, doc)
                first, longest = doc, 0
            longest = max(longest, length)
        if lengths:
            yield Part(self, first, len(lengths))


class Part:
    """Some consecutive documents of a corpus: their entries, and where they stand when padded to one length."""

    def __init__(self, corpus: Corpus, first: int, stop: int):
        self.corpus, self.first, self.stop = corpus, first, stop
        self.rows = slice(corpus.row_start[first], corpus.row_start[stop])
        bounds = corpus.entry_start
        self.entries = slice(int(bounds[self.rows.start]), int(bounds[self.rows.stop]))
        self.n_docs = stop - first
        self.n_pos = int(corpus.length[first:stop].max())

    @cached_property
    def row_doc(self) -> Int[Tensor, " rows"]:
        """Document of each row, counted within the part."""
        length = self.corpus.length[self.first : self.stop]
        return torch.arange(self.n_docs).repeat_interleave(length).to(self.corpus.device)

    @cached_property
    def row_pos(self) -> Int[Tensor, " rows"]:
        """Position of each row in its document."""
        starts = torch.tensor(self.corpus.row_start[self.first : self.stop], device=self.corpus.device)
        return torch.arange(self.rows.start, self.rows.stop, device=self.corpus.device) - starts[self.row_doc]

    @cached_property
    def entry_row(self) -> Int[Tensor, " entries"]:
        """Row of each entry, counted within the part."""
        per_row = self.corpus.per_row[self.rows].long()
        n = self.entries.stop - self.entries.start
        rows = torch.arange(len(per_row), device=per_row.device)
        return torch.repeat_interleave(rows, per_row, output_size=n)

    @cached_property
    def padded_row(self) -> Int[Tensor, " entries"]:
        """doc * n_pos + pos of each entry."""
        return (self.row_doc * self.n_pos + self.row_pos)[self.entry_row]

    @property
    def stripes(self) -> list[list[int]]:
        """Offsets of each document."""
        return self.corpus.stripes[self.first : self.stop]

    @property
    def feature(self) -> Int[Tensor, " entries"]:
        """Feature ids of the entries."""
        return self.corpus.feature[self.entries].long()

    def coefficient(self, gain: Float[Tensor, "n_heads rows"] | None, head: int | None) -> Float[Tensor, " entries"]:
        """Values times one head's QK-norm gain, where there is one."""
        value = self.corpus.value[self.entries]
        return value if gain is None else value * gain[head, self.rows][self.entry_row]

    def on_stripe(self) -> Float[Tensor, "docs pos pos"]:
        """1 where t - s is one of the document's offsets."""
        marks = torch.zeros(self.n_docs, self.n_pos, self.n_pos, dtype=self.corpus.value.dtype)
        for doc, offsets in enumerate(self.stripes):
            for offset in offsets:
                marks[doc].diagonal(-offset).fill_(1.0)
        return marks.to(self.corpus.device)


def concatenate(corpora: Sequence[Corpus], *, renumber: bool) -> Corpus:
    """One corpus of all documents in turn. `renumber`: numbers go on from one corpus to the next, else they stay."""
    joined: dict[str, Tensor | None] = {}
    for field in fields(Corpus):
        parts = [getattr(corpus, field.name) for corpus in corpora]
        along = 1 if field.name.startswith("gain") else 0
        joined[field.name] = None if parts[0] is None else torch.cat(parts, dim=along)
    if renumber:
        sizes = [len(corpus.number) for corpus in corpora]
        shifts = [sum(sizes[:i]) for i in range(len(sizes))]
        numbers = [corpus.number + shift for corpus, shift in zip(corpora, shifts, strict=True)]
        joined["number"] = torch.cat(numbers)
    return Corpus(**joined)  # type: ignore[arg-type]


def write(corpus: Corpus, path: Path, about: dict[str, object], more: Mapping[str, Tensor] | None = None) -> None:
    """One safetensors file with `about` as JSON in its header; complete or absent, whatever interrupts. more: tensors
    beside those of the corpus. Raises FraError where it cannot be written: no room, no right, a file for a folder.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in {**corpus.tensors(), **(more or {})}.items()}
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={"format": FORMAT, "about": json.dumps(about, sort_keys=True)})


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name in the same folder, which becomes `path` where the block ends well and is gone where it does not.
    Several processes, on several machines, may write one file: the last one's is there, whole. A link is followed and
    stays one, and a file that is there keeps its mode. Raises FraError where it cannot be written, and for a device or
    a pipe, in whose place a file would be put.
    """
    try:
        path = Path(os.path.realpath(path))
        other = path.exists() and not path.is_file()
    except (OSError, ValueError) as error:  # too long a name, and one with a null character
        raise _unwritable(path, error) from error
    if other:
        raise FraError(f"the census cannot be written to {path}, which is no regular file: name one.")
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        if path.exists():
            unfinished.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _unwritable(path: Path, error: Exception) -> FraError:
    return FraError(
        f"the census cannot be written to {str(path)!r} ({getattr(error, 'strerror', None) or error}): give a place "
        "with room that can be written to."
    )


_TRIED = 20
"""Times that a file is looked at which others replace meanwhile."""


def look_into(path: Path, look: Callable[[Any], T]) -> tuple[dict[str, object], T]:
    """What a census in a file is of, and what `look` finds in the open file. Raises FraError for what is no census."""
    for _ in range(_TRIED):
        before, failed = _state(path), None
        try:
            with safe_open(path, framework="pt") as file:
                metadata, found = file.metadata() or {}, None
                if metadata.get("format") == FORMAT:
                    found = look(file)
        except (OSError, RuntimeError, SafetensorError) as error:
            failed = error
        # The library opens a file twice: between, another process may have put its own in this place.
        if _state(path) == before:
            break
    if failed is not None:
        raise FraError(f"the census {path} cannot be read ({failed}): give a file that Census.save wrote.") from failed
    if found is None:
        raise FraError(f"{path} is no census ({FORMAT}): give a file that Census.save wrote.")
    try:
        about = json.loads(metadata["about"])
    except (KeyError, ValueError):
        about = None
    if not isinstance(about, dict):
        raise FraError(f"the census {path} is damaged (its header is none of a census): give one that is whole.")
    return about, found


def _state(path: Path) -> tuple[int, int, int] | None:
    with suppress(OSError, ValueError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


def read(path: Path) -> tuple[Corpus, dict[str, object], dict[str, Tensor]]:
    """The inverse of `write`: corpus, `about` and all tensors. Raises FraError for anything else, and for a damaged
    file.
    """
    # Copies are aligned as other tensors are, on which the last bits of a matrix product depend.
    about, tensors = look_into(path, lambda file: {name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118  (no mapping)
    try:
        if any(field.name not in tensors and field.name not in _OPTIONAL for field in fields(Corpus)):
            raise KeyError
        corpus = Corpus(**{f.name: tensors.get(f.name) for f in fields(Corpus)})  # type: ignore[arg-type]
        whole = (
            int(corpus.length.sum()) == len(corpus.per_row)
            and int(corpus.per_row.sum()) == len(corpus.feature) == len(corpus.value)
            and len(corpus.number) == len(corpus.length) == len(corpus.n_offsets)
            and int(corpus.n_offsets.sum()) == len(corpus.offset)
        )
    except (KeyError, ValueError):
        whole = False
    if not whole:
        raise FraError(f"the census {path} is damaged (its parts do not fit each other): give one that is whole.")
    return corpus, about, tensors
