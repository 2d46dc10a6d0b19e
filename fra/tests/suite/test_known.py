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
