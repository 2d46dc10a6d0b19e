"""A run of `pytest claims/` as a whole: the table it ends with, the same rows on workers, progress, interruption."""

import json

from fra.tests.suites import CLAIM_FILE, FAMILY_FILE, PLUGINS, outcomes, suite

__all__ = ["suite"]


def test_the_terminal_table_is_plain_and_fits_in_100_columns(suite):
    suite.all()
    result = suite.run("-q")
    lines = result.stdout.lines
    table = lines[next(k for k, line in enumerate(lines) if "verdicts" in line and "===" in line) :]
    result.stdout.fnmatch_lines(
        [
            "T01  Heads do it*EXPLORATORY*",
            "H0: E <= 1*effect > 1*",
            "*head*verdict*effect*interval*bar*p*n*",
            "*L0H0  SUPPORTED*2*[[]-inf, 9]*1*0.01*50*",
            "*L0H1  REFUTED*",
            "*L0H2  REFUTED*known: carried by the bias*",
            "*L0H3  SUPPORTED*OVERTURNED*",
            "*CANNOT_RUN  L0H7: not in the family",
            "*family  SUPPORTED*",
            "SUPPORTED 3 (1 OVERTURNED)   REFUTED 2 (1 known)   INCONCLUSIVE 2   CANNOT_RUN 1   BROKEN 9",
        ]
    )
    verdicts = table[: next(k for k, line in enumerate(table) if line.startswith("SUPPORTED"))]
    assert all(len(line) <= 100 and line.isascii() for line in verdicts)


def test_many_claims_end_with_their_counts(suite):
    for number in range(10, 17):
        suite.claims(
            **{f"c{number}": FAMILY_FILE.replace("T03", f"T{number}").replace("A family", f"Title {number} " * 9)}
        )
    result = suite.run("-q")
    lines = result.stdout.lines
    start = next(n for n, line in enumerate(lines) if line.startswith("claim ") and "SUPPORTED" in line)
    rows = [line.split() for line in lines[start + 1 : start + 8]]
    assert [row[:6] for row in rows] == [[f"T{n}", "1", ".", ".", ".", "."] for n in range(10, 17)]
    assert all(row[6] == "Title" and row[-1] == "..." for row in rows)
    assert all(len(line) <= 100 and line.isascii() for line in lines[start : start + 8])


def test_rows_are_equal_in_series_under_xdist_and_for_any_selection(suite):
    suite.all()
    suite.run("--ledger", "serial.json", "--report", "serial.html")
    serial = suite.rows("serial.json")
    args = ("claims", "-p", "xdist", "-n", "2", "--dist", "loadfile", "--ledger", "xdist.json")
    spread = suite.pytester.runpytest_subprocess(*args, timeout=120)
    assert spread.ret == 1
    assert suite.rows("xdist.json") == serial
    assert outcomes(spread) == {"passed": 2, "failed": 3, "skipped": 1, "xfailed": 1, "inconclusive": 2, "errors": 8}
    spread.stdout.fnmatch_lines(["*L0H2  REFUTED*known: carried by the bias*", "SUPPORTED 3 (1 OVERTURNED) *"])
    suite.run("--ledger", "some.json", "-k", "T01 or H4 or H0")
    some = suite.rows("some.json")
    assert 0 < len(some) < len(serial)
    assert all(row in serial for row in some)
    header = json.loads((suite.path / "serial.json").read_text())["header"]
    assert header["target"] == "tiny"
    assert header["device"] == "cpu"
    assert header["options"]["strict-verdicts"] is False
    assert "T01" in header["claims"]
    page = (suite.path / "serial.html").read_text()
    assert page.count("REFUTED") > 2


def test_progress_goes_to_stderr_and_is_quiet_under_q(suite):
    suite.claims(family=FAMILY_FILE)
    loud = suite.pytester.runpytest_subprocess("claims", timeout=60)
    assert "measuring the family" in loud.stderr.str()
    assert "measuring the family" not in loud.stdout.str()
    quiet = suite.pytester.runpytest_subprocess("claims", "-q", timeout=60)
    assert "measuring" not in quiet.stderr.str() + quiet.stdout.str()


def test_workers_report_progress_and_measure_what_is_shared_once(suite):
    """Two files that ask for `screens` land on one worker, each other file on some one worker."""
    suite.write(
        "conftest.py",
        f"""
        import os
        import pytest
        pytest_plugins = {[f"fixtures.{name}" for name in PLUGINS]}

        @pytest.fixture(scope="session")
        def screens(progress):
            progress(f"screening in {{os.environ['PYTEST_XDIST_WORKER']}}")
        """,
    )
    both = FAMILY_FILE.replace("evidence(progress)", "evidence(screens)").replace(
        'progress("measuring the family")', ""
    )
    suite.claims(one=both, two=both.replace("T03", "T04"), heads=CLAIM_FILE)
    args = ("claims", "-p", "xdist", "-n", "2", "--dist", "loadfile", "-v", "--ledger", "l.json")
    result = suite.pytester.runpytest_subprocess(*args, timeout=120)
    assert result.stderr.str().count("screening in gw") == 1
    on = {
        line.split()[0]
        for line in result.stdout.lines
        if "CLAIM" not in line and "test_heads[" in line and "[gw" in line
    }
    assert len(on) == 1, "the heads of a file are measured by one worker"
    assert {row["claim"] for row in suite.rows("l.json")} == {"T01", "T03", "T04"}


def test_an_interrupted_run_leaves_the_old_ledger(suite):
    suite.claims(heads=CLAIM_FILE.replace("raise ZeroDivisionError", "pytest.exit"))
    suite.write("ledger.json", "old")
    result = suite.run("--ledger", "ledger.json")
    assert result.ret == 2
    assert (suite.path / "ledger.json").read_text() == "old"
    result.stdout.fnmatch_lines(["the run did not come to its end*"])


def test_collecting_writes_nothing_and_other_tests_are_left_alone(suite):
    suite.all()
    suite.run("--collect-only", "--ledger", "ledger.json", ret=0)
    assert not (suite.path / "ledger.json").exists()
    suite.write("claims/known.toml", "broken [")
    suite.write("test_other.py", "def test_other(): pass")
    result = suite.pytester.runpytest_inprocess("test_other.py")
    assert outcomes(result) == {"passed": 1}
    assert "fra:" not in result.stdout.str()
