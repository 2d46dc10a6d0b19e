"""Sets of documents are cut by source: nothing is measured on a source on which something was chosen."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fra.stimuli.sources import disjoint, spread

SIZES = {"status": 12, "discovery": 10, "confirmation": 12}
MEASURED = ("status", "confirmation")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=4, max_size=120), st.integers(0, 5))
def test_no_source_has_documents_in_two_sets(sources: list[int], seed: int) -> None:
    found = disjoint(sources, SIZES, MEASURED, ("made", str(seed)))
    assert list(found) == list(SIZES)
    of = {name: {sources[k] for k in numbers} for name, numbers in found.items()}
    names = list(of)
    for k, one in enumerate(names):
        assert not any(of[one] & of[other] for other in names[:k])
        assert len(set(found[one])) == len(found[one]) <= SIZES[one]
        assert found[one] == sorted(found[one])


def test_measured_sets_get_one_document_of_each_of_many_sources_and_selection_the_prolific_ones() -> None:
    sources = [f"register {k // 10}" for k in range(100)] + [f"single {k}" for k in range(60)]
    found = disjoint(sources, {"status": 30, "discovery": 40, "confirmation": 30}, MEASURED, ("made",))
    for name in MEASURED:
        assert max(Counter(sources[k] for k in found[name]).values()) == 1
        assert len(found[name]) == 30
    assert len(found["discovery"]) == 40
    assert {sources[k].split()[0] for k in found["discovery"]} == {"register"}
    assert len({sources[k] for k in found["discovery"]}) == 10, "spread over ten sources"


def test_measured_sets_share_the_sources_in_proportion_and_leave_none_over() -> None:
    sources = list(range(300))
    found = disjoint(
        sources,
        {"status": 120, "discovery": 30, "confirmation": 240, "sets": 60},
        ("status", "confirmation", "sets"),
        ("m",),
    )
    sizes = {name: len(numbers) for name, numbers in found.items()}
    assert sizes["discovery"] == 30 * 300 // 450
    rest = 300 - sizes["discovery"]
    for name, share in (("status", 2 / 7), ("confirmation", 4 / 7), ("sets", 1 / 7)):
        assert abs(sizes[name] - rest * share) <= 2, sizes
    enough = disjoint(sources, {"status": 20, "discovery": 30, "confirmation": 240}, ("status", "confirmation"), ("m",))
    assert {name: len(numbers) for name, numbers in enough.items()} == {
        "status": 20,
        "discovery": 30,
        "confirmation": 240,
    }


def test_where_sources_are_short_further_documents_of_the_same_ones_fill_the_sets() -> None:
    sources = [f"register {k // 10}" for k in range(120)]
    found = disjoint(sources, {"status": 30, "discovery": 20, "confirmation": 30}, MEASURED, ("made",))
    assert all(len(found[name]) == {"status": 30, "discovery": 20, "confirmation": 30}[name] for name in ("discovery",))
    for name in MEASURED:
        counts = Counter(sources[k] for k in found[name])
        assert max(counts.values()) - min(counts.values()) <= 1, "evenly"


def test_a_set_that_needs_more_than_its_share_gets_it_and_no_more() -> None:
    sources, sizes = [f"s{k}" for k in range(100)], {"status": 30, "discovery": 10, "confirmation": 30}

    def cut(needed: int) -> dict[str, list[int]]:
        return disjoint(sources, sizes, MEASURED, ("made",), {"status": needed})

    plain = disjoint(sources, sizes, MEASURED, ("made",))
    assert cut(45) == plain, "an equal share of the 90 is enough"
    more = cut(60)
    assert {name: len(own) for name, own in more.items()} == {"status": 60, "discovery": 10, "confirmation": 30}
    assert not set(more["status"]) & {*more["discovery"], *more["confirmation"]}
    assert cut(68) == plain, "the others would have less than half of their share"


def test_the_cut_is_the_seeds_and_depends_on_nothing_else() -> None:
    sources = [f"s{k % 23}" for k in range(80)]
    assert disjoint(sources, SIZES, MEASURED, ("a",)) == disjoint(sources, SIZES, MEASURED, ("a",))
    assert disjoint(sources, SIZES, MEASURED, ("a",)) != disjoint(sources, SIZES, MEASURED, ("b",))


@pytest.mark.parametrize("n", [1, 7, 23, 30, 80])
def test_documents_are_spread_over_as_many_sources_as_there_are(n: int) -> None:
    sources = [f"s{k % 23}" for k in range(80)]
    chosen = spread(sources, n)
    assert len(chosen) == len(set(chosen)) == n
    assert len({sources[k] for k in chosen}) == min(n, 23)
