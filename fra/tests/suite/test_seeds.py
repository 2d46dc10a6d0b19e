"""`--seed N` enters every seed, and what depends on it is named."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fra.errors import FraError
from fra.statistics import stats
from fra.tests.suites import FAMILY_FILE, suite
from fra.tests.verdicts.test_claim import BAD, CLAIM, GOOD, OPEN, evidence
from fra.tests.verdicts.test_ledger import make_ledger
from fra.verdicts import ledger as ledgers

seeds = importlib.import_module("fixtures.seeds")  # a test of the suite, from within the library

__all__ = ["suite"]

DRAWING = """
    import numpy as np
    import pytest
    from fra.claim import Claim, family

    CLAIM = Claim(id="T01", title="Heads do it", h0="E <= 1", bar=1.0, statistic="mean/1", stimuli=("made",), n=50)

    @pytest.fixture(scope="module")
    def evidence():
        from fra.statistics.stats import seed_of

        rng = np.random.default_rng(seed_of("draw"))
        drawn = {f"L0H{h}": rng.normal(1, 0.5, 30) for h in range(8)}
        return family(CLAIM, drawn, target="tiny", sources=None, n_boot=99)

    def test_heads(head, evidence, verdict):
        verdict(evidence[head])
"""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    stats.use_seed(0)


def test_the_runs_seed_enters_every_seed_and_none_at_zero() -> None:
    before = stats.seed_of("a", "b")
    stats.use_seed(1)
    one = stats.seed_of("a", "b")
    stats.use_seed(2)
    assert len({before, one, stats.seed_of("a", "b")}) == 3
    stats.use_seed(0)
    assert stats.seed_of("a", "b") == before
    assert stats.seed_of("seed 1", "a", "b") == one, "nothing else is changed"


def test_the_option_moves_the_numbers_and_stands_in_the_ledger(suite) -> None:
    suite.claims(draws=DRAWING)
    for n in (0, 0, 5):
        suite.run("--ledger", f"{n}.json", "--seed", str(n))
    once = suite.rows("0.json")
    suite.run("--ledger", "again.json")
    assert suite.rows("again.json") == once
    other = suite.rows("5.json")
    assert [row["effect"] for row in other] != [row["effect"] for row in once]
    header = ledgers.read(suite.path / "5.json").header
    assert header.options["seed"] == 5
    assert header.seed.startswith("5;")


def test_rows_that_depend_on_the_seed_are_named(suite) -> None:
    suite.claims(family=FAMILY_FILE)
    suite.write(
        "claims/borderline.toml",
        '[[borderline]]\nclaim = "T03"\ntarget = "tiny"\nsays = "INCONCLUSIVE with 2 of 5 seeds"\n',
    )
    result = suite.run("--ledger", "ledger.json", ret=0)
    [row] = suite.rows()
    assert row["detail"]["borderline"] == "INCONCLUSIVE with 2 of 5 seeds"
    result.stdout.fnmatch_lines(["*family  SUPPORTED*borderline: INCONCLUSIVE with 2*"])
    suite.write("claims/borderline.toml", '[[borderline]]\nclaim = "T03"\ntarget = "tiny"\n')
    suite.refused(says="says is missing or empty")


def test_moving_rows_are_counted_among_the_judged() -> None:
    def run(*conditions, claim=CLAIM):
        return make_ledger(*(evidence((c,), head=f"L0H{k}", claim=claim) for k, c in enumerate(conditions)))

    found = seeds.over([run(GOOD, BAD, OPEN), run(GOOD, BAD, BAD), run(GOOD, GOOD, OPEN)])
    assert found.judged == 3
    assert {row.head: row.verdicts for row in found.moving} == {
        "L0H1": ("REFUTED", "REFUTED", "SUPPORTED"),
        "L0H2": ("INCONCLUSIVE", "REFUTED", "INCONCLUSIVE"),
    }
    assert [row.turns for row in found.moving] == [True, False]
    assert found.moving[1].said == "INCONCLUSIVE with 2 of 3 seeds, REFUTED with 1 of 3 seeds"
    lines = list(seeds.table(found, ["seed 0", "seed 1", "seed 2"]))
    assert lines[0] == "3 judged rows, 3 seeds: 2 move (66.7 %), 1 of them between SUPPORTED and REFUTED."
    with pytest.raises(FraError, match="one run says nothing"):
        seeds.over([run(GOOD)])
    with pytest.raises(FraError, match="is not in every ledger"):
        seeds.over([run(GOOD), run(GOOD, BAD)])
    other = dataclasses.replace(CLAIM, statistic="mean/2")
    with pytest.raises(FraError, match="was registered otherwise"):
        seeds.over([run(GOOD), run(GOOD, claim=other)])


def test_the_command_writes_what_the_plugin_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n, condition in enumerate((GOOD, OPEN)):
        ledgers.write(make_ledger(evidence((condition,), head="L0H1"), options={"seed": n}), tmp_path / f"{n}.json")
    files = [str(tmp_path / f"{n}.json") for n in range(2)]
    assert seeds.main([*files, "-o", str(tmp_path)]) == 0
    assert "1 judged rows, 2 seeds: 1 move" in capsys.readouterr().out
    assert "| T01 | L0H1 | SUPPORTED | INCONCLUSIVE |" in (tmp_path / "SEEDS.md").read_text()
    assert (
        'says = "SUPPORTED with 1 of 2 seeds, INCONCLUSIVE with 1 of 2 seeds"'
        in (tmp_path / "borderline.toml").read_text()
    )
    assert seeds.main([files[0]]) == 2
