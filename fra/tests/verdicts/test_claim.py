"""The judge against its table, and families against scipy and against each other."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as sps

from fra.claim import Claim, Condition, Evidence, Outcome, family, judge, parse_head
from fra.errors import FraError
from fra.statistics import stats
from fra.statistics.rules import RULES
from fra.verdicts import claim as claims

NAN, INF = float("nan"), float("inf")


def make_claim(**fields) -> Claim:
    standard = {
        "id": "T01",
        "title": "A claim",
        "h0": "E <= 1",
        "bar": 1.0,
        "statistic": "mean/1",
        "stimuli": ("made",),
        "n": 200,
    }
    return Claim(**(standard | fields))


CLAIM = make_claim()
TWO = make_claim(bars={"share": 0.1})
BELOW = make_claim(above=False)
IDENTITY = make_claim(above=False, kind="identity")


def above(effect=2.0, p=0.01, p_refute=1.0, power=None, bar=1.0, name="effect") -> Condition:
    """A condition whose bounds say what its p-values say."""
    low = bar + 0.1 if p is not None and p <= 0.05 else -INF
    high = bar - 0.1 if p_refute is not None and p_refute <= 0.05 else INF
    return Condition(name, effect, min(low, effect), max(high, effect), bar, p, p_refute, power=power)


def share(p=0.01, p_refute=1.0, power=None) -> Condition:
    return above(0.5 if p <= 0.05 else -0.5 if p_refute <= 0.05 else 0.1, p, p_refute, power, bar=0.1, name="share")


def exact(name: str, value: float, bar: float, up: bool = True) -> Condition:
    return Condition(name, value, value, value, bar, above=up)


def evidence(*candidates, claim=None, **fields) -> Evidence:
    named = {f"c{k}": candidate for k, candidate in enumerate(candidates)}
    own = claim or (TWO if candidates and len(candidates[0]) > 1 else CLAIM)
    return Evidence(**({"claim": own, "head": "L0H1", "n": 50, "candidates": named} | fields))


GOOD, OPEN = above(), above(1.1, 0.4, 0.6)
BAD = above(0.2, 1.0, 0.01, power=0.9)
UNMEASURED = Condition("share", NAN, -INF, INF, 0.1)


@pytest.mark.parametrize(
    ("given_", "outcome", "says"),
    [
        (evidence((GOOD,)), "SUPPORTED", "effect 2"),
        (evidence((BAD,), (GOOD,)), "SUPPORTED", "1 of 2 candidates"),
        (evidence((GOOD, share())), "SUPPORTED", "1 further condition met"),
        # The conditions must hold for one and the same candidate.
        (evidence((GOOD, share(0.3, 0.3)), (OPEN, share())), "INCONCLUSIVE", "share"),
        (evidence((BAD,)), "REFUTED", "power 0.90"),
        (evidence((above(0.2, 1.0, 0.01, power=0.8),)), "REFUTED", "effect 0.2"),
        (evidence((above(0.2, 1.0, 0.01, power=0.79),)), "INCONCLUSIVE", "0.79, below 0.8"),
        # No power, no refutation.
        (evidence((above(0.2, 1.0, 0.01),)), "INCONCLUSIVE", "not met, which alone does not refute"),
        (evidence((above(0.2, 1.0, 0.01, power=NAN),)), "INCONCLUSIVE", "not known"),
        # A search has a power of its own, that of everything together.
        (evidence((above(0.2, 1.0, 0.01),), power=0.85), "REFUTED", "power 0.85"),
        (evidence((BAD,), power=0.5), "INCONCLUSIVE", "0.50, below"),
        (evidence((BAD,), power=NAN), "INCONCLUSIVE", "not known"),
        # Every candidate must fail, of some condition each, and by each with power.
        (evidence((BAD, share()), (GOOD, share(1.0, 0.01, 0.85))), "REFUTED", "none of the 2 screened"),
        (evidence((BAD, share()), (GOOD, share(1.0, 0.01, 0.5))), "INCONCLUSIVE", "0.50, below"),
        # The condition with the most power decides.
        (evidence((above(0.2, 1.0, 0.01, 0.3), share(1.0, 0.01, 0.9))), "REFUTED", "share -0.5"),
        (evidence((BAD,), (OPEN,)), "INCONCLUSIVE", "'c1'"),
        (evidence((OPEN,)), "INCONCLUSIVE", "neither side"),
        (evidence((dataclasses.replace(OPEN, needed=130),)), "INCONCLUSIVE", "about 130 independent sources"),
        (evidence((GOOD,), n=19), "INCONCLUSIVE", "19 independent sources of documents, where 20 are needed"),
        (evidence(), "INCONCLUSIVE", "no candidate"),
        (evidence((above(NAN, 0.3),)), "INCONCLUSIVE", "not a finite number"),
        (evidence((above(2.0, NAN),)), "INCONCLUSIVE", "not a finite number"),
        (evidence((GOOD, UNMEASURED)), "INCONCLUSIVE", "share"),
        # A condition that was not measured does not stand in the way of a refutation by another.
        (evidence((BAD, UNMEASURED)), "REFUTED", "effect 0.2"),
        (evidence((GOOD,), undecided="the gate was shut"), "INCONCLUSIVE", "the gate was shut"),
        (evidence(cannot="no weights"), "CANNOT_RUN", "no weights"),
        (evidence(outside="no induction head"), "NOT_APPLICABLE", "no induction head"),
        # A number that is not estimated can deny a finding and never refutes it; an identity it does.
        (evidence((GOOD, exact("share", 0.2, 0.1))), "SUPPORTED", "1 further condition met"),
        (evidence((GOOD, exact("share", 0.05, 0.1))), "INCONCLUSIVE", "which alone does not refute: share 0.05"),
        (evidence((exact("effect", 0.5, 1.0, up=False),), claim=BELOW), "SUPPORTED", "bar < 1"),
        (evidence((exact("effect", 1.5, 1.0, up=False),), claim=BELOW), "INCONCLUSIVE", "bar < 1"),
        (evidence((exact("effect", 1.5, 1.0, up=False),), claim=IDENTITY), "REFUTED", "bar < 1"),
        (evidence((exact("effect", 1.0, 1.0, up=False),), claim=IDENTITY), "INCONCLUSIVE", "not met"),
    ],
)
def test_the_verdict_table(given_, outcome, says):
    verdict = judge(given_.claim, given_)
    assert verdict.outcome is Outcome(outcome), verdict.reason
    assert says in verdict.reason


def test_the_level_is_the_claims_own():
    at = evidence((dataclasses.replace(above(2.0, 0.03)),))
    assert judge(CLAIM, at).outcome is Outcome.SUPPORTED
    strict = make_claim(level=0.02)
    wide = dataclasses.replace(above(2.0, 0.03), low=0.9)
    assert judge(strict, evidence((wide,), claim=strict)).outcome is Outcome.INCONCLUSIVE


def test_the_headline_is_the_strongest_of_the_candidates_that_pass():
    verdict = judge(CLAIM, evidence((above(9.0, 0.4),), (above(2.0),), (above(3.0),)))
    assert verdict.best == "c2"
    assert verdict.headline == above(3.0)
    low = judge(BELOW, evidence(*((exact("effect", x, 1.0, up=False),) for x in (0.5, 0.2)), claim=BELOW))
    assert low.best == "c1"  # farther below the bar
    assert judge(CLAIM, evidence((BAD,), (above(0.1, 1.0, 0.01),))).best == "c0"  # none passes: the first
    assert judge(CLAIM, evidence(cannot="no")).headline is None


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: make_claim(id="Q 4"), "an id is"),
        (lambda: make_claim(h0=" "), "h0"),
        (lambda: make_claim(stimuli="natural"), "tuple"),
        (lambda: make_claim(stimuli=("foo",)), "no stimuli"),
        (lambda: make_claim(bar=NAN), "finite"),
        (lambda: make_claim(bars={"share": INF}), "finite"),
        (lambda: make_claim(level=1.0), "level"),
        (lambda: make_claim(n=10), "min_sources"),
        (lambda: make_claim(bars={"effect": 1.0}), "'effect' is the headline"),
        (lambda: make_claim(below=("share",)), "none of its conditions"),
        (lambda: make_claim(worth={"share": 1.0}), "none of its conditions"),
        (lambda: make_claim(worth={"effect": 0.0}), "above 0"),
        (lambda: make_claim(kind="guess"), "a finding, identity or control"),
        (lambda: make_claim(design=({"draws": 20},)), "no frozen dataclass"),
        (lambda: make_claim(design=(Lags(), Lags(count=3))), "two of one class"),
        (lambda: CLAIM.designed(Lags), "registers no Lags"),
        (lambda: CLAIM.bar_of("share"), "registers no condition 'share'"),
        (lambda: above(p=1.2), "no probability"),
        (lambda: dataclasses.replace(GOOD, power=7.0), "no probability"),
        (lambda: Condition("effect", 2, 2, 1, 1.0), "upside down"),
        (lambda: evidence((GOOD,), n=201), "200 are registered"),
        (lambda: evidence((GOOD,), power=7.0), "no probability"),
        (lambda: evidence(()), "without conditions"),
        # The judge asks for exactly what is registered.
        (lambda: evidence((GOOD,), claim=TWO), "lacks 'share'"),
        (lambda: evidence((GOOD, share()), claim=CLAIM), "brings 'share'"),
        (lambda: evidence((GOOD, GOOD), claim=TWO), "lacks 'share'"),
        (lambda: evidence((share(), GOOD)), "the headline first"),
        (lambda: evidence((dataclasses.replace(GOOD, bar=0.5),)), "held against 0.5, but 1 is registered"),
        (lambda: evidence((GOOD, dataclasses.replace(share(), bar=0.05))), "0.1 is registered"),
        (lambda: evidence((dataclasses.replace(GOOD, above=False),)), "the other way"),
        (lambda: evidence((GOOD, dataclasses.replace(share(), above=False))), "the other way"),
        (lambda: evidence((GOOD,), head="1.3"), "is not a head"),
        (lambda: judge(make_claim(id="T02"), evidence((GOOD,))), "cannot decide T02"),
        (lambda: judge(CLAIM, evidence((above(2.0, 0.01, 0.01),))), "both holds and fails"),
        # And refuses what contradicts itself.
        (lambda: judge(CLAIM, evidence((dataclasses.replace(GOOD, low=0.9),))), "p = 0.01 says otherwise"),
        (lambda: judge(CLAIM, evidence((dataclasses.replace(GOOD, p=0.2),))), "p = 0.2 says otherwise"),
        (lambda: judge(CLAIM, evidence((dataclasses.replace(BAD, high=1.1),))), "p_refute = 0.01 says otherwise"),
        (lambda: judge(CLAIM, evidence((dataclasses.replace(BAD, p_refute=0.3),))), "p_refute = 0.3 says otherwise"),
        (lambda: judge(CLAIM, evidence((dataclasses.replace(GOOD, effect=1.05),))), "outside its interval"),
        (lambda: parse_head("L01H2"), "is not a head"),
        (lambda: family(CLAIM, {"L0H0": np.zeros((3, 2))}, target="t", sources=None), "one number a document"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(build, says):
    with pytest.raises(FraError, match=says) as raised:
        build()
    assert "\n" not in str(raised.value)


@dataclasses.dataclass(frozen=True)
class Lags:
    count: int = 40
    tried: tuple[int, ...] = (2, 3)


def test_the_digest_moves_with_what_could_turn_a_verdict_and_with_nothing_else():
    changes = {
        "id": "T02",
        "h0": "E <= 2",
        "bar": 2.0,
        "condition": "other",
        "level": 0.01,
        "kind": "identity",
        "statistic": "mean/2",
        "stimuli": ("made", "natural"),
        "n": 201,
        "min_sources": 21,
        "above": False,
        "bars": {"share": 0.2},
        "gates": {"carried": 0.5},
        "worth": {"effect": 0.2},
        "design": (Lags(),),
    }
    digests = {name: make_claim(**{name: value}).digest for name, value in changes.items()}
    assert len({CLAIM.digest, *digests.values()}) == 1 + len(changes)
    turned = make_claim(bars={"share": 0.2}, below=("share",))
    assert turned.digest != digests["bars"]
    assert {field.name for field in dataclasses.fields(Claim)} == changes.keys() | {"title", "below"}
    assert make_claim(title="Other words").digest == CLAIM.digest
    assert make_claim(bar=1, stimuli=["made"]).digest == CLAIM.digest  # 1 and 1.0, list and tuple
    assert make_claim(bars={"a": 1, "b": 2}).digest == make_claim(bars={"b": 2, "a": 1}).digest


def test_every_number_of_a_design_and_of_the_rules_is_registered(monkeypatch):
    designed = make_claim(design=(Lags(),))
    assert make_claim(design=(Lags(tried=(2, 4)),)).digest != designed.digest
    assert make_claim(design=(Lags(count=41),)).digest != designed.digest
    assert designed.designed(Lags) == Lags()
    before = CLAIM.digest
    for name, value in dataclasses.asdict(RULES).items():
        monkeypatch.setattr(claims, "RULES", dataclasses.replace(RULES, **{name: value * 2}))
        assert CLAIM.digest != before, name


@settings(deadline=None)
@given(
    effect=st.floats(allow_nan=True, allow_infinity=True),
    p=st.none() | st.just(NAN) | st.floats(0, 1),
    p_refute=st.none() | st.just(NAN) | st.floats(0, 1),
    low=st.floats(allow_nan=True, allow_infinity=True),
    high=st.floats(allow_nan=True, allow_infinity=True),
    n=st.integers(0, 100),
    power=st.none() | st.floats(0, 1),
)
def test_whatever_the_numbers_there_is_a_verdict_that_is_earned_or_a_refusal(effect, p, p_refute, low, high, n, power):
    assume(not low > high)
    condition = Condition("effect", effect, low, high, 1.0, p, p_refute, power=power)
    try:
        outcome = judge(CLAIM, evidence((condition,), n=n)).outcome
    except FraError:
        assert condition.finite, "what cannot be judged is undecided, not refused"
        return
    if outcome is Outcome.SUPPORTED:
        assert n >= 20
        assert p is None or p <= 0.05
        assert low >= 1.0 - 1e-6 * max(1.0, abs(effect), abs(high) if math.isfinite(high) else 1.0)
        assert math.isfinite(effect)
    if outcome is Outcome.REFUTED:
        assert n >= 20
        assert condition.estimated
        assert p_refute is None or p_refute <= 0.05
        assert power >= 0.8


def samples(seed: int, means: dict[str, float], n: int = 120) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {head: rng.normal(mean, 1.0, n) for head, mean in means.items()}


def test_family_numbers_agree_with_the_t_test_and_with_holm():
    data = samples(1, {"L0H0": 1.6, "L0H1": 1.3, "L0H2": 1.0, "L0H3": 0.5})
    found = family(CLAIM, data, target="t", sources=None)
    raw = [sps.ttest_1samp(x, 1.0, alternative="greater").pvalue for x in data.values()]
    conditions = [e.candidates["every condition"][0] for e in found.values()]
    # The p of normal data is the t-test's, up to Monte Carlo error, and what is supposed of documents that none shows.
    for ours, theirs in (
        ([c.p for c in conditions], stats.holm(raw)),
        ([e.q for e in found.values()], sps.false_discovery_control(raw)),
    ):
        np.testing.assert_allclose(ours, theirs, atol=0.1)
        assert (np.array(ours) >= theirs - 0.01).all()
    for (head, e), c in zip(found.items(), conditions, strict=True):
        assert (e.head, e.n, e.claim) == (head, 120, CLAIM)
        assert c.effect == pytest.approx(data[head].mean())
        assert (c.p <= 0.05) == (c.low > 1.0), "the bound must invert the adjusted test"
        assert (c.p_refute <= 0.05) == (c.high < 1.0), "the bound must invert the adjusted test"
    assert [judge(CLAIM, e).outcome.value for e in found.values()][::3] == ["SUPPORTED", "REFUTED"]


def test_family_below_the_bar_mirrors_family_above_it():
    data = samples(2, {"L0H0": 0.2, "L0H1": 1.1, "L0H2": 1.9})
    up = family(make_claim(bar=-1.0, h0="E <= -1"), {h: -x for h, x in data.items()}, target="t", sources=None)
    down = family(BELOW, data, target="t", sources=None)
    for head in data:
        a, b = (found[head].candidates["every condition"][0] for found in (up, down))
        assert a.effect == pytest.approx(-b.effect)
        assert a.p == pytest.approx(b.p, abs=0.03)
        assert a.p_refute == pytest.approx(b.p_refute, abs=0.03)
        assert (b.p <= 0.05) == (b.high < 1.0)
        assert not b.above


def test_family_depends_on_nothing_but_claim_target_and_data():
    data, more = samples(3, {"L0H0": 1.3, "L0H1": 0.4}), {"target": "t", "sources": None, "n_boot": 999}
    one, again = (family(CLAIM, data, **more) for _ in range(2))
    assert one == again
    turned = family(CLAIM, dict(reversed(data.items())), **more)
    assert {h: e.candidates for h, e in turned.items()} == {h: e.candidates for h, e in one.items()}
    assert family(CLAIM, data, **(more | {"target": "other"}))["L0H0"].candidates != one["L0H0"].candidates
    assert family(CLAIM, {}, target="t", sources=None) == {}


def test_documents_of_one_source_count_as_one():
    data = samples(6, {"L0H0": 1.6})
    found = family(CLAIM, data, target="t", sources=[f"s{k % 15}" for k in range(120)], n_boot=999)["L0H0"]
    assert found.n == 15
    assert "15 independent sources" in judge(CLAIM, found).reason


def test_a_head_with_nan_is_inconclusive_and_costs_the_others_nothing_but_correction():
    data = samples(4, {"L0H0": 3.0}) | {"L0H2": np.r_[NAN, np.ones(119)]}
    found = family(CLAIM, data, target="t", sources=None, n_boot=999)
    assert [judge(CLAIM, e).outcome.value for e in found.values()] == ["SUPPORTED", "INCONCLUSIVE"]


def test_a_refutation_needs_a_design_that_could_have_seen_the_effect():
    rng = np.random.default_rng(5)
    # Far below the bar, yet so wide that an effect at the bar could not be told from none.
    wide = family(CLAIM, {"L0H0": rng.normal(-8.0, 20.0, 120)}, target="t", sources=None, n_boot=999)["L0H0"]
    (condition,) = wide.candidates["every condition"]
    assert condition.fails(0.05)
    assert condition.power < 0.3
    assert judge(CLAIM, wide).outcome is Outcome.INCONCLUSIVE
    narrow = family(CLAIM, {"L0H0": rng.normal(0.0, 0.5, 120)}, target="t", sources=None, n_boot=999)["L0H0"]
    assert narrow.candidates["every condition"][0].power > 0.99
    assert judge(CLAIM, narrow).outcome is Outcome.REFUTED


def test_judging_and_reporting_import_neither_torch_nor_pytest():
    code = (
        "import sys, fra.claim, fra.verdicts.decide, fra.verdicts.ledger, fra.report.page;"
        "print([m for m in ('torch', 'pytest', 'transformer_lens', 'sae_lens') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


THREE = make_claim(condition="a", bars={"b": 1.0, "c": 1.0})


def named(name: str, effect: float, p: float, p_refute: float) -> Condition:
    return above(effect, p, p_refute, power=0.9, name=name)


@pytest.mark.parametrize(
    ("candidate", "outcome", "decided", "met"),
    [
        ((named("a", 3, 0.01, 1), named("b", 2, 0.01, 1), named("c", 2, 0.01, 1)), "SUPPORTED", "a", (3, 3)),
        ((named("a", 3, 0.01, 1), named("b", 0, 1, 0.01), named("c", 2, 0.01, 1)), "REFUTED", "b", (2, 3)),
        ((named("a", 3, 0.01, 1), named("b", 1, 0.5, 0.5), named("c", 2, 0.01, 1)), "INCONCLUSIVE", "b", (2, 3)),
        ((named("a", 3, 0.01, 1), named("b", NAN, 1, 1), named("c", 2, 0.01, 1)), "INCONCLUSIVE", "b", (2, 3)),
    ],
)
def test_the_verdict_names_the_condition_that_decided(candidate, outcome, decided, met) -> None:
    found = judge(THREE, evidence(candidate, claim=THREE))
    assert (found.outcome, found.decided.name, found.met) == (outcome, decided, met)
    unsure = judge(THREE, evidence(candidate, claim=THREE, power=0.1))
    assert unsure.decided.name == decided, "without power it is the refutation that is in doubt"


def test_a_gate_that_was_not_met_leaves_the_headline() -> None:
    found = judge(TWO, evidence((GOOD, share(1.0, 0.01, 0.9)), undecided="too little"))
    assert (found.outcome, found.decided.name) == ("INCONCLUSIVE", "effect")
    assert judge(CLAIM, evidence(cannot="no weights")).decided is None
