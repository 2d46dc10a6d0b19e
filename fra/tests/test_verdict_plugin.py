"""The pytest side, end to end on claims made for it: every row of the verdict table, every option, every exit code."""

import json
import tomllib
from pathlib import Path

import pytest

from fra.ledger import WORDS

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ["threads", "devices", "options", "target", "stimuli", "verdict", "session"]

TARGET = """
name = "tiny"
[model]
name = "nobody/tiny"
[text]
documents = "nowhere"
[size]
n_layers = 1
n_heads = 8
"""

CLAIM_FILE = """
    import numpy as np
    import pytest
    from fra.claim import Claim, Condition, Evidence

    CLAIM = Claim(id="T01", title="Heads do it", h0="E <= 1", bar=1.0, statistic="mean/1", stimuli=("made",), n=50)

    def one(effect, p, p_refute, **more):
        condition = Condition("effect", np.float32(effect), -np.inf, np.float64(9.0), 1.0, np.float64(p), p_refute)
        return dict(candidates={"only": (condition,)}, n=np.int64(50), power=0.9, q=0.5) | more

    @pytest.fixture(scope="module")
    def evidence():
        found = {
            "L0H0": one(2, 0.01, 1),                                    # SUPPORTED
            "L0H1": one(0, 1, 0.01),                                    # REFUTED
            "L0H2": one(0.1, 1, 0.01),                                  # REFUTED, and known.toml says so
            "L0H3": one(3, 0.01, 1),                                    # SUPPORTED, though known.toml says REFUTED
            "L0H4": one(1, 0.5, 0.5, detail={"table": np.ones(2)}),     # INCONCLUSIVE
            "L0H5": one(float("nan"), 0.01, 1),                         # INCONCLUSIVE
            "L0H6": one(2, 0.01, 1),                                    # BROKEN, below
        }
        return {head: Evidence(claim=CLAIM, head=head, **fields) for head, fields in found.items()}

    def test_heads(head, evidence, verdict):
        if head == "L0H6":
            raise ZeroDivisionError("in the test")
        verdict(evidence.get(head))
"""

BROKEN_FILE = """
    import pytest
    from fra.claim import Claim

    CLAIM = Claim(id="T02", title="Nothing works", h0="E <= 1", bar=1.0, statistic="mean/1", stimuli=("made",), n=50)

    @pytest.fixture(scope="module")
    def evidence():
        raise ZeroDivisionError("in the measurement")

    def test_broken(head, evidence, verdict):
        verdict(evidence[head])
"""

FAMILY_FILE = """
    import pytest
    from fra.claim import Claim, Condition, Evidence

    CLAIM = Claim(id="T03", title="A family", h0="E >= 1", bar=1.0, above=False, statistic="sum/1", stimuli=(), n=50)

    @pytest.fixture(scope="module")
    def evidence(progress):
        progress("measuring the family")
        exact = Condition("effect", 0.5, 0.5, 0.5, 1.0, above=False)
        return Evidence(claim=CLAIM, head=None, candidates={"all": (exact,)}, n=50)

    def test_family(evidence, verdict):
        assert verdict(evidence).outcome == "SUPPORTED"
"""

KNOWN = """
[[known]]
claim = "T01"
target = "tiny"
head = "L0H2"
reason = "carried by the bias"
[[known]]
claim = "T01"
target = "tiny"
head = "L0H3"
reason = "looked dead"
[[known]]
claim = "T02"
target = "tiny"
reason = "never mind"
[[known]]
claim = "T01"
target = "another"
head = "L7H7"
reason = "another target"
"""

EXPECTED = {
    "L0H0": ("passed", "SUPPORTED"),
    "L0H1": ("failed", "REFUTED"),
    "L0H2": ("xfailed", "REFUTED"),
    "L0H3": ("failed", "SUPPORTED"),
    "L0H4": ("inconclusive", "INCONCLUSIVE"),
    "L0H5": ("inconclusive", "INCONCLUSIVE"),
    "L0H6": ("failed", "BROKEN"),
    "L0H7": ("skipped", "CANNOT_RUN"),
}


