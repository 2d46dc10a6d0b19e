"""What surrounds a call is set aside or named: it is not blamed on the architecture, and no exception gets through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import SAE, HookedSAETransformer
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import DeepseekV3Config, GPTBigCodeConfig, GPTNeoXConfig, StableLmConfig

import fra
from fra.architectures.face import face, set_aside
from fra.architectures.known import check_layer_and_head, one_document
from fra.checkpoints.weights import quiet
from fra.dictionaries.codes import check_dictionary
from fra.errors import FraError
from fra.targets.models import load_model
from fra.tests.models import (
    D_MODEL,
    D_VOCAB,
    N_CTX,
    build_model,
    build_sae,
    model_folder,
    random_tokens,
    tiny,
    tiny_sae,
)
from fra.tests.tiny_targets import one_sentence

LAYER, HEAD = 1, 2
NORMED, RESID = f"blocks.{LAYER}.ln1.hook_normalized", f"blocks.{LAYER}.hook_resid_pre"
TOKENS = random_tokens(20)
SCORES = f"blocks.{LAYER}.attn.hook_attn_scores"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def rough_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


AMBIENT: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
    "rough products": rough_products,
    "grad": torch.enable_grad,
}


def answers() -> list[Any]:
    """One number, or many, of every kind of call, and of a pass that is changed outside."""
    model, sae = tiny("qwen3"), tiny_sae(NORMED)
    head = fra.resolve(model, sae, TOKENS, LAYER, HEAD)
    census = fra.census(model, sae, [TOKENS, TOKENS[:9]], LAYER, reduce=("sum", "max", "mass"))
    return [
        head.scores(),
        torch.from_numpy(head.channels(n=9)["value"].to_numpy(copy=True)),
        *(torch.from_numpy(census.channels(name, n=9)["value"].to_numpy(copy=True)) for name in ("sum", "max", "mass")),
        fra.resolve_output(model, sae, TOKENS, LAYER, HEAD).z(),
    ]


@pytest.mark.parametrize("ambient", AMBIENT)
def test_the_callers_ambient_state_changes_nothing(ambient: str) -> None:
    expected = answers()
    with AMBIENT[ambient]():
        found = answers()
        dtype, autocast = torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    assert dtype == (torch.float64 if ambient == "default dtype" else torch.float32)  # put back
    assert autocast == (ambient == "autocast")
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.device == other.device
        assert torch.equal(one, other)


def test_rough_products_are_set_aside_and_put_back() -> None:
    with rough_products():
        with set_aside():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"


def test_what_is_removed_under_autocast_is_computed_in_single_precision() -> None:
    """The pass is the caller's, and rounds; what is taken from it does not round more."""
    model, sae = tiny("llama"), tiny_sae(NORMED)
    change = fra.remove(
        model, fra.resolve(model, sae, TOKENS, LAYER, HEAD).channels(n=30), layer=LAYER, head=HEAD, dictionary=sae
    )

    def taken() -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hooks: Any = [(SCORES, lambda x, hook: seen.append(x[0, HEAD].detach().float().tril()))]
        for context in (nullcontext(), change):
            with context, model.hooks(fwd_hooks=hooks):
                model(TOKENS[None])
        return seen[1] - seen[0]

    exact = taken()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = taken()
    assert float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("ambient", ["default dtype", "default device", "inference mode"])
def test_a_model_is_loaded_as_ever(ambient: str) -> None:
    with AMBIENT[ambient]():
        model = load_model(model_folder("gpt2"))
    weight = next(model.parameters())
    assert (weight.dtype, weight.device.type, weight.is_inference()) == (torch.float32, "cpu", False)


# ---- what is around the model, by name


def hooked(cls: type, **options: Any) -> Any:
    sizes = {"n_layers": 2, "d_model": D_MODEL, "d_head": 8, "n_heads": 4, "n_ctx": N_CTX, "d_vocab": D_VOCAB}
    with quiet():
        return cls(HookedTransformerConfig(**sizes, d_mlp=48, act_fn="gelu", normalization_type="LN", **options))


def another_hook(tmp_path: Path) -> Any:
    with tiny("llama").hooks(fwd_hooks=[(SCORES, lambda x, hook: 2 * x)]):
        return fra.resolve(tiny("llama"), tiny_sae(NORMED), TOKENS, LAYER, HEAD)


