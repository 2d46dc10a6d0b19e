"""What is wrong with the target ends the run at once and is said once; what is missing for all is said once, too."""

import time

import pytest

from fra.tests.suites import CLAIM_FILE, suite

__all__ = ["suite"]

RAISES = """
    @pytest.fixture(scope="session")
    def shared():
        {what}

    @pytest.fixture(scope="module")
    def evidence(shared):
        return shared
"""


def raising(what: str, claim_id: str) -> str:
    """A claim file whose fixture raises, for all heads."""
    start = CLAIM_FILE.index("    @pytest.fixture")
    end = CLAIM_FILE.index("    def test_heads")
    file = CLAIM_FILE[:start] + RAISES.format(what=what).lstrip("\n") + "\n" + CLAIM_FILE[end:]
    return file.replace('"T01"', f'"{claim_id}"').replace('if head == "L0H6"', "if False")


REFUSED = 'from fixtures.target import TargetRefused; raise TargetRefused("the dictionary is of another model.")'
MISSING = 'from fra.errors import CannotLoad; raise CannotLoad("the model is out of reach.")'
BROKEN = 'raise ZeroDivisionError("in the measurement")'


@pytest.mark.parametrize("args", [(), ("-p", "xdist", "-n", "2", "--dist", "loadfile")])
def test_a_target_that_is_wrong_ends_the_run_with_one_sentence_and_no_ledger(suite, args):
    suite.claims(one=raising(REFUSED, "T01"), two=raising(REFUSED, "T02"))
    result = suite.pytester.runpytest_subprocess("claims", *args, "--ledger", "l.json", timeout=120)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = [line for line in result.stdout.lines + result.stderr.lines if "of another model" in line]
    assert said == ["ERROR: the dictionary is of another model."]
    assert "Traceback" not in result.stdout.str()
    assert not (suite.path / "l.json").exists()


def test_what_is_missing_for_every_head_is_not_read_anew_for_each(suite, monkeypatch):
    rendered = []
    original = pytest.Function._repr_failure_py  # what pytest calls for fixtures

    def counted(self, excinfo, style=None):
        rendered.append(len(excinfo.traceback))
        return original(self, excinfo, style)

    monkeypatch.setattr(pytest.Function, "_repr_failure_py", counted)
    suite.write("tiny.toml", (suite.path / "tiny.toml").read_text().replace("n_heads = 8", "n_heads = 200"))
    suite.claims(one=raising(MISSING, "T01"))
    started = time.monotonic()
    result = suite.run("-q", "--ledger", "l.json", ret=0)
    assert time.monotonic() - started < 20
    assert {row["verdict"] for row in suite.rows("l.json")} == {"CANNOT_RUN"}
    assert len(suite.rows("l.json")) == 200
    assert rendered
    assert max(rendered) == 1, "frames of the way to the error"
    assert sum("out of reach" in line for line in result.stdout.lines) <= 3


def test_a_fixture_that_raises_shows_its_traceback_once(suite):
    suite.claims(one=raising(BROKEN, "T01"))
    result = suite.run("--ledger", "l.json", ret=1)
    text = result.stdout.str()
    assert text.count('raise ZeroDivisionError("in the measurement")') == 1
    assert text.count("(its traceback stands at claims/test_one.py::test_heads[L0H0])") >= 7
    assert {row["verdict"] for row in suite.rows("l.json")} == {"BROKEN"}
    assert {row["detail"]["reason"] for row in suite.rows("l.json")} == {"ZeroDivisionError: in the measurement"}
