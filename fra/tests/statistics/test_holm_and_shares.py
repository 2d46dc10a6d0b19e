"""Holm and its levels, ranks and shares, against statsmodels and scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as sps
from statsmodels.stats.multitest import multipletests

from fra.statistics import stats
from fra.statistics.stats import ClusterMeans


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


P_VALUES = st.lists(
    st.sampled_from([0.0, 1e-4, 0.01, 0.05 / 3, 0.02, 0.025, 0.05, 0.2, 0.5, 1.0]), min_size=1, max_size=8
)


@given(P_VALUES, st.sampled_from([0.01, 0.05, 0.1]))
def test_holm_and_its_levels(p, level):
    adjusted = stats.holm(p)
    levels = stats.holm_levels(p, level)
    assert ((np.array(p) <= levels) == (adjusted <= level)).all()
    assert ((levels > 0) | (np.array(p) == 0) | (adjusted <= level)).all()
    assert (levels <= level * (1 + 1e-12)).all()
    assert (levels >= level / len(p) * (1 - 1e-12)).all() or (adjusted > level).any()


def test_holm_levels_by_hand():
    # rejected at .05/4 and .05/3; the third fails at .05/2, which then holds for the fourth too
    assert np.allclose(stats.holm_levels([0.03, 0.001, 0.9, 0.01], 0.05), [0.025, 0.0125, 0.025, 0.05 / 3])
    assert np.allclose(stats.holm_levels([0.001, 0.001], 0.05), [0.025, 0.025])


def test_a_bound_at_its_holm_level_agrees_with_holm(rng):
    for shift in (0.0, 0.3, 0.6, 1.0):
        heads = [ClusterMeans(rng.normal(shift * h / 8, 1, 40), seed=h, n_boot=999) for h in range(8)]
        p = np.array([head.p_above(0.1)[0] for head in heads])
        low = [head.lower(level)[0] for head, level in zip(heads, stats.holm_levels(p, 0.05), strict=True)]
        assert ((stats.holm(p) <= 0.05) == (np.array(low) > 0.1)).all()


@pytest.mark.parametrize("size", [1, 2, 24])  # few calls: statsmodels collects garbage at each, which is slow
def test_holm_and_benjamini_hochberg_are_those_of_statsmodels(rng, size):
    p = np.round(rng.random(size) ** 3, 2)  # rounded: ties
    assert np.allclose(stats.holm(p), multipletests(p, method="holm")[1], rtol=1e-12)
    assert np.allclose(stats.benjamini_hochberg(p), multipletests(p, method="fdr_bh")[1], rtol=1e-12)


def test_nan_p_counts_as_one():
    assert stats.holm([0.01, np.nan]).tolist() == [0.02, 1.0]
    assert np.allclose(stats.holm([0.03, 0.001, 0.9, 0.01]), [0.06, 0.004, 0.9, 0.03])
    assert stats.benjamini_hochberg([0.01, np.nan]).tolist() == [0.02, 1.0]
    assert stats.holm_levels([0.01, np.nan], 0.05)[1] == 0.05
    assert stats.holm([]).size == stats.benjamini_hochberg([]).size == stats.holm_levels([], 0.05).size == 0


def test_rank_p():
    assert stats.rank_p(5.0, [1, 2, 3]) == 0.25
    assert stats.rank_p(2.0, [1, 2, 3]) == 0.75  # a tie counts
    assert stats.rank_p(np.nan, [1, 2, 3]) == 1.0
    assert stats.rank_p(5.0, [1, np.nan, 3]) == 0.5
    assert stats.rank_p(5.0, []) == 1.0


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0.01, 0.05, 0.2]))
def test_clopper_pearson_inverts_the_binomial_test(k, more, level):
    n = k + more
    low, high = stats.clopper_pearson(k, n, level)
    assert 0 <= low <= high <= 1
    if k > 0:
        assert sps.binom.sf(k - 1, n, low) == pytest.approx(level, rel=1e-6)
    else:
        assert low == 0
    if more > 0:
        assert sps.binom.cdf(k, n, high) == pytest.approx(level, rel=1e-6)
    else:
        assert high == 1


def test_twenty_nine_of_twenty_nine_shows_above_ninety_per_cent():
    assert stats.clopper_pearson(29, 29, 0.05)[0] > 0.90 > stats.clopper_pearson(28, 28, 0.05)[0]
