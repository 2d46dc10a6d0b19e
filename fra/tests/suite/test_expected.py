"""`python -m fixtures.expected`: what was expected of a target against what came out."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest

from fra.tests.verdicts.test_claim import BAD, GOOD, OPEN, evidence
from fra.tests.verdicts.test_ledger import make_ledger
from fra.verdicts.ledger import write

expected = importlib.import_module("fixtures.expected")  # a test of the suite, from within the library

ROOT = Path(__file__).parents[3]


def file_of(folder: Path, *rows: tuple[str, str]) -> Path:
    path = folder / "expected.toml"
    path.write_text("".join(f'[[expected]]\nclaim = "{c}"\nverdict = "{v}"\nwhy = "so"\n' for c, v in rows))
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    found = make_ledger(evidence((GOOD,), head="L0H0"), evidence((GOOD,), head="L0H1"), evidence((BAD,), head="L0H2"))
    write(found, tmp_path / "ledger.json")
    return tmp_path / "ledger.json"


def claim_of(ledger: Path) -> str:
    return expected.read(ledger).verdicts[0].claim


@pytest.mark.parametrize(("verdict", "word"), [("SUPPORTED", "hit"), ("REFUTED", "miss"), ("INCONCLUSIVE", "miss")])
def test_the_commonest_verdict_is_the_one_expected(
    ledger: Path, tmp_path: Path, capsys, verdict: str, word: str
) -> None:
    file = file_of(tmp_path, (claim_of(ledger), verdict), ("X99", "REFUTED"))
    assert expected.main([str(file), str(ledger)]) == 0
    said = capsys.readouterr().out
    assert f"| {verdict} | {word} | SUPPORTED 2, REFUTED 1 |" in said
    assert "1 of 2 not measured" in said and "| X99 | REFUTED | not measured |" in said


def test_a_tie_is_a_miss() -> None:
    rows = make_ledger(evidence((GOOD,), head="L0H0"), evidence((OPEN,), head="L0H1")).verdicts
    word, counts = expected.outcome(expected.Expected(claim=rows[0].claim, verdict="SUPPORTED", why=""), rows)
    assert word == "miss" and sum(counts.values()) == 2


def test_a_row_in_two_ledgers_and_a_claim_twice_are_refused(ledger: Path, tmp_path: Path, capsys) -> None:
    file = file_of(tmp_path, (claim_of(ledger), "SUPPORTED"))
    assert expected.main([str(file), str(ledger), str(ledger)]) == 2
    assert "is in two of the ledgers" in capsys.readouterr().err
    assert expected.main([str(file_of(tmp_path, ("X01", "REFUTED"), ("X01", "REFUTED"))), str(ledger)]) == 2
    assert "expects X01 twice" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "expected = 3", "[[expected]]\nclaim = 'Q01'\n", "[["])
def test_a_file_that_holds_none_is_refused(tmp_path: Path, ledger: Path, capsys, text: str) -> None:
    (tmp_path / "none.toml").write_text(text)
    assert expected.main([str(tmp_path / "none.toml"), str(ledger)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_registered_claim_is_expected_of_smollm2() -> None:
    named = {row.claim for row in expected.read_expected(ROOT / "fixtures/smollm2/expected.toml")}
    assert named == set(tomllib.loads((ROOT / "claims/registered.toml").read_text()))
