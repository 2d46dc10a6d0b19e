"""The status of heads of a model that has hundreds or thousands of them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fra.induction import status
from fra.induction.designs import TokenInduction
from fra.statistics.stats import ClusterMeans
from fra.stimuli import sets
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch, repeat
from fra.targets.target import load_target
from fra.tests.models import tiny

DOCUMENTS, HEADS = 200, 1_000


def made_up(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(Sums, rows, true contrast) of heads: most do nothing, others anything up to 0.9; documents differ in length, and
    in how strongly they move all heads at once, as those of models do.
    """
    rng = np.random.default_rng(seed)
    true = np.where(rng.random(HEADS) < 0.9, 0.02 * rng.random(HEADS), rng.uniform(0.0, 0.9, HEADS))
    rows = rng.integers(16, 64, (DOCUMENTS, 1)).repeat(HEADS, 1).astype(float)
    p = np.clip(true, 1e-3, 1 - 1e-3)
    narrow = np.where(p < 0.1, 80, 26)  # as wide as the widest of SmolLM2-135M's heads, of its small ones apart
    together = np.clip(1 + 0.05 * rng.standard_normal((DOCUMENTS, 1)), 0.5, 1.5)
    return rows * rng.beta(narrow * p, narrow * (1 - p), (DOCUMENTS, HEADS)) * together, rows, true


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_heads(seed: int) -> None:
    sums, rows, true = made_up(seed)
    contrast = sums.sum(0) / rows.sum(0)
    found = [name for name, _, _ in status.classify(ClusterMeans(sums, rows, seed=seed), TokenInduction())]
    by_size = {
        name: {own for own, value in zip(found, contrast, strict=True) if inside(value)}
        for name, inside in (("large", lambda c: c > 0.25), ("small", lambda c: c < 0.03))
    }
    assert by_size == {"large": {"TIH"}, "small": {"not a TIH"}}
    assert Counter(found)["undecided"] < HEADS / 20
    assert max(true[[own == "not a TIH" for own in found]]) < 0.05 < 0.2 < min(true[[own == "TIH" for own in found]])


@pytest.mark.parametrize(("layers", "documents"), [(3, 120), (30, 120), (200, 240)])
def test_models_of_many_heads_have_more_status_documents(
    monkeypatch: pytest.MonkeyPatch, layers: int, documents: int
) -> None:
    mini = load_target("mini")
    cfg = SimpleNamespace(n_layers=layers, n_heads=9, n_ctx=128)
    made: Any = SimpleNamespace(
        model=SimpleNamespace(cfg=cfg), name="mini", bos=mini.bos, tokenizer=mini.tokenizer, documents=mini.documents
    )
    pool = np.ones(mini.model.cfg.d_vocab)
    monkeypatch.setattr(sets, "mean_prediction", lambda model, target: pool)
    found = sets.documents(made, "repeated_random", RepeatedSets())
    assert len(found["status"]) == len(set(found["status"].sources)) == documents
    few = sets.documents(SimpleNamespace(**{**vars(made), "model": mini.model}), "repeated_random", RepeatedSets())
    for name in sets.SETS:
        own = few[name].sources
        assert found[name].sources[: len(own)] == own, "what a small model has stays as it is"
        assert name == "status" or len(found[name]) == len(own)


@torch.no_grad()
def test_patterns_a_few_documents_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = tiny("llama", torch.float64), np.random.default_rng(0)
    batch = Batch.of([repeat(rng.permutation(250)[:n] + 1, 0, rng, f"s{n}") for n in (8, 12, 9, 10, 11)])
    whole = status.row_values(model, batch)
    sides = [status.patterns(model, tokens).transpose(1, 2).flatten(0, 1) for tokens in (batch.tokens, batch.control)]
    assert torch.allclose(whole[0], status.contrast(*sides, batch), atol=1e-6)
    monkeypatch.setattr(status, "PATTERN_BYTES", 1)
    one_by_one = status.row_values(model, batch)
    assert torch.allclose(whole[0], one_by_one[0], atol=1e-6)
    for name, values in whole[1].items():
        assert torch.allclose(values, one_by_one[1][name], atol=1e-6)
