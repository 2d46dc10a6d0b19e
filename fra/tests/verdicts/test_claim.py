"""The judge against its table, and families against scipy and against each other."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps

from fra.claim import Claim, Condition, Evidence, Outcome, family, judge, parse_head
from fra.errors import FraError
from fra.verdicts import stats

NAN, INF = float("nan"), float("inf")


def make_claim(**fields) -> Claim:
    standard = {
        "id": "T01",
        "title": "A claim",
        "h0": "E <= 1",
        "bar": 1.0,
        "statistic": "mean/1",
        "stimuli": ("made",),
        "n": 100,
        "bars": {"share": 0.1},
    }
    return Claim(**(standard | fields))


CLAIM = make_claim()
BELOW = make_claim(above=False, bars={})


def above(effect=2.0, p=0.01, p_refute=1.0, low=-INF, high=INF) -> Condition:
    return Condition("effect", effect, low, high, 1.0, p, p_refute)


def share(low: float, high: float) -> Condition:
    return Condition("share", (low + high) / 2, low, high, 0.1)


def evidence(*candidates, claim=CLAIM, **fields) -> Evidence:
    named = {f"c{k}": candidate for k, candidate in enumerate(candidates)}
    return Evidence(**({"claim": claim, "head": "L0H1", "n": 50, "candidates": named} | fields))


GOOD, BAD, OPEN = above(), above(0.2, 1.0, 0.01), above(1.1, 0.4, 0.6)


@pytest.mark.parametrize(
    ("given_", "outcome", "says"),
    [
        (evidence((GOOD,)), "SUPPORTED", "effect 2"),
        (evidence((BAD,), (GOOD,)), "SUPPORTED", "1 of 2 candidates"),
        (evidence((GOOD, share(0.2, 0.3))), "SUPPORTED", "1 further condition met"),
        # The conditions must hold for one and the same candidate.
        (evidence((GOOD, share(0.05, 0.3)), (OPEN, share(0.2, 0.3))), "INCONCLUSIVE", "share"),
        (evidence((BAD,), power=0.8), "REFUTED", "power 0.80"),
        (evidence((BAD,)), "REFUTED", "effect 0.2"),
        (evidence((BAD,), power=0.79), "INCONCLUSIVE", "power"),
        # Every candidate must fail, of some condition each.
        (evidence((BAD, share(0.2, 0.3)), (GOOD, share(0.0, 0.05))), "REFUTED", "none among the 2 screened"),
        (evidence((GOOD, share(0.0, 0.05))), "REFUTED", "share 0.025 [0, 0.05], bar > 0.1"),
        (evidence((BAD,), (OPEN,)), "INCONCLUSIVE", "'c1'"),
        (evidence((OPEN,)), "INCONCLUSIVE", "neither side"),
        (evidence((GOOD, share(0.0, 0.3))), "INCONCLUSIVE", "neither side of the bar is rejected: share 0.15"),
        (evidence((GOOD,), n=19), "INCONCLUSIVE", "19 documents, where 20 are needed"),
        (evidence(), "INCONCLUSIVE", "no candidate"),
        (evidence((above(NAN, 0.01),)), "INCONCLUSIVE", "not a finite number"),
        (evidence((above(INF, 0.01),)), "INCONCLUSIVE", "not a finite number"),
        (evidence((above(2.0, NAN),)), "INCONCLUSIVE", "not a finite number"),
        (evidence((GOOD, Condition("share", NAN, NAN, NAN, 0.1))), "INCONCLUSIVE", "share"),
        # A condition that was not measured does not stand in the way of a refutation by another.
        (evidence((BAD, Condition("share", NAN, NAN, NAN, 0.1))), "REFUTED", "effect 0.2"),
        (evidence((GOOD,), undecided="the gate was shut"), "INCONCLUSIVE", "the gate was shut"),
        (evidence(cannot="no weights"), "CANNOT_RUN", "no weights"),
        (evidence(outside="no induction head"), "NOT_APPLICABLE", "no induction head"),
        (evidence((Condition("error", 0.5, 0.5, 0.5, 1.0, above=False),), claim=BELOW), "SUPPORTED", "bar < 1"),
        (evidence((Condition("error", 1.5, 1.5, 1.5, 1.0, above=False),), claim=BELOW), "REFUTED", "bar < 1"),
        (evidence((Condition("error", 1.0, 1.0, 1.0, 1.0, above=False),), claim=BELOW), "INCONCLUSIVE", "neither"),
    ],
)
def test_the_verdict_table(given_, outcome, says):
    verdict = judge(given_.claim, given_)
    assert verdict.outcome is Outcome(outcome), verdict.reason
    assert says in verdict.reason


def test_the_level_is_the_claims_own():
    at = evidence((above(2.0, 0.03),))
    assert judge(CLAIM, at).outcome is Outcome.SUPPORTED
    strict = make_claim(level=0.02)
    assert judge(strict, dataclasses.replace(at, claim=strict)).outcome is Outcome.INCONCLUSIVE


def test_the_headline_is_the_strongest_of_the_candidates_that_pass():
    verdict = judge(CLAIM, evidence((above(9.0, 0.4),), (above(2.0),), (above(3.0),)))
    assert verdict.best == "c2"
    assert verdict.headline == above(3.0)
    low = judge(BELOW, evidence(*((Condition("e", x, x, x, 1.0, above=False),) for x in (0.5, 0.2)), claim=BELOW))
    assert low.best == "c1"  # farther below the bar
    assert judge(CLAIM, evidence((BAD,), (above(0.1, 1.0, 0.01),))).best == "c0"  # none passes: the first
    assert judge(CLAIM, evidence(cannot="no")).headline is None


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: make_claim(id="Q 4"), "an id is"),
        (lambda: make_claim(h0=" "), "h0"),
        (lambda: make_claim(stimuli="natural"), "tuple"),
        (lambda: make_claim(bar=NAN), "finite"),
        (lambda: make_claim(bars={"share": INF}), "finite"),
        (lambda: make_claim(level=1.0), "level"),
        (lambda: make_claim(n=10), "min_documents"),
        (lambda: above(p=1.2), "no probability"),
        (lambda: above(low=2, high=1), "upside down"),
        (lambda: evidence((GOOD,), n=101), "100 are registered"),
        (lambda: evidence((GOOD,), ()), "differ in their conditions"),
        (lambda: evidence(()), "without conditions"),
        (lambda: evidence((dataclasses.replace(GOOD, bar=0.5),)), "held against 0.5, but 1 is registered"),
        (lambda: evidence((GOOD, dataclasses.replace(share(0, 1), bar=0.05))), "0.1 is registered"),
        (lambda: evidence((dataclasses.replace(GOOD, above=False),)), "the other way"),
        (lambda: evidence((GOOD,), head="1.3"), "is not a head"),
        (lambda: judge(make_claim(id="T02"), evidence((GOOD,))), "cannot decide T02"),
        (lambda: judge(CLAIM, evidence((above(2.0, 0.01, 0.01),))), "both holds and fails"),
        (lambda: parse_head("L01H2"), "is not a head"),
        (lambda: family(CLAIM, {"L0H0": np.zeros((3, 2))}, target="t"), "one number a document"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(build, says):
    with pytest.raises(FraError, match=says) as raised:
        build()
    assert "\n" not in str(raised.value)


def test_the_digest_moves_with_what_could_turn_a_verdict_and_with_nothing_else():
    changes = {
        "id": "T02",
        "h0": "E <= 2",
        "bar": 2.0,
        "level": 0.01,
        "statistic": "mean/2",
        "stimuli": ("made", "other"),
        "n": 101,
        "min_documents": 21,
        "above": False,
        "bars": {"share": 0.2},
    }
    digests = {name: make_claim(**{name: value}).digest for name, value in changes.items()}
    assert len({CLAIM.digest, *digests.values()}) == 1 + len(changes)
    assert {field.name for field in dataclasses.fields(Claim)} == changes.keys() | {"title"}
    assert make_claim(title="Other words").digest == CLAIM.digest
    assert make_claim(bar=1, stimuli=["made"]).digest == CLAIM.digest  # 1 and 1.0, list and tuple
    assert make_claim(bars={"a": 1, "b": 2}).digest == make_claim(bars={"b": 2, "a": 1}).digest


@settings(deadline=None)
@given(
    effect=st.floats(allow_nan=True, allow_infinity=True),
    p=st.none() | st.just(NAN) | st.floats(0, 1),
    p_refute=st.none() | st.just(NAN) | st.floats(0, 1),
    n=st.integers(0, 100),
    power=st.none() | st.floats(0, 1),
)
def test_whatever_the_numbers_there_is_a_verdict_and_it_is_earned(effect, p, p_refute, n, power):
    condition = Condition("effect", effect, -INF, INF, 1.0, p, p_refute)
    given_ = evidence((condition,), n=n, power=power)
    if condition.holds(0.05) and condition.fails(0.05):
        with pytest.raises(FraError, match="both"):
            judge(CLAIM, given_)
        return
    outcome = judge(CLAIM, given_).outcome
    if outcome is Outcome.SUPPORTED:
        assert n >= 20
        assert p is not None
        assert p <= 0.05
        assert math.isfinite(effect)
    if outcome is Outcome.REFUTED:
        assert n >= 20
        assert p_refute is not None
        assert p_refute <= 0.05
        assert power is None or power >= 0.8


def samples(seed: int, means: dict[str, float], n: int = 60) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {head: rng.normal(mean, 1.0, n) for head, mean in means.items()}


def test_family_numbers_agree_with_the_t_test_and_with_holm():
    claim = make_claim(bars={})
    data = samples(1, {"L0H0": 1.6, "L0H1": 1.3, "L0H2": 1.0, "L0H3": 0.5})
    found = family(claim, data, target="t")
    raw = [sps.ttest_1samp(x, 1.0, alternative="greater").pvalue for x in data.values()]
    conditions = [e.candidates["effect"][0] for e in found.values()]
    # The bootstrap's p on normal data is the t-test's, up to its own Monte Carlo error.
    np.testing.assert_allclose([c.p for c in conditions], stats.holm(raw), atol=0.03)
    np.testing.assert_allclose([e.q for e in found.values()], sps.false_discovery_control(raw), atol=0.03)
    for (head, e), c in zip(found.items(), conditions, strict=True):
        assert (e.head, e.n, e.claim) == (head, 60, claim)
        assert c.effect == pytest.approx(data[head].mean())
        assert (c.p <= 0.05) == (c.low > 1.0), "the bound must invert the adjusted test"
        assert (c.p_refute <= 0.05) == (c.high < 1.0), "the bound must invert the adjusted test"
    assert [judge(claim, e).outcome.value for e in found.values()][::3] == ["SUPPORTED", "REFUTED"]


def test_family_below_the_bar_mirrors_family_above_it():
    data = samples(2, {"L0H0": 0.2, "L0H1": 1.1, "L0H2": 1.9})
    up = family(make_claim(bars={}, bar=-1.0, h0="E <= -1"), {h: -x for h, x in data.items()}, target="t")
    down = family(make_claim(bars={}, above=False), data, target="t", null=0.0)
    for head in data:
        a, b = up[head].candidates["effect"][0], down[head].candidates["effect"][0]
        assert a.effect == pytest.approx(-b.effect)
        assert a.p == pytest.approx(b.p, abs=0.03)
        assert a.p_refute == pytest.approx(b.p_refute, abs=0.03)
        assert (b.p <= 0.05) == (b.high < 1.0)
        assert not b.above


def test_family_depends_on_nothing_but_claim_target_and_data():
    data = samples(3, {"L0H0": 1.3, "L0H1": 0.4})
    one, again = (family(CLAIM, data, target="t", n_boot=999) for _ in range(2))
    assert one == again
    turned = family(CLAIM, dict(reversed(data.items())), target="t", n_boot=999)
    assert {h: e.candidates for h, e in turned.items()} == {h: e.candidates for h, e in one.items()}
    assert family(CLAIM, data, target="other", n_boot=999)["L0H0"].candidates != one["L0H0"].candidates
    assert family(CLAIM, {}, target="t") == {}


def test_heads_without_variance_or_with_nan_are_inconclusive_and_cost_the_others_nothing_but_correction():
    data = samples(4, {"L0H0": 3.0}) | {"L0H1": np.full(60, 5.0), "L0H2": np.r_[NAN, np.ones(59)]}
    found = family(CLAIM, data, target="t", n_boot=999)
    assert [judge(CLAIM, e).outcome.value for e in found.values()] == ["SUPPORTED", "INCONCLUSIVE", "INCONCLUSIVE"]


def test_a_refutation_needs_a_design_that_could_have_seen_the_effect():
    rng = np.random.default_rng(5)
    claim = make_claim(bars={}, n=25)
    # Far below the bar, yet so wide that an effect at the bar could not be told from none.
    wide = {"L0H0": rng.normal(-8.0, 10.0, 25)}
    power = family(claim, wide, target="t", n_boot=999)["L0H0"].power
    assert power < 0.3
    assert judge(claim, family(claim, wide, target="t", n_boot=999)["L0H0"]).outcome is Outcome.INCONCLUSIVE
    assert judge(claim, family(claim, wide, target="t", null=None, n_boot=999)["L0H0"]).outcome is Outcome.REFUTED
    narrow = {"L0H0": rng.normal(0.0, 0.5, 25)}
    assert family(claim, narrow, target="t", n_boot=999)["L0H0"].power > 0.99


def test_judging_and_reporting_import_neither_torch_nor_pytest():
    code = (
        "import sys, fra.claim, fra.verdicts.stats, fra.verdicts.ledger, fra.report.page;"
        "print([m for m in ('torch', 'pytest', 'transformer_lens', 'sae_lens') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def named(name: str, effect: float, p: float, p_refute: float) -> Condition:
    return Condition(name, effect, -INF, INF, CLAIM.bar, p=p, p_refute=p_refute)


@pytest.mark.parametrize(
    ("candidate", "outcome", "decided", "met"),
    [
        ((named("a", 3, 0.01, 1), named("b", 2, 0.01, 1)), "SUPPORTED", "a", (2, 2)),
        ((named("a", 3, 0.01, 1), named("b", 0, 1, 0.01), named("c", 2, 0.01, 1)), "REFUTED", "b", (2, 3)),
        ((named("a", 3, 0.01, 1), named("b", 1, 0.5, 0.5)), "INCONCLUSIVE", "b", (1, 2)),
        ((named("a", 3, 0.01, 1), named("b", NAN, 1, 1)), "INCONCLUSIVE", "b", (1, 2)),
    ],
)
def test_the_verdict_names_the_condition_that_decided(candidate, outcome, decided, met) -> None:
    found = judge(CLAIM, evidence(candidate, power=0.9))
    assert (found.outcome, found.decided.name, found.met) == (outcome, decided, met)
    unsure = judge(CLAIM, evidence(candidate, power=0.1))
    assert unsure.decided.name == decided, "without power it is the refutation that is in doubt"


def test_a_gate_that_was_not_met_leaves_the_headline() -> None:
    found = judge(CLAIM, evidence((named("a", 3, 0.01, 1), named("b", 0, 1, 0.01)), undecided="too little"))
    assert (found.outcome, found.decided.name) == ("INCONCLUSIVE", "a")
    assert judge(CLAIM, evidence(cannot="no weights")).decided is None
