"""Verdicts kept between runs: what is taken from an earlier run, what is measured anew, and that both look the same."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from fixtures.measuring import running_code
from fra.tests.suites import CLAIM_FILE, FAMILY_FILE, KNOWN, PLUGINS, ROOT, outcomes, suite

__all__ = ["suite"]

COUNTING = """
    from pathlib import Path
    import pytest
    from fixtures.options import RUN

    @pytest.fixture(scope="module", autouse=True)
    def counted(request):
        {imports}
        # In place of the fixture target, which takes seconds: what it says of the target.
        request.config.stash[RUN].provenance |= {"model": "mini, sha256 0", "device": "cpu"}
        with open(Path(str(request.config.rootpath)) / "measured.txt", "a") as file:
            file.write(request.module.__name__ + "\\n")
"""


def counting(text: str, imports: str = "pass") -> str:
    """A claim file that leaves a line in measured.txt when its module is measured, and whose claims fit mini's size."""
    return COUNTING.replace("{imports}", imports) + text


@pytest.fixture
def cached(suite, monkeypatch):
    """A suite on mini whose rows are kept in a folder of the test's."""
    monkeypatch.delenv("FRA_NO_CACHE")
    monkeypatch.setenv("FRA_CACHE", str(suite.path / "cache"))
    suite.pytester.makeconftest(f"pytest_plugins = {[f'fixtures.{name}' for name in [*PLUGINS, 'kept']]}")
    suite.claims(heads=counting(CLAIM_FILE), family=counting(FAMILY_FILE, "import helper"))
    suite.write("claims/helper.py", "SIZE = 1\n")
    suite.write("claims/known.toml", "[[known]]".join(KNOWN.split("[[known]]")[:3]).replace('"tiny"', '"mini"'))
    return suite


def measured(suite) -> list[str]:
    """Which modules were measured since this was last asked."""
    file = suite.path / "measured.txt"
    lines = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return sorted(lines)


def run(suite, *args: str, ledger: str = "ledger.json"):
    return suite.run("-q", "--target", "mini", "--ledger", ledger, "--heads", "L0H0,L0H1,L0H2,L0H3,L0H4,L0H6", *args)


def test_a_second_run_measures_nothing_and_ends_the_same(cached):
    first = run(cached, ledger="first.json")
    assert measured(cached) == ["test_family", "test_heads"]
    second = run(cached, ledger="second.json")
    assert outcomes(first) == outcomes(second) and first.ret == second.ret == 1
    # L0H6 raised: nothing judged it, and its module is measured again for it alone.
    assert measured(cached) == ["test_heads"]
    assert cached.rows("first.json") == cached.rows("second.json")
    second.stdout.fnmatch_lines(["6 rows are kept from earlier runs on the same weights, text and code*"])
    header = [json.loads((cached.path / name).read_text())["header"] for name in ("first.json", "second.json")]
    assert header[1]["options"].pop("rows kept from earlier runs") == 6
    assert header[0]["model"] == "mini, sha256 0"
    assert header[0]["options"].pop("ledger") != header[1]["options"].pop("ledger")
    for name in ("started", "seconds"):
        assert header[0].pop(name) and header[1].pop(name)
    assert header[0] == header[1]

    run(cached, "-k", "family", ledger="family.json")
    alone = json.loads((cached.path / "family.json").read_text())
    assert measured(cached) == [] and [row["claim"] for row in alone["verdicts"]] == ["T03"], "a selection stays one"
    assert alone["header"]["model"] == header[0]["model"], "known although nothing was loaded"

    run(cached, "--no-cache")
    assert measured(cached) == ["test_family", "test_heads"]
    run(cached, "--seed", "1")
    assert measured(cached) == ["test_family", "test_heads"]


@pytest.mark.long
def test_on_workers(cached):
    args = ["-p", "xdist.plugin", "-n", "2", "--dist", "loadfile"]
    run(cached, *args, ledger="first.json")
    assert measured(cached) == ["test_family", "test_heads"]
    run(cached, *args, ledger="second.json")
    assert measured(cached) == ["test_heads"]
    assert cached.rows("first.json") == cached.rows("second.json")
    run(cached, "-k", "family", ledger="third.json")
    assert measured(cached) == [], "one process takes what workers measured"


def test_a_changed_line_of_code_is_measured_anew(cached):
    run(cached)
    measured(cached)
    cached.write("claims/helper.py", "SIZE = 2\n")
    run(cached, "-k", "not L0H6")
    assert measured(cached) == ["test_family"], "the file beside it alone changed"
    cached.claims(heads=counting(CLAIM_FILE.replace("one(0.1,", "one(0.2,")))
    run(cached, "-k", "not L0H6")
    assert measured(cached) == ["test_heads"]
    effects = {row["head"]: row["effect"] for row in cached.rows() if row["claim"] == "T01"}
    assert effects["L0H2"] == pytest.approx(0.2), "and not what was kept"


