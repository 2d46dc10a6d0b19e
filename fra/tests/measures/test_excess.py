"""Q06: the two counts on numbers made up, where the answer is known, and on the hand-built circuit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fra.claim import Outcome, judge
from fra.core.coded import measure_arm
from fra.induction.channels import Effects, measure_arms
from fra.induction.cih import Screen
from fra.induction.status import HeadStatus
from fra.measures.channels.q06_excess import (
    FALSE_POSITIVES,
    SCRAMBLES,
    ExcessNumbers,
    count,
    judged,
    layer_numbers,
    margins,
)
from fra.stimuli import repeated
from fra.tests import circuit
from fra.tests.claims import claim

CLAIM = claim("Q06")
BARS = CLAIM.bars
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
        rng.normal(0.1, 0.02, SCRAMBLES),
        rng.normal(0.0, 0.002, SCRAMBLES),
    )


def verdict(margin_of: dict[str, float], contrast_of: dict[str, float]):
    rng = np.random.default_rng(0)
    found = {h: numbers(rng, margin_of[h], contrast_of[h]) for h in margin_of}
    counts = count(found, 60 * ROWS, np.full(60, ROWS), BARS, seed=1)
    status = {h: HeadStatus(h, "TIH" if contrast_of[h] > 0.2 else "not a TIH", 0.0, 0.0, 0.0, {}) for h in found}
    return counts, judge(CLAIM, judged(CLAIM, Screen("t", "repeated_random", status, {}, {}, str), counts, 60))


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


def test_thresholds_let_the_same_share_of_scrambles_through_both_tests() -> None:
    rng = np.random.default_rng(3)
    found = {f"L1H{k}": numbers(rng, 0.1, 0.0) for k in range(8)}
    counts = count(found, 60 * ROWS, np.full(60, ROWS), BARS, seed=1)
    thresholds = {"scrambled_margin": counts.margin_threshold, "scrambled_contrast": counts.contrast_threshold}
    for part, threshold in thresholds.items():
        draws = np.concatenate([getattr(n, part) for n in found.values()])
        assert FALSE_POSITIVES - 2 / len(draws) < (draws > threshold[0]).mean() <= FALSE_POSITIVES
    assert abs(counts.null.mean()) < 0.3


def test_margin_is_the_best_channels_smallest_ratio() -> None:
    rows = np.full((40, 2), 10.0)
    effects = Effects(rows * [0.3, 0.2], rows * [0.01, 0.06], rows * [0.5, 0.15], rows, rows)
    assert margins(effects, 400.0, BARS) == pytest.approx([1.5])  # [3, .5, 5] and [2, 3, 1.5]
    weight = np.zeros((1, 40))
    weight[0, :3] = 1
    assert margins(effects, 400.0, BARS, weight) == pytest.approx([1.5])
    rare = dataclasses.replace(effects, covered=rows * [1.0, 0.0])
    assert margins(rare, 400.0, BARS) == pytest.approx([0.5])


def test_the_circuits_head_passes_both_tests_and_the_other_neither() -> None:
    model, sae = circuit.model(), circuit.dictionary()
    made = repeated.repeated_random(90, np.arange(48), circuit.N_CTX, circuit.BOS, ("excess",))
    discovery, confirmation = repeated.collate(made[:45]), repeated.collate(made[45:])
    arm = measure_arm(model, sae, discovery.tokens, 1, circuit.HOOK)
    arms = measure_arms(model, sae, confirmation, 1, circuit.HOOK)
    screen = Screen("circuit", "repeated_random", {}, {}, {}, str)
    found = layer_numbers(arm, arms, screen, 1, [0, 1], BARS, discovery)
    counts = count(found, float(len(confirmation.row_doc)), confirmation.periods.numpy().astype(float), BARS, seed=0)
    assert counts.carrying == counts.inducing == ["L1H0"]
    assert counts.margin[0] > 5
    assert counts.contrast[0] > 0.9
    assert counts.excess == 0
