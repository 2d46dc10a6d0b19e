"""`python -m fixtures.known`: a run's refutations become what the next run expects."""

from __future__ import annotations

import dataclasses
import importlib
import tomllib

from fra.tests.suites import CLAIM_FILE, FAMILY_FILE, suite
from fra.tests.verdicts.test_claim import GOOD, OPEN, evidence
from fra.tests.verdicts.test_ledger import make_ledger

known = importlib.import_module("fixtures.known")  # a test of the suite, from within the library

table = importlib.import_module("fixtures.table")

__all__ = ["suite"]


def test_what_a_run_refutes_is_expected_by_the_next_and_other_targets_stay(suite) -> None:
    quiet = CLAIM_FILE.replace('if head == "L0H6":', "if False:")
    suite.claims(heads=quiet, family=FAMILY_FILE)
    suite.write(
        "claims/known.toml",
        '[[known]]\nclaim = "T01"\ntarget = "another"\nhead = "L7H7"\nreason = "by hand"\n'
        '[[known]]\nclaim = "T01"\ntarget = "tiny"\nhead = "L0H0"\nreason = "was so once"\n',
    )
    suite.run("--ledger", "ledger.json", ret=1)
    file = suite.path / "claims/known.toml"
    assert known.main([str(suite.path / "ledger.json"), "-o", str(file)]) == 0
    rows = tomllib.loads(file.read_text())["known"]
    assert [(r["target"], r["claim"], r.get("head")) for r in rows] == [
        ("another", "T01", "L7H7"),
        ("tiny", "T01", "L0H1"),
        ("tiny", "T01", "L0H2"),
    ]
    assert rows[0]["reason"] == "by hand"
    assert "effect 0 " in rows[1]["reason"]
    suite.run("--ledger", "again.json", ret=0)
    once = file.read_text()
    assert known.main([str(suite.path / "again.json"), "-o", str(file)]) == 0
    assert file.read_text() == once


def test_a_part_of_a_run_writes_nothing(suite, capsys) -> None:
    suite.claims(heads=CLAIM_FILE)
    suite.run("--ledger", "part.json", "-k", "H1")
    assert known.main([str(suite.path / "part.json"), "-o", str(suite.path / "claims/known.toml")]) == 2
    assert "is a part of a run" in capsys.readouterr().err
    assert not (suite.path / "claims/known.toml").exists()
    assert known.main([str(suite.path / "part.json")]) == 0
    assert "[[known]]" in capsys.readouterr().out


def test_an_undecided_row_says_first_what_would_decide() -> None:
    ledger = make_ledger(
        evidence((dataclasses.replace(OPEN, needed=130),), head="L0H0"),
        evidence((dataclasses.replace(GOOD, needed=130),), head="L0H1"),
    )
    for lines in (list(table.show(ledger, width=100, colour=False)), list(table.verdicts(ledger))):
        undecided, supported = (next(line for line in lines if head in line) for head in ("L0H0", "L0H1"))
        assert "about 130 sources would" in undecided
        assert "130" not in supported


def test_accepted_refutations_are_expected_by_the_next_run_and_what_is_overturned_stays(suite) -> None:
    suite.claims(heads=CLAIM_FILE.replace('if head == "L0H6":', "if False:"))
    before = '# by hand\n[[known]]\nclaim = "T01"\ntarget = "tiny"\nhead = ["L0H2", "L0H3"]\nreason = "looked dead"\n'
    suite.write("claims/known.toml", before)
    file = suite.path / "claims/known.toml"
    result = suite.run("--accept-known", "-k", "not L0H7", ret=1)
    result.stdout.fnmatch_lines(["known.toml: 1 refutations added (T01 L0H1); read them*"])
    assert file.read_text().startswith(before.rstrip()), "what was written by hand stays, word for word"
    _, added = tomllib.loads(file.read_text())["known"]
    assert (added["claim"], added["target"], added["head"]) == ("T01", "tiny", "L0H1")
    assert "effect 0 " in added["reason"]
    again = suite.run("--accept-known", ret=1)  # L0H3 is supported all the same
    again.stdout.fnmatch_lines(["known.toml: no refutation that it does not know"])
    assert "OVERTURNED" in again.stdout.str()
    suite.write("claims/known.toml", file.read_text().replace(', "L0H3"', ""))
    suite.run(ret=0)


def test_every_head_is_a_star_and_a_row_of_a_head_comes_first(suite) -> None:
    suite.claims(heads=CLAIM_FILE.replace('if head == "L0H6":', "if False:"))
    star = '[[known]]\nclaim = "T01"\ntarget = "tiny"\nhead = "*"\nreason = "everywhere"\n'
    suite.write("claims/known.toml", star + star.replace('"*"', '"L0H1"').replace("everywhere", "here"))
    result = suite.run("--ledger", "ledger.json", ret=1)
    details = {row["head"]: row["detail"] for row in suite.rows()}
    assert (details["L0H1"]["known"], details["L0H2"]["known"]) == ("here", "everywhere")
    assert details["L0H0"]["overturned"] == "everywhere"
    assert "name in that row the heads that are refuted" in result.stdout.str()
    for wrong, says in (
        ('["L0H1", "*"]', "stands alone"),
        ("[]", "names no head"),
        ('["L0H1", "L0H1"]', "recorded twice"),
        ('["L0H9"]', "has no head L0H9"),
    ):
        suite.write("claims/known.toml", star.replace('"*"', wrong))
        suite.refused(says=says)
