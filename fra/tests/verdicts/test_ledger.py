"""The ledger: what is written is read, and whatever else is read gives one sentence."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fra.claim import Condition, Evidence, judge
from fra.errors import FraError
from fra.report import page as report
from fra.tests.verdicts.test_claim import BAD, CLAIM, GOOD, INF, NAN, evidence, make_claim
from fra.verdicts import files
from fra.verdicts import ledger as ledgers
from fra.verdicts.ledger import Header, Ledger, clean, note_of, row_of

FIELDS = ["claim", "target", "head", "verdict", "effect", "low", "high", "bar", "p", "q", "n", "digest", "detail"]
HEADER = {"target", "model", "versions", "commit", "device", "seed", "started", "seconds"}
TARGET = "tiny"


def make_ledger(*given_: Evidence, **header) -> Ledger:
    standard = {
        "target": TARGET,
        "model": "a model",
        "versions": {"fra": "0.1"},
        "commit": None,
        "device": "cpu",
        "seed": "sha256",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.5,
        "claims": {CLAIM.id: note_of(CLAIM, exploratory=False)},
    }
    rows = [row_of(judge(e.claim, e), TARGET) for e in given_]
    return Ledger(schema=1, header=Header(**(standard | header)), verdicts=rows)


def test_a_ledger_is_written_in_the_schema_of_the_contract(tmp_path):
    file = tmp_path / "ledger.json"
    ledgers.write(make_ledger(evidence((GOOD,), head="L0H1", q=0.02, power=0.9)), file)
    data = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert list(data) == ["schema", "header", "verdicts"]
    assert data["schema"] == 1
    assert data["header"].keys() >= HEADER
    [row] = data["verdicts"]
    assert list(row) == FIELDS
    assert (row["effect"], row["low"], row["high"], row["p"], row["q"], row["n"]) == (2.0, 1.1, None, 0.01, 0.02, 50)
    assert row["digest"] == CLAIM.digest
    assert row["detail"]["power"] == 0.9
    assert row["detail"]["candidates"]["c0"]["effect"]["holds"] is True
    assert ledgers.read(file) == make_ledger(evidence((GOOD,), head="L0H1", q=0.02, power=0.9))


def many() -> Evidence:
    """Two candidates, the second refuted."""
    return replace(evidence((GOOD,)), candidates={"a": (GOOD,), "b": (BAD,)})


def test_candidates_are_written_without_what_is_null_false_or_repeated():
    [row] = make_ledger(many()).verdicts
    first, second = (shown["effect"] for shown in row.detail["candidates"].values())
    assert (first["bar"], first["above"], first["holds"]) == (GOOD.bar, True, True)
    assert not {"high", "fails"} & first.keys(), "null and false are left out"
    assert not {"bar", "above", "holds"} & second.keys(), "the first candidate says the bar and the side"
    assert (second["effect"], second["fails"]) == (BAD.effect, True)
    read = ledgers.candidates_of(ledgers.loads(ledgers.dumps(make_ledger(many()))).verdicts[0])
    numbers = ("effect", "low", "high", "bar", "above", "p", "p_refute", "power", "needed")
    full = clean({name: getattr(BAD, name) for name in numbers}) | {"holds": False, "fails": True}
    assert read["b"]["effect"] == full


def test_a_ledger_that_writes_candidates_in_full_is_read_and_drawn_alike():
    ledger = make_ledger(many())
    data = json.loads(ledgers.dumps(ledger))
    [row] = data["verdicts"]
    for conditions in row["detail"]["candidates"].values():
        null = dict.fromkeys(("effect", "low", "high", "p", "p_refute", "power", "needed"))
        shown = conditions["effect"]
        conditions["effect"] = {**null, "bar": 1.0, "above": True, "holds": False, "fails": False, **shown}
    old = ledgers.loads(json.dumps(data, indent=1))
    assert old == ledger
    assert ledgers.dumps(old) == ledgers.dumps(ledger)
    assert report.render(old) == report.render(ledger)
    del row["detail"]["candidates"]["a"]["effect"]["bar"]
    with pytest.raises(FraError, match="'effect' of the first candidate has no bar"):
        ledgers.loads(json.dumps(data))


def test_a_row_is_a_line():
    text = ledgers.dumps(make_ledger(evidence((GOOD,), head="L0H1"), evidence((BAD,), head="L0H2")))
    assert [line[:30] for line in text.splitlines() if '"head"' in line] == ['{"claim":"T01","target":"tiny"'] * 2


def test_rows_are_sorted_by_claim_layer_and_head_and_a_family_comes_first():
    heads = ["L10H0", "L2H11", "L2H3", None]
    ledger = make_ledger(*(evidence((GOOD,), head=head) for head in heads))
    assert [row.head for row in ledger.verdicts] == [None, "L2H3", "L2H11", "L10H0"]
    with pytest.raises(ValueError, match="two verdicts for T01 at L2H3"):
        make_ledger(evidence((GOOD,), head="L2H3"), evidence((GOOD,), head="L2H3"))


def test_whatever_a_measurement_holds_becomes_json():
    messy = {
        "nan": NAN,
        "inf": np.float32("inf"),
        "int": np.int64(2**40),
        "bool": np.bool_(True),
        "array": np.array([[1.0, NAN]]),
        "tensor": torch.tensor([1.5, INF]),
        "frame": pd.DataFrame({"feature": [3], "effect": [NAN]}),
        "set": {"b", "a"},
        "path": Path("x"),
        5: None,
        "surrogate": "\ud800",
    }
    row = row_of(judge(CLAIM, evidence((GOOD,), detail=messy)), TARGET)
    detail = json.loads(json.dumps(row.detail, allow_nan=False))
    assert detail["nan"] is detail["inf"] is None
    assert (detail["int"], detail["bool"], detail["5"]) == (2**40, True, None)
    assert (detail["array"], detail["tensor"]) == ([[1.0, None]], [1.5, None])
    assert detail["frame"] == [{"feature": 3, "effect": None}]
    assert (detail["set"], detail["path"]) == (["a", "b"], "x")
    detail["surrogate"].encode()


def test_numpy_scalars_in_conditions_and_evidence_end_as_floats():
    condition = Condition(
        "effect", np.float32(2), np.float64(1.5), np.float64(INF), 1.0, np.float64(0.01), np.float32(1)
    )
    row = row_of(judge(CLAIM, evidence((condition,), q=np.float64(0.5), n=np.int64(50))), TARGET)
    assert {type(x) for x in (row.effect, row.low, row.p, row.q)} == {float}
    assert type(row.n) is int
    assert row.high is None


def test_what_json_cannot_hold_is_refused_by_its_key():
    with pytest.raises(FraError, match=r"detail\.a\[1\] holds a object"):
        clean({"a": [1, object()]})
    with pytest.raises(FraError, match="'reason' in detail is the ledger's own"):
        row_of(judge(CLAIM, evidence((GOOD,), detail={"reason": "mine"})), TARGET)


def test_a_write_that_fails_leaves_the_old_ledger_whole(tmp_path, monkeypatch):
    file = tmp_path / "ledger.json"
    file.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FraError, match="No space left"):
        ledgers.write(make_ledger(), file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file], "nothing half-written stays behind"


def test_paths_that_cannot_be_written_are_known_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    files.check_writable(tmp_path / "new" / "folder" / "ledger.json")
    assert not (tmp_path / "new" / "folder" / "ledger.json").exists()
    for path in (tmp_path, tmp_path / "file" / "ledger.json", tmp_path / ("x" * 300)):
        with pytest.raises(FraError, match=r"directory|cannot be written"):
            files.check_writable(path)


def changed(**changes) -> str:
    data = json.loads(ledgers.dumps(make_ledger(evidence((GOOD,)))))
    row = data["verdicts"][0]
    for key, value in changes.items():
        where = data["header"] if key in data["header"] else data if key in data else row
        where[key] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("[]", "an object with schema"),
        ("{}", "has the schema 'None'"),
        (changed(schema=2), "reads schema 1"),
        (changed(schema=True), "reads schema 1"),
        (changed(schema=1.0), "reads schema 1"),
        (changed(verdict="MAYBE"), "verdicts.0.verdict"),
        (changed(effect="2"), "verdicts.0.effect"),
        (changed(effect=True), "verdicts.0.effect"),
        (changed(effect=NAN), "NaN is not a JSON number"),
        (changed(p=2), "verdicts.0.p"),
        (changed(head="1.3"), "verdicts.0.head"),
        (changed(head="L0H99999999"), "verdicts.0.head"),
        (changed(digest="abc"), "verdicts.0.digest"),
        (changed(extra=1), "verdicts.0.extra"),
        (changed(seconds=-1), "header.seconds"),
        (changed(verdicts={}), "verdicts"),
        (changed(detail={"candidates": {"a": 1}}), "verdicts.0.detail"),
        (changed(detail={"reason": 1}), "verdicts.0.detail"),
        (changed(detail={"x": "\ud800"}), "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        (changed(detail={"x": json.loads("[" * 50 + "]" * 50)}), "nested more than"),
        ('{"schema": ' + "1" * 5000 + "}", "is not JSON"),
    ],
)
def test_a_malformed_ledger_gives_one_sentence(text, says, tmp_path):
    file = tmp_path / "ledger.json"
    file.write_text(text)
    with pytest.raises(FraError, match=says) as raised:
        ledgers.read(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["missing.json", ".", "x" * 300, "null\0"])
def test_a_file_that_cannot_be_read_gives_one_sentence(name, tmp_path):
    with pytest.raises(FraError, match="cannot be read"):
        ledgers.read(tmp_path / name)


def test_bytes_that_are_not_text_give_one_sentence():
    with pytest.raises(FraError, match="is not JSON"):
        ledgers.loads(b"\xff\xfe\xfa")


def attempt(build):
    """What `build` makes, or None and the sentence with which it refuses."""
    try:
        return build(), ""
    except FraError as error:
        return None, str(error)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
def test_fuzz_any_bytes_are_a_sentence(raw):
    with pytest.raises(FraError):
        ledgers.loads(raw)


@settings(max_examples=250, deadline=None)
@given(
    key=st.sampled_from([*FIELDS, "target", "versions", "seconds", "claims", "options", "header", "verdicts"]),
    value=anything,
)
def test_fuzz_a_ledger_with_one_value_changed_is_read_and_shown_or_refused(key, value):
    ledger, sentence = attempt(lambda: ledgers.loads(changed(**{key: value})))
    if ledger is None:
        assert "\n" not in sentence
        return
    page = report.render(ledger)
    assert page.startswith("<!doctype html>")
    page.encode()
    assert ledgers.loads(ledgers.dumps(ledger)) == ledger


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=8), anything, max_size=4))
def test_fuzz_any_detail_of_a_measurement_is_kept_and_shown(detail):
    row, sentence = attempt(lambda: row_of(judge(CLAIM, evidence((GOOD,), detail=detail)), TARGET))
    if row is None:
        assert "the ledger's own" in sentence
        return
    ledger = make_ledger().model_copy(update={"verdicts": [row]})
    again = ledgers.loads(ledgers.dumps(ledger))
    assert again.verdicts == [row]
    assert report.render(again) == report.render(ledger)


def test_a_device_stays_a_device_and_a_pipe_a_pipe(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.check_writable(pipe)
    files.write_text("through", pipe)
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    before = os.stat(os.devnull)
    files.write_text("away", Path(os.devnull))
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert os.stat(os.devnull).st_rdev == before.st_rdev


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    files.write_text("new", link)
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "later")
    files.write_text("text", dangling)
    assert (tmp_path / "later").read_text() == "text"
    assert dangling.is_symlink()


def test_a_ledger_of_a_newer_fra_is_refused_by_name():
    data = json.loads(ledgers.dumps(make_ledger(evidence((GOOD,)))))
    data["header"]["versions"]["fra"] = "9.1"
    data["header"]["weather"] = "fine"
    with pytest.raises(FraError, match=r"key 'header.weather', which this fra does not know; fra 9.1 wrote it"):
        ledgers.loads(json.dumps(data))


def test_what_a_newer_fra_writes_is_said_to_be_newer_and_not_to_be_no_ledger():
    data = json.loads(ledgers.dumps(make_ledger(evidence((GOOD,)))))
    data["verdicts"][0]["verdict"] = "PROVEN"
    with pytest.raises(FraError, match=r"is not a ledger: verdicts\.0\.verdict"):
        ledgers.loads(json.dumps(data))
    data["header"]["versions"]["fra"] = "99.0.1"
    with pytest.raises(FraError, match=r"is newer than this fra, .*written by 99\.0\.1 \(verdicts\.0\.verdict"):
        ledgers.loads(json.dumps(data))
    with pytest.raises(FraError, match="reads schema 1: it is newer"):
        ledgers.loads(json.dumps(data | {"schema": 2}))


def test_a_byte_order_mark_is_no_part_of_a_ledger(tmp_path):
    made = make_ledger(evidence((GOOD,)))
    file = tmp_path / "ledger.json"
    file.write_text(ledgers.dumps(made), encoding="utf-8-sig")
    assert file.read_bytes().startswith(b"\xef\xbb\xbf")
    assert ledgers.read(file) == ledgers.loads("\ufeff" + ledgers.dumps(made)) == made


@pytest.mark.parametrize("name", ["known", "power", "exploratory", "reason"])
def test_names_that_the_ledger_keeps_for_itself_are_refused(name):
    with pytest.raises(FraError, match="is the ledger's own"):
        row_of(judge(CLAIM, evidence((GOOD,), detail={name: None})), TARGET)


def test_a_row_holds_the_numbers_of_the_condition_that_decided():
    claim = make_claim(condition="headline", bars={"control": 1.0})
    conditions = (
        Condition("headline", 3.0, 2.5, INF, CLAIM.bar, p=0.01, p_refute=1.0),
        Condition("control", 0.1, -INF, 0.4, CLAIM.bar, p=1.0, p_refute=0.02, power=0.9),
    )
    row = row_of(judge(claim, evidence(conditions, claim=claim)), TARGET)
    assert row.detail["power"] == 0.9
    assert (row.verdict, row.effect, row.low, row.high, row.bar, row.p) == ("REFUTED", 0.1, None, 0.4, CLAIM.bar, 1.0)
    assert (row.detail["decided"], row.detail["met"]) == ("control", "1 of 2")
    page = report.render(make_ledger(evidence(conditions, claim=claim)))
    assert 'control <span class="quiet">1 of 2 met</span>' in page
