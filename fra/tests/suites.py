"""A folder with claims made for a test, and pytest run on it. `suite` is a fixture: import it beside `Suite`."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ["threads", "devices", "options", "target", "stimuli", "verdict", "resume", "session"]

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
        low, high = 1.1 if p <= 0.05 else -np.inf, 0.9 if p_refute <= 0.05 else np.float64(9.0)
        condition = Condition("effect", np.float32(effect), low, high, 1.0, np.float64(p), p_refute, power=0.9)
        return dict(candidates={"only": (condition,)}, n=np.int64(50), q=0.5) | more

    @pytest.fixture(scope="module")
    def evidence():
        found = {
            "L0H0": one(2, 0.01, 1),                                    # SUPPORTED
            "L0H1": one(0, 1, 0.01),                                    # REFUTED
            "L0H2": one(0.1, 1, 0.01),                                  # REFUTED, and known.toml says so
            "L0H3": one(3, 0.01, 1),                                    # SUPPORTED, though known.toml says REFUTED
            "L0H4": one(1, 0.5, 0.5, detail={"table": np.ones(2)}),     # INCONCLUSIVE
            "L0H5": one(float("nan"), 0.5, 1),                          # INCONCLUSIVE
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
    "L0H7": ("skipped", "NOT_APPLICABLE"),
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
