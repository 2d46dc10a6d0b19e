"""Two ledgers compared: by hand-made rows, and through the command as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fra.compare import main
from fra.ledgers.compare import ABSENT, differences, inputs
from fra.tests.verdicts.test_claim import BAD, GOOD, evidence
from fra.tests.verdicts.test_ledger import make_ledger
from fra.verdicts import ledger as ledgers
from fra.verdicts.ledger import Ledger


def two_rows() -> Ledger:
    return make_ledger(evidence((GOOD,), head="L0H1"), evidence((BAD,), head="L0H2", power=0.9))


def changed(ledger: Ledger, number: int, **values: object) -> Ledger:
    rows = list(ledger.verdicts)
    rows[number] = rows[number].model_copy(update=values)
    return ledger.model_copy(update={"verdicts": rows})


def test_the_same_run_at_another_time_is_equal() -> None:
    one = two_rows()
    later = one.model_copy(update={"header": one.header.model_copy(update={"seconds": 1e6, "commit": "other"})})
    assert differences(one, later) == []


def test_what_differs_is_named_with_both_values() -> None:
    one = two_rows()
    row = one.verdicts[0]
    (found,) = differences(one, changed(one, 0, effect=-1.0))
    assert (found.claim, found.head, found.where, found.one, found.other) == (
        row.claim,
        row.head,
        "effect",
        row.effect,
        -1.0,
    )
    detail = json.loads(json.dumps(row.detail)) | {"curve": [1, 2.0, "x"]}
    with_curve = changed(one, 0, detail=detail)
    (inside,) = differences(with_curve, changed(one, 0, detail=detail | {"curve": [1, 2.5, "x"]}))
    assert (inside.where, inside.one, inside.other) == ("detail.curve[1]", 2.0, 2.5)


def test_what_was_not_measured_alike_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def note(sha: str, source: str) -> ledgers.DictionaryNote:
        shown = {"hook": "blocks.0.hook_resid_pre", "role": "dictionary", "d_sae": 8, "l0": 2.0}
        return ledgers.DictionaryNote(**shown, source=source, sha256=sha * 64, explained_variance=0.5)

    text = ledgers.TextNote(documents="text", n_documents=9, n_sources=3, sha256="c" * 64, first_tokens=["a"])
    one = two_rows()
    header = one.header.model_copy(update={"dictionaries": [note("a", "saes/x")], "text": text})
    moved = header.model_copy(update={"dictionaries": [note("a", "elsewhere/x")]})
    other = header.model_copy(
        update={
            "dictionaries": [note("b", "saes/x"), note("d", "saes/y")],
            "text": text.model_copy(update={"sha256": "e" * 64, "n_sources": 4}),
        }
    )
    for name, own in (("one", header), ("moved", moved), ("other", other), ("old", one.header)):
        ledgers.write(one.model_copy(update={"header": own}), tmp_path / f"{name}.json")
    for name in ("moved", "old"):
        assert main([str(tmp_path / "one.json"), str(tmp_path / f"{name}.json"), "--expect-equal"]) == 0
        assert "not measured alike" not in capsys.readouterr().out
    assert main([str(tmp_path / "one.json"), str(tmp_path / "other.json"), "--expect-equal"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "not measured alike: dictionary at blocks.0.hook_resid_pre: saes/x (sha256 aaaaaaaaaaaa) -> "
        "saes/x (sha256 bbbbbbbbbbbb)",
        "not measured alike: dictionary at blocks.0.hook_resid_pre: none -> saes/y (sha256 dddddddddddd)",
        "not measured alike: text: text, 9 documents of 3 sources (sha256 cccccccccccc) -> "
        "text, 9 documents of 4 sources (sha256 eeeeeeeeeeee)",
    ]


def test_how_dictionaries_fit_is_compared_where_both_ledgers_say_it() -> None:
    def run(**fit: float) -> ledgers.Ledger:
        shown = {"hook": "blocks.0.hook_resid_pre", "role": "dictionary", "d_sae": 8, "l0": 2.0}
        said = {"source": "saes/x", "sha256": "a" * 64, "explained_variance": 0.5, **fit}
        note = ledgers.DictionaryNote.model_validate(shown | said)
        return (one := two_rows()).model_copy(update={"header": one.header.model_copy(update={"dictionaries": [note]})})

    at = "dictionary at blocks.0.hook_resid_pre"
    assert inputs(run(loss_recovered=0.9), run(loss_recovered=0.7)) == [f"{at}: loss recovered 0.900 -> 0.700"]
    assert inputs(run(), run(explained_variance=0.4, loss_recovered=0.7)) == [
        f"{at}: explained variance 0.500 -> 0.400"
    ]
    assert inputs(run(loss_recovered=0.9), run(loss_recovered=0.9049)) == [], "rounding of another device"


def test_a_row_of_one_ledger_alone_is_a_difference() -> None:
    one = two_rows()
    less = one.model_copy(update={"verdicts": one.verdicts[1:]})
    (gone,) = differences(one, less)
    (come,) = differences(less, one)
    assert (gone.one, gone.other) == (one.verdicts[0].verdict, ABSENT)
    assert (come.one, come.other) == (ABSENT, one.verdicts[0].verdict)


@pytest.mark.parametrize(("tolerance", "equal"), [(0.0, False), (1e-12, True)])
def test_tolerance_is_relative_and_for_numbers_alone(tolerance: float, equal: bool) -> None:
    one = changed(two_rows(), 0, effect=1000.0)
    nearly = changed(one, 0, effect=1000.0 * (1 + 1e-13))
    assert (differences(one, nearly, tolerance) == []) is equal
    assert differences(one, changed(one, 0, effect=None), 0.5), "null is no number"


def test_the_command_says_what_turned_and_exits_as_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = two_rows()
    paths = tmp_path / "a.json", tmp_path / "b.json"
    word = "REFUTED" if one.verdicts[0].verdict != "REFUTED" else "SUPPORTED"
    for path, ledger in zip(paths, (one, changed(one, 0, verdict=word)), strict=True):
        ledgers.write(ledger, path)
    names = [str(path) for path in paths]
    assert main([names[0], names[0], "--expect-equal"]) == 0
    assert main(names) == 0
    assert main([*names, "--expect-equal"]) == 1
    said = capsys.readouterr().out
    assert f"verdict: {one.verdicts[0].verdict} -> {word}" in said
    assert "1 differ, 1 in their verdict" in said
    assert main([names[0], str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    assert main([*names, "--tolerance", "2"]) == 2
