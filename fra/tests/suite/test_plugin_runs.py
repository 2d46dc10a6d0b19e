"""A run of `pytest claims/` as a whole: the table it ends with, the same rows on workers, progress, interruption."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fra.tests.suites import CLAIM_FILE, FAMILY_FILE, PLUGINS, ROOT, outcomes, suite

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
            "*L0H0  SUPPORTED*2*[[]1.1, 9]*1*0.01*50*",
            "*L0H1  REFUTED*",
            "*L0H2  REFUTED*known: carried by the bias*",
            "*L0H3  SUPPORTED*OVERTURNED*",
            "*not asked  L0H7: not in the family",
            "*family  SUPPORTED*",
            "findings:   SUPPORTED 3 (1 OVERTURNED)  REFUTED 2 (1 known)  INCONCLUSIVE 2  BROKEN 9",
            "1 rows not asked: their claims are not about those heads",
        ]
    )
    verdicts = table[: next(k for k, line in enumerate(table) if line.startswith("findings:"))]
    assert all(len(line) <= 100 and line.isascii() for line in verdicts)


def test_many_claims_end_with_their_counts(suite):
    for number in range(10, 17):
        suite.claims(
            **{f"c{number}": FAMILY_FILE.replace("T03", f"T{number}").replace("A family", f"Title {number} " * 9)}
        )
    result = suite.run("-q")
    lines = result.stdout.lines
    start = next(n for n, line in enumerate(lines) if line.startswith("claim ") and line.endswith(" yes no ? - !"))
    rows = [line.split() for line in lines[start + 1 : start + 8]]
    assert [row[0] for row in rows] == [f"T{n}" for n in range(10, 17)]
    assert all(" ".join(row[1:-5]) == " ".join(["Title", row[0][1:]] * 9) for row in rows), "whole titles"
    assert all(row[-5:] == ["1", ".", ".", ".", "."] for row in rows)
    assert all(len(line) <= 100 and line.isascii() for line in lines[start : start + 8])


def test_what_fails_a_run_of_many_claims_is_named(suite):
    suite.all()
    for number in range(10, 17):
        text = FAMILY_FILE.replace("T03", f"T{number}")
        suite.claims(**{f"c{number}": text.replace("bar=1.0,", 'bar=1.0, kind="identity",') if number > 12 else text})
    result = suite.run()
    result.stdout.fnmatch_lines(
        [
            "T01 *2*2*2*.*1",
            "yes SUPPORTED  no REFUTED*",
            "identities that are SUPPORTED wherever they were asked: T13 (1), T14 (1), T15 (1), T16 (1)",
            "OVERTURNED: T01 L0H3",
            "BROKEN: T01 L0H6; T02 L0H0-7",
            "REFUTED, and not known: T01 L0H1",
        ]
    )
    text = result.stdout.str()
    assert "H0:" not in text, "rows are shown under -v alone"
    assert "H0:" in suite.run("-v").stdout.str()


def test_progress_tells_of_whole_claims(suite):
    suite.all()
    for args in ((), ("-p", "xdist", "-n", "2", "--dist", "loadfile")):
        result = suite.pytester.runpytest_subprocess("claims", *args, timeout=120)
        told = [line for line in result.stderr.lines if "claims, 0:" in line]
        assert [line.split()[:3] for line in told] == [["[1", "of", "3"], ["[2", "of", "3"], ["[3", "of", "3"]]
        assert sum("T01: 2 SUPPORTED, 2 REFUTED, 2 INCONCLUSIVE, 1 BROKEN" in line for line in told) == 1
        assert " left" in told[0]
        assert " left" not in told[2]


def test_rows_are_equal_in_series_under_xdist_and_for_any_selection(suite):
    suite.all()
    suite.run("--ledger", "serial.json", "--report", "serial.html")
    serial = suite.rows("serial.json")
    args = ("claims", "-p", "xdist", "-n", "2", "--dist", "loadfile", "--ledger", "xdist.json")
    spread = suite.pytester.runpytest_subprocess(*args, timeout=120)
    assert spread.ret == 1
    assert suite.rows("xdist.json") == serial
    assert outcomes(spread) == {"passed": 2, "failed": 3, "skipped": 1, "xfailed": 1, "inconclusive": 2, "errors": 8}
    spread.stdout.fnmatch_lines(
        ["*L0H2  REFUTED*known: carried by the bias*", "findings:   SUPPORTED 3 (1 OVERTURNED) *"]
    )
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


@pytest.mark.parametrize("worker", [False, True], ids=["in series", "on a worker"])
def test_what_is_shared_is_let_go_behind_the_last_test_that_asks_for_it(worker: bool) -> None:
    from types import SimpleNamespace

    from fixtures.stimuli import KEPT, pytest_runtest_teardown

    config = SimpleNamespace(stash=pytest.Stash(), **({"workerinput": {}} if worker else {}))
    screens, carried = {"natural": object()}, {(1, 2): object()}
    config.stash[KEPT] = {"screens": screens, "carried": carried}
    names = [("screens",), ("screens", "carried"), (), ("carried",), ()]
    session = SimpleNamespace(items=[])
    items = [
        SimpleNamespace(config=config, session=session, fixturenames=asked, path=n) for n, asked in enumerate(names)
    ]
    session.items = items
    kept = []
    for item, following in zip(items, [*items[1:], None], strict=True):
        pytest_runtest_teardown(item, following)
        kept.append((bool(screens), bool(carried)))
    # The third asks for neither: a worker takes that for the end, since what shares a measurement comes in a row.
    between = (False, False) if worker else (False, True)
    assert kept == [(True, True), between, between, (False, False), (False, False)]


SLOW_FILE = """
    import os
    import signal
    import time
    import numpy as np
    import pytest
    from fra.claim import Claim, family

    CLAIM = Claim(id="T05", title="Slow", h0="E <= 0", bar=0.0, statistic="mean/1", stimuli=("made",), n=20)

    @pytest.fixture(scope="module")
    def evidence():
        rng = np.random.default_rng(0)
        drawn = {f"L0H{h}": rng.normal(1, 0.5, 20) for h in range(8)}
        return family(CLAIM, drawn, target="tiny", sources=None, n_boot=99)

    def test_slow(head, evidence, verdict):
        if head == "L0H3" and "DIES" in os.environ:
            os._exit(9)
        if head == "L0H3" and "WAITS" in os.environ:
            open("waiting", "w").close()
            time.sleep(120)
        verdict(evidence.get(head))
