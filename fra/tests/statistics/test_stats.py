"""fra.stats against scipy, statsmodels and textbook loops, and its exact properties.

Holm, ranks and shares are in test_holm_and_shares, what can only be simulated in test_calibration.
"""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as sps

from fra.errors import FraError
from fra.statistics import stats, unseen
from fra.statistics.bounds import power_of_share
from fra.statistics.stats import ClusterMeans

N_BOOT = 199


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def skewed(n_docs: int, n_cand: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n_docs)
    counts = rng.poisson(2.0, (n_docs, n_cand)).astype(float)
    return counts * rng.lognormal(0, 1, (n_docs, n_cand)), counts


@st.composite
def samples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Sums and counts of few documents, degenerate ones included; on a grid, so that ties and equal documents occur."""
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 4)))
    counts = draw(arrays(np.float64, shape, elements=st.integers(0, 3).map(float)))
    sums = draw(arrays(np.float64, shape, elements=st.integers(-8, 40).map(lambda k: k / 4)))
    return np.where(counts > 0, sums, 0.0), counts, draw(st.integers(0, 2**32))


# ---- estimate and standard error ----


def test_one_row_a_document_is_the_t_test(rng):
    x = rng.lognormal(0, 1, (30, 6))
    means = ClusterMeans(x, seed=0, n_boot=N_BOOT)
    assert np.allclose(means.estimate, x.mean(axis=0), rtol=1e-12)
    assert np.allclose(means.se, sps.sem(x, axis=0), rtol=1e-12)
    expected = sps.ttest_1samp(x, 1.0).statistic
    assert np.allclose((means.estimate - 1.0) / means.se, expected, rtol=1e-10)


def test_ratio_and_its_error_are_those_of_clustered_weighted_least_squares(rng):
    """Every document split into its rows: statsmodels sees rows and clusters, we see sums and counts."""
    sums, counts = np.zeros((25, 3)), np.zeros((25, 3))
    for c in range(3):
        document = np.repeat(np.arange(25), rng.poisson(3.0, 25))
        y = rng.exponential(1.0, document.size) + document % 3
        np.add.at(sums[:, c], document, y)
        np.add.at(counts[:, c], document, 1.0)
        plain = sm.WLS(y, np.ones_like(y)).fit(cov_type="cluster", cov_kwds={"groups": document})
        means = ClusterMeans(sums[:, c], counts[:, c], seed=0, n_boot=N_BOOT)
        assert means.estimate[0] == pytest.approx(plain.params[0], rel=1e-10)
        assert means.se[0] == pytest.approx(plain.bse[0], rel=1e-10)
        assert means.n_live[0] == np.unique(document).size
        live = counts[:, c] > 0
        ratio = sums[live, c] / counts[live, c]
        by_document = sm.WLS(ratio, np.ones_like(ratio), weights=counts[live, c]).fit(
            cov_type="cluster", cov_kwds={"groups": np.flatnonzero(live)}
        )
        assert means.se[0] == pytest.approx(by_document.bse[0], rel=1e-10)


# ---- the bootstrap, written out with loops and sampled documents ----


def textbook_t(sums: np.ndarray, counts: np.ndarray, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """t* [n_boot, n_cand] by drawing documents, recomputing everything (Efron and Tibshirani 1993, ch. 12.5)."""
    whole = ClusterMeans(sums, counts, seed=0, n_boot=1).estimate
    out = []
    for _ in range(n_boot):
        drawn = rng.integers(len(sums), size=len(sums))
        again = ClusterMeans(sums[drawn], counts[drawn], seed=0, n_boot=1)
        out.append((again.estimate - whole) / again.se)
    return np.array(out)


def with_guard(sums: np.ndarray, counts: np.ndarray, above: bool) -> tuple[np.ndarray, np.ndarray]:
    """The guard's document, one candidate at a time."""
    more_sums, more_counts = [], []
    for s, n in zip(sums.T, counts.T, strict=True):
        e = s.sum() / n.sum()
        per_row = s[n > 0] / n[n > 0] - e
        against, other = (-per_row.min(), per_row.max()) if above else (per_row.max(), -per_row.min())
        distance = max(1.5 * (against - other), 0.8 * against)
        more_counts.append(n[n > 0].mean())
        more_sums.append(n[n > 0].mean() * (e - distance if above else e + distance))
    return np.vstack([sums, more_sums]), np.vstack([counts, more_counts])


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("simultaneous", [True, False])
def test_bounds_are_those_of_the_textbook_bootstrap_t(above: bool, simultaneous: bool):
    sums, counts = skewed(40, 3)
    means = ClusterMeans(sums, counts, seed=3, n_boot=9_999)
    s, n = with_guard(sums, counts, above)
    guarded = ClusterMeans(s, n, seed=0, n_boot=1)
    t = textbook_t(s, n, 4_000, np.random.default_rng(5))
    t = t if above else -t
    tail = means._above if above else means._below
    found = tail.bound(np.full(3, 0.1), simultaneous) * (1 if above else -1)  # without the margins beside the guard
    at_bound = (guarded.estimate - found) / guarded.se if above else (found - guarded.estimate) / guarded.se
    beyond = ((t.max(axis=1)[:, None] if simultaneous else t) > at_bound).mean(axis=0)
    # four standard errors of a share of 0.1 between two bootstraps of 4 000 and 9 999
    assert np.abs(beyond - 0.1).max() < 4 * np.sqrt(0.09 * (1 / 4_000 + 1 / 9_999))
    # right-skewed samples need the guard above them more than below
    moved = np.abs(guarded.estimate - means.estimate) / means.se
    assert (moved < 0.25).all() == above, moved


