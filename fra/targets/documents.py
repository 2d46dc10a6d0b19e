"""The text of a target: a folder of .txt files, one file of many texts, or a data set of the hub; and which source each
document comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fra.errors import FraError

if TYPE_CHECKING:
    from fra.targets.file import TextTable

_DATASET_DOCUMENTS = 400
_PIECE = 2000
"""Characters of a piece of a file that is cut, about: more than the 128 tokens that most claims read of a document."""


@dataclass(frozen=True)
class Document:
    """One text of a target."""

    name: str
    source: str
    """Documents of one source are one cluster when documents are resampled: as `text.sources` says, else the name up to
    its last hyphen.
    """
    text: str


def read_documents(target: str, table: TextTable, folder: Path) -> list[Document]:
    """What the `[text]` of a target names (`folder`: its `documents` as a path), by name.

    Raises FraError, naming the target, for a folder without text, an empty text, one that is not UTF-8, and sources
    that cannot be told as the target says.
    """
    if folder.is_dir() or folder.is_file():
        _local_alone(target, table)
        parts = _of_file(target, table, folder) if folder.is_file() else _of_folder(target, table, folder)
        return [Document(name, _source(target, table, name), text) for name, text in parts]
    if table.documents.startswith((".", "/", "~")) or folder.exists():
        raise FraError(f"the text of {target!r} is missing: text.documents names {folder}, which is no directory.")
    return _of_dataset(target, table, folder)


def _local_alone(target: str, table: TextTable) -> None:
    for key in ("split", "column"):
        if getattr(table, key) is not None:
            raise FraError(f"text.{key} of {target!r} is of data sets, and text.documents is none: remove it.")


def _of_folder(target: str, table: TextTable, folder: Path) -> Iterator[tuple[str, str]]:
    """The files by name: those of the folder itself, or, where sources are folders, all beneath it."""
    if table.separator is not None:
        raise FraError(f"text.separator of {target!r} cuts one file, and text.documents is a folder: remove it.")
    below = sorted(folder.rglob("*.txt"))
    files = below if table.sources == "folder" else sorted(folder.glob("*.txt"))
    if not files:
        deeper = f', but its folders do (text.sources = "folder" reads these): {below[0]}' if below else ""
        raise FraError(f"the text of {target!r} is empty: {folder} holds no .txt file{deeper}.")
    for file in files:
        yield file.relative_to(folder).with_suffix("").as_posix(), _read(file)


def _of_file(target: str, table: TextTable, file: Path) -> Iterator[tuple[str, str]]:
    """The texts of one file: between separators, else pieces of whole paragraphs."""
    if file.suffix != ".txt":
        raise FraError(f"the text of {target!r} is {file}: give a .txt file, or the directory that holds them.")
    whole = _read(file)
    texts = whole.split(table.separator) if table.separator is not None else list(_pieces(whole))
    kept = [text.strip() for text in texts if text.strip()]
    if table.separator is not None and len(kept) < 2:
        raise FraError(f"text.separator of {target!r} ({table.separator!r}) does not divide {file}: correct it.")
    width = len(str(len(kept)))
    for number, text in enumerate(kept, start=1):
        yield f"{file.stem}-{number:0{width}d}", text


def _pieces(text: str) -> Iterator[str]:
    """A long text cut at the ends of paragraphs, and where a paragraph is longer than a piece, between words."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", text):
        for start in range(0, len(paragraph), _PIECE):
            part = paragraph[start : start + _PIECE]
            piece += ("\n\n" if start == 0 and piece else "") + part
            if len(piece) < _PIECE:
                continue
            cut = len(piece) if start + _PIECE >= len(paragraph) else max(piece.rfind(" "), _PIECE // 2)
            yield piece[:cut]
            piece = piece[cut:]
    yield piece


def _of_dataset(target: str, table: TextTable, folder: Path) -> list[Document]:
    from fra.checkpoints.hub import dataset_texts

    given = table.documents
    if table.separator is not None or table.sources not in (None, "document"):
        key = "separator" if table.separator is not None else "sources"
        raise FraError(
            f"text.{key} of {target!r} does not go with the data set {given!r}, each text of which is a source: remove "
            f"it{'' if '/' in given else ', or correct text.documents if a folder was meant'}."
        )
    try:
        texts = dataset_texts(given, _DATASET_DOCUMENTS, table.split or "train", table.column or "text")
    except FraError as error:
        if "/" in given:
            raise
        # A folder's name that is misspelt reads as a data set's.
        raise FraError(f"the text of {target!r} is missing: there is no directory {folder}, and {error}") from error
    if not texts:
        raise FraError(f"the dataset {given!r} holds no text: use another as text.documents.")
    names = [f"{given.rsplit('/', 1)[-1]}.{number}" for number in range(len(texts))]
    return [Document(name, name, text) for name, text in zip(names, texts, strict=True)]


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")  # without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise FraError(f"the document {file} cannot be read as UTF-8 text ({error}).") from error
    if not text.strip():
        raise FraError(f"the document {file} is empty: write text into it or remove it.")
    return text


def _source(target: str, table: TextTable, name: str) -> str:
    """The source of a document, from its name (relative to the folder of text, without .txt)."""
    match table.sources:
        case None if table.separator is not None:
            return name
        case None | "name":
            return name.rpartition("-")[0] or name
        case "document":
            return name
        case "folder":
            if "/" in name:
                return name.rpartition("/")[0]
            raise FraError(
                f'the document {name!r} of {target!r} lies in no folder, and text.sources = "folder" says that folders '
                "are sources: put it into one."
            )
        case pattern:
            found = re.search(pattern, name)
            source = found and (found[1] if found.re.groups and found[1] is not None else found[0])
            if source:
                return str(source)
            raise FraError(
                f"text.sources of {target!r} is the pattern {pattern!r}, which finds no source in the document's name "
                f'{name!r}: correct it, or say "document", "folder" or "name".'
            )