"""


def header(suite, name="ledger.json"):
    return json.loads((suite.path / name).read_text())["header"]


def test_an_interrupted_run_keeps_what_it_has_and_says_that_it_is_a_part(suite):
    suite.claims(heads=CLAIM_FILE.replace("raise ZeroDivisionError", "pytest.exit"))
    suite.write("ledger.json", "old")
    result = suite.run("--ledger", "ledger.json")
    assert result.ret == 2
    assert [row["head"] for row in suite.rows()] == [f"L0H{h}" for h in range(6)]
    assert header(suite)["partial"] == "the run was interrupted after 6 of 8 rows"
    result.stdout.fnmatch_lines(["wrote ledger.json, a part: the run was interrupted after 6 of 8 rows"])


@pytest.mark.parametrize(("number", "args"), [(signal.SIGINT, ()), (signal.SIGTERM, ("-p", "xdist", "-n", "1"))])
def test_a_signal_acts_at_once_and_keeps_the_rows(suite, number, args):
    suite.claims(slow=SLOW_FILE)
    command = [sys.executable, "-m", "pytest", "claims", "-q", "--ledger", "ledger.json", *args]
    process = subprocess.Popen(
        command,
        cwd=suite.path,
        env=os.environ | {"WAITS": "1"},
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs with &
    )
    until = time.monotonic() + 100
    while not (suite.path / "waiting").exists():
        assert process.poll() is None and time.monotonic() < until, "the run ended before it was interrupted"
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(timeout=30)  # the test within would sleep for two minutes
    assert [row["head"] for row in suite.rows()] == ["L0H0", "L0H1", "L0H2"]
    assert "interrupted after 3 of 8" in header(suite)["partial"]


def test_a_worker_that_dies_leaves_a_row_for_every_test(suite, monkeypatch):
    monkeypatch.setenv("DIES", "1")
    suite.claims(slow=SLOW_FILE)
    args = (
        "claims",
        "-p",
        "xdist",
        "-n",
        "1",
        "--dist",
        "loadfile",
        "--max-worker-restart=0",
        "--ledger",
        "ledger.json",
    )
    result = suite.pytester.runpytest_subprocess(*args, timeout=120)
    assert result.ret == 1
    rows = {row["head"]: row for row in suite.rows()}
    assert sorted(rows) == [f"L0H{h}" for h in range(8)]
    broken = {head: row["detail"]["reason"] for head, row in rows.items() if row["verdict"] == "BROKEN"}
    later = dict.fromkeys(["L0H4", "L0H5", "L0H6", "L0H7"], "its worker died before it was run")
    assert broken == {"L0H3": "its worker died in it"} | later


@pytest.mark.parametrize("asked", ["--setup-plan", "--setup-only", "--fixtures", "--collect-only"])
def test_what_measures_nothing_writes_nothing(suite, asked):
    suite.all()
    suite.write("ledger.json", "old")
    suite.run(asked, "--ledger", "ledger.json")
    assert (suite.path / "ledger.json").read_text() == "old"


def test_a_selection_says_that_it_is_one(suite):
    suite.all()
    suite.run("--ledger", "whole.json")
    assert header(suite, "whole.json")["partial"] is None
    suite.run("--ledger", "some.json", "-k", "T03 or family")
    assert header(suite, "some.json")["partial"] == "1 of 17 rows were asked for"
    suite.run("--ledger", "heads.json", "--heads", "L0H1")
    assert header(suite, "heads.json")["partial"] == "3 of 17 rows were asked for"


def test_the_last_of_several_runs_of_a_test_counts(suite):
    suite.claims(family=FAMILY_FILE)
    suite.write(
        "conftest.py",
        f"""
        pytest_plugins = {[f"fixtures.{name}" for name in PLUGINS]}

        def pytest_runtest_logreport(report):
            ...

        def pytest_runtest_protocol(item, nextitem):
            from _pytest.runner import runtestprotocol
            for _ in range(2):  # what plugins that run a test again do
                for report in runtestprotocol(item, nextitem=nextitem, log=False):
                    item.ihook.pytest_runtest_logreport(report=report)
            return True
        """,
    )
    suite.run("--ledger", "ledger.json")
    assert len(suite.rows()) == 1


def test_resume_goes_on_where_a_run_ended(suite):
    suite.claims(heads=CLAIM_FILE.replace('head == "L0H6"', "head is None"), family=FAMILY_FILE)
    mini = str(ROOT / "fixtures" / "targets" / "mini.toml")  # a target whose weights have a fingerprint
    args = ("--target", mini, "--device", "cpu")
    suite.run(*args, "--ledger", "whole.json", "-k", "heads or family")
    suite.run(*args, "--ledger", "part.json", "-k", "family")
    again = suite.run(*args, "--ledger", "part.json", "-k", "heads or family", "--resume")
    again.stdout.fnmatch_lines(["--resume: 1 rows of part.json stand"])
    assert suite.rows("part.json") == suite.rows("whole.json")
    suite.run(*args, "--ledger", "family.json", "-k", "family")
    nothing = suite.run(*args, "--ledger", "family.json", "-k", "family", "--resume", ret=0)
    nothing.stdout.fnmatch_lines(["--resume: 1 rows of family.json stand"])
    failing = suite.run(*args, "--ledger", "whole.json", "-k", "heads or family", "--resume", ret=1)
    failing.stdout.fnmatch_lines(["--resume: 2 of the rows that stand fail, first T01 L0H1"])
    other = suite.run("--target", "tiny.toml", "--ledger", "part.json", "--resume", ret=4)
    other.stderr.fnmatch_lines(["ERROR: --resume: part.json was made with the target mini and this run has tiny*"])
    suite.run("--resume", ret=4).stderr.fnmatch_lines(["ERROR: --resume goes on with the ledger that --ledger names*"])


def test_collecting_writes_nothing_and_other_tests_are_left_alone(suite):
    suite.all()
    suite.run("--collect-only", "--ledger", "ledger.json", ret=0)
    assert not (suite.path / "ledger.json").exists()
    suite.write("claims/known.toml", "broken [")
    suite.write("test_other.py", "def test_other(): pass")
    result = suite.pytester.runpytest_inprocess("test_other.py")
    assert outcomes(result) == {"passed": 1}
    assert "fra:" not in result.stdout.str()