@pytest.mark.parametrize("above", [True, False])
def test_bounds_keep_the_shift_and_students_margin(above: bool):
    """At every level the lower of the bootstrap's bound less the shift and of Student's, one number at a time."""
    rng = np.random.default_rng(6)
    sums = np.stack([rng.normal(size=130), rng.exponential(size=130), -rng.exponential(size=130)], axis=1)
    means = ClusterMeans(sums, seed=3, n_boot=4_999)
    tail, sign = (means._above, 1) if above else (means._below, -1)
    decided = set()
    for level in (0.2, 0.05, 0.01, 0.002):
        found = means.lower(level, False) if above else -means.upper(level, False)
        bare = tail.bound(np.full(3, level), False)
        for c in range(3):
            x = sign * sums[:, c]
            against, other = x.mean() - x.min(), x.max() - x.mean()
            distance = max(1.5 * (against - other), 0.8 * against)
            shift = max(np.log(0.05 / level), 0.0) / 130 * distance
            student = x.mean() - sps.t.isf(level, 129) * sps.sem(x)
            assert found[c] == pytest.approx(min(bare[c] - shift, student), rel=1e-9)
            decided.add(bool(student < bare[c] - shift))
    assert decided == {True, False}


def test_symmetric_sample_loses_little_against_t():
    x = sps.norm.ppf((np.arange(120) + 0.5) / 120)
    means = ClusterMeans(x, seed=1)
    half = sps.t.isf(0.05, 119) * means.se[0]
    assert half < means.upper(0.05)[0] < 1.25 * half
    assert means.lower(0.05)[0] == pytest.approx(-means.upper(0.05)[0], rel=0.03)
    bar = -0.25
    plain = sps.ttest_1samp(x, bar, alternative="greater").pvalue
    assert plain < means.p_above(bar)[0] < 5 * plain
    assert means.p_below(-bar)[0] == pytest.approx(means.p_above(bar)[0], rel=0.2)


# ---- the floor, and samples that agree ----


def floor(n: int) -> float:
    return float((1 - unseen.RARE) ** n)


def test_no_p_is_smaller_than_the_chance_to_see_nothing_of_a_rare_kind(rng):
    for n in (20, 39, 40, 61, 101):
        x = 10 + rng.normal(size=(n, 3))
        means = ClusterMeans(x, seed=0)
        for p, bound in ((means.p_above, means.lower), (means.p_below, means.upper)):
            far = -1e3 if bound == means.lower else 1e3
            assert p(far, False)[0] == pytest.approx(max(floor(n), 1e-4), abs=1e-4)
            assert p(far)[0] == pytest.approx(max(3 * floor(n), 1e-4), abs=1e-4)
            assert p(far, False)[0] >= floor(n)
            assert np.isfinite(bound(0.05, False)).all() == (n >= 40)
            assert np.isinf(bound(0.99 * floor(n), False)).all()
    assert [unseen.sources_for(level) for level in (0.05, 0.01, 0.0005)] == [40, 61, 101]
    for level in (0.05, 0.01, 0.0005):
        assert floor(unseen.sources_for(level)) <= level < floor(unseen.sources_for(level) - 1)


