"""What a census leaves out cannot be among the strongest: bounds against the definition, answers with narrow blocks."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fra._census import bounds, dense
from fra._census.result import Census
from fra.core.strongest import Strongest
from fra.tests._census.test_census_properties import (
    D_SAE,
    FEW,
    N_HEADS,
    assert_strongest,
    defined,
    make_census,
    rows_of,
    shapes,
)
from fra.tests.bench import workloads

BOUNDED: Any = ("sum", "abs", "max", "mean", "count")


@FEW
@given(shape=shapes, where=st.sampled_from(["all", "stripe", "off"]))
def test_no_channel_is_stronger_than_its_bound(shape: dict[str, Any], where: str) -> None:
    census = make_census(**shape)
    live, sources = census.corpus.live, [(name, head) for name in BOUNDED for head in range(N_HEADS)]
    norms = [
        {head: census.layer.directions(side, head, live).norm(dim=1) for head in range(N_HEADS)}
        for side in ("query", "key")
    ]
    steps = bounds.staircase(census.corpus, sources, *norms)
    at = {int(feature): place for place, feature in enumerate(live)}
    for number, (name, head) in enumerate(sources):
        assert steps.bounded((name, head))
        for (i, j), (value, _) in defined(census, name, head, where).items():
            assert abs(value) <= float(steps._q[number, at[i]] * steps._k[number, at[j]]) * (1 + 1e-6)


@pytest.fixture
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column or two in a block, a few numbers in a tile: bounds are looked at everywhere."""
    monkeypatch.setattr(dense, "COLUMNS", (1, 2))
    monkeypatch.setattr(dense, "TERM_COLUMNS", 1)
    monkeypatch.setattr(dense, "FIRST_SCANNED", 1)
    monkeypatch.setattr(dense, "SCANNED_AT_ONCE", 2)


@pytest.mark.usefixtures("_narrow")
@FEW
@given(shape=shapes, n=st.integers(1, 6), where=st.sampled_from(["all", "off"]), least=st.integers(1, 2))
def test_nothing_strong_is_left_out(shape: dict[str, Any], n: int, where: Any, least: int) -> None:
    census = make_census(**shape)
    # A mean per QK-normed head, and contrasts, which nothing bounds, beside what is bounded.
    reduces: Any = (*BOUNDED, *(("contrast",) if where == "all" else ()))
    found = census.strongest(reduces, n, where=where, min_count=least)
    for reduce in reduces:
        for head in range(N_HEADS):
            every = {c: row for c, row in defined(census, reduce, head, where).items() if row[1] >= least}
            assert_strongest(rows_of(found[reduce], head), every, n)


@pytest.mark.usefixtures("_narrow")
@FEW
@given(seed=st.integers(0, 2**16), n=st.integers(1, 12))
def test_ties_go_to_the_smaller_ids_whatever_the_order_of_the_scan(seed: int, n: int) -> None:
    census = make_census(seed)
    found = rows_of(census.channels("count", n, [0]), 0)
    every = defined(census, "count", 0, "all")
    ranked = sorted(every, key=lambda cell: (-every[cell][1], cell))
    assert list(found) == ranked[:n]


@pytest.mark.parametrize("rotary", [False, True])
def test_most_is_left_out_and_the_answer_is_that_of_everything(rotary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = workloads.entries(2, 40, 6, 300)
    layer = workloads.layer(300, 2, d_model=16, d_head=8, n_pos=40 if rotary else None)
    every = workloads.of(layer, corpus).strongest(("sum", "abs"), None)
    for name, value in {"SAMPLED_FEATURES": 16, "COLUMNS": (8, 64), "TERM_COLUMNS": 8, "_STEP": 0.75}.items():
        monkeypatch.setattr(dense, name, value)
    looked: list[int] = []
    right = Strongest.offer_tile

    def counted(self: Strongest, values: torch.Tensor, *more: Any) -> None:
        looked.append(values.numel())
        right(self, values, *more)

    monkeypatch.setattr(Strongest, "offer_tile", counted)
    found = workloads.of(layer, corpus).strongest(("sum", "abs"), 9)
    sources = 4 if rotary else 2  # without rotation and negative values sums and absolute sums are one
    assert sum(looked) < 0.5 * sources * len(corpus.live) ** 2
    for name, frame in found.items():
        for head, mine in frame.groupby("head"):
            best = every[name][every[name]["head"] == head].head(9).reset_index(drop=True)
            pd.testing.assert_frame_equal(mine.reset_index(drop=True), best, rtol=1e-4)


def test_a_feature_that_is_strong_in_one_head_alone_is_found_there() -> None:
    """Heads share one order of features, and each has its own bounds."""
    census = make_census(11)
    layer = census.layer
    W_q, W_k = layer.weights.W_q.clone(), layer.weights.W_k.clone()
    W_q[0, :3], W_k[1, 3:] = W_q[0, :3] * 1e3, W_k[1, 3:] * 1e3
    lopsided = type(layer)(
        type(layer.weights)(**{**vars(layer.weights), "W_q": W_q, "W_k": W_k}), layer.decoder, layer.rotary
    )
    other = Census(lopsided, census.corpus, census.heads, census.reduces, 1 << 30, lambda: census.fingerprint)
    for head in range(N_HEADS):
        every = defined(other, "sum", head, "all")
        ranked = sorted(every, key=lambda cell: -abs(every[cell][0]))[:5]
        assert list(rows_of(other.channels("sum", 5, [head]), head)) == ranked
        assert len(every) <= D_SAE**2
