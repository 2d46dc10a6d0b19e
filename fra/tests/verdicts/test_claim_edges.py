"""Claims, conditions and evidence at their edges: what is just allowed and just not, what is kept, and as what."""

import dataclasses
import hashlib
import json
import typing

import pytest

from fra.errors import FraError
from fra.statistics.rules import RULES
from fra.tests.verdicts.test_claim import CLAIM, GOOD, INF, NAN, TWO, Lags, evidence, exact, make_claim, share
from fra.verdicts.claim import Claim, Condition, Evidence, Kind, parse_head


@dataclasses.dataclass(frozen=True)
class Table:
    widths: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=lambda: {10: (1, 2), 2: (3,)})


@dataclasses.dataclass
class Thawed:
    count: int = 1


FULL = {
    "id": "T01.full-1",
    "title": "A claim",
    "h0": "E >= 2",
    "bar": 2,
    "condition": "lead",
    "statistic": "mean/1",
    "stimuli": ["made", "natural"],
    "n": 30,
    "kind": "control",
    "level": 0.01,
    "min_sources": 10,
    "above": False,
    "bars": {"b": 1, "a": 2},
    "below": ["b", "a"],
    "gates": {"y": 1, "x": 2},
    "worth": {"lead": 3, "a": 1},
    "design": [Lags(), Table()],
}
WRITTEN = {
    "id": "T01.full-1",
    "h0": "E >= 2",
    "kind": "control",
    "condition": "lead",
    "bar": 2.0,
    "above": False,
    "bars": {"a": 2.0, "b": 1.0},
    "below": ["a", "b"],
    "gates": {"x": 2.0, "y": 1.0},
    "worth": {"a": 1.0, "lead": 3.0},
    "level": 0.01,
    "statistic": "mean/1",
    "stimuli": ["made", "natural"],
    "n": 30,
    "min_sources": 10,
    "design": {"Lags": {"count": 40, "tried": [2, 3]}, "Table": {"widths": {"10": [1, 2], "2": [3]}}},
    "rules": dataclasses.asdict(RULES),
}


def test_a_registration_by_hand_and_its_digest():
    claim = Claim(**FULL)
    assert claim.registration() == WRITTEN
    assert claim.digest == hashlib.sha256(json.dumps(WRITTEN, sort_keys=True).encode()).hexdigest()


def test_whatever_the_sequences_are_given_as_they_are_kept_as_tuples_and_cannot_be_changed():
    claim = Claim(**FULL)
    assert (claim.stimuli, claim.below, claim.design) == (("made", "natural"), ("b", "a"), (Lags(), Table()))
    for one, name in ((claim, "bar"), (GOOD, "effect"), (evidence((GOOD,)), "n")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, name, 0)


def test_claims_and_evidence_are_hashable_whatever_they_hold():
    claim = Claim(**FULL)
    assert len({claim, Claim(**FULL), CLAIM}) == 2
    found = evidence((GOOD,), detail={"map": [1.0]})
    assert len({found, evidence((GOOD,), detail={"map": [1.0]})}) == 1


def test_evidence_of_nothing_is_empty_and_said_by_name():
    empty = Evidence(claim=CLAIM, head=None)
    assert (empty.candidates, empty.detail, empty.n) == ({}, {}, 0)
    assert {getattr(empty, name) for name in ("power", "q", "undecided", "cannot", "outside")} == {None}
    with pytest.raises(TypeError):
        Evidence(CLAIM, None)
    with pytest.raises(FraError, match="evidence for T01 at the family: it rests on 201"):
        Evidence(claim=CLAIM, head=None, n=201)
    with pytest.raises(FraError, match="evidence for T01 at L0H1: it rests on 201"):
        evidence((GOOD,), n=201)


@pytest.mark.parametrize("kind", typing.get_args(Kind))
def test_each_kind_can_be_claimed(kind: str):
    assert make_claim(kind=kind).kind == kind


def test_the_kinds_are_three():
    assert typing.get_args(Kind) == ("finding", "identity", "control")


def test_names_of_heads_and_claims():
    assert parse_head("L12H3") == (12, 3)
    assert parse_head("L0H1023") == (0, 1023)
    for name in ("l1H2", "L1H02", "L1H2 ", "L1١H2", "L10000H2", ""):
        with pytest.raises(FraError, match="write the layer and the head"):
            parse_head(name)
    for name in ("q", "Zz_9.a-B", "q04.Natural"):
        assert make_claim(id=name).id == name
    for name in ("", "4q", "q..a", "q.", "q\n"):
        with pytest.raises(FraError, match="an id is"):
            make_claim(id=name)