def test_a_sample_skewed_the_harmless_way_has_no_floor_and_one_odd_document_does_not_make_it_so(rng):
    x = rng.exponential(size=30)
    means = ClusterMeans(x, seed=0)
    assert means.p_above(-50.0)[0] < 0.001 < floor(30) <= means.p_below(50.0)[0]
    few = ClusterMeans(rng.exponential(size=unseen.SEEN - 1) ** 2, seed=0)
    assert few.p_above(-50.0)[0] >= floor(unseen.SEEN - 1)
    for odd in (1, 2, 3):
        y = np.concatenate([rng.normal(size=30 - odd), 50.0 + np.arange(odd)])
        assert (ClusterMeans(y, seed=0).p_above(-1e4)[0] >= floor(30)) == (odd < 3)


@pytest.mark.parametrize("n", [12, 40, 90])
def test_documents_that_all_agree_are_decided_by_their_number(n):
    counts = np.arange(1.0, n + 1) % 4
    live = int((counts > 0).sum())
    for value, rows in ((0.9, np.ones(n)), (0.9, counts), (0.0, counts), (-7.0, np.ones(n))):
        means = ClusterMeans(value * rows, rows, seed=0, n_boot=N_BOOT)
        p = floor(int((rows > 0).sum()))
        assert means.constant.tolist() == [True] and means.testable.tolist() == [False]
        assert means.estimate[0] == pytest.approx(value)
        assert means.se[0] == 0
        assert means.p_above(value - 0.1)[0] == means.p_below(value + 0.1)[0] == pytest.approx(p, rel=1e-12)
        assert means.p_above(value + 0.1)[0] == means.p_below(value - 0.1)[0] == 1
        at = float(means.p_above(value - 0.1)[0])
        for level in (0.05, 0.01, at, np.nextafter(at, 0)):
            assert means.lower(level)[0] == (means.estimate[0] if at <= level else -np.inf)
            assert means.upper(level)[0] == (means.estimate[0] if at <= level else np.inf)
            assert stats.detectable(means, level)[0] == (0 if at <= level else np.inf)
            assert stats.power_above(means, 0.0, 0.1, level)[0] == float(at <= level)
            assert stats.power_above(means, 0.1, 0.1, level)[0] == 0
    several = ClusterMeans(np.full((n, 5), 0.9), seed=0)
    assert several.p_above(0.5)[0] == pytest.approx(min(1.0, 5 * floor(n)))
    assert live < n


def test_nearly_all_agreeing_is_no_better_than_all_and_grows_worse_with_what_does_not():
    for n in (40, 60, 90, 120):
        ladder = [0.9, 0.8999, 0.7, 0.4, -5.0, -60.0]
        means = [ClusterMeans(np.array([0.9] * (n - 1) + [odd]), seed=0) for odd in ladder]
        p = [float(m.p_above(0.5)[0]) for m in means]
        low = [float(m.lower(0.05)[0]) for m in means]
        assert p[0] == min(p)
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(p)), p
        assert all(a >= b for a, b in itertools.pairwise(low)), low
        assert p[-1] > 0.3  # the mean itself lies below the bar
        one = sps.binom.cdf(1, n, unseen.RARE)
        assert p[1] == pytest.approx(one, abs=2e-4) if one < 0.12 else p[1] < 0.15
        # on the other side an odd one changes nothing
        assert ClusterMeans(np.array([0.9] * (n - 1) + [9.0]), seed=0).p_above(0.5)[0] <= p[0] + 1e-4
    # half and half is no agreement
    assert (unseen.Agreement.above(np.array([[1.0], [1.0], [2.0], [3.0]]), np.ones((4, 1))).p == 1).all()


def test_agreement_is_the_binomial_of_those_below_the_common_value():
    x = np.array([[2.0] * 36 + [1.5, 3.0, 8.0, 8.5]]).T
    found = unseen.Agreement.above(x, np.ones_like(x))
    assert found.p[0] == pytest.approx(sps.binom.cdf(1, 40, unseen.RARE))
    low = np.minimum(x, 2.0).mean()
    distance = max(1.5 * ((low - 1.5) - (2.0 - low)), 0.8 * (low - 1.5))
    bound = low - distance * (1 + max(np.log(0.05 / found.p[0]), 0)) / 40
    assert found.estimate[0] + found.lift[0] == pytest.approx(bound)
    assert found.estimate[0] == pytest.approx(x.mean())


