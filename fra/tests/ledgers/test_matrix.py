"""Many ledgers side by side: as a matrix, a table, a page, and through the command."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest

from fra import compare
from fra.errors import FraError
from fra.ledgers.matrix import matrix, named, pairs
from fra.report.compared import SIDE, render, scatters
from fra.tests.ledgers.test_compare import changed, two_rows
from fra.tests.verdicts.test_claim import GOOD, evidence
from fra.verdicts import ledger as ledgers
from fra.verdicts.frames import COLUMNS
from fra.verdicts.ledger import Ledger


def of_target(ledger: Ledger, name: str) -> Ledger:
    rows = [row.model_copy(update={"target": name}) for row in ledger.verdicts]
    header = ledger.header.model_copy(update={"target": name})
    return ledger.model_copy(update={"header": header, "verdicts": rows})


def three() -> list[Ledger]:
    one = two_rows()
    return [one, changed(one, 0, verdict="INCONCLUSIVE"), of_target(changed(one, 1, verdict="SUPPORTED"), "other")]


def test_a_frame_has_a_row_a_verdict_and_the_ledgers_numbers() -> None:
    one = changed(two_rows(), 0, effect=None, n=None)
    found = one.to_frame()
    assert tuple(found.columns) == COLUMNS
    assert found["verdict"].tolist() == [row.verdict for row in one.verdicts]
    assert found["layer"].tolist() == [0, 0] and str(found["layer"].dtype) == "Int64"
    assert math.isnan(found["effect"][0]) and found["effect"][1] == one.verdicts[1].effect
    assert pd.isna(found["n"][0]) and found["n"][1] == one.verdicts[1].n
    assert found["power"][1] == one.verdicts[1].detail["power"]
    empty = one.model_copy(update={"verdicts": []}).to_frame()
    assert tuple(empty.columns) == COLUMNS and not len(empty)


def test_the_matrix_counts_the_rows_of_every_claim_and_ledger() -> None:
    many = three()
    claim = many[0].verdicts[0].claim
    more = many[0].verdicts[0].model_copy(update={"claim": "ZZ", "digest": "f" * 64, "head": None})
    many[1] = many[1].model_copy(update={"verdicts": [*many[1].verdicts, more]})
    names = named(many, ["a", "b", "c"])
    assert names == ("tiny (a)", "tiny (b)", "other")
    assert named(many, ["a", "a", "c"]) == ("tiny (a)", "tiny (a) #2", "other")
    found = matrix(many, names)
    assert [line.claim for line in found.lines] == [claim, "ZZ"]
    words = [[row.verdict for row in ledger.verdicts if row.claim == claim] for ledger in many]
    for cell, own in zip(found.lines[0].cells, words, strict=True):
        assert cell is not None
        assert dict(cell.counts) == {word: own.count(word) for word in own}
        yes, no = own.count("SUPPORTED"), own.count("REFUTED")
        assert cell.share == (yes / (yes + no) if yes + no else None)
    assert [cell is None for cell in found.lines[1].cells] == [True, False, True]
    frame = found.to_frame()
    assert frame.loc[0, "tiny (a) SUPPORTED"] == words[0].count("SUPPORTED")
    assert pd.isna(frame.loc[1, "other SUPPORTED"]) and frame.loc[1, "tiny (b) REFUTED"] == 0
    assert not found.lines[0].changed
    many[2] = changed(many[2], 0, digest="e" * 64)
    assert matrix(many, names).lines[0].changed


def test_effects_are_paired_where_they_are_of_one_thing() -> None:
    one = two_rows()
    assert [(a.head, b.head) for a, b in pairs(one, one)] == [("L0H1", "L0H1"), ("L0H2", "L0H2")]
    assert len(list(pairs(one, changed(one, 0, effect=None)))) == 1
    assert len(list(pairs(one, changed(one, 0, digest="e" * 64)))) == 1
    assert not list(pairs(one, of_target(one, "other"))), "a head of another target is another thing"
    family = changed(one, 0, head=None)
    ((a, b),) = pairs(family, of_target(family, "other"))
    assert a.head is b.head is None


def test_a_scatter_has_one_scale_and_cuts_what_lies_far_out() -> None:
    one = two_rows()
    (row, _) = one.verdicts
    other = changed(one, 0, effect=row.effect + 0.25, high=1e9, low=None)
    found = [point for scatter in scatters(one, other) for point in scatter.points]
    assert len(found) == 2
    same = next(point for point in found if "L0H2" in point.said)
    moved = next(point for point in found if "L0H1" in point.said)
    assert same.x + same.y == pytest.approx(SIDE, abs=0.2), "on the diagonal"
    assert moved.x + moved.y < SIDE - 1, "above it: the other's effect is larger"
    assert 0 < moved.y_high < moved.y < moved.y_low < SIDE
    assert not any(point.turned for point in found)


def test_the_page_shows_every_cell_loads_nothing_and_lets_only_its_script_run() -> None:
    many = three()
    sneaky = many[0].header.model_copy(update={"target": "<script>alert(1)</script>"})
    many[0] = many[0].model_copy(update={"header": sneaky})
    names = named(many, ["a", "b", "c"])
    page = render(matrix(many, names), many, ["a.json", "b.json", "c.json"], {"mini": ["a <b> line"]})
    assert page.count("<script>") == 1 and "&lt;script&gt;alert" in page
    assert "a &lt;b&gt; line" in page
    assert not re.search(r"(src|href)=", page)
    assert page.count("<td data-order=") == 3 * len(matrix(many, names).lines)
    assert re.search(r"default-src 'none'.*script-src 'sha256-", page)


def test_the_command_reads_many_and_writes_what_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{name}.json" for name in "abc"]
    for path, ledger in zip(paths, three(), strict=True):
        ledgers.write(ledger, path)
    outputs = [tmp_path / f"out.{kind}" for kind in ("html", "csv", "parquet")]
    assert compare.run(paths, outputs=outputs) == 0
    said = capsys.readouterr().out
    assert "tiny (a)" in said and "other" in said and "tiny (a) -> tiny (b)" in said and "another target" in said
    assert "INCONCLUSIVE" in said
    frames = [pd.read_csv(outputs[1]), pd.read_parquet(outputs[2])]
    pd.testing.assert_frame_equal(*frames, check_dtype=False)
    assert "heat" in outputs[0].read_text()
    assert compare.run(paths, expect_equal=True) == 1
    assert compare.run([paths[0], paths[0], paths[0]], expect_equal=True) == 0
    capsys.readouterr()
    wide = list(compare.table(matrix([two_rows()] * 30, [f"target-number-{k}" for k in range(30)]), 80))
    assert max(map(len, wide)) <= 80 and sum(line.count("target-number-") for line in wide) == 30
    with pytest.raises(FraError, match="there is one ledger to compare"):
        compare.run(paths[:1])
    with pytest.raises(FraError, match=r"is none of \.html, \.csv, \.parquet"):
        compare.run(paths, outputs=[tmp_path / "out.xlsx"])


def test_a_turned_verdict_comes_with_its_numbers_in_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = two_rows()
    word = "REFUTED" if one.verdicts[0].verdict != "REFUTED" else "SUPPORTED"
    for name, ledger in (("a", one), ("b", changed(one, 0, verdict=word, effect=0.125))):
        ledgers.write(ledger, tmp_path / f"{name}.json")
    compare.run([tmp_path / "a.json", tmp_path / "b.json"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith(
        f"verdict: {one.verdicts[0].verdict} -> {word} (effect {one.verdicts[0].effect:.4g} -> 0.125)"
    )


def test_another_schema_is_refused_by_name(tmp_path: Path) -> None:
    ledgers.write(two_rows(), tmp_path / "a.json")
    (tmp_path / "b.json").write_text((tmp_path / "a.json").read_text().replace('{"schema": 1', '{"schema": 2', 1))
    with pytest.raises(FraError, match=r"b\.json has the schema '2'; this fra reads schema 1"):
        compare.run([tmp_path / "a.json", tmp_path / "b.json"])
    assert evidence((GOOD,)), "the rows are real ones"
