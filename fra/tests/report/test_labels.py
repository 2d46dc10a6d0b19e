"""Labels of features: every form of file that people have, and one sentence for what is none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fra.errors import FraError
from fra.report import labels

# As Neuronpedia's "explanation/export" answers, and as its batches of explanations are written (JSON lines, gzipped).
EXPORT = [
    {"modelId": "gpt2-small", "layer": "6-att-kk", "index": "12", "description": " words of <b>law</b>\n"},
    {"modelId": "gpt2-small", "layer": "6-att-kk", "index": "12", "description": "a second explanation"},
    {"modelId": "gpt2-small", "layer": "6-att-kk", "index": 3, "description": "semicolons"},
    {"modelId": "gpt2-small", "layer": "6-att-kk", "index": "4", "description": ""},
]  # fmt: skip
WANTED = {12: "words of <b>law</b>", 3: "semicolons"}
FORMS = {
    "export.json": json.dumps(EXPORT).encode(),
    "wrapped.json": json.dumps({"explanations": EXPORT, "explanationsCount": 4}).encode(),
    "batch-0.jsonl.gz": gzip.compress("\n".join(json.dumps(record) for record in EXPORT).encode()),
    "own.json": json.dumps({"12": "words of <b>law</b>", "3": "semicolons"}).encode(),
    "records.json": json.dumps(
        [{"feature": 12, "label": "words of <b>law</b>"}, {"feature": 3, "label": "semicolons"}]
    ).encode(),
    "own.csv": b"feature,label\n12,words of <b>law</b>\n3,semicolons\n",
    "excel.csv": "\ufefffeature,label\r\n12,words of <b>law</b>\r\n3,semicolons\r\n".encode(),
    "index.csv": b"index,description\n12,words of <b>law</b>\n3,semicolons\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_labels(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(FORMS[name])
    assert labels.read(file, 20, "gpt2-small/6-att-kk") == WANTED


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"12;words\n", "neither JSON nor CSV with the header feature,label"),
        (b"", "neither JSON nor CSV"),
        (b'{"12": ', "no JSON"),
        (b"[1, 2]", "no list of labels"),
        (b'{"twelve": "words"}', "entry 1 of the labels"),
        (b'{"12": 7}', "entry 1 of the labels"),
        (b"feature,label\n-1,x\n", "no feature number"),
        (b"feature,label\n20,x\n", "feature 20, and the dictionary has 20 features"),
        (b"feature,label\n", "hold no label"),
        (b"feature,label\n1,\xff\n", "not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (
            json.dumps([EXPORT[0] | {"layer": "5-att-kk"}]).encode(),
            "are of 'gpt2-small/5-att-kk' and the dictionary is",
        ),
    ],
)
def test_what_is_no_labels_is_one_sentence(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "labels"
    file.write_bytes(content)
    with pytest.raises(FraError) as caught:
        labels.read(file, 20, "gpt2-small/6-att-kk")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FraError, match="cannot be read: No such file"):
        labels.read(tmp_path / "none.csv", 20)
