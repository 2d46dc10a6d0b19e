"""Options, registrations and known refutations of `pytest claims/`: what each does; what is wrong is exit code 4."""

import importlib
import json
import subprocess
import sys
import textwrap
import tomllib

import pytest

from fra import doctor
from fra.tests.suites import CLAIM_FILE, FAMILY_FILE, KNOWN, ROOT, TARGET, outcomes, suite

__all__ = ["suite"]


def test_strict_verdicts_fail_what_is_inconclusive(suite):
    suite.claims(heads=CLAIM_FILE)
    result = suite.run("--strict-verdicts", "-v", "-k", "H4 or H7", "--ledger", "ledger.json", ret=1)
    assert outcomes(result) == {"failed": 1, "skipped": 1, "deselected": 6}
    result.stdout.fnmatch_lines(["*L0H4*INCONCLUSIVE*"])
    assert [r["verdict"] for r in suite.rows()] == ["INCONCLUSIVE", "NOT_APPLICABLE"]
    suite.run("-k", "H4 or H7", ret=0)


def test_heads_shows_only_these(suite):
    suite.claims(heads=CLAIM_FILE, family=FAMILY_FILE)
    result = suite.run("--heads", "L0H0, L0H7", "--ledger", "ledger.json", ret=0)
    assert outcomes(result)["deselected"] == 6
    assert [(r["claim"], r["head"]) for r in suite.rows()] == [("T01", "L0H0"), ("T01", "L0H7"), ("T03", None)]


