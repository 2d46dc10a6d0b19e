"""Text that is a data set of the hub, with its split and column: the `datasets` library itself, on a data set that lies
in a folder as one of the hub does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fra.errors import FraError
from fra.targets.documents import Document, read_documents
from fra.targets.file import TextTable
from fra.tests.tiny_targets import one_sentence

NAME = "owner/songs"
ROWS = {
    "train": [{"text": f"train text {k}", "lyrics": f"train song {k}"} for k in range(3)],
    "validation": [{"text": f"held out {k}", "lyrics": f"held song {k}"} for k in range(2)],
}
ROWS["validation"].append({"text": " ", "lyrics": ""})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of that name where the library looks before it asks the hub; the target file lies elsewhere."""
    folder = tmp_path / "here" / NAME
    folder.mkdir(parents=True)
    for split, rows in ROWS.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "target"


def read(home: Path, documents: str = NAME, **keys: str) -> list[Document]:
    return read_documents("mine", TextTable(documents=documents, **keys), home / documents)


def test_split_and_column_are_those_of_the_target_file(home: Path) -> None:
    assert [document.text for document in read(home)] == [f"train text {k}" for k in range(3)]
    found = read(home, split="validation", column="lyrics")
    assert [document.text for document in found] == ["held song 0", "held song 1"], "an empty text is left out"
    assert [(document.name, document.source) for document in found] == [(f"songs.{k}", f"songs.{k}") for k in range(2)]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"split": "test"}, ("owner/songs", "test", "text.split")),
        ({"column": "words"}, ("has no column 'words'", "lyrics", "text.column")),
        ({"separator": "x"}, ("text.separator", "data set")),
    ],
)
def test_what_the_data_set_does_not_have_is_said(home: Path, keys: dict[str, str], words: tuple[str, ...]) -> None:
    with pytest.raises(FraError) as caught:
        read(home, **keys)
    said = one_sentence(caught.value)
    for word in words:
        assert word in said, said
