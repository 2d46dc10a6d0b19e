"""Leaving out any one term breaks the sum, and freezing a layer whose weights are misread is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fra
from fra.architectures.architecture import RawQK
from fra.architectures.bridge import BridgeArchitecture
from fra.core.resolve import ResolvedHead
from fra.errors import FraError
from fra.tests.core.conftest import Register
from fra.tests.core.test_resolve_architectures import TOKENS, own_scores, yardstick
from fra.tests.models import tiny, tiny_sae

RESID, NORMALIZED = "blocks.1.hook_resid_pre", "blocks.1.ln1.hook_normalized"


def weight(kind: str, name: str) -> Any:
    return getattr(tiny(kind).blocks[1].attn, name).detach()


def norm_bias(kind: str) -> torch.Tensor:
    return tiny(kind).blocks[1].ln1.original_component.bias.detach()


def frozen_with(**change: Callable[[Any], Any]) -> Callable[[ResolvedHead], ResolvedHead]:
    """Replaces fields of the frozen layer by functions of themselves."""
    return lambda r: ResolvedHead(
        replace(r.frozen, **{k: f(getattr(r.frozen, k)) for k, f in change.items()}), r.codes, r.head
    )


def codes_with(**change: Callable[[Any], Any]) -> Callable[[ResolvedHead], ResolvedHead]:
    return lambda r: ResolvedHead(
        r.frozen, replace(r.codes, **{k: f(getattr(r.codes, k)) for k, f in change.items()}), r.head
    )


OMISSIONS: dict[str, tuple[str, str, Callable[[ResolvedHead], ResolvedHead]]] = {
    "b_Q": ("gpt2", RESID, frozen_with(b_q=lambda b: b - weight("gpt2", "b_Q"))),
    "b_K": ("gpt2", RESID, frozen_with(b_k=lambda b: b - weight("gpt2", "b_K"))),
    "b_Q at hook_normalized": ("gpt2", NORMALIZED, frozen_with(b_q=lambda b: b - weight("gpt2", "b_Q"))),
    "b_dec": ("gpt2", RESID, codes_with(bias=torch.zeros_like)),
    "error": ("gpt2", RESID, codes_with(error=torch.zeros_like)),
    "features": ("gpt2", RESID, codes_with(value=torch.zeros_like)),
    "LayerNorm bias, query": ("gpt2", RESID, frozen_with(b_q=lambda b: b - norm_bias("gpt2") @ weight("gpt2", "W_Q"))),
    "LayerNorm bias, key": (
        "gpt2",
        NORMALIZED,
        frozen_with(b_k=lambda b: b - norm_bias("gpt2") @ weight("gpt2", "W_K")),
    ),
    "LayerNorm scale": ("gpt2", RESID, frozen_with(sigma=torch.ones_like)),
    "LayerNorm weight": ("gpt2", RESID, frozen_with(W_q=lambda W: weight("gpt2", "W_Q"))),
    "centring": ("pythia", RESID, frozen_with(W_k=lambda W: W + 0.05)),
    "RMSNorm scale": ("llama", RESID, frozen_with(sigma=torch.ones_like)),
    "scale": ("gpt2", RESID, frozen_with(scale=lambda scale: 1.0)),
    "scale that GPT-Neo does not have": ("gpt_neo", RESID, frozen_with(scale=lambda scale: 8**-0.5)),
    "query_pre_attn_scalar": ("gemma2", RESID, frozen_with(scale=lambda scale: 8**-0.5)),
    "rotation": ("llama", RESID, frozen_with(rotary=lambda rotary: None)),
    "partial rotation": ("pythia", RESID, frozen_with(rotary=lambda rotary: None)),
    "pairing of rotated dimensions": (
        "llama",
        RESID,
        frozen_with(rotary=lambda rotary: replace(rotary, adjacent=True)),
    ),
    "QK-norm gain, query": ("qwen3", RESID, frozen_with(gain_q=torch.ones_like)),
    "QK-norm gain, key": ("gemma3", RESID, frozen_with(gain_k=torch.ones_like)),
    "QK-norm weight": (
        "qwen3",
        RESID,
        frozen_with(W_q=lambda W: W / tiny("qwen3").blocks[1].attn.q_norm.weight.detach()),
    ),
    "softcap": ("gemma2", RESID, frozen_with(softcap=lambda softcap: None)),
    "grouped keys": ("llama", RESID, frozen_with(W_k=lambda W: W.roll(2, 0))),
}


@pytest.mark.parametrize("what", OMISSIONS)
def test_every_term_is_needed(what: str) -> None:
    kind, hook, leave_out = OMISSIONS[what]
    model = tiny(kind)
    scores, attended = own_scores(model, 1)
    errors = []
    for head in range(4):
        whole = fra.resolve(model, tiny_sae(hook), TOKENS, 1, head)
        assert yardstick(whole, scores[head], attended[head]) <= 1e-6
        errors.append(yardstick(leave_out(whole), scores[head], attended[head]))
    # Every head notices, by a thousand times the bar.
    assert min(errors) > 1e-3


@pytest.mark.parametrize(
    ("option", "leave_out"),
    [
        ("layer_norm", codes_with(bias=lambda bias: bias - bias.mean(-1, keepdim=True))),
        ("layer_norm", codes_with(value=lambda value: value / 2)),
        ("constant_norm_rescale", codes_with(value=lambda value: value * 1.1)),
    ],
    ids=["offset m_t", "gain g_t of layer_norm", "gain g_t of constant_norm_rescale"],
)
def test_the_dictionarys_normalisation_is_needed(
    option: str, leave_out: Callable[[ResolvedHead], ResolvedHead]
) -> None:
    # Without LayerNorm's centring, a constant offset of x reaches the scores.
    model = tiny("llama")
    scores, attended = own_scores(model, 1)
    whole = fra.resolve(model, tiny_sae(RESID, normalize_activations=option), TOKENS, 1, 0)
    assert yardstick(whole, scores[0], attended[0]) <= 1e-6
    assert yardstick(leave_out(whole), scores[0], attended[0]) > 1e-3


@pytest.mark.parametrize(
    ("kind", "field", "wrong"),
    [
        ("gpt2", "b_Q", torch.zeros_like),
        ("gpt2", "b_K", torch.zeros_like),
        ("gpt2", "bias", torch.zeros_like),
        ("gpt2", "weight", torch.ones_like),
        ("gpt2", "centred", lambda centred: False),
        ("gpt2", "scale", lambda scale: 1.0),
        ("llama", "W_K", lambda W: W.roll(2, 0)),
        ("gemma2", "softcap", lambda softcap: None),
        ("gemma2", "weight", lambda w: w - 1),
        ("gemma3", "norm_q", lambda norm: None),
        ("qwen3", "norm_k", lambda norm: (norm[0] * 0 + 1, norm[1])),
        ("gemma3", "scale", lambda scale: 8**-0.5),
    ],
)
def test_a_layer_whose_weights_are_misread_is_refused(
    kind: str, field: str, wrong: Callable[[Any], Any], registered: Register
) -> None:
    class Misread(BridgeArchitecture):
        def read_qk(self, layer: int) -> RawQK:
            raw = super().read_qk(layer)
            if hasattr(raw.norm, field):
                return replace(raw, norm=replace(raw.norm, **{field: wrong(getattr(raw.norm, field))}))
            return replace(raw, **{field: wrong(getattr(raw, field))})

    registered(Misread)
    with pytest.raises(FraError, match="cannot be reproduced from its weights as Misread reads them"):
        fra.resolve(tiny(kind), tiny_sae(RESID), TOKENS, 1, 0)


@pytest.mark.parametrize("window", [None, 4, 6])
def test_a_window_that_is_misread_is_refused(window: int | None, registered: Register) -> None:
    class Misread(BridgeArchitecture):
        def read_qk(self, layer: int) -> RawQK:
            return replace(super().read_qk(layer), window=window)

    registered(Misread)
    with pytest.raises(FraError, match="mask"):
        fra.resolve(tiny("gemma2"), tiny_sae(RESID), TOKENS, 1, 0)


@pytest.mark.parametrize("kind", ["llama", "pythia"])
def test_a_rotation_that_is_misread_is_refused(kind: str, registered: Register) -> None:
    class Misread(BridgeArchitecture):
        def rotary_hooks(self, layer: int) -> dict[str, str]:
            return {}

    registered(Misread)
    with pytest.raises(FraError, match="cannot be reproduced from its weights"):
        fra.resolve(tiny(kind), tiny_sae(RESID), TOKENS, 1, 0)
