"""Differences of two shares: Fisher's table against scipy, p-values by enumeration, bounds that invert them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as sps

from fra.statistics.exact import TwoShares, fisher_table


def test_the_table_is_fishers() -> None:
    table = fisher_table(7, 12)
    for k in range(8):
        for other in range(13):
            p = sps.fisher_exact([[k, 7 - k], [other, 12 - other]], alternative="greater")[1]
            assert table[k, other] == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize(("k", "k_other"), [(7, 3), (4, 1), (2, 9), (0, 0)])
@pytest.mark.parametrize("bar", [0.0, 0.2, -0.3])
def test_p_is_the_largest_chance_of_an_outcome_as_far_out(k: int, k_other: int, bar: float) -> None:
    n, m = 8, 11
    table = fisher_table(n, m)
    far = table <= table[k, k_other] * (1 + 1e-9)
    shares = np.linspace(max(0, -bar), min(1, 1 - bar), 2001)
    chance = [
        float(sps.binom.pmf(np.arange(n + 1), n, s + bar) @ far @ sps.binom.pmf(np.arange(m + 1), m, s)) for s in shares
    ]
    p = float(TwoShares(k, n, k_other, m).p_above(bar)[0])
    assert max(chance) <= p * (1 + 1e-9)  # bounded from above
    assert p <= max(chance) * 1.06 + 1e-4
    turned = float(TwoShares(k_other, m, k, n).p_below(-bar)[0])
    assert turned == pytest.approx(p)


@pytest.mark.parametrize(
    ("k", "n", "k_other", "m"), [(37, 53, 1, 45), (1, 102, 1, 102), (3, 9, 20, 40), (5, 5, 0, 300)]
)
def test_bounds_invert_the_tests(k: int, n: int, k_other: int, m: int) -> None:
    sample = TwoShares(k, n, k_other, m)
    for level in (0.05, 0.05 / 9):
        low, high = float(sample.lower(level)[0]), float(sample.upper(level)[0])
        assert low <= sample.estimate <= high
        assert (float(sample.p_above(0.0)[0]) <= level) == (low > 0)
        assert (float(sample.p_below(0.0)[0]) <= level) == (high < 0)
        if low > -0.999:
            assert float(sample.p_above(low + 1e-6)[0]) > level >= float(sample.p_above(low - 1e-6)[0])
    fisher = sps.fisher_exact([[k, n - k], [k_other, m - k_other]], alternative="greater")[1]
    assert float(sample.p_above(0.0)[0]) <= min(1.0, 1.1 * fisher + 1e-6)  # Boschloo's test is no weaker


def test_power_is_that_of_fishers_test() -> None:
    sample, rng = TwoShares(1, 20, 2, 25), np.random.default_rng(0)
    k, other = rng.binomial(20, 0.58, 3000), rng.binomial(25, 0.08, 3000)
    p = [sps.fisher_exact([[a, 20 - a], [b, 25 - b]], alternative="greater")[1] for a, b in zip(k, other, strict=True)]
    assert float(sample.power(0.5, 0.01)[0]) == pytest.approx(np.mean(np.asarray(p) <= 0.01), abs=0.02)
    below = TwoShares(20, 25, 18, 20)
    k, other = rng.binomial(25, 0.4, 3000), rng.binomial(20, 0.9, 3000)
    p = [sps.fisher_exact([[a, 25 - a], [b, 20 - b]], alternative="less")[1] for a, b in zip(k, other, strict=True)]
    assert float(below.power(0.5, 0.01, above=False)[0]) == pytest.approx(np.mean(np.asarray(p) <= 0.01), abs=0.02)


def test_the_level_holds_where_the_shares_are_equal() -> None:
    for share in (0.05, 0.3, 0.5, 0.9):
        own, other = (sps.binom.pmf(np.arange(n + 1), n, share) for n in (10, 14))
        p = np.array([[float(TwoShares(a, 10, b, 14).p_above(0.0)[0]) for b in range(15)] for a in range(11)])
        assert float(own @ (p <= 0.05) @ other) <= 0.05


def test_without_tries_nothing_is_told() -> None:
    for sample in (TwoShares(0, 0, 1, 3), TwoShares(1, 3, 0, 0)):
        assert np.isnan(sample.estimate) and sample.p_above(0.0)[0] == sample.p_below(0.0)[0] == 1.0
        assert np.isnan(sample.power(0.5, 0.05)[0])