def test_another_rootdir_leads_to_the_same_claims(suite):
    suite.claims(heads=CLAIM_FILE)
    (suite.path / "elsewhere").mkdir()
    as_somebody = ["git", "-C", "elsewhere", "-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "another project"]):
        subprocess.run([*as_somebody, *command], cwd=suite.path, check=True)
    suite.run("--rootdir", "elsewhere", "-k", "H4 or H7", "--ledger", "ledger.json", ret=0)
    header = json.loads((suite.path / "ledger.json").read_text())["header"]
    assert header["commit"] is None, "not that of another project"
    assert [(r["head"], r["verdict"]) for r in suite.rows()] == [("L0H4", "INCONCLUSIVE"), ("L0H7", "NOT_APPLICABLE")]


def test_registration(suite):
    suite.claims(heads=CLAIM_FILE, family=FAMILY_FILE)
    result = suite.run("--register", "--ledger", "ledger.json", ret=0)
    result.stdout.fnmatch_lines(["T01: registered", "T03: registered"])
    assert not (suite.path / "ledger.json").exists(), "nothing is measured"
    file = suite.path / "claims" / "registered.toml"
    entries = tomllib.loads(file.read_text())
    assert entries.keys() == {"T01", "T03"}
    assert entries["T01"]["bar"] == 1.0
    suite.run("-k", "H0", "--ledger", "ledger.json", ret=0)
    [row] = suite.rows()
    assert row["digest"] == entries["T01"]["digest"]
    assert "exploratory" not in row["detail"]

    suite.claims(heads=CLAIM_FILE.replace("bar=1.0", "bar=0.5"))
    suite.refused(says="T01 changed since it was registered (bar 1.0 -> 0.5)")
    suite.refused("-k", "T03", says="--register")
    before = file.read_text()
    result = suite.run("--register", ret=0)
    result.stdout.fnmatch_lines(["T01: changed (bar 1.0 -> 0.5)"])
    assert file.read_text() != before

    suite.claims(heads=CLAIM_FILE.replace("Heads do it", "In other words").replace("bar=1.0", "bar=0.5"))
    suite.run("--register", ret=0).stdout.fnmatch_lines(["nothing changed: 2 claims are registered"])
    (suite.path / "claims" / "test_family.py").unlink()
    suite.refused(says="registers T03, which no claim file declares")


MEASURING_FILE = """
    import numpy as np
    import pytest
    from beside import below
    from fra.claim import Claim, Condition, Evidence

    CLAIM = Claim(id="T04", title="A sum", h0="E <= 1", bar=1.0, statistic="sum/1", stimuli=("made",), n=50)

    @pytest.fixture(scope="module")
    def evidence(scale):
        \"\"\"All of it.\"\"\"
        value = float(np.ones((9, 9)).diagonal(-1).sum()) * below() * scale  # eight
        exact = Condition("effect", value, value, value, 1.0)
        return Evidence(claim=CLAIM, head=None, candidates={"all": (exact,)}, n=50)

    def test_sum(evidence, verdict):
        verdict(evidence)
"""
SCALE = "import pytest\n\n@pytest.fixture(scope='module')\ndef scale():\n    return 1.0\n"


def test_registration_covers_the_code_that_measures(suite):
    """What it does, in the claim's file, beside it, in a conftest.py above it; not how it reads, nor its title."""
    suite.claims(sum=MEASURING_FILE, family=FAMILY_FILE)
    suite.write("claims/beside.py", "def below():\n    return 1.0\n")
    suite.write("claims/conftest.py", SCALE)
    suite.run("--register", ret=0)
    code = tomllib.loads((suite.path / "claims" / "registered.toml").read_text())["T04"]["code"]
    assert sorted(code) == ["beside.py", "conftest.py", "test_sum.py"]
    suite.run("-k", "sum", ret=0)

    suite.claims(sum=MEASURING_FILE.replace("diagonal(-1)", "diagonal(-2)"))
    suite.refused(says="test_sum.py changed since T04 was registered")
    assert "T03" not in suite.run(ret=4).stderr.str(), "another file's claim"
    prose = MEASURING_FILE.replace("  # eight", "").replace("All of it.", "Everything.").replace("A sum", "The sum")
    suite.claims(sum=prose.replace("import numpy as np", "import numpy as np\n\n"))
    suite.run("-k", "sum", ret=0)
    for name, text in (("beside.py", "def below():\n    return 2.0\n"), ("conftest.py", SCALE.replace("1.0", "2.0"))):
        before = (suite.path / "claims" / name).read_text()
        suite.write(f"claims/{name}", text)
        suite.refused(says=f"{name} changed since ")
        suite.write(f"claims/{name}", before)
    suite.claims(sum=MEASURING_FILE.replace("diagonal(-1)", "diagonal(-2)"))
    result = suite.run("--register", ret=0)
    result.stdout.fnmatch_lines(["T04: its code changed (test_sum.py)"])
    suite.run("-k", "sum", ret=0)


def test_a_claim_that_was_registered_without_its_code_is_registered_again(suite):
    suite.claims(family=FAMILY_FILE)
    suite.run("--register", ret=0)
    file = suite.path / "claims" / "registered.toml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("code")))
    suite.refused(says="does not say by which code T03 is measured")
    suite.run("--register", ret=0).stdout.fnmatch_lines(["T03: its code changed (test_family.py)"])
    suite.run(ret=0)


def test_the_code_of_a_claim_is_its_measures_and_what_these_import(tmp_path):
    """By hand: Q06's file imports one module of `fra.measures`, and that one two others of its room."""
    measuring = importlib.import_module("fixtures.measuring")
    claims = ROOT / "claims"
    found = measuring.measuring_code(claims / "q" / "test_q06_excess.py", claims)
    room = "fra/measures/channels/"
    assert list(found) == [f"{room}{name}.py" for name in ("designs", "details", "q06_excess")] + [
        "q/test_q06_excess.py"
    ]


def test_an_unregistered_claim_beside_a_registered_one_is_exploratory(suite):
    suite.claims(heads=CLAIM_FILE)
    suite.run("--register", ret=0)
    suite.claims(family=FAMILY_FILE)
    result = suite.run("-v", "-k", "H0 or family", "--ledger", "ledger.json", ret=0)
    assert [r["detail"].get("exploratory", False) for r in suite.rows()] == [False, True]
    result.stdout.fnmatch_lines(
        ["fra: *EXPLORATORY: T03*", "*test_family SUPPORTED (EXPLORATORY)*", "T03*[[]EXPLORATORY*"]
    )


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("claims/known.toml", KNOWN.replace('"T02"', '"T99"'), "there is no claim 'T99'"),
        (
            "claims/known.toml",
            KNOWN.replace('"T01"\ntarget = "another"', '"T99"\ntarget = "another"'),
            "no claim 'T99'",
        ),
        ("claims/known.toml", KNOWN.replace("L0H3", "L1H3"), "tiny has no head L1H3"),
        ("claims/known.toml", KNOWN.replace("L0H3", "3"), "is not a head"),
        ("claims/known.toml", KNOWN.replace("L0H3", "L0H2"), "recorded twice"),
        ("claims/known.toml", KNOWN.replace('reason = "looked dead"', ""), "reason is missing"),
        ("claims/known.toml", KNOWN.replace("head =", "heads ="), "unknown key 'heads'"),
        ("claims/known.toml", "[other]", "other than [[known]]"),
        ("claims/known.toml", "known = [", "is not TOML"),
        ("claims/registered.toml", "= 3", "is not TOML"),
        ("claims/registered.toml", "T01 = 3", "has no digest"),
        ("claims/registered.toml", '[T01]\ndigest = "0"', "T01 changed"),
        ("claims/test_syntax.py", "CLAIM = (", "cannot be imported: SyntaxError"),
        ("claims/test_import.py", "import nothing_of_that_name", "ModuleNotFoundError"),
        (
            "claims/test_bad.py",
            "from fra.claim import Claim\nC = Claim(id='x y', title='a', h0='b', bar=0, n=9, statistic='', stimuli=())",
            "an id is",
        ),
        ("claims/test_twice.py", CLAIM_FILE.replace("bar=1.0", "bar=2.0"), "two different claims are called T01"),
        ("tiny.toml", TARGET.replace("n_heads", "n_head"), "size.n_head: unknown key (is n_heads meant?)"),
        ("tiny.toml", TARGET + "=", "is not TOML"),
    ],
)
def test_what_is_written_down_wrongly_is_exit_code_4(suite, file, text, says):
    suite.all()
    suite.write(file, text)
    suite.refused(says=says)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--target", "nowhere.toml"], "there is no target 'nowhere.toml'"),
        (["--device", "tpu"], "--device tpu"),
        (["--device", "cuda:x"], "--device cuda:x"),
        (["--heads", "L1H0"], "tiny has no head L1H0"),
        (["--heads", "all"], "is not a head"),
        (["--heads", ","], "names no head"),
        (["--ledger", "."], "is a directory"),
        (["--ledger", "tiny.toml/ledger.json"], "cannot be written"),
        (["--report", "tiny.toml/page.html"], "cannot be written"),
    ],
)
def test_bad_options_are_exit_code_4(suite, args, says):
    suite.claims(heads=CLAIM_FILE)
    suite.refused(*args, says=says)


