"""The text of a target: a folder of .txt files, or a data set of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fra.errors import FraError

_DATASET_DOCUMENTS = 400


@dataclass(frozen=True)
class Document:
    """One text of a target."""

    name: str
    source: str
    """Documents of one source are one cluster when documents are resampled: the name up to its last hyphen."""
    text: str


def read_documents(target: str, given: str, folder: Path) -> list[Document]:
    """What a target's `text.documents` (`given`; as a path, `folder`) names, by name.

    Raises FraError, naming the target, for a folder without text, an empty text, or one that is not UTF-8.
    """
    if folder.is_dir():
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise FraError(f"the text of {target!r} is empty: {folder} holds no .txt file.")
        return [_document(file) for file in files]
    if given.startswith((".", "/", "~")) or folder.exists():
        raise FraError(f"the text of {target!r} is missing: text.documents names {folder}, which is no directory.")
    from fra.targets.hub import dataset_texts

    texts = dataset_texts(given, _DATASET_DOCUMENTS)
    if not texts:
        raise FraError(f"the dataset {given!r} holds no text: use another as text.documents.")
    names = [f"{given.rsplit('/', 1)[-1]}.{number}" for number in range(len(texts))]
    return [Document(name, name, text) for name, text in zip(names, texts, strict=True)]


def _document(file: Path) -> Document:
    try:
        text = file.read_text(encoding="utf-8-sig")  # without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise FraError(f"the document {file} cannot be read as UTF-8 text ({error}).") from error
    if not text.strip():
        raise FraError(f"the document {file} is empty: write text into it or remove it.")
    return Document(file.stem, file.stem.rpartition("-")[0] or file.stem, text)
