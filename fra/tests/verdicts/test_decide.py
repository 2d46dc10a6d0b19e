"""The one decider against scipy, statsmodels and loops: what is corrected for what, what joins or stays apart, and how
often a whole claim is wrong.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps
from statsmodels.stats.multitest import multipletests

from fra.claim import Claim, Outcome, family, judge
from fra.errors import FraError
from fra.statistics import stats
from fra.statistics.exact import Bounded, Proportion, exact_where_unbounded
from fra.statistics.rules import RULES
from fra.verdicts.conditions import as_share, exact
from fra.verdicts.decide import (
    WHOLE,
    Beside,
    Drawn,
    Given,
    Number,
    Planted,
    Sampled,
    corrected,
    decide,
    means_of,
    ranked,
)

ONE = Claim(
    id="T01",
    title="A claim to test with",
    h0="E <= 0.5",
    condition="first",
    bar=0.5,
    statistic="test/1",
    stimuli=("natural",),
    n=120,
)
TWO = replace(ONE, bars={"second": 0.1})
RANKED = replace(ONE, bars={"rank": 0.95})
HEADS = ("L0H0", "L0H1", "L1H0")


def sample(mean: float, seed: int, n: int = 120) -> stats.ClusterMeans:
    values = np.random.default_rng(seed).normal(mean, 0.2, n)
    return stats.ClusterMeans(values, seed=seed)


def column(name: str, means: tuple[float, ...], seed: int = 0, **more: object) -> Sampled:
    return Sampled(
        name=name, samples={h: sample(m, seed + k) for k, (h, m) in enumerate(zip(HEADS, means, strict=True))}, **more
    )


def rows(n_cand: int = 1) -> dict[str, Beside]:
    return {h: Beside(candidates=[f"c{k}" for k in range(n_cand)]) for h in HEADS}


def one_tailed(own: Sampled, bar: float) -> tuple[list[float], list[float]]:
    samples = [own.samples[h] for h in HEADS]
    return [float(m.p_above(bar, False)[0]) for m in samples], [float(m.p_below(bar, False)[0]) for m in samples]


@pytest.mark.parametrize("means", [(0.58, 0.56, 0.4), (0.44, 0.55, 0.45), (0.43, 0.46, 0.57), (0.6, 0.6, 0.56)])
def test_a_head_passes_by_the_worst_of_its_conditions_and_holm_goes_over_the_heads(means) -> None:
    first, second = column("first", means), column("second", tuple(m - 0.42 for m in means), seed=10)
    decided = corrected(TWO, [first, second])
    (up_1, down_1), (up_2, down_2) = one_tailed(first, 0.5), one_tailed(second, 0.1)
    worst = np.maximum(up_1, up_2)
    passes = multipletests(worst, 0.05, method="holm")[0]
    refuted = multipletests(np.minimum(1, 2 * np.minimum(down_1, down_2)), 0.05, method="holm")[0]
    for n, h in enumerate(HEADS):
        ((*conditions,),) = decided.conditions[h]
        assert all(c.holds(0.05) for c in conditions) == passes[n]
        assert any(c.fails(0.05) for c in conditions) == refuted[n]
        for c, bar in zip(conditions, (0.5, 0.1), strict=True):
            assert c.holds(0.05) == (c.low > bar), "the bound inverts the test"
            assert c.fails(0.05) == (c.high < bar)
    assert list(decided.raw.values()) == pytest.approx(list(worst))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.2), st.floats(0, 0.2)), min_size=1, max_size=6))
def test_adjusted_p_are_those_of_holm_by_hand(p: list[tuple[float, float]]) -> None:
    from fra.statistics.multiplicity import HolmFamily

    worst = [max(own) for own in p]
    family_ = HolmFamily(worst, 0.05)
    order = sorted(range(len(p)), key=lambda k: worst[k])
    level, rejecting = {}, True
    for step, k in enumerate(order):
        rejecting = rejecting and worst[k] * (len(p) - step) <= 0.05
        at = step if rejecting else next((s for s, o in enumerate(order) if worst[o] * (len(p) - s) > 0.05), step)
        level[k] = 0.05 / (len(p) - at)
    for k, own in enumerate(p):
        adjusted = family_.adjusted(k, own)
        assert (adjusted <= 0.05).all() == (worst[k] <= level[k] * (1 + 1e-12))
        for raw, one in zip(own, adjusted, strict=True):
            if abs(raw - level[k]) > 1e-12:
                assert (one <= 0.05) == (raw <= level[k])
            assert one >= raw or one == pytest.approx(raw)


def test_one_head_that_fails_for_one_reason_costs_the_others_nothing_beyond_its_place() -> None:
    """Holm over the heads, not over every condition by itself: the chance of a wrong head is that of the claim."""
    first, second = column("first", (0.9, 0.9, 0.9)), column("second", (0.9, 0.9, 0.0), seed=10)
    decided = corrected(TWO, [first, second])
    assert [all(c.holds(0.05) for c in own[0]) for own in decided.conditions.values()] == [True, True, False]
    assert decided.raw["L1H0"] == float(second.samples["L1H0"].p_above(0.1, False)[0]) > 0.9


def test_below_is_above_with_the_sign_turned() -> None:
    means = (0.2, 0.28, 0.35)
    down_claim = replace(ONE, condition="below", bar=0.3, above=False)
    down = corrected(down_claim, [column("below", means)])
    turned = {h: m.turned() for h, m in column("below", means).samples.items()}
    up = corrected(replace(ONE, condition="below", bar=-0.3), [Sampled(name="below", samples=turned)])
    for h in HEADS:
        ((a,),), ((b,),) = down.conditions[h], up.conditions[h]
        assert (a.effect, a.low, a.high, a.p, a.p_refute) == (-b.effect, -b.high, -b.low, b.p, b.p_refute)
        assert a.above is False
    further = replace(ONE, bars={"low": 0.3}, below=("low",))
    one = corrected(further, [column("first", (0.9,) * 3), column("low", (0.2,) * 3)]).conditions["L0H0"][0][1]
    assert one.above is False
    assert one.holds(0.05)


def test_candidates_meet_everything_together_and_are_refuted_one_by_one() -> None:
    rng = np.random.default_rng(1)
    tables = [
        {h: rng.normal(mean, 0.2, (120, 4)) for h in HEADS} for mean in ([0.5, 0.62, 0.4, 0.55], [0.1, 0.2, 0.3, 0.1])
    ]
    means = [{h: stats.ClusterMeans(v, seed=k) for k, (h, v) in enumerate(t.items())} for t in tables]
    columns = [
        Sampled(name=name, samples=m, simultaneous=True) for name, m in zip(("first", "second"), means, strict=True)
    ]
    decided = corrected(TWO, columns)
    best = [
        min(max(a, b) for a, b in zip(means[0][h].p_above(0.5, True), means[1][h].p_above(0.1, True), strict=True))
        for h in HEADS
    ]
    assert list(decided.raw.values()) == pytest.approx(best)
    passes = multipletests(best, 0.05, method="holm")[0]
    last = [  # every candidate must be short of one of two bars: the one that is least clearly so decides
        min(
            1,
            2
            * max(
                min(a, b) for a, b in zip(means[0][h].p_below(0.5, False), means[1][h].p_below(0.1, False), strict=True)
            ),
        )
        for h in HEADS
    ]
    refuted = multipletests(last, 0.05, method="holm")[0]
    for n, h in enumerate(HEADS):
        own = decided.conditions[h]
        assert any(all(c.holds(0.05) for c in each) for each in own) == passes[n]
        assert all(any(c.fails(0.05) for c in each) for each in own) == refuted[n]


def test_several_samples_of_a_head_must_all_hold_and_each_may_refute() -> None:
    good, bad = sample(0.8, 1), sample(0.3, 2)
    both = {"a": [good, good], "b": [good, bad]}
    for name, samples in both.items():
        decided = corrected(ONE, [Sampled(name="first", samples={WHOLE: samples})])
        ((c,),) = decided.conditions[WHOLE]
        assert c.holds(0.05) == (name == "a")
        assert c.fails(0.05) == (name == "b")
        assert c.p == pytest.approx(max(float(m.p_above(0.5, False)[0]) for m in samples))
        assert c.p_refute == pytest.approx(min(1.0, 2 * min(float(m.p_below(0.5, False)[0]) for m in samples)))
        assert c.effect == min(float(m.estimate[0]) for m in samples)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.booleans())
def test_numbers_without_spread_hold_or_are_missed_and_refute_nothing(values: list[float], above: bool) -> None:
    claim = replace(ONE, above=above)
    found = decide(claim, [Sampled(name="first", samples={WHOLE: [Number(v) for v in values]})], {WHOLE: Beside(n=40)})
    beyond = [v > 0.5 if above else v < 0.5 for v in values]
    assert judge(claim, found[WHOLE]).outcome is (Outcome.SUPPORTED if all(beyond) else Outcome.INCONCLUSIVE)
    ((c,),) = found[WHOLE].candidates.values()
    assert (c.p, c.p_refute) == (None, None)
    assert c.effect == (min(values) if above else max(values))


def test_a_number_beside_a_sample() -> None:
    for value, holds in ((0.9, True), (0.1, False)):
        ((c,),) = corrected(ONE, [Sampled(name="first", samples={WHOLE: [sample(0.8, 1), Number(value)]})]).conditions[
            WHOLE
        ]
        assert c.holds(0.05) == holds


def test_a_linear_form_is_said_as_a_share() -> None:
    claim = replace(ONE, condition="share", bar=0.2)
    rng = np.random.default_rng(0)
    whole, part = rng.normal(2.0, 0.3, 40), rng.normal(0.7, 0.1, 40)
    m = stats.ClusterMeans(part - 0.2 * whole, seed=3)
    one = Sampled(name="share", samples={"L0H0": m}, shares={"L0H0": (part.mean(), whole.mean())})
    ((c,),) = corrected(claim, [one]).conditions["L0H0"]
    assert c.effect == pytest.approx(part.mean() / whole.mean())
    assert c.bar == 0.2
    assert c.low == pytest.approx(0.2 + m.lower(0.05, False)[0] / whole.mean())
    assert c.p == m.p_above(0.0, False)[0]
    assert c.holds(0.05) == (c.low > 0.2)
    small = stats.ClusterMeans(0.1 * part - 0.2 * whole, seed=3)
    short = Sampled(name="share", samples={"L0H0": small}, shares={"L0H0": (0.1 * part.mean(), whole.mean())})
    ((c,),) = corrected(claim, [short]).conditions["L0H0"]
    assert c.fails(0.05)
    little = replace(claim, worth={"share": 0.01})
    ((c,),) = corrected(little, [short]).conditions["L0H0"]
    worth = 0.01 * whole.mean()  # of the whole, in the samples' own unit
    assert c.power == pytest.approx(float(stats.power_above(small, 0.0, worth, 0.05, False)[0]))
    assert 0.05 < c.power < 0.95, "not so clear that the unit would not matter"


@pytest.mark.parametrize("whole", [0.0, -1.0, np.nan])
def test_a_share_of_nothing_is_not_measured(whole: float) -> None:
    c = as_share(exact("share", 0.3, 0.0), 0.3, whole, 0.2)
    assert not c.holds(0.05)
    assert not c.fails(0.05)
    assert (c.low, c.high, c.p, c.p_refute) == (-np.inf, np.inf, None, None)


def test_a_number_that_is_given_denies_its_candidate_and_refutes_nothing() -> None:
    claim = replace(ONE, bars={"given": 0.0})
    rng = np.random.default_rng(0)
    means = {"L0H0": stats.ClusterMeans(rng.normal(0.9, 0.2, (120, 2)), seed=0)}
    first = Sampled(name="first", samples=means, simultaneous=True)
    beside = {"L0H0": Beside(candidates=("a", "b"))}
    for given_, outcome in (([1.0, -1.0], "SUPPORTED"), ([-1.0, -1.0], "INCONCLUSIVE"), (1.0, "SUPPORTED")):
        found = decide(claim, [first, Given("given", {"L0H0": given_})], beside)["L0H0"]
        assert judge(claim, found).outcome is Outcome(outcome)
    with pytest.raises(FraError, match=r"2 of 'first', 3 of 'given'"):
        corrected(claim, [first, Given("given", {"L0H0": [1.0, 2.0, 3.0]})])
    with pytest.raises(FraError, match="without conditions"):
        corrected(claim, [])


def test_an_identity_is_refuted_by_a_number() -> None:
    claim = replace(ONE, kind="identity", above=False, min_sources=1)
    for value, outcome in ((0.4, "SUPPORTED"), (0.6, "REFUTED")):
        found = decide(claim, [Given("first", {"L0H0": value})], {"L0H0": Beside(n=3)})["L0H0"]
        assert judge(claim, found).outcome is Outcome(outcome)


def test_what_a_head_lacks_was_not_measured_and_supports_nothing() -> None:
    first = column("first", (0.9, 0.9, 0.9))
    second = Sampled(name="second", samples={"L0H0": sample(0.9, 5)})
    found = decide(TWO, [first, second], rows())
    outcomes = {h: judge(TWO, e).outcome for h, e in found.items()}
    assert outcomes == {"L0H0": Outcome.SUPPORTED, "L0H1": Outcome.INCONCLUSIVE, "L1H0": Outcome.INCONCLUSIVE}
    nothing = decide(TWO, [first, second], {**rows(), "L1H1": Beside(n=40)})
    assert nothing["L1H1"].candidates == {}


def test_power_is_that_of_the_condition_that_refutes() -> None:
    first, second = column("first", (0.9, 0.3, 0.9)), column("second", (0.5, 0.5, 0.0), seed=10)
    found = corrected(TWO, [first, second]).conditions

    def by_hand(own: Sampled, h: str, worth: float) -> float:
        return float(stats.power_above(own.samples[h], 0.0, worth, 0.05 / 3, simultaneous=False)[0])

    powers = {h: tuple(c.power for c in own[0]) for h, own in found.items()}
    assert powers == {
        "L0H0": (None, None),
        "L0H1": (by_hand(first, "L0H1", 0.5), None),
        "L1H0": (None, by_hand(second, "L1H0", 0.1)),
    }
    worth = replace(TWO, worth={"second": 0.03})
    ((_, c),) = corrected(worth, [first, second]).conditions["L1H0"]
    assert c.power == by_hand(second, "L1H0", 0.03)


def test_a_condition_without_worth_can_be_missed_and_never_refutes() -> None:
    claim = replace(ONE, bars={"lead": 0.0})
    first, lead = column("first", (0.9, 0.9, 0.9)), column("lead", (-1.0, -1.0, 1.0))
    found = decide(claim, [first, lead], rows())
    assert [judge(claim, e).outcome for e in found.values()][::2] == [Outcome.INCONCLUSIVE, Outcome.SUPPORTED]
    worth = replace(claim, worth={"lead": 0.5})
    assert judge(worth, decide(worth, [first, lead], rows())["L0H0"]).outcome is Outcome.REFUTED


def test_what_is_undecided_says_how_many_sources_would_decide_on_its_side_of_the_bar() -> None:
    rng = np.random.default_rng(3)
    for above in (True, False):
        claim = replace(ONE, above=above)
        for shift in (0.02, -0.02):
            values = rng.normal(0.5, 0.2, 60)
            m = stats.ClusterMeans(values - values.mean() + 0.5 + shift, seed=1)
            ((c,),) = corrected(claim, [Sampled(name="first", samples={"L0H0": m})]).conditions["L0H0"]
            assert not c.holds(0.05)
            assert not c.fails(0.05)
            assert c.needed == stats.sources_needed(m, 0.5, 0.05, "above" if shift > 0 else "below")
            assert c.needed > 60
    both = {n: Sampled(name=n, samples={"L0H0": sample(x, 1)}) for n, x in (("first", 0.48), ("second", 0.9))}
    ((c, _),) = corrected(TWO, list(both.values())).conditions["L0H0"]
    assert c.needed == stats.sources_needed(both["first"].samples["L0H0"], 0.5, 0.05 / 2, "below")


def test_what_is_planted_is_asked_only_where_it_matters_and_by_its_lower_bound() -> None:
    asked = []

    def planted(h: str) -> Planted:
        asked.append(h)
        return Planted(found=86, tried=100)

    found = decide(ONE, [column("first", (0.9, 0.2, 0.5))], rows(), planted=planted)
    assert asked == ["L0H1"]
    bound = sps.beta.ppf(0.05, 86, 15)
    assert found["L0H1"].power == pytest.approx(bound)
    assert bound < 0.8 < 0.86
    assert judge(ONE, found["L0H1"]).outcome is Outcome.INCONCLUSIVE
    assert Planted(88, 100).power > 0.8
    assert np.isnan(Planted(99, 99).power)


class TestNulls:
    """Ranks among nulls: head by head, one draw after another, and only where the outcome can still change."""

    @staticmethod
    def drawn(null: dict[str, float], calls: list[tuple[str, int]], observed: float = 2.0) -> Drawn:
        """Draws are normal, with a mean a head."""

        def draw(h: str, k: int) -> dict[str, float]:
            calls.append((h, k))
            return {"rank": float(np.random.default_rng(stats.seed_of(h, str(k))).normal(null[h], 0.1))}

        return Drawn(observed={"rank": dict.fromkeys(null, observed)}, draw=draw)

    def test_heads_are_held_against_their_own_draws_alone(self) -> None:
        null = {"L0H0": 0.0, "L0H1": 5.0, "L1H0": 0.0}
        found = decide(RANKED, [column("first", (0.9,) * 3), self.drawn(null, [])], rows())
        outcomes = [judge(RANKED, e).outcome.value for e in found.values()]
        assert outcomes == ["SUPPORTED", "INCONCLUSIVE", "SUPPORTED"]
        alone = replace(RANKED)
        single = decide(
            alone,
            [Sampled(name="first", samples={"L0H0": sample(0.9, 0)}), self.drawn({"L0H0": 0.0}, [])],
            {"L0H0": Beside()},
        )
        assert judge(alone, single["L0H0"]).outcome is Outcome.SUPPORTED

    def test_nothing_is_drawn_for_a_head_that_fails_elsewhere_and_it_stops_when_hopeless(self) -> None:
        calls: list[tuple[str, int]] = []
        null = {"L0H0": 0.0, "L0H1": 5.0, "L1H0": 0.0}
        found = decide(RANKED, [column("first", (0.9, 0.9, 0.3)), self.drawn(null, calls)], rows())
        times = {h: sum(head == h for head, _ in calls) for h in HEADS}
        most = int(np.ceil(RULES.draws_a_step * 3 / 0.05)) - 1
        assert times == {"L0H0": most, "L0H1": int(0.05 * (most + 1)) + 1, "L1H0": 0}
        assert found["L0H0"].detail["draws of the nulls"] == most
        ((_, unmeasured),) = found["L1H0"].candidates.values()
        assert not unmeasured.finite
        assert judge(RANKED, found["L1H0"]).outcome is Outcome.REFUTED

    def test_ranks_join_holm_over_the_heads(self) -> None:
        """40 draws cannot show anything for three heads: p is at least 1/41, and Holm asks for 0.05 / 3."""
        rng = np.random.default_rng(0)
        for n, outcome in ((40, Outcome.INCONCLUSIVE), (200, Outcome.SUPPORTED)):
            draws = {h: rng.normal(0, 0.1, n) for h in HEADS}
            found = decide(
                RANKED, [column("first", (0.9,) * 3), ranked(RANKED, "rank", dict.fromkeys(HEADS, 2.0), draws)], rows()
            )
            ((_, c),) = found["L0H0"].candidates.values()
            assert c.p == pytest.approx(3 / (1 + n))
            assert judge(RANKED, found["L0H0"]).outcome is outcome

    @settings(max_examples=100, deadline=None)
    @given(st.integers(0, 2**32), st.floats(-3, 3))
    def test_stopping_early_decides_as_all_draws_would(self, seed: int, observed: float) -> None:
        from fra.statistics.nulls import sequential

        draws = np.random.default_rng(seed).normal(0, 1, 199)
        found = sequential({"rank": np.array([observed])}, lambda k: {"rank": draws[k]}, np.array([True]), 0.05, 199)[
            "rank"
        ]
        whole = stats.rank_p(observed, draws)
        assert (found.p[0] <= 0.05) == (whole <= 0.05)
        if found.n == 199 and (draws >= observed).sum() < 11:
            assert found.p[0] == pytest.approx(whole)
        else:
            assert found.p[0] == pytest.approx(11 / (np.flatnonzero(draws >= observed)[10] + 1)), "Besag and Clifford"

    def test_several_conditions_share_their_draws_and_candidates_are_counted_one_by_one(self) -> None:
        from fra.statistics.nulls import sequential

        a, b = np.random.default_rng(0).normal(0, 1, (2, 99))
        observed = {"a": np.array([1.0, 5.0]), "b": np.array([5.0, 5.0])}
        found = sequential(observed, lambda k: {"a": a[k], "b": b[k]}, np.array([True, True]), 0.05, 99)
        assert found["a"].p[1] == 0.01 == found["b"].p[0]
        assert found["a"].p[0] > 0.05
        none = sequential(observed, lambda k: {"a": a[k], "b": b[k]}, np.array([False, False]), 0.05, 99)
        assert (none["a"].n, none["a"].p.tolist()) == (0, [1.0, 1.0])
        strange = sequential(observed, lambda k: {"a": float("nan"), "b": b[k]}, np.array([True, True]), 0.05, 99)
        assert (strange["a"].p > 0.05).all(), "what is not a number counts against"


def test_the_chance_of_any_wrong_head_is_that_of_the_claim_for_all_conditions_together() -> None:
    """24 heads, each with one of three conditions false at its bar (the others far beyond), a rank among them: over
    runs at most 5 % with any head supported. Holm over every condition by itself gave up to three times that.
    """
    rng = np.random.default_rng(7)
    claim = replace(ONE, bars={"second": 0.5, "rank": 0.95})
    heads = [f"L0H{k}" for k in range(12)]
    wrong = 0
    runs = 200
    for run in range(runs):
        truth = {h: k % 3 for k, h in enumerate(heads)}
        p = {name: {} for name in ("first", "second")}
        for h in heads:
            for number, name in enumerate(p):
                mean = 0.5 if truth[h] == number else 3.0
                p[name][h] = _Normal(float(rng.normal(mean, 0.1)), 0.1)
        null = {h: np.random.default_rng([run, k]) for k, h in enumerate(heads)}
        observed = {h: float(null[h].normal()) if truth[h] == 2 else 100.0 for h in heads}
        draws = Drawn(observed={"rank": observed}, draw=lambda h, k, null=null: {"rank": float(null[h].normal())})
        columns = [Sampled(name=name, samples=own) for name, own in p.items()]
        found = corrected(claim, [*columns, draws]).conditions
        wrong += any(all(c.holds(0.05) for c in own[0]) for own in found.values())
    low, _ = stats.clopper_pearson(wrong, runs, 0.01)
    assert low <= 0.05
    assert wrong, "it is no level of zero that is shown"


class _Normal:
    """A sample of known spread: its tests are exact."""

    n_docs = 60

    def __init__(self, estimate: float | np.ndarray, se: float) -> None:
        self.estimate, self.se = np.atleast_1d(estimate), se
        self.n_cand = len(self.estimate)

    def p_above(self, bar: float, simultaneous: bool) -> np.ndarray:
        return sps.norm.sf((self.estimate - bar) / self.se)

    def p_below(self, bar: float, simultaneous: bool) -> np.ndarray:
        return sps.norm.cdf((self.estimate - bar) / self.se)

    def lower(self, level: float, simultaneous: bool) -> np.ndarray:
        return self.estimate - sps.norm.isf(level) * self.se

    def upper(self, level: float, simultaneous: bool) -> np.ndarray:
        return self.estimate + sps.norm.isf(level) * self.se

    def power(self, worth: float, level: float, above: bool, simultaneous: bool) -> np.ndarray:
        return np.full(self.n_cand, sps.norm.sf(sps.norm.isf(level) - worth / self.se))


def refuted(claim: Claim, p: dict[str, list[list[float]]]) -> list[bool]:
    """Whether each head is refuted, by raw p-values of "effect >= bar" [conditions][candidates]."""
    names = [claim.condition, *claim.bars]
    columns = [
        Sampled(
            name=n, samples={h: _Normal(claim.bar_of(n) + sps.norm.ppf(np.array(own[k])), 1.0) for h, own in p.items()}
        )
        for k, n in enumerate(names)
    ]
    found = corrected(claim, columns).conditions
    return [all(any(c.fails(0.05) for c in each) for each in own) for own in found.values()]


def test_holm_for_refutations_is_over_what_is_corrected_within_a_head() -> None:
    """Either of two conditions may refute: 2 x 0.012 is no 0.05 / 3, and so Holm does not come to the third head."""
    heads = {"L0H0": [[0.012], [0.9]], "L0H1": [[0.013], [0.9]], "L1H0": [[0.02], [0.9]]}
    assert refuted(TWO, heads) == [False, False, False]
    assert refuted(TWO, heads | {"L0H0": [[0.001], [0.9]], "L0H1": [[0.002], [0.9]]}) == [True, True, True]


def test_a_head_that_one_candidate_stands_for_is_not_refuted_and_makes_no_room() -> None:
    assert refuted(ONE, {"L0H0": [[0.001, 0.9]], "L0H1": [[0.03, 0.03]]}) == [False, False]
    assert refuted(ONE, {"L0H0": [[0.001, 0.001]], "L0H1": [[0.03, 0.03]]}) == [True, True]


def test_the_chance_of_any_wrong_refutation_is_that_of_the_claim() -> None:
    rng = np.random.default_rng(8)
    heads, wrong, runs = [f"L0H{k}" for k in range(12)], 0, 400
    for _ in range(runs):
        columns = [
            Sampled(name=name, samples={h: _Normal(float(rng.normal(bar, 0.1)), 0.1) for h in heads})
            for name, bar in (("first", 0.5), ("second", 0.1))
        ]
        found = corrected(TWO, columns).conditions
        wrong += any(any(c.fails(0.05) for c in own[0]) for own in found.values())
    low, high = stats.clopper_pearson(wrong, runs, 0.01)
    assert low <= 0.05
    assert high >= 0.03, "nor is more given away than the level asks"


def test_q_is_over_the_heads_that_are_named_and_a_whole_targets_row_has_no_head() -> None:
    first = column("first", (0.9, 0.52, 0.3))
    raw = [float(first.samples[h].p_above(0.5, False)[0]) for h in HEADS]
    found = decide(ONE, [first], rows())
    assert [e.q for e in found.values()] == pytest.approx(list(sps.false_discovery_control(raw)))
    wider = decide(ONE, [first], rows(), q_over=[*HEADS, "L9H9"])
    assert [wider[h].q for h in HEADS] == pytest.approx(list(sps.false_discovery_control([*raw, 1.0]))[:3])
    whole = decide(ONE, [Sampled(name="first", samples={WHOLE: sample(0.9, 0)})], {WHOLE: Beside()}, q_over=())
    assert (whole[WHOLE].head, whole[WHOLE].q) == (None, None)


def test_a_family_of_several_conditions_is_what_the_decider_makes_of_it() -> None:
    claim = replace(ONE, bars={"second": 0.1, "below": 0.3, "rank": 0.95}, below=("below",))
    rng = np.random.default_rng(0)
    means = {"first": 0.9, "second": 0.3, "below": 0.1}
    values = {name: {h: rng.normal(mean, 0.2, 120) for h in HEADS} for name, mean in means.items()}
    sources = [f"source {k % 60}" for k in range(120)]
    ranks = {"rank": {h: (2.0, rng.normal(0, 0.1, 300)) for h in HEADS}}
    found = family(claim, values, target="t", ranks=ranks, sources=sources)
    second = {h: means_of(claim, "t", h, "second", values["second"][h], sources=sources) for h in HEADS}
    for h in HEADS:
        (conditions,) = found[h].candidates.values()
        assert [c.name for c in conditions] == ["first", "second", "below", "rank"]
        assert [c.above for c in conditions] == [True, True, False, True]
        assert (second[h].n_docs, found[h].n) == (60, 60), "documents of one source are one"
        assert conditions[1].effect == second[h].estimate[0]
        assert judge(claim, found[h]).outcome is Outcome.SUPPORTED
    with pytest.raises(FraError, match="'third' was measured"):
        family(claim, values | {"third": values["first"]}, target="t", ranks=ranks, sources=sources)
    with pytest.raises(FraError, match="'below' was not measured"):
        family(claim, {n: values[n] for n in ("first", "second")}, target="t", ranks=ranks, sources=sources)


def test_a_control_that_is_not_beaten_denies_support_and_refutes_nothing() -> None:
    rng = np.random.default_rng(0)
    values = {"first": {h: rng.normal(0.9, 0.2, 120) for h in HEADS}}
    ranks = {"rank": {h: (0.0, rng.normal(0, 1, 300)) for h in HEADS}}
    found = family(RANKED, values, target="t", ranks=ranks, sources=None)
    assert {judge(RANKED, e).outcome for e in found.values()} == {Outcome.INCONCLUSIVE}


@pytest.mark.parametrize(("k", "n"), [(0, 30), (3, 30), (29, 30), (30, 30), (12, 12)])
def test_a_share_of_tries_is_tested_exactly(k: int, n: int) -> None:
    own = Proportion(k, n)
    for bar in (0.1, 0.5, 0.9):
        assert own.p_above(bar)[0] == pytest.approx(sps.binomtest(k, n, bar, alternative="greater").pvalue)
        assert own.p_below(bar)[0] == pytest.approx(sps.binomtest(k, n, bar, alternative="less").pvalue)
        for level in (0.05, 0.001):
            assert (own.p_above(bar)[0] <= level) == (own.lower(level)[0] > bar)
            assert (own.p_below(bar)[0] <= level) == (own.upper(level)[0] < bar)
    assert np.isnan(Proportion(0, 0).estimate)


def test_where_all_agree_an_exact_bound_stands_in_and_inverts_its_test() -> None:
    constant = stats.ClusterMeans(np.full(30, 0.9), seed=0)
    own = exact_where_unbounded(constant, (0.0, 1.0))
    assert own is not None
    q = stats.clopper_pearson(30, 30, 0.05)[0]
    assert own.lower(0.05)[0] == pytest.approx(0.9 * q)
    assert own.p_above(0.5)[0] == pytest.approx((0.5 / 0.9) ** 30)
    nearly = Bounded(np.r_[np.zeros(1), np.ones(39)], 0.0, 1.0)
    for one in (own, nearly):
        for bar in (0.2, 0.5, 0.8, 0.95):
            for level in (0.05, 0.002):
                assert (one.p_above(bar)[0] <= level) == (one.lower(level)[0] > bar)
                assert (one.p_below(bar)[0] <= level) == (one.upper(level)[0] < bar)
    assert exact_where_unbounded(sample(0.5, 0), (0.0, 1.0)) is None
