"""S02: planted receivers, and each part against its definition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fra.attribution.designs import Receivers
from fra.attribution.sentences import kurtosis_of
from fra.claim import Outcome, judge
from fra.core.sentences import Segments
from fra.measures.sentences import s02_receivers
from fra.measures.sentences.s02_receivers import (
    Text,
    kurtoses,
    measure,
    other_cut,
    receivers_evidence,
    strongest,
    whole_sentences,
)
from fra.tests.claims import claim

N_SENTENCES, HEADS = 14, 20


def text(number: int) -> Text:
    """BOS and sentences of other lengths."""
    rng = np.random.default_rng(number)
    length = [1, *rng.integers(2, 9, N_SENTENCES)]
    segment = torch.from_numpy(np.repeat(np.arange(1 + N_SENTENCES), length))
    tokens = torch.full((len(segment),), number)
    kinds = ("bos", *["sentence"] * N_SENTENCES)
    return Text(Segments(tokens, segment, kinds, ("", *map(str, range(N_SENTENCES)))), f"source {number}")


def patterns(one: Text, planted: bool, by_place: bool) -> torch.Tensor:
    """Random patterns; where planted, head 7 looks at one sentence of the document, the whole of it and no other token
    (by_place: at one token, whatever is a sentence there).
    """
    number, n = int(one.cut.tokens[0]), len(one.cut.tokens)
    generator = torch.Generator().manual_seed(number)
    scores = 0.3 * torch.randn(1, HEADS, n, n, generator=generator, dtype=torch.float64)
    if planted:
        mine = one.cut.segment == 2 + number % 6
        if by_place:
            mine = torch.arange(n) == n // 4
        scores[0, 7, :, mine] += 6
    return scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def measured(
    monkeypatch: pytest.MonkeyPatch,
    planted: bool,
    by_place: bool = False,
    changed: dict[int, torch.Tensor] | None = None,
) -> Any:
    made = [text(k) for k in range(120)]
    target: Any = SimpleNamespace(
        name="planted", model=SimpleNamespace(cfg=SimpleNamespace(n_ctx=512)), heads=[f"L0H{k}" for k in range(HEADS)]
    )
    by_tokens = {int(one.cut.tokens[0]): patterns(one, planted, by_place) for one in made} | (changed or {})
    monkeypatch.setattr(s02_receivers, "texts", lambda target, design: made)
    monkeypatch.setattr(s02_receivers, "patterns_of", lambda model, tokens: by_tokens[int(tokens[0])])
    own = claim("S02")
    found, cannot = measure(target, own)
    return found, judge(own, receivers_evidence(own, target, found, cannot))


def test_a_planted_receiver_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found, verdict = measured(monkeypatch, planted=True)
    assert found.chosen.tolist() == [7]
    assert verdict.outcome is Outcome.SUPPORTED, verdict.reason


def test_heads_are_chosen_whatever_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another head concentrates, on the measured documents alone."""
    first, _ = measured(monkeypatch, planted=True)
    numbers = [int(source.split()[1]) for source in first.sources]
    swapped = {}
    for number in numbers:
        swapped[number] = patterns(text(number), True, False)
        swapped[number][0, [3, 7]] = swapped[number][0, [7, 3]]
    again, _ = measured(monkeypatch, planted=True, changed=swapped)
    assert again.chosen.tolist() == first.chosen.tolist() == [7]
    assert again.own.mean() < first.own.mean() - 1


def test_random_heads_are_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    _, verdict = measured(monkeypatch, planted=False)
    assert verdict.outcome is Outcome.REFUTED, verdict.reason


def test_a_place_is_no_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that looks at one token concentrates as much, however sentences are cut."""
    found, verdict = measured(monkeypatch, planted=True, by_place=True)
    assert found.chosen.tolist() == [7]
    assert abs(float((found.own - found.cut_otherwise).mean())) < 0.6
    assert verdict.outcome is not Outcome.SUPPORTED, verdict.reason


def test_too_few_documents_cannot_run() -> None:
    own = claim("S02")
    target: Any = SimpleNamespace(name="short", model=SimpleNamespace(cfg=SimpleNamespace(n_ctx=128)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s02_receivers, "texts", lambda target, design: [text(k) for k in range(79)])
        found, cannot = measure(target, own)
    verdict = judge(own, receivers_evidence(own, target, found, cannot))
    assert verdict.outcome is Outcome.CANNOT_RUN
    assert "79 sources" in verdict.reason and "80 are needed" in verdict.reason


def test_other_cuts_have_the_same_lengths() -> None:
    one, rng = text(3).cut, np.random.default_rng(0)
    others = [other_cut(one, rng) for _ in range(5)]
    for other in others:
        assert sorted(torch.bincount(other.segment)[1:].tolist()) == sorted(torch.bincount(one.segment)[1:].tolist())
        assert torch.equal(other.segment[:2], torch.tensor([0, 1])) and torch.equal(other.tokens, one.tokens)
    assert len({tuple(other.segment.tolist()) for other in others}) == 5


def test_a_document_ends_with_a_whole_sentence() -> None:
    one = text(5).cut
    short = whole_sentences(one, 30)
    assert len(short.tokens) <= 30 < int((one.segment <= len(short)).sum())
    assert torch.equal(short.segment, one.segment[: len(short.tokens)])
    assert len(short) == int(short.segment[-1]) + 1 == len(short.texts)
    assert whole_sentences(one, 500) is one


def test_kurtosis_is_by_moments_and_choice_by_means() -> None:
    rng = np.random.default_rng(2)
    scores = rng.random((3, 9))
    scores[1] = 0.25
    found = kurtosis_of(scores)
    for k in (0, 2):
        centred = scores[k] - scores[k].mean()
        assert found[k] == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2 - 3)
    assert np.isnan(found[1])
    table = np.array([[1.0, np.nan, 0.0, 2.0], [1.0, np.nan, 4.0, np.nan]])
    assert strongest(table, 0.5).tolist() == [2, 3]
    assert strongest(table, 0.01).tolist() == [2]
    one = text(1)
    assert kurtoses(patterns(one, True, False), one.cut, Receivers()).shape == (HEADS,)
