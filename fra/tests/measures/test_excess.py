"""Q06: the two counts on numbers made up, where the answer is known, and on the hand-built circuit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fra.claim import Outcome, judge
from fra.induction.cih import Screen
from fra.induction.status import HeadStatus
from fra.measures.channels.designs import HeadExcess
from fra.measures.channels.q06_excess import (
    CountDraws,
    ExcessNumbers,
    HeadCounts,
    count,
    excess_evidence,
    head_numbers,
    judged,
    margins,
)
from fra.search.channels import Effects
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.induction.test_cih_circuit import layer_one, screened
from fra.verdicts.decide import Planted

CLAIM = claim("Q06")
DESIGN = HeadExcess()
LEAST = 20
ROWS = 30.0


def numbers(rng: np.random.Generator, margin: float, contrast: float, n: int = 60) -> ExcessNumbers:
    """A head whose best channel clears the bars `margin` times; its scrambles clear next to nothing."""
    rows = np.full((n, 2), ROWS)
    noise = rng.normal(1.0, 0.05, (n, 2))
    scale = np.array([margin, margin / 3])
    effects = Effects(
        nats=rows * noise * scale * 0.1,
        attention=rows * noise * scale * 0.02,
        contrast=rows * noise * scale * 0.1,
        rows=rows,
        covered=rows,
    )
    return ExcessNumbers(
        effects,
        ROWS * rng.normal(contrast, 0.01, n),
        rng.normal(0.1, 0.02, DESIGN.scrambles),
        rng.normal(0.0, 0.002, DESIGN.scrambles),
    )


def counted(found: dict[str, ExcessNumbers]) -> HeadCounts:
    return count(found, np.full(60, ROWS), np.arange(60), DESIGN, LEAST, 0.20, seed=1)


def verdict(margin_of: dict[str, float], contrast_of: dict[str, float], power: int | None = None):
    rng = np.random.default_rng(0)
    found = {h: numbers(rng, margin_of[h], contrast_of[h]) for h in margin_of}
    counts = counted(found)
    status = {h: HeadStatus(h, "TIH" if contrast_of[h] > 0.2 else "not a TIH", 0.0, 0.0, 0.0, {}) for h in found}
    planted = None if power is None else (lambda: Planted(power, 100))
    screen = Screen("t", "repeated_random", status, {}, {}, str)
    return counts, judge(CLAIM, judged(CLAIM, screen, counts, 60, planted))


def family(carrying: int, inducing: int, n: int = 16) -> tuple[dict[str, float], dict[str, float]]:
    names = [f"L{k // 8}H{k % 8}" for k in range(n)]
    return (
        {h: 2.0 if k < carrying else 0.05 for k, h in enumerate(names)},
        {h: 0.8 if k < inducing else -0.01 for k, h in enumerate(names)},
    )


def test_an_excess_beyond_scrambles_is_supported() -> None:
    counts, found = verdict(*family(9, 3))
    assert counts.excess == counts.by_bars == 6
    assert found.outcome is Outcome.SUPPORTED, found.reason


@pytest.mark.parametrize(("carrying", "inducing"), [(3, 3), (2, 3), (4, 3)])
def test_no_or_a_small_excess_is_not(carrying: int, inducing: int) -> None:
    counts, found = verdict(*family(carrying, inducing))
    assert counts.excess == carrying - inducing
    assert counts.needed(0.05) >= 2
    assert found.outcome is Outcome.INCONCLUSIVE  # nothing was planted, so no power is known


def test_fewer_heads_are_refuted_where_planted_families_pass() -> None:
    assert verdict(*family(2, 8), power=100)[1].outcome is Outcome.REFUTED
    assert verdict(*family(2, 8), power=80)[1].outcome is Outcome.INCONCLUSIVE
    assert verdict(*family(9, 3), power=100)[1].outcome is Outcome.SUPPORTED


def test_a_head_of_negative_contrast_is_no_induction_head() -> None:
    """Whatever its scrambles have: least of all where these are lower still."""
    rng = np.random.default_rng(4)
    found = {"L1H0": numbers(rng, 0.05, -0.01), "L1H1": numbers(rng, 0.05, 0.5)}
    found = {h: dataclasses.replace(own, scrambled_contrast=rng.normal(-0.2, 0.01, 20)) for h, own in found.items()}
    assert counted(found).inducing == ["L1H1"]


def test_a_head_is_held_against_its_own_scrambles_alone() -> None:
    rng = np.random.default_rng(5)
    found = {f"L1H{k}": numbers(rng, 0.5, 0.1) for k in range(4)}
    before = counted(found)
    loud = dataclasses.replace(found["L1H3"], scrambled_margin=np.full(20, 9.0), scrambled_contrast=np.full(20, 0.9))
    after = counted({**found, "L1H3": loud})
    assert before.carrying == before.inducing == ["L1H0", "L1H1", "L1H2", "L1H3"]
    assert after.carrying == after.inducing == ["L1H0", "L1H1", "L1H2"]
    np.testing.assert_array_equal(before.margin_threshold[:3], after.margin_threshold[:3])


def test_channels_above_scrambles_but_below_the_bars_are_no_excess() -> None:
    margin, contrast = family(9, 3)
    weak = {h: 0.5 if m > 1 and contrast[h] < 0.2 else m for h, m in margin.items()}
    counts, found = verdict(weak, contrast)
    assert counts.excess == 6
    assert counts.by_bars == 0
    assert found.outcome is not Outcome.SUPPORTED


def test_a_family_too_small_for_the_statement_is_undecided() -> None:
    _, found = verdict(*family(3, 2, n=3))
    assert found.outcome is Outcome.INCONCLUSIVE
    assert "is needed to tell it from scrambles" in found.reason


def test_both_tests_call_one_scramble_in_twenty_positive() -> None:
    rng = np.random.default_rng(3)
    found = {f"L{k // 8}H{k % 8}": numbers(rng, 0.1, 0.0) for k in range(64)}
    counts = counted(found)
    assert abs(counts.null.mean()) < 0.5
    # carrying less inducing, each binomial(64, 1/20) and independent here
    assert counts.null.std() == pytest.approx(np.sqrt(2 * 64 * 0.05 * 0.95), rel=0.15)
    low = {h: dataclasses.replace(own, scrambled_contrast=own.scrambled_contrast - 1) for h, own in found.items()}
    assert counted(low).null.mean() == pytest.approx(64 / 20, rel=0.15), "no scramble below zero is an induction head"


def test_resampled_bounds_exclude_the_bar_exactly_where_the_test_rejects() -> None:
    rng = np.random.default_rng(0)
    for estimate in (-2.0, 0.0, 3.0):
        sample = CountDraws(estimate, np.round(rng.normal(estimate, 1.5, 999)), 60)
        for level in (0.05, 0.01, 1e-5):
            for bar in (-3.0, -1.0, 0.0, 1.0, 2.0):
                assert (sample.lower(level)[0] > bar) == (sample.p_above(bar)[0] <= level)
                assert (sample.upper(level)[0] < bar) == (sample.p_below(bar)[0] <= level)
        assert sample.lower(0.05)[0] <= estimate <= sample.upper(0.05)[0]


def test_margin_is_the_best_channels_smallest_ratio() -> None:
    rows = np.full((40, 2), 10.0)
    effects = Effects(rows * [0.3, 0.2], rows * [0.01, 0.06], rows * [0.5, 0.15], rows, rows)
    assert margins(effects, 400.0, DESIGN, LEAST) == pytest.approx([1.5])  # [3, .5, 5] and [2, 3, 1.5]
    weight = np.zeros((1, 40))
    weight[0, :3] = 1
    assert margins(effects, 400.0, DESIGN, LEAST, weight) == pytest.approx([1.5])
    rare = dataclasses.replace(effects, covered=rows * [1.0, 0.0])
    assert margins(rare, 400.0, DESIGN, LEAST) == pytest.approx([0.5])


def test_the_circuits_head_passes_both_tests_and_the_other_neither() -> None:
    layer, _ = layer_one(circuit.model())
    found = {f"L1H{head}": head_numbers(layer, head, DESIGN) for head in (0, 1)}
    periods = layer.confirmation.batch.periods.numpy().astype(float)
    counts = count(found, periods, np.arange(len(periods)), DESIGN, LEAST, 0.20, seed=0)
    assert counts.carrying == counts.inducing == ["L1H0"]
    assert counts.margin[0] > 5
    assert counts.contrast[0] > 0.9
    assert counts.excess == 0


def test_selection_never_sees_the_confirmation_documents() -> None:
    """The search's candidates, of the head and of its scrambles, are the same on other confirmation documents."""
    (layer, _), (other, _) = layer_one(circuit.model()), layer_one(circuit.model(), measured="others")
    for head in (0, 1):
        assert bool((layer.candidates(head, 20)[0] == other.candidates(head, 20)[0]).all())
    margin = [head_numbers(each, 0, DESIGN).effects.nats for each in (layer, other)]
    assert not np.array_equal(*margin)


def test_the_circuit_has_no_excess_from_end_to_end() -> None:
    """One head that carries channels and induces, another that does neither."""
    evidence = excess_evidence(CLAIM, screened(circuit.model()))
    assert judge(CLAIM, evidence).outcome is not Outcome.SUPPORTED
    assert evidence.detail["heads that carry channels"] == ["L1H0"]
    assert evidence.detail["heads that are induction heads by the calibrated test"] == ["L1H0"]
    assert evidence.n == 90
