"""`fra new-claim`: what it writes runs as it is, and the test that it writes can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fra.commands import app
from fra.errors import FraError
from fra.scaffold import new_claim
from fra.tests.models import build_model
from fra.tests.tiny_targets import NORMALIZED, signed_axes, write_target

ROOT = Path(__file__).resolve().parents[3]
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "and", "make", "more", "than"]


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with a claims folder, and a tiny target."""
    folder = pytester.path
    (folder / "claims").mkdir()
    (folder / "conftest.py").write_bytes((ROOT / "conftest.py").read_bytes())
    pytester.makeini("[pytest]")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    return folder


def test_the_made_files_run_as_they_are(project: Path, pytester: pytest.Pytester) -> None:
    assert app.main(["new-claim", "X02", "Heads look at the first token."]) == 0
    claim, test = project / "claims" / "test_x02.py", project / "tests" / "test_x02_planted.py"
    style = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), str(claim), str(test)]
    checked = subprocess.run([*style, "--ignore", "D103,I001"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    pytester.runpytest_inprocess("tests", "-p", "no:cacheprovider").assert_outcomes(passed=3)

    model = build_model("gpt2", project / "model")
    sae = signed_axes(project / "sae", NORMALIZED)
    (project / "text").mkdir()
    for n in range(60):
        text = " ".join(WORDS[(n + k * (1 + n % 7)) % len(WORDS)] for k in range(12))
        (project / "text" / f"t{n:02d}.txt").write_text(text)
    target = write_target(project, model, {NORMALIZED: sae}, project / "text")
    ran = pytester.runpytest_inprocess("claims", "--target", str(target), "--ledger", "ledger.json", "--device", "cpu")
    rows = json.loads((project / "ledger.json").read_text())["verdicts"]
    words = [row["verdict"] for row in rows]
    assert words[:4] == ["CANNOT_RUN"] * 4 and set(words[4:]) <= {"SUPPORTED", "REFUTED", "INCONCLUSIVE"}, ran.outlines
    assert all(row["n"] == 60 and row["bar"] == 0.5 for row in rows[4:])
    assert json.loads((project / "ledger.json").read_text())["header"]["claims"]["X02"]["title"].startswith("Heads")


def test_the_made_test_notices_a_measure_that_does_not_see_the_effect(project: Path, pytester: pytest.Pytester) -> None:
    claim, _ = new_claim("X02", "Heads look at the first token", Path("claims"), Path("tests"))
    text = claim.read_text()
    assert "scores[:, 0] - row_mean" in text
    claim.write_text(text.replace("scores[:, 0] - row_mean", "scores[:, 1] - row_mean"))
    outcome = pytester.runpytest_inprocess("tests", "-p", "no:cacheprovider")
    assert outcome.parseoutcomes() == {"failed": 2, "passed": 1}, "the planted yes, and the size of the effect"


@pytest.mark.parametrize(
    ("name", "title", "claims", "tests", "said"),
    [
        ("2X", "T", "claims", "tests", "is no claim's id"),
        ("X02", " . ", "claims", "tests", "the title is empty"),
        ("X02", 'a "b"', "claims", "tests", "quotation marks"),
        ("X02", "T" * 91, "claims", "tests", "91 characters"),
        ("X02", "T", "nowhere", "tests", "there is no folder nowhere"),
        ("X02", "T", "claims", "claims/own", "every test is a claim's own"),
        ("X01", "T", "claims", "tests", "is declared by"),
        ("X03", "T", "claims", "tests", "nothing is overwritten"),
    ],
)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, title: str, claims: str, tests: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("claims", "tests"):
        Path(folder).mkdir()
    Path("claims/test_first.py").write_text('CLAIM = Claim(id="X01")')
    Path("tests/test_x03_planted.py").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FraError, match=said):
        new_claim(name, title, Path(claims), Path(tests))
    assert sorted(tmp_path.rglob("*")) == before
