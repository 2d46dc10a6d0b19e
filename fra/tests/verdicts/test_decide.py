"""The one decider against scipy, statsmodels and loops: what is corrected for what, and what joins or stays apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps
from statsmodels.stats.multitest import multipletests

from fra.claim import Claim, Outcome, family, judge
from fra.errors import FraError
from fra.verdicts import stats
from fra.verdicts.conditions import as_share, exact, rank_condition
from fra.verdicts.decide import WHOLE, Beside, Given, Number, Power, Sampled, corrected, decide, means_of
from fra.verdicts.jackknife import jackknifed

CLAIM = Claim(
    id="T01",
    title="A claim to test with",
    h0="E <= 0.5",
    bar=0.5,
    bars={"second": 0.1, "below": 0.3, "rank": 0.95, "share": 0.2},
    statistic="test/1",
    stimuli=("natural",),
    n=60,
)
HEADS = ("L0H0", "L0H1", "L1H0")


def sample(mean: float, seed: int, n: int = 40) -> stats.ClusterMeans:
    values = np.random.default_rng(seed).normal(mean, 0.2, n)
    return stats.ClusterMeans(values, seed=seed)


def column(name: str, means: tuple[float, ...], seed: int = 0, **more: object) -> Sampled:
    return Sampled(
        name=name, samples={h: sample(m, seed + k) for k, (h, m) in enumerate(zip(HEADS, means, strict=True))}, **more
    )


def rows(n_cand: int = 1) -> dict[str, Beside]:
    return {h: Beside(n=40, candidates=[f"c{k}" for k in range(n_cand)]) for h in HEADS}


@pytest.mark.parametrize("means", [(0.58, 0.56, 0.4), (0.44, 0.55, 0.45), (0.43, 0.46, 0.57)])
def test_support_is_holm_over_heads_and_refutation_bonferroni_over_heads_and_what_may_refute(means) -> None:
    first, second = column("first", means), column("second", tuple(m - 0.4 for m in means), seed=10)
    decided = corrected(CLAIM, [first, second])
    for k, (own, bar) in enumerate(((first, 0.5), (second, 0.1))):
        above = [float(own.samples[h].p_above(bar, False)[0]) for h in HEADS]
        below = [float(own.samples[h].p_below(bar, False)[0]) for h in HEADS]
        holm = multipletests(above, 0.05, method="holm")[1]
        for n, h in enumerate(HEADS):
            ((*conditions,),) = decided.conditions[h]
            c = conditions[k]
            assert (c.name, c.bar) == (own.name, bar)
            assert c.p == pytest.approx(holm[n], abs=1e-12)
            assert c.p_refute == pytest.approx(min(1.0, below[n] * 3 * 2))
            assert c.holds(0.05) == (holm[n] <= 0.05) == (c.low > bar), "the bound inverts the test"
            assert c.fails(0.05) == (below[n] * 6 <= 0.05) == (c.high < bar)
    assert decided.raw == {h: float(first.samples[h].p_above(0.5, False)[0]) for h in HEADS}


def test_a_claim_of_one_condition_may_be_refuted_by_holm() -> None:
    own = column("first", (0.4, 0.44, 0.46))
    below = [float(own.samples[h].p_below(0.5, False)[0]) for h in HEADS]
    holm = multipletests(below, 0.05, method="holm")[1]
    decided = corrected(CLAIM, [own], refuting="holm")
    for h, p in zip(HEADS, holm, strict=True):
        ((c,),) = decided.conditions[h]
        assert c.p_refute == pytest.approx(p, abs=1e-12)
        assert c.fails(0.05) == (c.high < 0.5)


def test_below_is_above_with_the_sign_turned() -> None:
    means = (0.2, 0.28, 0.35)
    down = corrected(CLAIM, [column("below", means, above=False)])
    turned = {h: m.turned() for h, m in column("below", means).samples.items()}
    up = corrected(CLAIM, [Sampled(name="below", samples=turned, bar=-0.3)])
    for h in HEADS:
        ((a,),), ((b,),) = down.conditions[h], up.conditions[h]
        assert (a.effect, a.low, a.high, a.p, a.p_refute) == (-b.effect, -b.high, -b.low, b.p, b.p_refute)
        assert a.above is False


def test_candidates_of_a_head_are_tested_together_and_holm_goes_over_the_best() -> None:
    rng = np.random.default_rng(1)
    table = {h: rng.normal([0.5, 0.62, 0.4, 0.55], 0.2, (40, 4)) for h in HEADS}
    means = {h: stats.ClusterMeans(v, seed=k) for k, (h, v) in enumerate(table.items())}
    decided = corrected(CLAIM, [Sampled(name="first", samples=means, simultaneous=True)])
    best = {h: float(m.p_above(0.5, True).min()) for h, m in means.items()}
    holm = dict(zip(HEADS, multipletests(list(best.values()), 0.05, method="holm")[1], strict=True))
    for h in HEADS:
        p = [c.p for (c,) in decided.conditions[h]]
        assert min(p) == pytest.approx(holm[h], abs=1e-12)
        assert len(p) == 4
    assert decided.raw == best


def test_several_samples_of_a_head_must_all_hold_and_each_may_refute() -> None:
    good, bad = sample(0.8, 1), sample(0.3, 2)
    both = {"a": [good, good], "b": [good, bad]}
    for name, samples in both.items():
        decided = corrected(CLAIM, [Sampled(name="first", samples={WHOLE: samples})])
        ((c,),) = decided.conditions[WHOLE]
        assert c.holds(0.05) == (name == "a")
        assert c.fails(0.05) == (name == "b")
        assert c.p == max(float(m.p_above(0.5, False)[0]) for m in samples)
        assert c.p_refute == min(1.0, 2 * min(float(m.p_below(0.5, False)[0]) for m in samples))
        assert c.effect == min(float(m.estimate[0]) for m in samples)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.booleans())
def test_numbers_decide_by_themselves(values: list[float], above: bool) -> None:
    samples = [Number(v) for v in values]
    ((c,),) = corrected(CLAIM, [Sampled(name="first", samples={WHOLE: samples}, above=above)]).conditions[WHOLE]
    beyond = [v > 0.5 if above else v < 0.5 for v in values]
    short = [v < 0.5 if above else v > 0.5 for v in values]
    assert (c.p, c.p_refute) == (None, None)
    assert c.effect == (min(values) if above else max(values))
    assert c.holds(0.05) == all(beyond)
    assert c.fails(0.05) == any(short)


def test_a_number_beside_a_sample() -> None:
    for value, holds in ((0.9, True), (0.1, False)):
        ((c,),) = corrected(
            CLAIM, [Sampled(name="first", samples={WHOLE: [sample(0.8, 1), Number(value)]})]
        ).conditions[WHOLE]
        assert (c.holds(0.05), c.fails(0.05)) == (holds, not holds)


def test_a_linear_form_is_said_as_a_share() -> None:
    rng = np.random.default_rng(0)
    whole, part = rng.normal(2.0, 0.3, 40), rng.normal(0.7, 0.1, 40)
    m = stats.ClusterMeans(part - 0.2 * whole, seed=3)
    one = Sampled(name="share", samples={"L0H0": m}, shares={"L0H0": (part.mean(), whole.mean())})
    ((c,),) = corrected(CLAIM, [one]).conditions["L0H0"]
    assert c.effect == pytest.approx(part.mean() / whole.mean())
    assert c.bar == 0.2
    assert c.low == pytest.approx(0.2 + m.lower(0.05, False)[0] / whole.mean())
    assert c.p == m.p_above(0.0, False)[0]
    assert c.holds(0.05) == (c.low > 0.2)


@pytest.mark.parametrize("whole", [0.0, -1.0, np.nan])
def test_a_share_of_nothing_is_not_measured(whole: float) -> None:
    c = as_share(exact("share", 0.3, 0.0), 0.3, whole, 0.2)
    assert not c.holds(0.05)
    assert not c.fails(0.05)
    assert (c.low, c.high, c.p, c.p_refute) == (-np.inf, np.inf, None, None)


def test_a_jackknifed_statistic_is_a_students_t() -> None:
    left_out = np.random.default_rng(0).normal(0.7, 0.01, 12)
    j = jackknifed(0.7, left_out)
    t = (0.7 - 0.5) / j.se
    ((c,),) = corrected(CLAIM, [Sampled(name="first", samples={"L0H0": j})]).conditions["L0H0"]
    assert c.p == pytest.approx(sps.t.sf(t, 11))
    assert c.p_refute == pytest.approx(sps.t.cdf(t, 11))
    assert c.low == pytest.approx(0.7 - sps.t.isf(0.05, 11) * j.se)
    ((unknown,),) = corrected(CLAIM, [Sampled(name="first", samples={"L0H0": jackknifed(0.7, [0.7])})]).conditions[
        "L0H0"
    ]
    assert (unknown.p, unknown.p_refute, unknown.low, unknown.high) == (1.0, 1.0, -np.inf, np.inf)


def test_given_conditions_stand_beside_each_candidate_and_count_where_they_may_refute() -> None:
    rng = np.random.default_rng(0)
    means = {"L0H0": stats.ClusterMeans(rng.normal(0.45, 0.2, (40, 2)), seed=0)}
    first = Sampled(name="first", samples=means, simultaneous=True)
    rank = Given("rank", {"L0H0": [rank_condition("rank", 0.01, 0.05)]})
    alone = corrected(CLAIM, [first, rank]).conditions["L0H0"]
    assert [own[1].name for own in alone] == ["rank", "rank"]
    may = corrected(CLAIM, [first, Given("rank", rank.conditions, refutes=True)]).conditions["L0H0"]
    assert [own[0].p_refute for own in may] == [min(1.0, 2 * own[0].p_refute) for own in alone]
    three = Given("rank", {"L0H0": [rank_condition("rank", 0.01, 0.05)] * 3})
    with pytest.raises(FraError, match=r"2 of 'first', 3 of 'rank'"):
        corrected(CLAIM, [first, three])
    with pytest.raises(FraError, match="without conditions"):
        corrected(CLAIM, [])


def test_what_a_head_lacks_was_not_measured_and_supports_nothing() -> None:
    first = column("first", (0.9, 0.9, 0.9))
    second = Sampled(name="second", samples={"L0H0": sample(0.9, 5)})
    found = decide(CLAIM, [first, second], rows())
    outcomes = {h: judge(CLAIM, e).outcome for h, e in found.items()}
    assert outcomes == {"L0H0": Outcome.SUPPORTED, "L0H1": Outcome.INCONCLUSIVE, "L1H0": Outcome.INCONCLUSIVE}
    nothing = decide(CLAIM, [second], {**rows(), "L1H1": Beside(n=40)})
    assert nothing["L1H1"].candidates == {}


def test_power_of_the_headline_and_of_what_fails() -> None:
    first, second = column("first", (0.9, 0.3, 0.9)), column("second", (0.5, 0.5, 0.0), seed=10)

    def powers(power: Power) -> list[float | None]:
        return [e.power for e in decide(CLAIM, [first, second], rows(), power=power).values()]

    def by_hand(own: Sampled, h: str, bar: float) -> float:
        return float(stats.power_above(own.samples[h], 0.0, bar, 0.05 / 3, simultaneous=False)[0])

    headline = [by_hand(first, h, 0.5) for h in HEADS]
    assert powers(Power("headline")) == headline
    assert powers(Power("failing")) == [None, headline[1], by_hand(second, "L1H0", 0.1)]
    assert powers(Power("failing", or_headline=True)) == [headline[0], headline[1], by_hand(second, "L1H0", 0.1)]
    assert powers(Power("failing", {"second": 0.0})) == [None, None, by_hand(second, "L1H0", 0.1)]


def test_q_is_over_the_heads_that_are_named_and_a_whole_targets_row_has_no_head() -> None:
    first = column("first", (0.9, 0.52, 0.3))
    raw = [float(first.samples[h].p_above(0.5, False)[0]) for h in HEADS]
    found = decide(CLAIM, [first], rows())
    assert [e.q for e in found.values()] == pytest.approx(list(sps.false_discovery_control(raw)))
    wider = decide(CLAIM, [first], rows(), q_over=[*HEADS, "L9H9"])
    assert [wider[h].q for h in HEADS] == pytest.approx(list(sps.false_discovery_control([*raw, 1.0]))[:3])
    whole = decide(CLAIM, [Sampled(name="first", samples={WHOLE: sample(0.9, 0)})], {WHOLE: Beside(n=40)}, q_over=())
    assert (whole[WHOLE].head, whole[WHOLE].q) == (None, None)


def test_a_family_of_several_conditions_is_what_the_decider_makes_of_it() -> None:
    rng = np.random.default_rng(0)
    means = {"effect": 0.9, "second": 0.3, "below": 0.1}
    values = {name: {h: rng.normal(mean, 0.2, 40) for h in HEADS} for name, mean in means.items()}
    sources = [f"source {k % 20}" for k in range(40)]
    ranks = {"rank": {h: (2.0, rng.normal(0, 1, 99)) for h in HEADS}}
    found = family(CLAIM, values, target="t", below=["below"], ranks=ranks, sources=sources)
    second = {h: means_of(CLAIM, "t", h, "second", values["second"][h], sources=sources) for h in HEADS}
    levels = stats.holm_levels([float(m.p_above(0.1, False)[0]) for m in second.values()], 0.05)
    for h, level in zip(HEADS, levels, strict=True):
        (conditions,) = found[h].candidates.values()
        assert [c.name for c in conditions] == ["effect", "second", "below", "rank"]
        assert [c.above for c in conditions] == [True, True, False, True]
        assert second[h].n_docs == 20, "documents of one source are one"
        assert (conditions[1].effect, conditions[1].low) == (second[h].estimate[0], second[h].lower(level, False)[0])
        assert conditions[3].p == stats.rank_p(*ranks["rank"][h])
        assert judge(CLAIM, found[h]).outcome is Outcome.SUPPORTED


def test_a_control_that_is_not_beaten_denies_support_and_refutes_nothing() -> None:
    rng = np.random.default_rng(0)
    values = {"effect": {h: rng.normal(0.9, 0.2, 40) for h in HEADS}}
    found = family(CLAIM, values, target="t", ranks={"rank": {h: (0.0, rng.normal(0, 1, 99)) for h in HEADS}})
    assert {judge(CLAIM, e).outcome for e in found.values()} == {Outcome.INCONCLUSIVE}
