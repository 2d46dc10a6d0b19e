"""Interventions look at nothing ahead, come off again, and refuse what does not fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import fra
from fra import interventions as iv
from fra.errors import FraError
from fra.tests.intervening import (
    ATTN,
    HEAD,
    LAYER,
    SCORES,
    TOKENS,
    at,
    double,
    logits,
    maps,
    resolved,
    sae_of,
    seen,
    strong,
)
from fra.tests.models import ARCHITECTURES, D_SAE, N_CTX, model_folder, random_tokens, tiny

# ---- never a look ahead


def everything(kind: str, dtype: torch.dtype) -> list[iv.Intervention]:
    """One of each kind of intervention, each of them strong."""
    model, place = tiny(kind, dtype), at(kind)
    other = torch.stack([random_tokens(16, seed) for seed in (7, 8)])
    first = fra.resolve(model, place["dictionary"], TOKENS[0], LAYER, HEAD)
    channels = first.channels("abs", n=100)
    features = first.codes.feature.unique()
    head = {"layer": LAYER, "head": HEAD}
    blocks = [("feature", "bias"), ("error", "feature"), ("bias", "error")]
    return [
        fra.remove(model, channels, **place),
        fra.remove(model, channels, **place, clean=TOKENS),
        iv.scale(model, channels, 4.0, **place, keys=[0, 3, 12, 14]),
        iv.keep_only(model, channels, **place),
        iv.scale_blocks(model, blocks, -2.0, **place),
        iv.scale_features(model, features[::2], "query", **place),
        iv.scale_features(model, features[::2], "key", **place),
        iv.remove_output(model, features[::2], terms=("error", "bias"), **place),
        iv.scale_output(model, features[::2], 5.0, **place),
        iv.zero_ablate(model, **head),
        iv.mean_ablate(model, other, **head),
        iv.patch_output(model, other, **head),
        iv.patch_pattern(model, other, **head),
        iv.freeze_scales(model, other, layer=LAYER),
    ]


def leaks(model: Any, interventions: list[iv.Intervention]) -> list[int]:
    """Which interventions let a logit at or before position 10 feel the tokens after it, to the last bit."""
    changed = TOKENS.clone()
    changed[:, 11:] = torch.stack([random_tokens(16, seed)[11:] for seed in (3, 4)])
    found = []
    for number, intervention in enumerate(interventions):
        with intervention:
            one, two = logits(model), logits(model, changed)
        assert not torch.equal(one[:, 11:], two[:, 11:])
        if not torch.equal(one[:, :11], two[:, :11]):
            found.append(number)
    return found


def unmasked(model: Any) -> iv.Intervention:
    """The classic mistake: scores overwritten above the diagonal, too."""

    def edit(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        scores = scores.clone()
        scores[:, HEAD] = 0.0
        return scores

    return iv.Intervention(model, [], [(SCORES, edit)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_earlier_logits_never_depend_on_later_tokens(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind, dtype)
    interventions = everything(kind, dtype)
    assert leaks(model, interventions) == []
    plain = logits(model)
    for intervention in interventions[: -1 if kind == "no_layernorm" else None]:  # no norm, no scale to freeze
        with intervention:
            assert not torch.equal(logits(model), plain)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_neo"])
def test_an_unmasked_patch_is_seen_to_leak(kind: str) -> None:
    assert leaks(double(kind), [unmasked(double(kind))]) == [0]


# ---- attaching and detaching


def attached(model: Any) -> int:
    points = {id(point): point for point in model.hook_dict.values()}.values()
    return sum(len(p._forward_hooks) + len(p._forward_pre_hooks) + len(p.fwd_hooks) for p in points)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
def test_the_model_is_as_it_was_afterwards(kind: str) -> None:
    model = double(kind)
    plain, number = logits(model), attached(model)
    for intervention in everything(kind, torch.float64):
        with intervention:
            assert attached(model) > number
        assert attached(model) == number
    failing = fra.remove(model, [[0, 0]], **at(kind))
    with failing, failing:
        assert attached(model) > number
    assert attached(model) == number
    with pytest.raises(RuntimeError, match="mine"), failing:
        seen(model, SCORES, hooks=[("blocks.0.hook_resid_pre", explode)])
    assert attached(model) == number
    assert torch.equal(logits(model), plain)


def explode(value: torch.Tensor, hook: Any) -> None:
    raise RuntimeError("mine")


@pytest.mark.parametrize("folded", [False, True], ids=["raw", "folded"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neo"])
def test_a_list_of_hooks_does_the_same(kind: str, folded: bool) -> None:
    model, sae = tiny(kind, torch.float64, folded), sae_of(kind)
    channels = fra.resolve(model, sae, TOKENS[0], LAYER, HEAD).channels("abs", n=30)
    plain = logits(model)
    features = channels.q_feature.unique()[:8].tolist()
    for intervention in (
        fra.remove(model, channels, **at(kind)),
        iv.scale_output(model, features, 3.0, **at(kind)),
        iv.zero_ablate(model, layer=LAYER, head=HEAD, share=0.5),
    ):
        with intervention:
            within = logits(model)
        with torch.no_grad():
            listed = model.run_with_hooks(TOKENS, fwd_hooks=intervention.hooks)
        assert torch.equal(within, listed)
        assert not torch.equal(within, plain)
        assert torch.equal(logits(model), plain)


def test_hooks_of_others_stay_on() -> None:
    model = double("gpt2")
    fired = []
    with model.hooks(fwd_hooks=[(SCORES, lambda value, hook: fired.append(1))]):
        intervention = fra.remove(model, [[0, 0]], **at("gpt2"), clean=TOKENS)
        assert not fired  # building it ran the model without them
        with intervention:
            logits(model)
        logits(model)
    assert len(fired) == 2


def test_gradients_reach_the_input_through_what_remains() -> None:
    model, heads = double("gpt2"), resolved("gpt2")
    channels = strong(heads)
    kept = {}

    def leaf(x: torch.Tensor, hook: Any) -> torch.Tensor:
        kept["x"] = x.detach().requires_grad_()
        return kept["x"]

    with model.hooks(fwd_hooks=[(f"{ATTN}.hook_q", leaf)]), fra.remove(model, channels, **at("gpt2")):
        model(TOKENS)[0, 12, 3].backward()
    gradient = kept["x"].grad[0, 12, HEAD]
    model.zero_grad(set_to_none=True)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 1e-6


def test_half_precision_keeps_its_precision() -> None:
    model = tiny("gpt2", torch.bfloat16)
    channels = fra.resolve(model, sae_of("gpt2"), TOKENS[0], LAYER, HEAD).channels("abs", n=30)
    before = seen(model, SCORES)[0]
    with fra.remove(model, channels, **at("gpt2")):
        scores, output = seen(model, SCORES)[0], logits(model)
    assert scores.dtype == before.dtype and output.dtype == torch.bfloat16
    heads = [fra.resolve(model, sae_of("gpt2"), document, LAYER, HEAD) for document in TOKENS]
    taken = maps(heads, torch.tensor(channels[["q_feature", "k_feature"]].to_numpy()))
    error = ((before - scores)[:, HEAD].float() - taken)[:, heads[0].frozen.mask].abs().max()
    assert float(error) < 0.02 * float(taken.abs().max())


# ---- bad input


@pytest.fixture(scope="module")
def plain_attention() -> Any:
    """GPT-Neo as TransformerBridge: its hook_attn_scores shows the pattern, and editing it does nothing."""
    folder = model_folder("gpt_neo")
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", hf_model=hf)
    bridge.eval()
    return bridge


@torch.no_grad()
def test_a_scores_hook_that_shows_something_else_is_not_changed(plain_attention: Any) -> None:
    """An edit there would be dropped, and the pattern comes too late for one of the output that needs it; one that
    needs neither is heard, and does what it does to HookedTransformer.
    """
    hooked = tiny("gpt_neo")
    assert isinstance(hooked, HookedTransformer)
    for build, point in (
        (lambda: fra.remove(plain_attention, [[0, 0]], **at("gpt_neo")), "attn_scores"),
        (lambda: iv.remove_output(plain_attention, [0], **at("gpt_neo")), "pattern"),
        (lambda: iv.Intervention(plain_attention, [], [("blocks.1.attn.hook_pattern", print)]), "pattern"),
    ):
        with pytest.raises(FraError, match=rf"changed by way of 'blocks\.1\.attn\.hook_{point}'.* HookedTransformer"):
            build()
    found = []
    for model in (hooked, plain_attention):
        with iv.zero_ablate(model, layer=LAYER, head=HEAD):
            found.append(model(TOKENS).log_softmax(-1))
    assert float((found[0] - hooked(TOKENS).log_softmax(-1)).abs().max()) > 1e-2
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


BAD: list[tuple[str, Callable[[Any, dict[str, Any]], Any]]] = [
    ("there are no channels", lambda m, p: fra.remove(m, torch.zeros(0, 2, dtype=torch.long), **p)),
    (r"shape \[3\]", lambda m, p: fra.remove(m, torch.tensor([1, 2, 3]), **p)),
    ("integer ids", lambda m, p: fra.remove(m, torch.rand(2, 2), **p)),
    (f"feature {D_SAE} is out of range", lambda m, p: fra.remove(m, [[0, D_SAE]], **p)),
    ("feature -1 is out of range", lambda m, p: iv.remove_output(m, [-1], **p)),
    ("no column 'k_feature'", lambda m, p: fra.remove(m, pd.DataFrame({"q_feature": [1]}), **p)),
    ("layer 5 is out of range", lambda m, p: fra.remove(m, [[0, 0]], **{**p, "layer": 5})),
    ("head 4 is out of range", lambda m, p: fra.remove(m, [[0, 0]], **{**p, "head": 4})),
    ("head 4 is out of range", lambda m, p: iv.zero_ablate(m, layer=0, head=4)),
    ("attention input of layer 1, not of layer 0", lambda m, p: fra.remove(m, [[0, 0]], **{**p, "layer": 0})),
    ("attention input of layer 1, not of layer 0", lambda m, p: iv.remove_output(m, [0], **{**p, "layer": 0})),
    ("not a SAELens dictionary", lambda m, p: fra.remove(m, [[0, 0]], **{**p, "dictionary": 3})),
    ("'mlp'", lambda m, p: iv.scale_blocks(m, [("mlp", "bias")], **p)),
    ("no blocks", lambda m, p: iv.scale_blocks(m, [], **p)),
    ("side='both'", lambda m, p: inspect.unwrap(iv.scale_features)(m, [0], "both", **p)),
    ("'mlp' is no kind of term", lambda m, p: iv.remove_output(m, [], terms=("mlp",), **p)),
    ("'row' does not say where", lambda m, p: fra.remove(m, [[0, 0]], **p, row=[3])),
    ("'key' does not say where", lambda m, p: iv.remove_output(m, [0], **p, key=[3])),
    ("there are no features", lambda m, p: iv.remove_output(m, [], **p)),
    ("no reference position", lambda m, p: iv.mean_ablate(m, TOKENS, layer=0, head=0, reference_rows=[])),
    ("no hook 'blocks.9.nothing'", lambda m, p: iv.Intervention(m, [], [("blocks.9.nothing", explode)])),
    ("outside the vocabulary", lambda m, p: fra.remove(m, [[0, 0]], **p, clean=TOKENS + 10_000)),
]
BAD_IN_THE_PASS: list[tuple[str, Callable[[Any, dict[str, Any]], Any]]] = [
    ("positions outside 0 to 15", lambda m, p: fra.remove(m, [[0, 0]], **p, rows=[3, 16])),
    (r"keys has shape \[1, 5\]", lambda m, p: fra.remove(m, [[0, 0]], **p, keys=torch.ones(5, dtype=torch.bool))),
    ("Boolean mask", lambda m, p: fra.remove(m, [[0, 0]], **p, entries=torch.ones(16, 16))),
    ("documents of the same shape", lambda m, p: fra.remove(m, [[0, 0]], **p, clean=TOKENS[:, :9])),
    ("documents of the same shape", lambda m, p: iv.patch_output(m, TOKENS[:, :9], layer=1, head=0)),
    ("documents of the same shape", lambda m, p: iv.patch_pattern(m, TOKENS[:, :9], layer=1, head=0)),
    ("documents of the same shape", lambda m, p: iv.freeze_scales(m, TOKENS[:, :9], layer=1)),
    ("documents of the same shape", lambda m, p: iv.set_output(m, torch.zeros(7).double(), layer=1, head=0)),
]


@pytest.mark.parametrize(("message", "build"), BAD)
def test_bad_input_is_refused_in_one_sentence(message: str, build: Callable[..., Any]) -> None:
    with pytest.raises(FraError, match=message):
        build(double("gpt2"), at("gpt2"))


@pytest.mark.parametrize(("message", "build"), BAD_IN_THE_PASS)
def test_what_does_not_fit_the_pass_is_refused_there(message: str, build: Callable[..., Any]) -> None:
    model = double("gpt2")
    number = attached(model)
    with pytest.raises(FraError, match=message), build(model, at("gpt2")):
        logits(model)
    assert attached(model) == number


def test_a_pass_with_a_key_value_cache_or_without_the_readers_is_refused() -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    model = double("gpt_neo")
    past = TransformerLensKeyValueCache.init_cache(model.cfg, torch.device("cpu"), 2)
    model(TOKENS[:, :8], past_kv_cache=past)
    intervention = fra.remove(model, [[0, 0]], **at("gpt_neo"))
    with pytest.raises(FraError, match="key-value cache"), intervention:
        model(TOKENS[:, 8:], past_kv_cache=past)
    with pytest.raises(FraError, match="did not fire"):
        model.run_with_hooks(TOKENS, fwd_hooks=intervention.hooks[-1:])


def test_documents_fit_the_context() -> None:
    assert TOKENS.shape[1] <= N_CTX
    assert np.array_equal(TOKENS[:, 0], [0, 0])