def test_the_target_of_the_option_beats_the_environment_beats_the_ini(suite, monkeypatch):
    suite.claims(heads=CLAIM_FILE)
    for name in ("one", "two"):
        suite.write(f"{name}.toml", TARGET.replace('"tiny"', f'"{name}"', 1))
    monkeypatch.setenv("FRA_TARGET", "one.toml")
    suite.run("-k", "H0", "--ledger", "ledger.json", ret=0)
    assert suite.rows()[0]["target"] == "one"
    suite.run("-k", "H0", "--ledger", "ledger.json", "--target", "two.toml", ret=0)
    assert suite.rows()[0]["target"] == "two"


def test_the_header_prints_every_option_in_force(suite):
    suite.claims(heads=CLAIM_FILE)
    result = suite.run("--heads", "L0H0", "--dtype", "float64", "--strict-verdicts")
    result.stdout.fnmatch_lines(
        [
            "fra: target tiny.toml, device cpu, dtype float64, heads L0H0, require-gpu no, strict-verdicts yes, "
            "seed 0, ledger none, report none",
            "fra: tiny has 1 layers of 8 heads; 1 claims, 0 registered, EXPLORATORY: T01; known refutations: 0",
        ]
    )


def test_no_gpu(suite, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    needs = FAMILY_FILE.replace("evidence(progress)", "evidence(device)").replace(
        'progress("measuring the family")', ""
    )
    suite.claims(family=needs)
    suite.refused("--require-gpu", says="--require-gpu: torch finds no CUDA device here")
    result = suite.run("--device", "cuda", "--ledger", "ledger.json", "-rs", ret=0)
    assert outcomes(result) == {"skipped": 1}
    [row] = suite.rows()
    assert row["verdict"] == "CANNOT_RUN"
    assert "no GPU" in row["detail"]["reason"]


def test_why_there_is_no_gpu_is_said_with_both_versions_of_cuda(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA" in doctor.no_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "driver_cuda", lambda: None)
    assert "no NVIDIA driver answers" in doctor.no_cuda()
    monkeypatch.setattr(doctor, "driver_cuda", lambda: "12.4")
    assert "built for CUDA 13.0 and the driver allows CUDA 12.4" in doctor.no_cuda()


def test_workers_take_turns_at_gpus(monkeypatch):
    import torch

    devices = importlib.import_module("fixtures.devices")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for worker, own in ((None, 0), ("gw0", 0), ("gw1", 1), ("gw2", 0)):
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
        if worker is not None:
            monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        assert devices.resolve_device("cuda") == devices.resolve_device("auto") == f"cuda:{own}"
        assert devices.resolve_device("cuda:1") == "cuda:1"


def test_require_gpu_wants_the_weights_too(suite, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    suite.claims(family=FAMILY_FILE)
    suite.write("tiny.toml", TARGET.replace('name = "nobody/tiny"', 'path = "missing"'))
    suite.refused("--require-gpu", says="--require-gpu: ")
    suite.refused(says="there is no directory")  # a target file that names what is not there, whatever is asked


def test_local_weights_that_are_no_weights_are_found_before_anything_is_measured(suite):
    suite.claims(family=FAMILY_FILE)
    suite.write("tiny.toml", TARGET.replace('name = "nobody/tiny"', 'path = "model"'))
    (suite.path / "model").mkdir()
    (suite.path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    suite.refused(says="model")


def test_collecting_claims_loads_no_model_library():
    code = """
    import sys
    import pytest
    class Look:
        def pytest_sessionfinish(self):
            print("loaded:", [m for m in ("transformer_lens", "sae_lens", "transformers") if m in sys.modules])
    pytest.main(["claims", "--collect-only", "-qq", "-p", "no:cacheprovider"], plugins=[Look()])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert "loaded: []" in done.stdout, done.stdout[-300:] + done.stderr[-300:]


def test_an_option_that_another_plugin_has_taken_is_reached_by_its_second_name(suite, monkeypatch):
    suite.claims(heads=CLAIM_FILE)
    (suite.path / "other_plugin.py").write_text(
        textwrap.dedent("""
        def pytest_addoption(parser):
            parser.addoption("--device", action="append")
            parser.addoption("--report", dest="report")
        """)
    )
    monkeypatch.syspath_prepend(suite.path)
    other = ("-p", "other_plugin", "-k", "H0")
    suite.run(*other, "--fra-device", "cpu", "--fra-report", "own.html", "--device", "theirs", "--report", "x", ret=0)
    assert (suite.path / "own.html").exists() and not (suite.path / "x").exists()
    suite.refused(*other, "--fra-device", "theirs", says="--device theirs: give auto, cpu")
    suite.run("-k", "H0", "--fra-ledger", "a.json", "--device", "cpu", ret=0)  # both names where both are free
    assert (suite.path / "a.json").exists()


def test_the_ini_files_target_is_found_from_a_subfolder(suite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.claims(family=FAMILY_FILE)
    (suite.path / "claims" / "known.toml").write_text("")
    monkeypatch.chdir(suite.path / "claims")
    result = suite.pytester.runpytest_inprocess("test_family.py", "--ledger", "l.json")
    assert result.ret == 0, result.stderr.str()
    assert [row["target"] for row in suite.rows("claims/l.json")] == ["tiny"]
