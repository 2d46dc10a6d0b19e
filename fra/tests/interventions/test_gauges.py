"""Gauges: edits that a model does not feel, and what moves under them."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fra.errors import FraError
from fra.interventions import gauges
from fra.measures.identities import q13_gauges
from fra.measures.identities.q13_gauges import STAYS, Moved
from fra.tests import models

LAYER = 1
HOOK = "blocks.1.ln1.hook_normalized"


@cache
def measured(kind: str, folded: bool = False, hook: str = HOOK) -> dict[str, list[Moved] | str]:
    documents = [models.random_tokens(14, seed) for seed in range(2)]
    sae = models.tiny_sae(hook, dtype="float64")
    return q13_gauges.measure(models.tiny(kind, torch.float64, folded), sae, documents, LAYER, ("test", kind))


def moved(found: dict[str, list[Moved] | str], gauge: str) -> list[Moved]:
    own = found[gauge]
    assert not isinstance(own, str), own
    return own


@pytest.mark.parametrize(("kind", "folded"), [("gpt2", False), ("gpt2", True), ("pythia", False)])
def test_what_a_gauge_leaves_alone_and_what_it_moves(kind: str, folded: bool) -> None:
    found = measured(kind, folded)
    function = ("model's own scores", "pattern", "logits")
    for head in moved(found, "mean_direction"):
        for name in (*function, "channels as fra", "effect of removing a complete set", "feature x bias"):
            assert head.overall(name) < STAYS, name
        # random decoders have a mean
        for name in ("channels", "row-centred channels", "effect of removing the set"):
            assert head.overall(f"{name} without centring") > 0.02, name
        assert head.overall("model's own scores, another direction") > 0.1
    for head in moved(found, "key_bias"):
        for name in ("pattern", "logits", "feature x feature", "row-centred feature x bias"):
            assert head.overall(name) < STAYS, name
        for name in ("model's own scores", "feature x bias"):  # rotary positions leave a part of v to half the model
            assert head.overall(name) > 0.01, name


def test_nothing_moves_when_queries_and_keys_change_their_basis() -> None:
    for head in moved(measured("gpt2"), "basis"):
        assert all(head.overall(name) < STAYS for name in head.by_document)


def test_each_edit_changes_the_weights_and_takes_the_change_back() -> None:
    model = models.load_model(models.model_folder("gpt2"), torch.float64)
    tokens = models.random_tokens(12)[None]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(tokens)
    c = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W = model.blocks[LAYER].attn.W_K.clone()
    with gauges.mean_direction(model, LAYER, c):
        assert float((model.blocks[LAYER].attn.W_K - W).detach().abs().max()) > 0.1
        assert torch.allclose(model(tokens), logits, atol=1e-12)
    with pytest.raises(RuntimeError, match="on purpose"), gauges.key_bias(model, LAYER, c):
        raise RuntimeError("on purpose")
    ones = torch.ones(32, dtype=torch.float64)
    ones[3] = 2.0  # no direction but that of the mean is idle
    with gauges.rank_one(model, LAYER, ones, c):
        assert float((model(tokens) - logits).detach().abs().max()) > 1e-4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "gauge", "why"),
    [
        ("llama", "mean_direction", "does not centre"),
        ("llama", "key_bias", "no key bias"),
        ("gemma2", "key_bias", "softcap"),
        ("qwen3", "key_bias", "QK-norm"),
        ("pythia", "basis", "rotary"),
        ("no_layernorm", "mean_direction", "does not centre"),
    ],
)
def test_where_there_is_no_such_gauge(kind: str, gauge: str, why: str) -> None:
    model = models.tiny(kind, torch.float64)
    assert why in (gauges.why_not(model, LAYER, gauge) or "")
    with pytest.raises(FraError, match=why):
        getattr(q13_gauges, gauge)(
            model, LAYER, torch.ones((4, 8, 8) if gauge == "basis" else (4, 8), dtype=torch.float64)
        )


def test_a_key_bias_is_no_gauge_where_rotary_positions_turn_it() -> None:
    v = torch.ones(4, 8, dtype=torch.float64)
    model = models.tiny("pythia", torch.float64)  # a quarter of 8 dimensions turn
    with pytest.raises(FraError, match="rotary"):
        gauges.key_bias(model, LAYER, v)
    v[:, :2] = 0.0
    tokens = models.random_tokens(12)[None]
    before = model(tokens)
    with gauges.key_bias(model, LAYER, v):
        assert torch.allclose(model(tokens), before, atol=1e-12)


def test_a_dictionary_before_the_norm_feels_no_mean_direction() -> None:
    found = measured("gpt2", hook="blocks.1.hook_resid_pre")
    assert "before the LayerNorm" in str(found["mean_direction"])
    assert moved(found, "key_bias")