def test_p_is_never_zero_and_counts_resamples(rng):
    x = 10 + rng.normal(size=(150, 2))
    means = ClusterMeans(x, seed=0, n_boot=99)
    assert (means.p_above(0.0) == 0.01).all()
    assert (means.p_below(0.0) == 1.0).all()
    assert np.isneginf(means.lower(0.009)).all()  # no p is that small with 99 resamples: nothing can be said
    assert np.isfinite(means.lower(0.01)).all()


# ---- properties ----


@settings(deadline=None, max_examples=40)
@given(samples(), st.lists(st.integers(-20, 80).map(lambda k: k / 8), min_size=2, max_size=6), st.booleans())
def test_bounds_invert_tests_and_p_is_monotone_in_the_bar(sample, bars, simultaneous):
    sums, counts, seed = sample
    means = ClusterMeans(sums, counts, seed=seed, n_boot=N_BOOT)
    bars = sorted(bars)
    above = np.array([means.p_above(bar, simultaneous) for bar in bars])
    below = np.array([means.p_below(bar, simultaneous) for bar in bars])
    assert (np.diff(above, axis=0) >= 0).all()
    assert (np.diff(below, axis=0) <= 0).all()
    seen = [p for p in (*above.ravel()[:3], *below.ravel()[:3]) if p < 1]  # at level 1 anything is rejected
    for level in (0.001, 0.005, 0.05, 0.5, *seen):
        for bar, p_above, p_below in zip(bars, above, below, strict=True):
            assert ((p_above <= level) == (means.lower(level, simultaneous) > bar)).all()
            assert ((p_below <= level) == (means.upper(level, simultaneous) < bar)).all()
    # at the bound itself (the bar that a bound would meet), and one float beyond it
    for level in (0.05, 0.3):
        low, high = means.lower(level, simultaneous), means.upper(level, simultaneous)
        ok = np.isfinite(low)
        assert (means.p_above(np.where(ok, low, 0), simultaneous)[ok] > level).all()
        assert (means.p_above(np.where(ok, np.nextafter(low, -np.inf), 0), simultaneous)[ok] <= level).all()
        ok = np.isfinite(high)
        assert (means.p_below(np.where(ok, high, 0), simultaneous)[ok] > level).all()
        assert (means.p_below(np.where(ok, np.nextafter(high, np.inf), 0), simultaneous)[ok] <= level).all()


@settings(deadline=None, max_examples=40)
@given(samples(), st.integers(-16, 16).map(float), st.sampled_from([0.25, 2.0, 1024.0]))
def test_shift_and_scale_move_with_the_effect(sample, shift, scale):
    """Powers of two and integers: exact in floating point, so that ties stay ties."""
    sums, counts, seed = sample
    plain = ClusterMeans(sums, counts, seed=seed, n_boot=N_BOOT)
    moved = ClusterMeans(scale * (sums + shift * counts), counts, seed=seed, n_boot=N_BOOT)
    assert (plain.testable == moved.testable).all()
    ok = plain.testable
    assert np.allclose(moved.estimate[ok], scale * (plain.estimate[ok] + shift), atol=1e-9 * scale)
    assert np.allclose(moved.se[ok], scale * plain.se[ok], rtol=1e-7)
    for simultaneous in (True, False):
        for bound in ("lower", "upper"):
            a = getattr(plain, bound)(0.1, simultaneous)
            b = getattr(moved, bound)(0.1, simultaneous)
            assert (np.isfinite(a) == np.isfinite(b)).all()
            f = np.isfinite(a)
            assert np.allclose(b[f], scale * (a[f] + shift), rtol=1e-6, atol=1e-6 * scale)


@settings(deadline=None, max_examples=40)
@given(samples())
def test_reflection_swaps_the_directions(sample):
    sums, counts, seed = sample
    plain = ClusterMeans(sums, counts, seed=seed, n_boot=N_BOOT)
    mirror = ClusterMeans(-sums, counts, seed=seed, n_boot=N_BOOT)
    for simultaneous in (True, False):
        assert (plain.p_above(0.75, simultaneous) == mirror.p_below(-0.75, simultaneous)).all()
        assert (plain.lower(0.1, simultaneous) == -mirror.upper(0.1, simultaneous)).all()