def within_an_intervention(tmp_path: Path) -> Any:
    model, sae = tiny("gpt2"), tiny_sae(NORMED)
    channels = fra.resolve(model, sae, TOKENS, LAYER, HEAD).channels("abs", n=40)
    with fra.remove(model, channels, layer=LAYER, head=HEAD, dictionary=sae):
        return fra.resolve(model, sae, TOKENS, LAYER, HEAD)


def attached(tmp_path: Path) -> Any:
    model, sae = hooked(HookedSAETransformer), tiny_sae(RESID)
    model.add_sae(sae)
    return fra.resolve(model, sae, TOKENS, LAYER, HEAD)


def training(tmp_path: Path) -> Any:
    model: Any = load_model(build_model("gpt2", tmp_path))
    model.train()
    return fra.resolve(model, tiny_sae(NORMED), TOKENS, LAYER, HEAD)


def overflow(tmp_path: Path) -> Any:
    model: Any = load_model(build_model("llama", tmp_path), dtype=torch.float16)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(model.blocks[LAYER].attn.original_component, name).weight.mul_(3000)
    return fra.resolve(model, tiny_sae(NORMED), TOKENS, LAYER, HEAD)


def split_input(tmp_path: Path) -> Any:
    model = hooked(HookedTransformer, use_split_qkv_input=True)
    return fra.resolve(model, tiny_sae(RESID), TOKENS, LAYER, HEAD)


NAMED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another hook": (another_hook, r"other hooks are on the model at '.*hook_attn_scores'.*reset_hooks"),
    "an intervention": (within_an_intervention, r"other hooks are on the model at .*leave the `with` block"),
    "an attached dictionary": (attached, r"is attached to the model at 'blocks.1.hook_resid_pre'.*reset_saes"),
    "dropout": (training, r"training mode and drops activations at random .*model.eval"),
    "overflow": (overflow, r"too large for float16 .*bfloat16 or float32"),
    "input by head": (split_input, r"split by head \(use_split_qkv_input\)"),
}


@pytest.mark.parametrize("what", NAMED)
def test_a_circumstance_is_named_and_not_the_architecture(what: str, tmp_path: Path) -> None:
    do, message = NAMED[what]
    with pytest.raises(FraError, match=message) as caught:
        do(tmp_path)
    assert "cannot be reproduced" not in one_sentence(caught.value)


def test_hooks_that_only_look_are_no_circumstance() -> None:
    seen: list[torch.Tensor] = []
    with tiny("llama").hooks(fwd_hooks=[(SCORES, lambda x, hook: seen.append(x))]):
        assert fra.resolve(tiny("llama"), tiny_sae(NORMED), TOKENS, LAYER, HEAD).n_pos == len(TOKENS)
    assert seen


def test_a_feature_without_a_direction_adds_nothing(tmp_path: Path) -> None:
    """A dead feature whose decoder row is zero, in a dictionary that rescales by the norm of rows."""
    sae = SAE.load_from_disk(build_sae("topk", D_MODEL, NORMED, tmp_path, rescale_acts_by_decoder_norm=True))
    with torch.no_grad():
        sae.W_dec[7] = 0.0
    head = fra.resolve(tiny("llama"), sae, TOKENS, LAYER, HEAD)
    assert not bool((head.codes.feature == 7).any())
    truth = head.frozen.scores(HEAD)[0]
    torch.testing.assert_close(head.scores(), truth, rtol=0, atol=1e-4)


# ---- no exception gets through