class Suite:
    """A folder with claims, and pytest run on it: in this process, or in one of its own."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.path = pytester.path
        pytester.makeini("[pytest]\nfra_target = tiny.toml\naddopts = -p no:cacheprovider --device cpu")
        pytester.makeconftest(f"pytest_plugins = {[f'fixtures.{name}' for name in PLUGINS]}")
        self.write("tiny.toml", TARGET)
        (self.path / "claims").mkdir()

    def write(self, name: str, text: str) -> None:
        lines = text.split("\n")
        cut = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        (self.path / name).write_text("\n".join(line[cut:] for line in lines))

    def claims(self, **files: str) -> None:
        for name, text in files.items():
            self.write(f"claims/test_{name}.py", text)

    def all(self) -> None:
        self.claims(heads=CLAIM_FILE, broken=BROKEN_FILE, family=FAMILY_FILE)
        self.write("claims/known.toml", KNOWN)

    def run(self, *args: str, ret: int | None = None) -> pytest.RunResult:
        result = self.pytester.runpytest_inprocess("claims", *args)
        if ret is not None:
            assert result.ret == ret
        return result

    def refused(self, *args: str, says: str) -> None:
        """Exit code 4, one sentence, no traceback, nothing measured, no ledger."""
        result = self.run("--ledger", "refused.json", *args, ret=4)
        lines = [line for line in result.stderr.lines + result.stdout.lines if line.startswith("ERROR")]
        assert len(lines) == 1, result.stderr.str()
        assert says in lines[0]
        assert "Traceback" not in result.stderr.str() + result.stdout.str()
        assert not (self.path / "refused.json").exists()

    def rows(self, name: str = "ledger.json") -> list[dict]:
        text = (self.path / name).read_text()
        return json.loads(text, parse_constant=pytest.fail)["verdicts"]


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FRA_TARGET", raising=False)
    monkeypatch.syspath_prepend(str(ROOT))
    return Suite(pytester)


def outcomes(result: pytest.RunResult) -> dict[str, int]:
    return {name: k for name, k in result.parseoutcomes().items() if name not in ("warnings", "warning")}


def test_every_row_of_the_verdict_table(suite):
    suite.all()
    result = suite.run("--ledger", "ledger.json", "-v", ret=1)
    counts = {
        word: sum(w == word for w, _ in EXPECTED.values()) for word in ("failed", "skipped", "xfailed", "inconclusive")
    }
    # T02's fixture raises eight times: errors, although known.toml records a refutation of T02.
    assert outcomes(result) == {**counts, "passed": 2, "errors": 8}
    rows = suite.rows()
    assert [(r["claim"], r["head"]) for r in rows] == [
        *(("T01", f"L0H{h}") for h in range(8)),
        *(("T02", f"L0H{h}") for h in range(8)),
        ("T03", None),
    ]
    by_head = {r["head"]: r for r in rows if r["claim"] == "T01"}
    assert {head: r["verdict"] for head, r in by_head.items()} == {head: word for head, (_, word) in EXPECTED.items()}
    assert by_head["L0H2"]["detail"]["known"] == "carried by the bias"
    assert by_head["L0H3"]["detail"]["overturned"] == "looked dead"
    assert "overturned" not in by_head["L0H0"]["detail"]
    assert by_head["L0H4"]["detail"]["table"] == [1.0, 1.0]
    assert (by_head["L0H0"]["effect"], by_head["L0H0"]["low"], by_head["L0H5"]["effect"]) == (2.0, None, None)
    assert by_head["L0H6"]["detail"]["reason"] == "ZeroDivisionError: in the test"
    assert by_head["L0H7"]["detail"]["reason"] == "not in the family"
    assert {r["verdict"] for r in rows if r["claim"] == "T02"} == {"BROKEN"}
    assert all(r["detail"]["exploratory"] for r in rows)
    said = result.stdout.str()
    assert "although known.toml records a refutation (looked dead)" in said
    assert "XPASS" not in said
    for head, (_, word) in EXPECTED.items():
        shown = {"L0H3": "OVERTURNED"}.get(head, word)
        assert f"test_heads[{head}] {shown}" in said
    result.stdout.fnmatch_lines(
        ["*L0H0*SUPPORTED (EXPLORATORY)*", "*L0H2*REFUTED (known)*", "*ERROR at setup of test_broken*"]
    )


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


def test_strict_verdicts_fail_what_is_inconclusive(suite):
    suite.claims(heads=CLAIM_FILE)
    result = suite.run("--strict-verdicts", "-v", "-k", "H4 or H7", "--ledger", "ledger.json", ret=1)
    assert outcomes(result) == {"failed": 1, "skipped": 1, "deselected": 6}
    result.stdout.fnmatch_lines(["*L0H4*INCONCLUSIVE*"])
    assert [r["verdict"] for r in suite.rows()] == ["INCONCLUSIVE", "CANNOT_RUN"]
    suite.run("-k", "H4 or H7", ret=0)


def test_a_known_refutation_alone_is_exit_code_0(suite):
    suite.claims(heads=CLAIM_FILE)
    suite.write("claims/known.toml", KNOWN[: KNOWN.index("[[known]]", 20)])
    suite.run("-k", "H0 or H2", ret=0)
    suite.write("claims/known.toml", KNOWN[: KNOWN.index("[[known]]", 20)].replace('"tiny"', '"another"'))
    suite.run("-k", "H0 or H2", ret=1)
    suite.write("claims/known.toml", KNOWN[: KNOWN.index("[[known]]", 20)].replace('head = "L0H2"\n', ""))
    suite.run("-k", "H1 or H2", ret=0)  # without a head: all of them
    suite.run("-k", "H0", ret=1)  # overturned


def test_heads_shows_only_these(suite):
    suite.claims(heads=CLAIM_FILE, family=FAMILY_FILE)
    result = suite.run("--heads", "L0H0, L0H7", "--ledger", "ledger.json", ret=0)
    assert outcomes(result)["deselected"] == 6
    assert [(r["claim"], r["head"]) for r in suite.rows()] == [("T01", "L0H0"), ("T01", "L0H7"), ("T03", None)]


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
        ("tiny.toml", TARGET.replace("n_heads", "n_head"), "size.n_heads"),
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
            "ledger none, report none",
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


def test_require_gpu_wants_the_weights_too(suite, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    suite.claims(family=FAMILY_FILE)
    suite.write("tiny.toml", TARGET.replace('name = "nobody/tiny"', 'path = "missing"'))
    suite.refused("--require-gpu", says="--require-gpu: ")
    suite.run(ret=0)  # a claim that needs no weights runs without them


def test_local_weights_that_are_no_weights_are_found_before_anything_is_measured(suite):
    suite.claims(family=FAMILY_FILE)
    suite.write("tiny.toml", TARGET.replace('name = "nobody/tiny"', 'path = "model"'))
    (suite.path / "model").mkdir()
    (suite.path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    suite.refused(says="model")


def test_what_a_fixture_lacks_cannot_run(suite):
    lacking = FAMILY_FILE.replace('progress("measuring the family")', 'pytest.skip("no dictionary at blocks.0.hook")')
    suite.claims(family=lacking)
    result = suite.run("--ledger", "ledger.json", "-v", ret=0)
    result.stdout.fnmatch_lines(["*test_family CANNOT_RUN*"])
    [row] = suite.rows()
    assert (row["verdict"], row["detail"]["reason"]) == ("CANNOT_RUN", "no dictionary at blocks.0.hook")
    suite.claims(family=FAMILY_FILE.replace('progress("measuring the family")', "").replace("progress", "target"))
    result = suite.run("--ledger", "ledger.json", ret=0)
    [row] = suite.rows()
    assert row["verdict"] == "CANNOT_RUN"
    assert "hub" in row["detail"]["reason"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("pass", "never called verdict"),
        ("verdict(evidence); verdict(evidence)", "called twice"),
        ("import dataclasses; verdict(dataclasses.replace(evidence, head='L0H0'))", "about T03 at the family"),
        ("verdict(evidence); assert False, 'afterwards'", "AssertionError"),
        ("pytest.xfail('by hand')", "by hand"),
    ],
)
def test_a_test_that_gets_around_the_verdict_fails(suite, body, says):
    suite.claims(family=FAMILY_FILE.replace('assert verdict(evidence).outcome == "SUPPORTED"', body))
    result = suite.run("--ledger", "ledger.json", ret=1)
    assert outcomes(result) == {"failed": 1}
    [row] = suite.rows()
    assert row["verdict"] == "BROKEN"
    assert says in row["detail"]["reason"]


def test_a_verdict_cannot_be_swallowed(suite):
    swallowing = CLAIM_FILE.replace(
        "verdict(evidence.get(head))",
        "\n        try:\n            verdict(evidence.get(head))\n        except BaseException:\n            pass",
    )
    suite.claims(heads=swallowing)
    result = suite.run("-k", "H0 or H1 or H4")
    assert outcomes(result) == {"passed": 1, "failed": 1, "inconclusive": 1, "deselected": 5}


def test_a_set_up_error_stays_red_whatever_the_marks_say(suite):
    marked = BROKEN_FILE.replace("def test_broken", "@pytest.mark.xfail\n    def test_broken")
    suite.claims(broken=marked)
    result = suite.run("--ledger", "ledger.json", ret=1)
    assert outcomes(result) == {"errors": 8}
    assert {r["verdict"] for r in suite.rows()} == {"BROKEN"}


def test_an_xfail_mark_in_a_claim_file_is_refused(suite):
    suite.claims(heads=CLAIM_FILE.replace("def test_heads", "@pytest.mark.xfail\n    def test_heads"))
    result = suite.run("-k", "H1", ret=1)
    result.stdout.fnmatch_lines(["*is a row of known.toml, not an xfail mark*"])


def test_two_tests_of_one_claim_at_one_head_are_refused(suite):
    suite.claims(family=FAMILY_FILE + "\n    def test_again(evidence, verdict):\n        verdict(evidence)\n")
    result = suite.run(ret=1)
    assert outcomes(result) == {"passed": 1, "errors": 1}
    result.stdout.fnmatch_lines(["*T03 has two tests for the family*"])


def test_which_claim_a_test_is_about(suite):
    several = """
    import pytest
    from fra.claim import Claim, Evidence

    A, B, C = (Claim(id=f"T1{k}", title="t", h0="h", bar=0, statistic="s/1", stimuli=(), n=50) for k in range(3))

    @pytest.fixture(scope="module", params=[A, B], ids=lambda c: c.id)
    def claim(request):
        return request.param

    def test_by_parameter(claim, verdict):
        verdict(Evidence(claim=claim, head=None, cannot="of " + claim.id))

    @pytest.mark.claim(C)
    def test_by_mark(verdict):
        verdict(None)
    """
    suite.claims(several=several)
    suite.run("--ledger", "ledger.json", ret=0)
    assert [(r["claim"], r["verdict"]) for r in suite.rows()] == [(f"T1{k}", "CANNOT_RUN") for k in range(3)]
    suite.claims(several=several.replace("@pytest.mark.claim(C)", ""))
    result = suite.run(ret=1)
    assert outcomes(result) == {"skipped": 2, "errors": 1}
    result.stdout.fnmatch_lines(["*is about no claim: *"])


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


def test_the_verdict_words_are_those_of_the_ledger():
    assert {word for _, word in EXPECTED.values()} <= set(WORDS)