def test_the_least_and_the_largest_designs():
    assert make_claim(n=1, min_sources=1).n == 1
    assert make_claim(n=20).min_sources == 20
    assert evidence((GOOD,), n=200).n == CLAIM.n
    for fields in ({"min_sources": 0}, {"n": 0, "min_sources": 0}, {"n": 19}):
        with pytest.raises(FraError, match=r"must lie in 1\.\.n"):
            make_claim(**fields)
    for level in (0, 1, NAN):
        with pytest.raises(FraError, match="level is"):
            make_claim(level=level)
    for power in (0.0, 1.0, NAN, None):
        assert evidence((GOOD,), power=power).power is power
    for power in (1.5, -0.1):
        with pytest.raises(FraError, match="no probability"):
            evidence((GOOD,), power=power)


def test_a_design_is_made_of_frozen_instances():
    assert make_claim(design=(Lags(), Table())).designed(Table) == Table()
    for part in (Lags, Thawed(), 3):
        with pytest.raises(FraError, match="no frozen dataclass"):
            make_claim(design=(part,))


def test_what_is_unknown_is_said_once():
    with pytest.raises(FraError, match=r"below names \['x'\], which"):
        make_claim(below=("x", "y"))


def test_each_condition_has_its_own_bar_side_and_worth():
    claim = make_claim(bars={"up": 0.5, "down": -0.2, "zero": 0.0}, below=("down",), worth={"up": 0.1})
    assert [claim.bar_of(name) for name in ("effect", "up", "down")] == [1.0, 0.5, -0.2]
    assert [claim.worth_of(name) for name in ("effect", "up", "down", "zero")] == [1.0, 0.1, 0.2, None]
    for above in (True, False):
        turned = dataclasses.replace(claim, above=above)
        assert [turned.above_of(name) for name in ("effect", "up", "down")] == [above, True, False]


# ---- conditions ----


def test_numbers_of_a_condition_are_floats_and_all_but_five_may_be_left_out():
    plain = Condition("effect", 2, 1, 3, 1)
    assert all(type(getattr(plain, name)) is float for name in ("effect", "low", "high", "bar"))
    assert (plain.p, plain.p_refute, plain.above, plain.power, plain.refutes, plain.needed) == (
        (None, None, True, None, True, None)
    )
    given = dataclasses.replace(plain, p=0, p_refute=1, power=0)
    assert [repr(x) for x in (given.p, given.p_refute, given.power)] == ["0.0", "1.0", "0.0"]
    assert Condition("effect", 1, 1, 1, 1).low == 1  # an interval may be a point
    for field in ("p", "p_refute", "power"):
        for number in (-0.1, 1.1):
            with pytest.raises(FraError, match=f"{field} is {number}"):
                dataclasses.replace(plain, **{field: number})


def test_either_p_makes_a_number_an_estimate():
    plain = Condition("effect", 2, 1, 3, 1)
    assert not plain.estimated
    assert dataclasses.replace(plain, p=0.5).estimated
    assert dataclasses.replace(plain, p_refute=0.5).estimated


def test_what_is_not_a_number_cannot_be_judged():
    plain = Condition("effect", 2, 1.5, 3, 1, 0.01, 1.0)
    assert plain.finite
    for changes in (
        {"effect": NAN},
        {"effect": INF, "high": INF},
        {"p": NAN},
        {"p_refute": NAN},
        {"low": NAN},
        {"high": NAN},
    ):
        odd = dataclasses.replace(plain, **changes)
        assert not (odd.finite or odd.holds(0.05) or odd.fails(0.05) or odd.contradiction(0.05)), changes
    assert dataclasses.replace(plain, high=INF, low=-INF).finite
    assert dataclasses.replace(plain, p=None, p_refute=None).finite


def test_a_level_is_reached_and_a_bar_is_passed():
    at = Condition("effect", 2, 0, 3, 1, 0.05, 0.05)
    assert at.holds(0.05) and at.fails(0.05)
    assert not at.holds(0.049) and not at.fails(0.049)
    for above in (True, False):
        assert not exact("effect", 1.0, 1.0, above).holds(0.05)
        assert not exact("effect", 1.0, 1.0, above).fails(0.05)
        assert exact("effect", 1.1, 1.0, above).holds(0.05) == exact("effect", 0.9, 1.0, above).fails(0.05) == above
        assert exact("effect", 0.9, 1.0, above).holds(0.05) == exact("effect", 1.1, 1.0, above).fails(0.05) != above


def turned(c: Condition) -> Condition:
    return Condition(c.name, -c.effect, -c.high, -c.low, -c.bar, c.p, c.p_refute, above=not c.above)


