"""Channels that a census follows while documents are seen: against the definition, and through merges and stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fra
from fra._census import follow as census_follow
from fra._census import observe
from fra._census.follow import Followed, channels_to_follow
from fra._census.result import Census
from fra.errors import FraError
from fra.tests._census.test_census import DOCUMENTS, LAYER, interrupt_once, sae, take
from fra.tests._census.test_census_properties import FEW, N_HEADS, make_census, one_document, plain, shapes
from fra.tests.models import D_SAE, tiny

CHANNELS = torch.tensor([[head, i, j] for head in range(N_HEADS) for i, j in ((0, 0), (1, 3), (2, 0), (6, 5))])


def by_hand(census: Census, head: int, i: int, j: int) -> list[tuple[int, int, int, float]]:
    """Document, positions and value of all contributions of a channel, strongest first, ties by place."""
    found = []
    for number, doc in zip(census.corpus.number.tolist(), plain(census, head), strict=True):
        for t, s in (doc["mask"] & doc["live"][:, :, i, j]).nonzero().tolist():
            found.append((number, t, s, float(doc["F"][t, s, i, j])))
    return sorted(found, key=lambda row: (-abs(row[3]), row[:3]))


def assert_strongest(found: pd.DataFrame, expected: list[tuple[int, int, int, float]], k: int) -> None:
    """The k strongest, in order; values that differ by rounding alone may change places."""
    assert len(found) == min(k, len(expected))
    values = {row[:3]: row[3] for row in expected}
    mine = [tuple(int(cell) for cell in row) for row in found[["document", "q_pos", "k_pos"]].to_numpy()]
    assert len(set(mine)) == len(mine)
    assert found["value"].tolist() == pytest.approx([values[at] for at in mine], rel=1e-9, abs=1e-12)
    sizes = [abs(row[3]) for row in expected[:k]]
    assert found["value"].abs().tolist() == pytest.approx(sizes, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("pairs", [2, 1 << 18])
@FEW
@given(shape=shapes, k=st.integers(1, 7), cut=st.integers(0, 4))
def test_the_strongest_contributions_are_held_and_halves_merge(
    pairs: int, shape: dict[str, Any], k: int, cut: int
) -> None:
    census = make_census(**shape, n_docs=4)
    nothing = Followed.nothing(CHANNELS, k, census.corpus.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(census_follow, "PAIRS_AT_ONCE", pairs)
        whole = nothing.see(census.layer, census.corpus)
        documents = [one_document(census.corpus, doc) for doc in range(4)]
        halves = [nothing, nothing]
        for doc, corpus in enumerate(documents):
            object.__setattr__(corpus, "number", census.corpus.number[doc : doc + 1])
            half = int(doc >= cut)
            halves[half] = halves[half].see(census.layer, corpus)
    assert len(whole.value) <= k * len(CHANNELS)
    frame = whole.frame()
    for head, i, j in CHANNELS.tolist():
        mine = frame[(frame["head"] == head) & (frame["q_feature"] == i) & (frame["k_feature"] == j)]
        assert_strongest(mine, by_hand(census, head, i, j), k)
    for merged in (halves[0].merge(halves[1]), halves[1].merge(halves[0])):
        pd.testing.assert_frame_equal(merged.frame(), frame, check_exact=True)


def test_whole_numbers_tie_by_document_and_position() -> None:
    census = make_census(4)
    ones = torch.ones_like(census.corpus.value)
    tied = Census(
        census.layer, type(census.corpus)(**{**vars(census.corpus), "value": ones}), (0, 1), ("sum",), 1 << 30, str
    )
    i = int(torch.bincount(tied.corpus.feature).argmax())
    found = tied.examples(1, i, i, 6)
    assert found["value"].nunique() == 1 and len(found) == 6
    assert_strongest(found, by_hand(tied, 1, i, i), 6)
    rows = [tuple(row) for row in found[["document", "q_pos", "k_pos"]].to_numpy().tolist()]
    assert rows == sorted(row[:3] for row in by_hand(tied, 1, i, i))[:6]


def strongest_ids(census: Census) -> pd.DataFrame:
    return census.channels("count", n=2)[["head", "q_feature", "k_feature"]]


def resolved(kind: str, head: int, i: int, j: int, k: int) -> list[tuple[int, int, int, float]]:
    """From every document's own resolution."""
    found = []
    for number, tokens in enumerate(DOCUMENTS):
        F = fra.resolve(tiny(kind, torch.float64), sae(), tokens, LAYER, head).channel(i, j).tril()
        found += [(number, int(t), int(s), float(F[t, s])) for t, s in F.nonzero().tolist()]
    return sorted(found, key=lambda row: (-abs(row[3]), row[:3]))[:k]


