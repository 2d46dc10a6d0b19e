"""What a claim spends its time on: one head of `mini` resolved, its reductions, and the bootstrap of a family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fra
from fra.statistics.stats import ClusterMeans

Benchmark = Callable[..., Any]
LAYER, HEAD = 1, 3


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, torch.Tensor]:
    """Model, dictionary and one document as long as the context."""
    target = fra.load_target("mini")
    _, sae = target.dictionary_for(LAYER)
    text = " ".join(document.text for document in target.documents()[:3])
    return target.model, sae, target.model.to_tokens(text)[0, : target.model.cfg.n_ctx]


def test_resolve_and_sum(benchmark: Benchmark, parts: tuple[Any, Any, torch.Tensor]) -> None:
    model, sae, tokens = parts
    scores = benchmark(lambda: fra.resolve(model, sae, tokens, LAYER, HEAD).scores())
    assert scores.shape == (len(tokens), len(tokens))


@pytest.mark.parametrize("view", ["top", "channels", "to_sparse"])
def test_view(benchmark: Benchmark, parts: tuple[Any, Any, torch.Tensor], view: str) -> None:
    model, sae, tokens = parts
    resolved = fra.resolve(model, sae, tokens, LAYER, HEAD)
    take = {
        "top": lambda: resolved.top(100),
        "channels": lambda: resolved.channels(n=100),
        "to_sparse": resolved.to_sparse,
    }
    found = benchmark(take[view])
    assert len(found) == (len(tokens) if view == "to_sparse" else 100)


def test_census(benchmark: Benchmark, parts: tuple[Any, Any, torch.Tensor]) -> None:
    model, sae, tokens = parts
    found = benchmark.pedantic(lambda: fra.census(model, sae, [tokens] * 4, layer=LAYER), rounds=3)  # type: ignore[attr-defined]
    assert found is not None


def test_bootstrap_of_fifty_candidates(benchmark: Benchmark) -> None:
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(150, 50)) * (rng.random((150, 50)) < 0.2)
    p = benchmark(lambda: ClusterMeans(values, seed=0).p_above(0.1))
    assert p.shape == (50,)
