"""Codes of every kind of dictionary that SAELens loads add up to the activation, and the scores with them; other kinds
are refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    TemporalSAE,
    TemporalSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata

import fra
from fra.core.frozen import freeze
from fra.dictionaries.codes import ROWS_AT_ONCE, check_dictionary, codes
from fra.dictionaries.hooks import attention_input_layer
from fra.errors import FraError
from fra.tests.core.test_resolve_architectures import TOKENS, own_scores, yardstick
from fra.tests.models import D_MODEL, D_SAE, build_sae, random_tokens, tiny, tiny_sae

HOOK = "blocks.1.hook_resid_pre"
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("topk", {}),
    ("topk", {"normalize_activations": "layer_norm"}),
    ("topk", {"normalize_activations": "constant_norm_rescale"}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"}),
    ("topk", {"apply_b_dec_to_input": False}),
    ("jumprelu", {}),
    ("jumprelu", {"normalize_activations": "layer_norm"}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("standard", {}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("gated", {}),
    ("gated", {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}),
    ("batchtopk", {}),
    ("batchtopk", {"normalize_activations": "layer_norm", "rescale_acts_by_decoder_norm": True}),
    ("batchtopk", {"normalize_activations": "expected_average_only_in"}),  # SAELens' trainer folds it
]


def activation(dtype: torch.dtype) -> torch.Tensor:
    return freeze(tiny("gpt2", dtype), TOKENS[None], 1, HOOK).x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_codes_add_up_to_what_the_dictionary_decodes_and_to_the_activation(
    kind: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    x, bar = activation(dtype), 1e-5 if dtype is torch.float32 else 1e-12
    sae = copy.deepcopy(tiny_sae(HOOK, kind, dtype=str(dtype).removeprefix("torch."), **options))
    found = codes(sae, x)
    assert 0 < len(found.row) < x.shape[1] * D_SAE
    written = found.dense() @ found.decoder + found.bias
    truth = sae.decode(sae.encode(x)).detach()
    torch.testing.assert_close(written, truth, atol=bar, rtol=bar)
    torch.testing.assert_close(written + found.error, x, atol=bar, rtol=bar)
    order = found.row * D_SAE + found.feature
    assert bool((order.diff() > 0).all())


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_scores_with_every_dictionary(kind: str, options: dict[str, Any]) -> None:
    for dtype, bar in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model = tiny("gpt2", dtype)
        scores, attended = own_scores(model, 1)
        # A float32 dictionary on a float64 model, too: the error term takes up its rounding.
        head = fra.resolve(model, tiny_sae(HOOK, kind, **options), TOKENS, 1, 2)
        assert yardstick(head, scores[2], attended[2]) <= bar


def test_batchtopk_is_trained_and_comes_back_as_jumprelu() -> None:
    sae = tiny_sae(HOOK, "batchtopk")
    assert isinstance(sae, JumpReLUSAE)
    assert float(sae.threshold.detach().abs().max()) > 0


def test_codes_do_not_depend_on_how_rows_are_cut() -> None:
    sae = tiny_sae(HOOK, "topk", dtype="float64", normalize_activations="layer_norm")
    x = torch.randn(3, ROWS_AT_ONCE // 2, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together, apart = codes(sae, x), codes(sae, x[1:2])
    second = (together.row >= x.shape[1]) & (together.row < 2 * x.shape[1])
    assert torch.equal(together.feature[second], apart.feature)
    torch.testing.assert_close(together.value[second], apart.value)
    torch.testing.assert_close(together.dense() @ together.decoder + together.bias + together.error, x)


def test_a_scale_that_is_not_folded_in_is_refused_until_it_is(tmp_path: Any) -> None:
    sae = SAE.load_from_disk(
        build_sae("standard", D_MODEL, HOOK, tmp_path, normalize_activations="expected_average_only_in")
    )
    with pytest.raises(FraError, match=r"call sae\.fold_activation_norm_scaling_factor"):
        fra.resolve(tiny("gpt2"), sae, TOKENS, 1, 0)
    sae.fold_activation_norm_scaling_factor(0.5)
    scores, attended = own_scores(tiny("gpt2"), 1)
    assert yardstick(fra.resolve(tiny("gpt2"), sae, TOKENS, 1, 0), scores[0], attended[0]) <= 1e-6


def _made(cls: Any, config: Any, hook: str = HOOK, **options: Any) -> Any:
    return cls(config(d_in=D_MODEL, d_sae=D_SAE, metadata=SAEMetadata(hook_name=hook), **options))


def _changed(change: Callable[[Any], None]) -> Any:
    sae = copy.deepcopy(tiny_sae(HOOK, "jumprelu"))
    with torch.no_grad():
        change(sae)
    return sae


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "transcoder": (
        lambda: _made(Transcoder, TranscoderConfig, apply_b_dec_to_input=False, d_out=D_MODEL),
        "architecture 'transcoder' cannot be resolved",
    ),
    "temporal": (
        lambda: _made(TemporalSAE, TemporalSAEConfig, n_heads=1, bottleneck_factor=1),
        "architecture 'temporal' cannot be resolved",
    ),
    "matching pursuit": (
        lambda: _made(MatchingPursuitSAE, MatchingPursuitSAEConfig),
        "architecture 'matching_pursuit' cannot be",
    ),
    "in training": (lambda: _made(TopKTrainingSAE, TopKTrainingSAEConfig, k=4), "still in training form"),
    "no dictionary": (lambda: torch.nn.Linear(D_MODEL, D_SAE), "Linear is not a SAELens dictionary"),
    "head outputs": (lambda: tiny_sae("blocks.1.attn.hook_z"), "holds head outputs, not an attention input"),
    "head outputs, reshaped": (
        lambda: tiny_sae("blocks.1.attn.hook_z", reshape_activations="hook_z"),
        "one of head outputs",
    ),
    "MLP output": (lambda: tiny_sae("blocks.0.hook_mlp_out"), "'blocks.0.hook_mlp_out' is not an attention input"),
    "no hook": (lambda: tiny_sae(""), "does not say which hook"),
    "another width": (
        lambda: _changed(lambda sae: setattr(sae.cfg, "d_in", 64)),
        "has width 64 and the activation there has 32",
    ),
    "L0 of zero": (
        lambda: _changed(lambda sae: sae.threshold.fill_(1e6)),
        r"no feature of .* is live on any of the 20 positions \(L0 is zero\)",
    ),
    "NaN in the decoder": (lambda: _changed(lambda sae: sae.W_dec.fill_(torch.nan)), "hold NaN or infinity"),
    "NaN in the encoder": (lambda: _changed(lambda sae: sae.b_enc.fill_(torch.inf)), "hold NaN or infinity"),
    "whitened": (
        lambda: _changed(lambda sae: setattr(sae.cfg, "normalize_activations", "covariance_whitening")),
        "fold_activation_whitening",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_dictionaries_are_refused_by_name(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(FraError, match=message) as caught:
        fra.resolve(tiny("gpt2"), make(), TOKENS, 1, 0)
    assert "\n" not in str(caught.value)


def test_a_dictionary_is_not_used_at_another_hook() -> None:
    check_dictionary(tiny_sae(HOOK), hook_name=HOOK)
    with pytest.raises(
        FraError, match=r"trained at 'blocks\.1\.hook_resid_pre' and is used at 'blocks\.0\.hook_resid_post'"
    ):
        check_dictionary(tiny_sae(HOOK), hook_name="blocks.0.hook_resid_post")


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("blocks.3.ln1.hook_normalized", 3), ("blocks.12.hook_resid_pre", 12), ("blocks.2.hook_resid_post", 3)],
)
def test_the_layer_that_reads_a_hook(hook: str, layer: int) -> None:
    assert attention_input_layer(hook) == layer


@pytest.mark.parametrize("tokens", [random_tokens()[None], random_tokens().float()])
def test_tokens_are_one_document_of_ids(tokens: torch.Tensor) -> None:
    resolve = getattr(fra.resolve, "__wrapped__", fra.resolve)  # past the suite's run-time type check
    with pytest.raises(FraError, match="integer ids of one document"):
        resolve(tiny("gpt2"), tiny_sae(HOOK), tokens, 1, 0)
