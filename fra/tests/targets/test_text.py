"""The text of a target: which sources documents have, how one file is cut, and what is said of too little or repeated
text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from fra.errors import FraError
from fra.targets.documents import Document, read_documents
from fra.targets.file import TextTable
from fra.targets.remarks import different, fewest_sources, remarks
from fra.tests.tiny_targets import one_sentence, write_text


def prose(seed: int, words: int = 60) -> str:
    """Text of its own: made-up words, other ones for each seed."""
    chance = random.Random(seed)
    return " ".join("".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(words))


def read(folder: Path, documents: str = "text", **keys: str) -> list[Document]:
    return read_documents("mine", TextTable(documents=documents, **keys), folder / documents)


def sources(documents: list[Document]) -> dict[str, str]:
    return {document.name: document.source for document in documents}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_text(tmp_path / "text", {name: prose(k) for k, name in enumerate(("court-1", "court-2", "sea-1", "lone"))})
    return tmp_path


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, ["court", "court", "lone", "sea"]),
        ("name", ["court", "court", "lone", "sea"]),
        ("document", ["court-1", "court-2", "lone", "sea-1"]),
        ("^[a-z]", ["c", "c", "l", "s"]),
        ("([a-z]+?)(t?)(-|$)", ["cour", "cour", "lone", "sea"]),
        ("-.|n.$", ["-1", "-2", "ne", "-1"]),
    ],
)
def test_sources_are_as_the_target_says(home: Path, said: str | None, expected: list[str]) -> None:
    keys = {} if said is None else {"sources": said}
    assert [document.source for document in read(home, **keys)] == expected


def test_folders_are_sources(home: Path) -> None:
    for folder in ("a", "b/deep"):
        write_text(home / "text" / folder, {"x-1": prose(7), "y": prose(8)})
    assert len(read(home)) == 4, "what lies in folders is read where these are sources, and only there"
    with pytest.raises(FraError, match=r"'court-1' of 'mine' lies in no folder"):
        read(home, sources="folder")
    for file in (home / "text").glob("*.txt"):
        file.unlink()
    found = sources(read(home, sources="folder"))
    assert found == {"a/x-1": "a", "a/y": "a", "b/deep/x-1": "b/deep", "b/deep/y": "b/deep"}
    with pytest.raises(FraError, match=r"holds no \.txt file, but its folders do \(text.sources = \"folder\""):
        read(home)


def test_a_pattern_that_finds_nothing_names_the_document(home: Path) -> None:
    with pytest.raises(FraError, match=r"'documents'.*'court-1'") as caught:
        read(home, sources="documents")
    one_sentence(caught.value)
    with pytest.raises(FraError, match="'lone'"):  # an empty match is no source
        read(home, sources="[0-9]*$")
    with pytest.raises(ValueError, match="no regular expression"):
        TextTable(documents="text", sources="(")


def test_one_file_is_cut_into_pieces_that_lose_nothing(tmp_path: Path) -> None:
    paragraphs = [prose(k, words) for k, words in enumerate((50, 900, 3, 20, 400, 700))]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = read(tmp_path, "book.txt")
    assert {document.source for document in found} == {"book"}
    assert all(document.text for document in found)
    assert 1000 <= max(len(document.text) for document in found) <= 4000
    assert len(found) > 4
    joined = " ".join(document.text for document in found).split()
    assert joined == " ".join(paragraphs).split(), "cut between words, nothing twice and nothing lost"
    assert len(set(sources(read(tmp_path, "book.txt", sources="document")).values())) == len(found)


def test_texts_of_one_file_stand_between_separators(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("<|end|>".join(["one\n", " two ", "", "three"]))
    found = read(tmp_path, "all.txt", separator="<|end|>")
    assert [document.text for document in found] == ["one", "two", "three"]
    assert sources(found) == {name: name for name in ("all-1", "all-2", "all-3")}
    with pytest.raises(FraError, match="does not divide"):
        read(tmp_path, "all.txt", separator="<end>")


def test_keys_that_do_not_go_together(home: Path) -> None:
    for keys, word in (({"separator": "x"}, "cuts one file"), ({"split": "test"}, "of data sets")):
        with pytest.raises(FraError, match=word):
            read(home, **keys)
    with pytest.raises(FraError, match=r"text.sources.*data set 'texts'.*if a folder was meant"):
        read(home, "texts", sources="folder")


def test_a_byte_order_mark_is_no_text(home: Path) -> None:
    (home / "text/lone.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert next(d.text for d in read(home) if d.name == "lone") == "hello"


def test_one_large_file_is_many_documents_and_what_they_count_as_is_said(tmp_path: Path) -> None:
    """A file of a megabyte: enough documents for every claim, in its order; what they count as is said."""
    (tmp_path / "book.txt").write_text("\n\n".join(prose(k, 100) for k in range(1800)))
    assert (tmp_path / "book.txt").stat().st_size > 10**6
    found = read(tmp_path, "book.txt")
    assert len(found) > 400
    assert [document.name for document in found] == sorted(document.name for document in found)
    (said,) = remarks("mine", found, None, cut=True)
    for words in (
        f"{len(found)} documents of 1 independent source",
        "pieces of one file, numbered by their position in it ('book-001' first)",
        "text.separator",
        'text.sources = "document"',
    ):
        assert words in said
    one_sentence(FraError(said))
    assert remarks("mine", read(tmp_path, "book.txt", sources="document"), "document", cut=True) == []


# What is said of the text


def named(texts: Mapping[str, str]) -> list[Document]:
    return [Document(name, name.rpartition("-")[0] or name, text) for name, text in texts.items()]


def test_good_text_needs_no_remark() -> None:
    assert remarks("mine", named({f"t{k}": prose(k) for k in range(fewest_sources())}), None) == []


def test_numbered_files_are_one_source_and_that_is_said() -> None:
    documents = named({f"doc-{k:03d}": prose(k) for k in range(300)})
    (said,) = remarks("mine", documents, None)
    for words in (
        "300 documents of 1 independent source,",
        "fewer than 40",
        "the 300 of 'doc'",
        'text.sources = "document"',
    ):
        assert words in said
    (said,) = remarks("mine", named({f"t{k}": prose(k) for k in range(39)}), "document")
    assert said.endswith("fewer than 40: add text.")


def test_forty_is_what_the_tests_of_claims_need() -> None:
    from fra.statistics.unseen import floor_of

    assert float(floor_of(fewest_sources())) <= 0.05 < float(floor_of(fewest_sources() - 1))


def test_repeated_text_is_said() -> None:
    texts = {f"t{k}": prose(k) for k in range(60)}
    texts |= {f"again{k}": prose(k)[:-5].upper() + " and so on" for k in range(7)}
    texts |= {"copy-2": prose(3)}
    (said,) = remarks("mine", named(texts), "name")
    assert said.startswith("8 of the 68 documents of 'mine' begin nearly as")
    assert "('again0' as 't0')" in said
    assert different([prose(1), prose(2), prose(1) + "!"]) == [0, 1, 0]
    one_source = [Document(f"d{k}", "s", prose(0)) for k in range(2)] + named({f"t{k}": prose(k) for k in range(1, 41)})
    assert remarks("mine", one_source, "x") == [], "documents of one source are counted once as it is"


def test_likeness_is_that_of_the_whole_sets() -> None:
    """The sketch against the share of common pieces, counted in full, around the half at which texts count as alike."""
    for changed, alike in ((4, True), (12, True), (45, False), (60, False)):
        one = prose(5).split()
        other = prose(6).split()[:changed] + one[changed:]
        sets = [{" ".join(w)[k : k + 6] for k in range(594)} for w in (one, other)]
        share = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert (share > 0.5) is alike
        assert (different([" ".join(one), " ".join(other)]) == [0, 0]) is alike


def test_documents_that_are_one_text_are_refused() -> None:
    with pytest.raises(FraError, match="80 documents of 'mine' all begin with the same text") as caught:
        remarks("mine", named({f"t{k}": f"This is document {k} of eighty." for k in range(80)}), None)
    one_sentence(caught.value)


def test_ten_documents_are_too_few_and_what_to_do_is_said() -> None:
    (said,) = remarks("mine", named({f"t{k}": prose(k) for k in range(10)}), None)
    assert said == (
        "'mine' has 10 documents of 10 independent sources, and a test that resamples sources can decide nothing with "
        "fewer than 40: add text."
    )


def test_short_documents_are_said() -> None:
    texts = {f"t{k}": prose(k) for k in range(50)} | {"tiny": "a few words"}
    (said,) = remarks("mine", named(texts), None)
    assert re.match(r"1 of the 51 documents of 'mine' are shorter than 80 characters \(first 'tiny'\)", said)