# Tables of angles are in float32 in transformers, so that R_t u . R_s v is R_{t-s} u . v to that precision alone.
@pytest.mark.parametrize(("kind", "tolerance"), [("gpt_neo", 1e-9), ("pythia", 1e-6), ("qwen3", 1e-4)])
def test_a_census_follows_channels_as_examples_find_them_afterwards(
    kind: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = strongest_ids(take(kind, heads=[1, 2]))
    options: Any = {"heads": [1, 2], "follow": ids, "n_examples": 3}
    monkeypatch.setattr(observe, "TOKENS_AT_ONCE", 12)  # several batches
    found = take(kind, **options)
    frame = found.followed()
    for head, i, j in ids.itertuples(index=False):
        mine = frame[(frame["head"] == head) & (frame["q_feature"] == i) & (frame["k_feature"] == j)]
        mine = mine.drop(columns=["head", "q_feature", "k_feature"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, found.examples(head, i, j, 3), rtol=1e-9)
        expected = resolved(kind, head, i, j, 3)
        assert mine["value"].tolist() == pytest.approx([row[3] for row in expected], rel=tolerance)
        assert [tuple(row) for row in mine.iloc[:, :3].to_numpy().tolist()] == [row[:3] for row in expected]
    found.save(tmp_path / "census")
    again = Census.load(tmp_path / "census", tiny(kind, torch.float64), sae(), LAYER)
    pd.testing.assert_frame_equal(again.followed(), frame, check_exact=True)
    merged = take(kind, DOCUMENTS[:2], **options).merge(take(kind, DOCUMENTS[2:], **options))
    pd.testing.assert_frame_equal(merged.followed(), frame, rtol=tolerance)


def test_interrupted_and_resumed_it_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "TOKENS_AT_ONCE", 12)
    pairs = strongest_ids(take(heads=[0]))[["q_feature", "k_feature"]].to_numpy()
    options: Any = {"follow": torch.tensor(pairs), "n_examples": 4}
    never = take(**options)
    calls = interrupt_once(monkeypatch)
    options |= {"checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        take(**options)
    pd.testing.assert_frame_equal(take(**options).followed(), never.followed(), check_exact=True)
    n_calls = len(calls)
    pd.testing.assert_frame_equal(take(**options).followed(), never.followed(), check_exact=True)
    assert len(calls) == n_calls, "a finished census is only read"
    assert never.followed()["head"].nunique() == 4, "of every head where none is named"
    for other in ({"n_examples": 3}, {"follow": torch.tensor(pairs[:1])}, {"follow": None}):
        with pytest.raises(FraError, match="or follows other channels"):
            take(**{**options, **other})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"follow": torch.zeros(3, dtype=torch.long)}, r"follow must be a DataFrame or a tensor \[n, 2\]"),
    ({"follow": torch.zeros(1, 2)}, r"not torch.float32 of shape \[1, 2\]"),
    ({"follow": torch.zeros(0, 2, dtype=torch.long)}, "follow names no channel"),
    ({"follow": torch.tensor([[0, D_SAE]])}, f"feature {D_SAE} of follow is out of range"),
    ({"follow": torch.tensor([[-1, 0]])}, "feature -1 of follow"),
    ({"follow": pd.DataFrame({"q_feature": [0]})}, "follow has no column k_feature"),
    ({"follow": pd.DataFrame({"q_feature": [0], "k_feature": [1], "head": [3]}), "heads": [0]}, "follow names head 3"),
    ({"follow": torch.tensor([[0, 1]]), "n_examples": 0}, "n_examples must be positive"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_channels_get_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FraError, match=message):
        take(documents=DOCUMENTS[:1], **options)


def test_what_was_not_followed_is_refused() -> None:
    plain_one = take(documents=DOCUMENTS[:1])
    with pytest.raises(FraError, match="no channels were followed"):
        plain_one.followed()
    twice = torch.tensor([[0, 1], [0, 1]])
    assert len(channels_to_follow(twice, range(N_HEADS), 2)) == N_HEADS, "each channel once a head"
    following = take(documents=DOCUMENTS[:1], follow=twice)
    for one, other in ((plain_one, following), (following, plain_one)):
        with pytest.raises(FraError, match="that follow the same channels"):
            one.merge(other)
