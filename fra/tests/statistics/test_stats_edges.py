"""The resampling number by number against loops, and ClusterMeans at its edges: what is just allowed and just not."""

import numpy as np
import pytest
from scipy import stats as sps

from fra.errors import FraError
from fra.statistics import stats, unseen
from fra.statistics.stats import ClusterMeans, Tail

N_BOOT = 240


def grid(n_docs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Four candidates on a coarse grid: equal documents, documents without rows, resamples without a spread. The last
    two candidates are live in two documents and agree in all but one.
    """
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 3, (n_docs, 4)).astype(float)
    counts[:2] = [1.0, 2.0, 1.0, 1.0]
    counts[2:, 2] = 0
    sums = counts * rng.integers(-3, 6, (n_docs, 4)) / 2
    sums[:2] = counts[:2] * [[0.5, 1.5, 2.0, 1.0], [2.0, -1.0, -0.5, 4.0]]
    sums[1:, 3] = counts[1:, 3] * 4.0
    return sums, counts


def drawn(seed: int, n_docs: int, n_boot: int = N_BOOT) -> np.ndarray:
    """[n_boot, n_docs] the documents of each resample."""
    return np.random.default_rng(seed).integers(n_docs, size=(n_boot, n_docs))


def loop_t(sums: np.ndarray, counts: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """[n_boot, n_cand] t* of each resample by candidate; without a spread -inf below the estimate, else inf."""
    out = np.full((len(documents), sums.shape[1]), np.inf)
    for b, picked in enumerate(documents):
        for c in range(sums.shape[1]):
            estimate = sums[:, c].sum() / counts[:, c].sum()
            s, n = sums[picked, c], counts[picked, c]
            if n.sum() == 0:
                continue
            again, live = s.sum() / n.sum(), int((n > 0).sum())
            squares = ((s - again * n) ** 2).sum()
            if live >= 2 and squares > 1e-9:
                out[b, c] = (again - estimate) / (np.sqrt(live / (live - 1) * squares) / n.sum())
            elif again < estimate - 1e-9:
                out[b, c] = -np.inf
    return out


@pytest.mark.parametrize("block", [2**21, 500])
def test_resamples_are_those_of_a_loop_over_documents(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "BLOCK", block)
    for n_docs in (5, 9, 30):
        sums, counts = grid(n_docs)
        expected = loop_t(sums, counts, drawn(7, n_docs))
        assert n_docs > 9 or (np.isneginf(expected).any() and np.isposinf(expected).any())
        tail = Tail(sums, counts, seed=7, n_boot=N_BOOT)
        found = np.concatenate(list(tail.resamples(slice(None))))
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(tail.marginal(slice(0, 4)), np.sort(expected, axis=0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(tail._maximum, np.sort(expected.max(axis=1)), rtol=1e-6, atol=1e-9)


def test_what_has_no_spread_is_told_from_rounding_at_every_scale():
    sums, counts = grid(5)
    expected = loop_t(sums, counts, drawn(7, 5))
    for rows, unit in ((1.0, 1e-7), (1.0, 1e7), (1e6, 1.0)):
        found = next(Tail(sums * rows * unit, counts * rows, seed=7, n_boot=N_BOOT).resamples(slice(None)))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    # The middle document lies on the mean: drawn alone it has neither spread nor distance, and widens the bound.
    middle = np.array([[0.0], [1.0], [2.0]])
    picked = drawn(1, 3)
    (found,) = Tail(middle, np.ones_like(middle), seed=1, n_boot=N_BOOT).resamples(slice(None))
    assert (picked == 1).all(axis=1).sum() > 3
    assert np.isposinf(found[(picked == 1).all(axis=1)]).all()
    np.testing.assert_allclose(found, loop_t(middle, np.ones_like(middle), picked), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1, 7, 240, 500])
def test_documents_are_drawn_as_the_generator_draws_them_whatever_the_block(size: int):
    blocks = list(stats.times_drawn(3, 11, N_BOOT, size))
    assert [len(block) for block in blocks] == [size] * (N_BOOT // size) + [N_BOOT % size] * (N_BOOT % size > 0)
    expected = [[(picked == d).sum() for d in range(11)] for picked in drawn(3, 11)]
    assert (np.concatenate(blocks) == expected).all()
    assert {block.dtype for block in blocks} == {np.dtype(np.float64)}


@pytest.mark.parametrize("simultaneous", [True, False])
@pytest.mark.parametrize("block", [2**21, 500])
def test_p_counts_resamples_and_the_bound_is_the_last_bar_that_is_rejected(
    simultaneous: bool, block: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stats, "BLOCK", block)
    rng = np.random.default_rng(4)
    sums = rng.exponential(size=(25, 4))
    counts = np.ones_like(sums)
    t = loop_t(sums, counts, drawn(2, 25))
    t = np.repeat(t.max(axis=1)[:, None], 4, axis=1) if simultaneous else t
    estimate, se = sums.mean(axis=0), sps.sem(sums, axis=0)
    bounds = estimate - t * se
    tail = Tail(sums, counts, seed=2, n_boot=N_BOOT)
    for bar in (0.0, 0.4, 0.7, 1.0, 1.4, 9.0):
        p = (1 + (bounds <= bar).sum(axis=0)) / (1 + N_BOOT)
        np.testing.assert_allclose(tail.p(np.full(4, bar), simultaneous), p)
    at = np.array([tail.bound(np.full(4, k / 241), simultaneous) for k in range(1, 241)])
    for k in (0, 11, 100):  # a bar that a bound meets is not passed
        np.testing.assert_allclose(tail.p(at[k], simultaneous), (1 + (at <= at[k]).sum(axis=0)) / 241, rtol=1e-12)
    levels = np.array([0.05, 3 / 241, 0.5, 0.9])
    expected = []
    for c, level in enumerate(levels):
        rejected = [b for b in bounds[:, c] if (1 + (bounds[:, c] < b).sum()) / (1 + N_BOOT) <= level]
        expected.append(max(rejected))
    np.testing.assert_allclose(tail.bound(levels, simultaneous), expected, rtol=1e-9)
    least = tail.bound(np.array([1 / 241, 0.9 / 241, 0.0, np.nan]), simultaneous)
    assert least[0] == pytest.approx(bounds[:, 0].min())
    assert np.isneginf(least[1:]).all()


@pytest.mark.parametrize("simultaneous", [True, False])
def test_power_and_what_is_detectable_count_the_same_resamples(simultaneous: bool):
    rng = np.random.default_rng(5)
    sums = rng.normal(1.0, [0.5, 1.0, 2.0], (50, 3))
    means = ClusterMeans(sums, seed=6, n_boot=N_BOOT)
    t = loop_t(-sums, np.ones_like(sums), drawn(6, 50))
    estimate, se = sums.mean(axis=0), sps.sem(sums, axis=0)
    for level in (0.2, 0.1):
        margin = estimate - means.lower(level, simultaneous)
        for gain in (0.2, 0.5, 0.8):
            share = (t < (gain - margin) / se).mean(axis=0)
            np.testing.assert_allclose(stats.power_above(means, 3.0, 3.0 + gain, level, simultaneous), share)
            np.testing.assert_allclose(means.power(gain, level, simultaneous=simultaneous), share)
            np.testing.assert_allclose(means.turned().power(gain, level, False, simultaneous), share)
        for power in (0.5, 0.8):
            rank = int(np.ceil(power * (N_BOOT - 1)))
            needed = margin + np.sort(t, axis=0)[rank] * se
            np.testing.assert_allclose(stats.detectable(means, level, power, simultaneous), needed)
    # one bar, effect and level a candidate
    bars, effects, levels = np.array([0.0, 1.0, 2.0]), np.array([0.6, 1.7, 3.1]), np.array([0.2, 0.1, 0.3])
    margin = estimate - means.lower(levels, simultaneous)
    share = (t < (effects - bars - margin) / se).mean(axis=0)
    np.testing.assert_allclose(stats.power_above(means, bars, effects, levels, simultaneous), share)


def test_together_and_eight_in_ten_are_what_is_meant_where_nothing_is_said():
    means = ClusterMeans(np.random.default_rng(8).normal(size=(45, 6)), seed=1, n_boot=N_BOOT)
    for f in (means.p_above, means.p_below, means.lower, means.upper):
        assert (f(0.1) == f(0.1, True)).all()
        assert (f(0.1) != f(0.1, False)).any()
    assert (stats.detectable(means, 0.1) == stats.detectable(means, 0.1, 0.8, True)).all()
    assert (stats.power_above(means, 0, 0.5, 0.1) == stats.power_above(means, 0, 0.5, 0.1, True)).all()
    assert (means.power(0.5, 0.1) == means.power(0.5, 0.1, True, False)).all()
    assert ClusterMeans([1.0, 2.0], seed=0).n_boot == 9_999


# ---- edges of a sample ----


def test_the_least_samples():
    one = ClusterMeans([1.0, 2.0, 4.0], seed=0, n_boot=1)
    assert one.p_above(-1e9)[0] in (0.5, 1.0)
    two = ClusterMeans([[1.0, 5.0], [2.0, 5.0]], seed=0, n_boot=9)
    assert two.testable.tolist() == [True, False]
    assert two.constant.tolist() == [False, True]
    assert two.n_live.tolist() == [2, 2]
    assert (two.estimate.tolist(), two.se.tolist()) == ([1.5, 5.0], [0.5, 0.0])
    single = ClusterMeans([[1.0], [0.0]], [[1.0], [0.0]], seed=0, n_boot=9)
    assert not single.testable[0] and not single.constant[0]
    assert np.isnan([single.estimate[0], single.se[0]]).all()


def test_a_document_without_rows_must_add_nothing_not_even_one():
    for sums in ([2.0, 1.0, 3.0], [2.0, -0.5, 3.0]):
        with pytest.raises(FraError, match="sums are not 0 where counts are 0"):
            ClusterMeans(sums, [1.0, 0.0, 1.0], seed=0)
    assert ClusterMeans([2.0, 0.0, 3.0], [1.0, 0.0, 0.5], seed=0).estimate[0] == pytest.approx(5 / 1.5)


@pytest.mark.parametrize("beside", [1e-3, 1e6])
def test_a_spread_below_a_billionth_of_a_thousandth_is_rounding(beside: float):
    """Of four documents of 4.0, one d more: se = d / 4, and the noise is 1e-12 * 2 * 4.0 / 4 whatever stands beside."""
    other = beside * np.array([1.0, 1.25, 0.5, 2.0])
    for d, spread in ((7e-12, False), (9e-12, True)):
        means = ClusterMeans(np.stack([[4.0, 4.0, 4.0, 4.0 + d], other], axis=1), seed=0, n_boot=9)
        assert means.testable.tolist() == [spread, True]
        assert means.constant.tolist() == [not spread, False]


def test_infinite_and_missing_numbers_leave_the_other_candidates_as_they_are():
    rng = np.random.default_rng(9)
    sums = rng.exponential(size=(50, 4))
    counts = np.ones((50, 4))
    sums[3, 1], counts[4, 2] = np.nan, np.inf
    sums[:, 3] = 0.5
    means = ClusterMeans(sums, counts, seed=3, n_boot=N_BOOT)
    alone = ClusterMeans(sums[:, [0, 3]], seed=3, n_boot=N_BOOT)
    assert means.testable.tolist() == [True, False, False, False]
    assert means.constant.tolist() == [False, False, False, True]
    for simultaneous in (True, False):
        for name, number in (("p_above", 0.3), ("p_below", 2.0), ("lower", 0.2), ("upper", 0.2)):
            found = getattr(means, name)(number, simultaneous)
            assert (found[[0, 3]] == getattr(alone, name)(number, simultaneous)).all()
            assert (found[[1, 2]] == {"p_above": 1.0, "p_below": 1.0, "lower": -np.inf, "upper": np.inf}[name]).all()


def test_numbers_may_be_whole_and_in_lists():
    for whole, same in (([1, 2, 4], [1.0, 2.0, 4.0]), ([[1, 0], [2, 3], [4, 1]], [[1.0, 0.0], [2.0, 3.0], [4.0, 1.0]])):
        a, b = (ClusterMeans(x, np.ones_like(x), seed=0, n_boot=99) for x in (whole, same))
        assert a.sums.dtype == a.counts.dtype == np.float64
        assert (a.p_above(1) == b.p_above(1.0)).all()
        assert (a.lower(0.2) == b.lower(0.2)).all()
    fine = ClusterMeans([1, 2, 4], seed=0, n_boot=99)
    assert (fine.p_below(np.array([3], dtype=np.uint8)) == fine.p_below(3.0)).all()
    assert stats.holm([1, 0]).tolist() == [1.0, 0.0]
    assert stats.holm([1, 0]).dtype == stats.holm_levels([1, 0], 0.05).dtype == np.float64
    assert stats.benjamini_hochberg([1, 0]).tolist() == [1.0, 0.0]
    assert stats.rank_p(2, [[1, 2], [3, 4]]) == 0.8


# ---- where documents agree ----


def test_where_most_agree_the_bound_is_that_of_the_agreement_and_counted_from_the_mean():
    x = np.array([2.0] * 86 + [1.5, 3.0, 8.0, 8.5])
    p = sps.binom.cdf(1, 90, unseen.RARE)
    low = np.minimum(x, 2.0).mean()
    distance = max(1.5 * ((low - 1.5) - (2.0 - low)), 0.8 * (low - 1.5))
    bound = low - distance * (1 + max(np.log(0.05 / p), 0)) / 90
    for means, lower, p_above, sign in (
        (ClusterMeans(x, seed=0), "lower", "p_above", 1),
        (ClusterMeans(-x, seed=0), "upper", "p_below", -1),
    ):
        assert means.testable[0]
        assert getattr(means, lower)(p)[0] == pytest.approx(sign * bound, rel=1e-12)
        assert getattr(means, p_above)(sign * (bound - 1e-9))[0] == p
        assert getattr(means, p_above)(sign * (bound + 1e-9))[0] > p
        assert sign * getattr(means, lower)(np.nextafter(p, 0))[0] < bound - 1e-6


def test_what_agrees_is_above_nothing_that_it_equals_and_is_corrected_like_the_rest():
    means = ClusterMeans(np.full((60, 3), 0.75), seed=0, n_boot=9)
    alone = (1 - unseen.RARE) ** 60
    assert (means.p_above(0.75) == 1).all()
    assert (means.p_below(0.75) == 1).all()
    for level, together, single in ((2 * alone, False, True), (3.1 * alone, True, True), (0.9 * alone, False, False)):
        for simultaneous, reached in ((True, together), (False, single)):
            assert (means.lower(level, simultaneous) == (0.75 if reached else -np.inf)).all()
            assert (means.upper(level, simultaneous) == (0.75 if reached else np.inf)).all()


def test_a_sample_turned_round_keeps_rows_seed_and_resamples():
    sums, counts = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [4.0], [2.0]])
    turned = ClusterMeans(sums, counts, seed=5, n_boot=77).turned()
    assert (turned.sums == -sums).all()
    assert (turned.counts == counts).all()
    assert (turned.seed, turned.n_boot) == (5, 77)


# ---- small ones ----


def test_sources_needed_without_a_bound_of_the_bootstrap():
    """A level that 99 resamples cannot reach: Student's margin, the guard's and the shift's, by hand."""
    rng = np.random.default_rng(10)
    x = np.stack([rng.normal(0.5, 1.0, 30), rng.normal(0.3, 0.8, 30)], axis=1)
    level = 0.002
    expected = {}
    for direction, sign in (("above", 1), ("below", -1)):
        numbers = []
        for c in range(2):
            y = sign * x[:, c]
            against, other = y.mean() - y.min(), y.max() - y.mean()
            distance = max(1.5 * (against - other), 0.8 * against)
            margin = sps.t.isf(level, 29) * sps.sem(y) + (1 + np.log(0.05 / level)) / 30 * distance
            numbers.append(int(np.ceil(30 * (margin / (y.mean() - sign * (-0.1 if sign > 0 else 0.49))) ** 2)))
        expected[direction] = numbers
    means = ClusterMeans(x, seed=0, n_boot=99)
    floor = unseen.sources_for(level)
    assert min(expected["above"] + expected["below"]) > floor
    assert expected["above"][0] != expected["above"][1]
    assert stats.sources_needed(means, -0.1, level) == min(expected["above"])
    assert stats.sources_needed(means, 0.49, level, "below") == min(expected["below"])
    for c in range(2):
        alone = ClusterMeans(x[:, c], seed=0, n_boot=99)
        assert stats.sources_needed(alone, -0.1, level) == expected["above"][c]
        assert stats.sources_needed(alone, 0.49, level, "below") == expected["below"][c]


def test_at_least_two_sources_are_needed_where_there_is_no_floor():
    x = np.random.default_rng(11).exponential(size=60) * 1e-6 + 5.0
    assert stats.sources_needed(ClusterMeans(x, seed=0), 0.0, 0.05) == 2


def test_bounds_of_a_share_are_those_of_the_beta_distribution():
    assert stats.clopper_pearson(0, 0, 0.05) == (0.0, 1.0)
    for k, n in ((3, 10), (1, 1), (0, 1), (29, 29)):
        low, high = stats.clopper_pearson(k, n, 0.02)
        assert low == pytest.approx(sps.beta.ppf(0.02, k, n - k + 1) if k else 0.0, abs=1e-12)
        assert high == pytest.approx(sps.beta.isf(0.02, k + 1, n - k) if k < n else 1.0, abs=1e-12)
        assert {type(low), type(high)} == {float}


def test_sums_by_source_add_what_belongs_together():
    values = np.arange(12.0).reshape(4, 3)
    assert stats.by_source(values, ["b", "a", "b", "c"]).tolist() == [[3, 4, 5], [6, 8, 10], [9, 10, 11]]
    assert stats.by_source(values[:, 0], ("x",) * 4).tolist() == [18.0]
    assert stats.by_source(np.ones((2, 2, 2)), ["x", "y"]).shape == (2, 2, 2)


def test_holm_levels_at_the_last_bit():
    """m * p is rounded otherwise than level / m: the level must still say what holm() says."""
    rng = np.random.default_rng(12)
    turned = 0
    for m in (3, 7, 49):
        for level in rng.random(100):
            at = level / m
            for p in (np.nextafter(at, 0), at, np.nextafter(at, 1)):
                family = np.r_[p, np.ones(m - 1)]
                rejected = stats.holm(family)[0] <= level
                assert (p <= stats.holm_levels(family, level)[0]) == rejected
                turned += rejected != (p <= at)
    assert turned > 0


def test_the_runs_seed_is_written_before_the_parts():
    plain = stats.seed_of("a")
    try:
        stats.use_seed(3)
        moved = stats.seed_of("a")
    finally:
        stats.use_seed(0)
    assert moved == stats.seed_of("seed 3", "a") != plain == stats.seed_of("a")