@settings(deadline=None, max_examples=40)
@given(samples())
def test_simultaneous_is_never_bolder_than_single(sample):
    sums, counts, seed = sample
    means = ClusterMeans(sums, counts, seed=seed, n_boot=N_BOOT)
    assert (means.p_above(0.5) >= means.p_above(0.5, simultaneous=False)).all()
    assert (means.p_below(0.5) >= means.p_below(0.5, simultaneous=False)).all()
    assert (means.lower(0.1) <= means.lower(0.1, simultaneous=False)).all()
    assert (means.upper(0.1) >= means.upper(0.1, simultaneous=False)).all()
    alone = [ClusterMeans(sums[:, c], counts[:, c], seed=seed, n_boot=N_BOOT) for c in range(sums.shape[1])]
    assert (means.p_above(0.5, simultaneous=False) == [one.p_above(0.5)[0] for one in alone]).all()


def test_order_of_documents_and_candidates_does_not_matter(rng):
    sums, counts = skewed(50, 6)
    means = ClusterMeans(sums, counts, seed=7)
    documents, candidates = rng.permutation(50), rng.permutation(6)
    shuffled = ClusterMeans(sums[documents], counts[documents], seed=7)
    assert np.allclose(shuffled.estimate, means.estimate, rtol=1e-12)
    assert np.allclose(shuffled.se, means.se, rtol=1e-12)
    assert np.abs(shuffled.p_above(1.4) - means.p_above(1.4)).max() < 0.02  # other resamples of the same documents
    assert np.allclose(shuffled.lower(0.1), means.lower(0.1), atol=0.1 * means.se.max())
    other = ClusterMeans(sums[:, candidates], counts[:, candidates], seed=7)
    assert (other.p_above(1.4) == means.p_above(1.4)[candidates]).all()


def test_more_candidates_widen_bounds_and_copies_do_not(rng):
    x = rng.normal(size=(150, 30))
    one, many = ClusterMeans(x[:, :1], seed=1), ClusterMeans(x, seed=1)
    copies = ClusterMeans(np.repeat(x[:, :1], 30, axis=1), seed=1)
    assert many.lower(0.05)[0] < one.lower(0.05)[0] - 0.5 * one.se[0]
    # max-T knows that they are the same; Bonferroni would not
    np.testing.assert_allclose(copies.lower(0.05), one.lower(0.05)[0], rtol=1e-12)


def test_the_seed_alone_decides_and_blocks_do_not(monkeypatch):
    sums, counts = skewed(30, 7)
    first = ClusterMeans(sums, counts, seed=11, n_boot=501)
    same = ClusterMeans(sums, counts, seed=11, n_boot=501)
    other = ClusterMeans(sums, counts, seed=12, n_boot=501)
    assert (first.p_above(1.2) == same.p_above(1.2)).all()
    assert (first.lower(0.1) != other.lower(0.1)).any()
    monkeypatch.setattr(stats, "BLOCK", 1_100)  # 36 resamples and 2 candidates at a time
    for simultaneous in (True, False):
        pieces = ClusterMeans(sums, counts, seed=11, n_boot=501)
        assert np.allclose(pieces.lower(0.1, simultaneous), first.lower(0.1, simultaneous), rtol=1e-9)
        assert np.allclose(pieces.p_below(1.2, simultaneous), first.p_below(1.2, simultaneous), atol=2.1 / 502)
        gain = stats.detectable(first, 0.1, simultaneous=simultaneous)
        assert np.allclose(stats.detectable(pieces, 0.1, simultaneous=simultaneous), gain, rtol=1e-9)


# ---- candidates that cannot be tested ----

FINE = [float(x) for x in np.random.default_rng(21).lognormal(0, 1, 12)]


CANNOT = {
    "no live document": ([0.0] * 12, [0.0] * 12),
    "one live document": ([3.0] + [0.0] * 11, [1.0] + [0.0] * 11),
    "nan": ([np.nan, *FINE[1:]], [1.0] * 12),
    "inf": ([np.inf, *FINE[1:]], [1.0] * 12),
    "nan where nothing is live": ([np.nan, *FINE[1:]], [0.0] + [1.0] * 11),
    "infinite count": (FINE, [np.inf] + [1.0] * 11),
}