@pytest.mark.parametrize(
    ("condition", "wrong"),
    [
        # p-values and bounds agree
        (Condition("e", 2, 1.5, 3, 1, 0.01, 1.0), None),
        (Condition("e", 0, -1, 0.5, 1, 1.0, 0.01), None),
        (Condition("e", 2, 0.5, 3, 1, 0.2, 0.8), None),
        (Condition("e", 2, 1, 3, 1, 0.05, 0.8), None),  # the bound lies on the bar
        (Condition("e", 2, 1, 3, 1, 0.06, 0.8), None),
        (Condition("e", 0.5, 0, 1, 1, 0.9, 0.05), None),
        (Condition("e", 0.5, 0, 1, 1, 0.9, 0.06), None),
        (Condition("e", 2, 1.5, 3, 1), None),
        # and do not
        (Condition("e", 2, 0.5, 3, 1, 0.05, 0.8), "p = 0.05 says"),
        (Condition("e", 2, 1.5, 3, 1, 0.06, 0.8), "p = 0.06 says"),
        (Condition("e", 0.5, 0, 1.5, 1, 0.9, 0.05), "p_refute = 0.05 says"),
        (Condition("e", 0.5, 0, 0.9, 1, 0.9, 0.0612), "p_refute = 0.0612 says"),
        (Condition("e", 0.5, 0, 0.9, 1, None, 0.06), "p_refute"),
        (Condition("e", 2, 2.5, 3, 1), "outside its interval"),
        (Condition("e", 3.5, 2.5, 3, 1), "outside its interval"),
        # Rounding: a billionth of the largest number, and of 1 where all are smaller.
        (Condition("e", 1e12, 1e12 + 500, INF, 1), None),
        (Condition("e", 1e12, 1e12 + 1500, INF, 1), "outside"),
        (Condition("e", -1e-9, 0, 0.5, 0.25), None),
        (Condition("e", 1e-9, -0.5, 0, 0.25), None),
        (Condition("e", -1.5e-9, 0, 0.5, 0.25), "outside"),
        (Condition("e", 0.5, -1e-9, 1, 0, 0.01), None),
        (Condition("e", 0.5, 1e-9, 1, 0, 0.3), None),
        (Condition("e", 0.5, 0.25 - 2**-30, 1, 0.25, 0.01), None),  # 2**-30 is just below a billionth
        (Condition("e", 0.5, 0.25 - 2**-29, 1, 0.25, 0.01), "p = 0.01"),
        (Condition("e", 0.5, 0.25 + 2**-30, 1, 0.25, 0.3), None),
        (Condition("e", 0.5, 0.25 + 2**-29, 1, 0.25, 0.3), "p = 0.3"),
    ],
)
def test_what_contradicts_itself_does_so_in_either_direction(condition: Condition, wrong: str | None):
    for either in (condition, turned(condition)):
        said = either.contradiction(0.05)
        assert said is None if wrong is None else wrong in (said or "nothing"), (either, said)


def test_a_condition_says_its_numbers():
    assert str(Condition("share", 0.51234, 0.25, 0.75, 0.1, 0.0123)) == "share 0.512 [0.25, 0.75], bar > 0.1, p = 0.012"
    assert str(exact("share", 2.0, 3.0, up=False)) == "share 2 [2, 2], bar < 3"


def test_the_order_of_conditions_is_the_same_for_every_candidate():
    three = make_claim(condition="a", bars={"b": 1.0, "c": 1.0})
    a, b, c = (dataclasses.replace(GOOD, name=name) for name in "abc")
    assert evidence((a, c, b), (a, c, b), claim=three).candidates["c1"] == (a, c, b)
    with pytest.raises(FraError, match="differ in the order"):
        evidence((a, b, c), (a, c, b), claim=three)
    with pytest.raises(FraError, match="it has an order, where 'a', 'b', 'c' are registered"):
        evidence((b, a, c), claim=three)
    with pytest.raises(FraError, match="it lacks 'b'"):
        evidence((a,), claim=three)
    with pytest.raises(FraError, match="it brings 'd'"):
        evidence((a, b, c, dataclasses.replace(a, name="e"), dataclasses.replace(a, name="d")), claim=three)
    # One that was not measured stands there as NaN; the last candidate is looked at like the first.
    assert evidence((GOOD, dataclasses.replace(share(), effect=NAN)), claim=TWO).claim is TWO
    with pytest.raises(FraError, match="it lacks 'share'"):
        evidence((GOOD, share()), (GOOD,), claim=TWO)