CONFIGS: dict[str, tuple[Any, str]] = {
    "latent attention": (
        DeepseekV3Config(
            vocab_size=D_VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=2,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=2,
            moe_intermediate_size=16,
        ),
        "NotImplementedError: .*MLA",
    ),
    "a norm of each head": (
        StableLmConfig(
            vocab_size=D_VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            partial_rotary_factor=0.25,
            qk_layernorm=True,
        ),
        "resolve cannot do this",
    ),
    "no biases": (
        GPTNeoXConfig(
            vocab_size=D_VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            attention_bias=False,
        ),
        r"GPTNeoXForCausalLM\) cannot be loaded by TransformerLens in float32 \(AssertionError",
    ),
    "several keys": (
        GPTBigCodeConfig(vocab_size=D_VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, multi_query=False),
        r"cannot be loaded by TransformerLens in float32 \(AssertionError: GPTBigCode",
    ),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_an_architecture_that_a_library_cannot_do_is_one_sentence(what: str, tmp_path: Path) -> None:
    config, message = CONFIGS[what]
    build_model(what, tmp_path, config=config)
    with pytest.raises(FraError, match=message) as caught:
        fra.resolve(load_model(tmp_path), tiny_sae(NORMED), TOKENS, LAYER, HEAD)
    one_sentence(caught.value)
    assert caught.value.__cause__ is not None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a text": ({"tokens": "one and two"}, "not a text: give the ids"),
    "two documents": ({"tokens": TOKENS[None]}, r"of shape \[1, 20\]"),
    "words": ({"tokens": ["one", "two"]}, "not a list of something else"),
    "fractions": ({"tokens": TOKENS / 2}, "not torch.float32"),
    "truths": ({"tokens": TOKENS > 9}, "not torch.bool"),
    "none": ({"tokens": []}, "tokens are empty"),
    "a head by name": ({"head": "L1H2"}, "head 'L1H2' is no number"),
    "no model": ({"model": None}, "None is no model"),
    "no dictionary": ({"sae": None}, "is not a SAELens dictionary"),
}


def as_resolve_does(given: dict[str, Any]) -> None:
    """Part by part: this suite checks types before anything else, and users' runs do not."""
    check_dictionary(given["sae"])
    check_layer_and_head(given["model"], given["layer"], given["head"])
    one_document(given["tokens"])


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_get_one_sentence(what: str) -> None:
    given: dict[str, Any] = {
        "model": tiny("gpt2"),
        "sae": tiny_sae(NORMED),
        "tokens": TOKENS,
        "layer": LAYER,
        "head": HEAD,
    }
    changed, message = WRONG[what]
    given |= changed
    with pytest.raises(FraError, match=message) as caught:
        as_resolve_does(given)
    one_sentence(caught.value)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.Tensor.int, torch.Tensor.clone])
def test_tokens_may_be_any_list_of_integers(make: Any) -> None:
    given = make(TOKENS.tolist()) if make in (list, tuple, np.array) else make(TOKENS)
    expected = fra.resolve(tiny("gpt2"), tiny_sae(NORMED), TOKENS, LAYER, HEAD).channels(n=3)
    found = fra.resolve(tiny("gpt2"), tiny_sae(NORMED), given, LAYER, HEAD).channels(n=3)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert fra.census(tiny("gpt2"), tiny_sae(NORMED), [given], LAYER).n_positions == len(TOKENS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dictionary_in_half_precision_resolves(dtype: torch.dtype, tmp_path: Path) -> None:
    sae = SAE.load_from_disk(build_sae("topk", D_MODEL, NORMED, tmp_path)).to(dtype)
    head = fra.resolve(tiny("llama"), sae, TOKENS, LAYER, HEAD)
    assert head.scores().dtype == torch.float32
    torch.testing.assert_close(head.scores(), head.frozen.scores(HEAD)[0], rtol=0, atol=1e-4)


def test_a_call_that_does_not_fit_the_signature_stays_one() -> None:
    with pytest.raises(TypeError, match="argument"):
        fra.resolve(tiny("gpt2"), tiny_sae(NORMED))  # type: ignore[call-arg]


def test_faces_keep_the_cause_and_let_interrupts_through() -> None:
    @face
    def fails(error: BaseException) -> None:
        raise error

    cause = KeyError("blocks.9\nmore")
    with pytest.raises(FraError, match=r"fails cannot do this .*KeyError: ") as caught:
        fails(cause)
    assert caught.value.__cause__ is cause
    one_sentence(caught.value)
    for passing in (KeyboardInterrupt(), MemoryError(), FraError("said.")):
        with pytest.raises(type(passing)) as caught_as:
            fails(passing)
        assert caught_as.value is passing


def test_scores_make_the_pattern_by_attention() -> None:
    """A softcap makes masked scores finite: `cap` is no mask."""
    head = fra.resolve(tiny("gemma2"), tiny_sae(NORMED), TOKENS, LAYER, HEAD)
    torch.testing.assert_close(head.frozen.attention(head.scores()), head.frozen.pattern[0, HEAD], rtol=0, atol=1e-5)