@pytest.mark.parametrize("why", CANNOT)
def test_what_cannot_be_tested_is_never_rejected_and_disturbs_nothing(why):
    bad, counts = CANNOT[why]
    sums = np.array([FINE, bad]).T
    means = ClusterMeans(sums, np.array([[1.0] * 12, counts]).T, seed=0, n_boot=N_BOOT)
    alone = ClusterMeans(FINE, seed=0, n_boot=N_BOOT)
    assert means.testable.tolist() == [True, False]
    assert np.isnan([means.estimate[1], means.se[1]]).all()
    for simultaneous in (True, False):
        for bar in (-1e9, 0.0, 1e9):
            assert means.p_above(bar, simultaneous)[1] == means.p_below(bar, simultaneous)[1] == 1.0
            assert means.p_above(bar, simultaneous)[0] == alone.p_above(bar, simultaneous)[0]
        assert means.lower(0.5, simultaneous)[1] == -np.inf
        assert means.upper(0.5, simultaneous)[1] == np.inf
        assert means.upper(0.05, simultaneous)[0] == alone.upper(0.05, simultaneous)[0]
        assert stats.power_above(means, 0.0, 5.0, 0.05, simultaneous)[1] == 0.0
        assert stats.detectable(means, 0.05, simultaneous=simultaneous)[1] == np.inf


def test_nothing_testable_at_all():
    for means in (ClusterMeans(np.zeros((5, 2)), seed=0), ClusterMeans(np.zeros((0, 2)), seed=0)):
        assert means.p_above(-1.0).tolist() == means.p_below(1.0).tolist() == [1.0, 1.0]
        assert np.isneginf(means.lower(0.05)).all()
        assert np.isposinf(stats.detectable(means, 0.05)).all()
    assert ClusterMeans(np.zeros((5, 0)), seed=0).p_above(0.0).size == 0


def test_one_document_that_carries_everything_bounds_nothing_above():
    """An eighth of the resamples lacks it and the guard: how large the effect may be cannot be known."""
    means = ClusterMeans([0.0] * 29 + [6.0], seed=0)
    assert means.upper(0.05)[0] == np.inf
    assert means.p_below(100.0)[0] > 0.1


def test_nan_bar_and_level_reject_nothing():
    means = ClusterMeans(FINE, seed=0, n_boot=N_BOOT)
    assert means.p_above(np.nan)[0] == means.p_below(np.nan)[0] == 1.0
    assert means.lower(np.nan)[0] == -np.inf
    assert means.upper(np.nan)[0] == np.inf


@pytest.mark.parametrize(
    ("sums", "counts", "n_boot", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 3)), 9, "they are [4, 2] and [4, 3]"),
        (np.zeros((4, 2, 1)), None, 9, "must both be [n_docs, n_cand]"),
        (np.ones((4, 2)), -np.ones((4, 2)), 9, "negative"),
        (np.ones((4, 2)), np.zeros((4, 2)), 9, "sums are not 0 where counts are 0"),
        (np.ones((4, 2)), None, 0, "n_boot is 0"),
    ],
)
def test_bad_input_gets_one_sentence(sums, counts, n_boot, message):
    with pytest.raises(FraError) as error:
        ClusterMeans(sums, counts, seed=0, n_boot=n_boot)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- power ----


def test_power_of_one_candidate_with_normal_documents_is_nearly_the_textbook_one():
    x = sps.norm.ppf((np.arange(400) + 0.5) / 400)
    means = ClusterMeans(x, seed=2)
    formula = (sps.t.isf(0.05, 399) + sps.t.isf(0.2, 399)) * means.se[0]
    assert formula < stats.detectable(means, 0.05)[0] < 1.15 * formula
    assert stats.power_above(means, 0.3, 0.3 + formula, 0.05)[0] == pytest.approx(0.76, abs=0.06)


def test_power_of_a_share_is_what_clopper_pearson_decides():
    for n, bar, effect, level in ((40, 0.5, 0.9, 0.05), (60, 0.8, 0.9, 0.002), (30, 0.9, 0.95, 0.01)):
        hits = [k for k in range(n + 1) if stats.clopper_pearson(k, n, level)[0] > bar]
        expected = sps.binom.pmf(hits, n, effect).sum() if hits else 0.0
        assert power_of_share(n, bar, effect, level) == pytest.approx(expected, abs=1e-12)
        mirrored = power_of_share(n, -2 * bar, -2 * effect, level, (-2.0, 0.0), above=False)
        assert mirrored == pytest.approx(expected, abs=1e-12)
    assert np.isnan(power_of_share(30, 1.5, 0.9, 0.05))