def test_what_the_claims_folder_says_is_not_kept(cached):
    run(cached, "-k", "heads and not L0H6", ledger="before.json")
    (cached.path / "claims" / "known.toml").unlink()
    after = run(cached, "-k", "heads and not L0H6", ledger="after.json")
    rows = {name: {row["head"]: row for row in cached.rows(f"{name}.json")} for name in ("before", "after")}
    assert measured(cached) == ["test_heads"], "before alone"
    assert rows["before"]["L0H2"]["detail"]["known"] == "carried by the bias"
    assert rows["before"]["L0H3"]["detail"]["overturned"] == "looked dead"
    for head in ("L0H2", "L0H3"):
        assert not {"known", "overturned"} & rows["after"][head]["detail"].keys()
    assert outcomes(after) == {"passed": 2, "failed": 2, "inconclusive": 1, "deselected": 20}
    strict = run(cached, "-k", "heads and not L0H6", "--strict-verdicts")
    assert measured(cached) == [] and outcomes(strict)["failed"] == 3


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"rows": [{"claim": "T03"}], "provenance": {}}'])
def test_a_damaged_file_counts_for_nothing(cached, damage):
    run(cached, "-k", "family", ledger="first.json")
    (file,) = (cached.path / "cache" / "verdicts").glob("mini-T03-*.json")
    file.write_bytes(damage)
    measured(cached)
    run(cached, "-k", "family", ledger="second.json")
    assert measured(cached) == ["test_family"]
    assert cached.rows("first.json") == cached.rows("second.json")
    run(cached, "-k", "family")
    assert measured(cached) == [], "and is written anew"


def test_a_cache_that_cannot_be_written_costs_nothing_else(cached, monkeypatch):
    (cached.path / "file").write_text("")
    monkeypatch.setenv("FRA_CACHE", str(cached.path / "file" / "in_it"))
    result = run(cached, "-k", "family")
    assert result.ret == 0 and outcomes(result)["passed"] == 1


def test_files_of_former_code_go(cached):
    for size in range(6):
        cached.write("claims/helper.py", f"SIZE = {size}\n")
        run(cached, "-k", "family")
    assert len(list((cached.path / "cache" / "verdicts").glob("mini-T03-*.json"))) == 4


def test_code_that_is_no_installed_library_is_not_kept(cached):
    """A module of the user's, outside of the claims folder: nobody says when it changes."""
    cached.write("mine.py", "SIZE = 1\n")
    cached.pytester.syspathinsert(cached.path)
    cached.claims(family=counting(FAMILY_FILE, "import mine"))
    for _ in range(2):
        run(cached, "-k", "family")
        assert measured(cached) == ["test_family"]


@pytest.mark.long
def test_real_claims_twice_and_the_code_that_they_run(tmp_path):
    """What Python really imported for some claims is the judge of `running_code`."""
    script = f"""
        import json, sys
        import pytest
        ask = ["claims", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "d02 or d03"]
        pytest.main(["claims", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--collect-only"])
        before = {{*sys.modules}}  # what other claims' files import
        assert pytest.main([*ask, "--ledger", {str(tmp_path / "first.json")!r}]) == 0
        print("MODULES", json.dumps(sorted(n for n in {{*sys.modules}} - before if n.split(".")[0] == "fra")))
    """
    again = [sys.executable, "-m", "pytest", "claims", "-q", "-k", "d02 or d03"]
    environment = {name: value for name, value in os.environ.items() if name != "FRA_NO_CACHE"}
    environment["FRA_CACHE"] = str(tmp_path)

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    said = run(sys.executable, "-c", textwrap.dedent(script))
    assert "2 rows are kept" in run(*again, "--ledger", str(tmp_path / "second.json"))
    ledgers = [json.loads((tmp_path / name).read_text()) for name in ("first.json", "second.json")]
    assert ledgers[0]["verdicts"] == ledgers[1]["verdicts"]
    for name in ("model", "device", "dictionaries", "text", "remarks", "claims"):
        assert ledgers[0]["header"][name] == ledgers[1]["header"][name], name

    (line,) = [line for line in said.splitlines() if line.startswith("MODULES")]
    names = json.loads(line.removeprefix("MODULES"))
    claims = ROOT / "claims"
    files = [claims / "d/test_d02_dfa_by_head.py", claims / "d/test_d03_dfa_by_source.py"]
    found = {file for one in files for file in running_code(one, claims) or {}}
    # What only writes ledger and page runs on rows that are there already.
    writes = ("fra.report", "fra.ledgers", "fra.plot", "fra.verdicts.pooled", "fra.verdicts.standing", "fra.doctor")
    for name in names:
        base = ROOT.joinpath(*name.split("."))
        file = next(one for one in (base / "__init__.py", base.with_suffix(".py")) if one.is_file())
        assert str(file) in found or name.startswith(writes), name
    assert "fra.measures.identities.d02_d03_d17_exactness" in names
    assert not any(name.startswith(f"{ROOT}/fra/commands") for name in found), "the command line changes no number"
    assert {"torch", "transformer_lens", "numpy"} <= found
