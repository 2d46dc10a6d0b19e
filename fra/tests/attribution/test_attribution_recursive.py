"""Recursive attribution is exact in sum, and each of its terms is what the model would lose without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fra.attribution import head_outputs
from fra.attribution import upstream as upstream_module
from fra.attribution.head_outputs import Live
from fra.dictionaries import encoder as encoder_module
from fra.errors import FraError
from fra.tests.models import ARCHITECTURES, random_tokens, tiny, tiny_sae

DOUBLE = torch.float64
LAYER = 1
TOKENS = random_tokens(14, 2)


def dictionary(hook: str, kind: str = "topk", **options: Any) -> Any:
    reshape = {"reshape_activations": "hook_z"} if hook.endswith("hook_z") else {}
    return tiny_sae(hook, kind, dtype="float64", **reshape, **options)


SAE_HOOK = f"blocks.{LAYER}.attn.hook_z"


def entries(model: Any, sae: Any, n: int = 6) -> tuple[Live, torch.Tensor]:
    """A few entries late in the document, and what their pre-activations are."""
    o = head_outputs.observe(model, sae, TOKENS)
    last = o.live.where(o.live.pos >= 9)
    at = last.where(torch.arange(len(last)) % max(1, len(last) // n) == 0)
    return at, o.pre_activation(at.feature)[0, at.pos, torch.arange(len(at))]


def upstream(kind: str) -> dict[str, list[str]]:
    at_input = "hook_resid_pre" if kind == "no_layernorm" else "ln1.hook_normalized"
    return {
        "components": [],
        "head outputs": ["blocks.0.attn.hook_z"],
        "attention outputs": ["blocks.0.hook_attn_out"],
        "inputs": [f"blocks.{LAYER}.{at_input}"],
        "residual": [f"blocks.{LAYER}.hook_resid_pre"],
        "both below": [f"blocks.0.{at_input}"],
    }


@pytest.mark.parametrize("folded", [False, True], ids=["raw", "folded"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_terms_sum_to_the_pre_activation(kind: str, folded: bool) -> None:
    model, sae = tiny(kind, DOUBLE, folded), dictionary(SAE_HOOK)
    at, truth = entries(model, sae)
    for hooks in upstream(kind).values():
        trace = upstream_module.recursive(model, sae, TOKENS, at, {hook: dictionary(hook) for hook in hooks})
        torch.testing.assert_close(trace.total(), truth, rtol=0, atol=2e-5)
        biases = {"b_V", "b_O"} if kind in ("gpt2", "pythia", "gpt_neo", "no_layernorm") and not folded else set()
        for component in {"feature", "bias", "error", "embed", "encoder bias", "mlp", *biases} & set(
            trace.components()
        ):
            part = sum(float(t.value.abs().max()) for t in trace.terms if t.component == component)
            if part:
                assert float((trace.without(component) - truth).abs().max()) > 1e-3, component
        for row, feature, value in trace.features.values():
            assert value.shape == (len(at), len(row)) and len(feature) == len(row)


@pytest.mark.parametrize("options", [{"rescale_acts_by_decoder_norm": True}, {"normalize_activations": "layer_norm"}])
def test_every_kind_of_dictionary_on_the_way(options: dict[str, Any]) -> None:
    model, sae = tiny("gpt2", DOUBLE), dictionary(SAE_HOOK, normalize_activations="constant_norm_rescale")
    at, truth = entries(model, sae)
    hooks = ["blocks.0.attn.hook_z", "blocks.0.hook_attn_out", f"blocks.{LAYER}.ln1.hook_normalized"]
    for hook in hooks:
        trace = upstream_module.recursive(model, sae, TOKENS, at, {hook: dictionary(hook, **options)})
        torch.testing.assert_close(trace.total(), truth, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "pythia", "no_layernorm"])
def test_a_term_is_the_derivative_of_the_frozen_model(kind: str) -> None:
    """Embedding and MLP terms by automatic differentiation through the model's own weights, patterns and scales held:
    the directional derivative along what the component wrote.
    """
    model, sae = tiny(kind, DOUBLE), dictionary(SAE_HOOK)
    at, _ = entries(model, sae, 3)
    trace = upstream_module.recursive(model, sae, TOKENS, at)
    names = [n for n in model.hook_dict if n.endswith(("hook_pattern", "hook_scale"))]
    _, clean = model.run_with_cache(TOKENS[None])
    held = [(n, lambda old, hook, n=n: clean[n]) for n in names if n in clean and ".ln2" not in n]
    held += (
        [("blocks.0.hook_mlp_out", lambda old, hook: clean["blocks.0.hook_mlp_out"])] if kind != "no_layernorm" else []
    )
    share = 0.5

    def pre(extra: list[Any]) -> torch.Tensor:
        with torch.no_grad(), model.hooks(fwd_hooks=held + extra):
            z = model.run_with_cache(TOKENS[None], names_filter=[SAE_HOOK])[1][SAE_HOOK]
        o = encoder_module.encoder(sae, z.reshape(1, len(TOKENS), 4, 8))
        z = z.reshape(len(TOKENS), 32)[at.pos]
        return (z * o.weight.flatten(0, 1)[:, at.feature].T).sum(1)

    before = pre([])
    where = 4
    wrote = clean["blocks.0.hook_resid_pre"][0, where]

    def less(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[:, where] -= share * wrote
        return x

    change = (before - pre([("blocks.0.hook_resid_pre", less)])) / share
    embedded = sum(t.value[:, where] for t in trace.terms if t.component in ("embed", "pos_embed"))
    torch.testing.assert_close(change, embedded, rtol=0, atol=1e-5)


def test_a_dictionary_that_is_not_upstream_is_refused() -> None:
    model, sae = tiny("gpt2", DOUBLE), dictionary(SAE_HOOK)
    at, _ = entries(model, sae)
    with pytest.raises(FraError, match="does not lie upstream"):
        upstream_module.recursive(model, sae, TOKENS, at, {SAE_HOOK: sae})