def test_sources_needed_are_about_as_many_as_decide(rng):
    def told(x, seed):
        return ClusterMeans(x, seed=seed, n_boot=1_999).p_above(0.0)[0]

    for n, gain, level in ((60, 0.35, 0.01), (120, 0.3, 0.002)):
        needed = [stats.sources_needed(ClusterMeans(gain + rng.normal(size=n), seed=k), 0.0, level) for k in range(20)]
        number = int(np.median([k or 10**9 for k in needed]))
        decides = next(
            many
            for many in (40, 61, 82, 101, 120, 150, 190, 240, 300)
            if np.mean([told(gain + rng.normal(size=many), k) <= level for k in range(40)]) >= 0.5
        )
        assert decides / 2.5 <= number <= decides * 2.5, "about so many: the margin of one sample tells"
    x = 0.1 + rng.normal(size=120)
    margin = x.mean() - ClusterMeans(x, seed=3).lower(0.01)[0]
    by_hand = int(np.ceil(120 * (margin / (x.mean() + 0.1)) ** 2))
    assert stats.sources_needed(ClusterMeans(x, seed=3), -0.1, 0.01) == by_hand > 120
    assert stats.sources_needed(ClusterMeans(-x, seed=3), 0.1, 0.01, "below") == by_hand
    near = ClusterMeans(0.9 + 0.01 * rng.normal(size=30), seed=0)
    assert stats.sources_needed(near, 0.5, 0.0005) == unseen.sources_for(0.0005)  # the margin is nothing: the floor
    assert stats.sources_needed(near, 1.5, 0.0005, "below") == unseen.sources_for(0.0005)
    assert stats.sources_needed(near, 1.5, 0.05) is None
    assert stats.sources_needed(near, float(near.estimate[0]), 0.05) is None
    constant = ClusterMeans(np.full(20, 0.9), seed=0)
    assert stats.sources_needed(constant, 0.5, 0.05) == 40
    assert stats.sources_needed(constant, 0.9, 0.05) is stats.sources_needed(constant, 0.95, 0.05) is None
    nothing = ClusterMeans(np.zeros((5, 1)), np.zeros((5, 1)), seed=0)
    assert stats.sources_needed(nothing, -1.0, 0.05) is None
    few = stats.sources_needed(ClusterMeans(rng.exponential(size=60), seed=0), 0.0, 0.05)
    assert few is not None and few < 40  # skewed the harmless way: no floor


@pytest.mark.parametrize("simultaneous", [True, False])
def test_detectable_and_power_are_two_sides_of_one_thing(simultaneous):
    sums, counts = skewed(60, 8)
    means = ClusterMeans(sums, counts, seed=4)
    for power in (0.5, 0.8, 0.95):
        gain = stats.detectable(means, 0.05, power, simultaneous)
        assert np.abs(stats.power_above(means, 2.0, 2.0 + gain, 0.05, simultaneous) - power).max() < 0.002
    ladder = [stats.power_above(means, 2.0, 2.0 + step, 0.05, simultaneous) for step in (0.0, 0.5, 1.0, 4.0, 1e3)]
    assert (np.diff(ladder, axis=0) >= 0).all()
    assert (ladder[0] <= 0.06).all()
    assert (ladder[-1] > 0.99).all()
    wide = stats.detectable(means, 0.05, simultaneous=True)
    assert (wide > stats.detectable(means, 0.05, simultaneous=False)).all()
    assert (stats.power_above(means, 0.0, 1e3, 1e-6) == 0).all()  # below 1 / (1 + B) nothing is ever rejected


def test_seed_of():
    # printf '["mini", "natural"]' | sha256sum: the first 16 hex digits, halved
    assert stats.seed_of("mini", "natural") == 6232429510046675226
    assert len({stats.seed_of(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"), ()]}) == 5
    assert all(0 <= stats.seed_of(str(k)) < 2**63 for k in range(200))


def test_memory_of_a_large_family_stays_bounded():
    code = (
        "import json, resource, numpy as np; from fra.statistics.stats import ClusterMeans;"
        "x = np.random.default_rng(0).exponential(1, (128, 3000));"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "m = ClusterMeans(x, seed=0, n_boot=1_999); m.p_below(1.0); m.lower(0.05, simultaneous=False);"
        "print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = json.loads(run.stdout)
    assert after - before < 300 * 1024


def test_importing_stats_brings_neither_torch_nor_pytest():
    heavy = ("torch", "pytest", "transformer_lens", "sae_lens")
    code = f"import sys, fra.statistics.stats; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
