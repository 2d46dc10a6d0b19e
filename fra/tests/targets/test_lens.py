"""TransformerLens without HookedTransformer, as version 4 is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformer_lens
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPTJConfig

import fra
from fra.checkpoints import lens
from fra.targets import models
from fra.tests.models import D_VOCAB, build_model, load_model, model_folder, random_tokens, tiny, tiny_sae
from fra.tests.tiny_targets import one_sentence


@pytest.fixture
def without_hooked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    lens.model_names.cache_clear()
    for module in (lens, models):
        monkeypatch.setattr(module, "loading_from_pretrained", None)
    yield
    lens.model_names.cache_clear()


@pytest.mark.usefixtures("without_hooked")
def test_models_of_the_bridge_resolve() -> None:
    model = load_model(model_folder("llama"))
    resolved = fra.resolve(model, tiny_sae("blocks.1.ln1.hook_normalized"), random_tokens(), head="L1H2")
    shown = resolved.frozen.model_scores[0, 2].masked_fill(~resolved.frozen.mask, -torch.inf)
    torch.testing.assert_close(resolved.scores(), shown, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt_neo", "gptj", "opt"])
def test_models_whose_scores_are_not_shown_resolve(kind: str, request: pytest.FixtureRequest) -> None:
    hooked = tiny(kind)
    assert isinstance(hooked, transformer_lens.HookedTransformer)
    name = "blocks.1.attn.hook_attn_scores"
    shown = hooked.run_with_cache(random_tokens()[None], names_filter=[name])[1][name][0, 2]
    request.getfixturevalue("without_hooked")
    model = load_model(model_folder(kind))
    assert isinstance(model, TransformerBridge)
    resolved = fra.resolve(model, tiny_sae("blocks.1.hook_resid_pre"), random_tokens(), head="L1H2")
    mask = resolved.frozen.mask
    torch.testing.assert_close(resolved.scores()[mask], shown[mask], rtol=1e-4, atol=1e-4)


SIZES = {"n_layers": 1, "d_model": 8, "d_head": 4, "n_heads": 2, "n_ctx": 8, "d_vocab": 9, "normalization_type": None}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_local_attn", True),
        ("window_size", 4),
        ("use_attn_scale", False),
        ("positional_embedding_type", "shortformer"),
        ("parallel_attn_mlp", True),
        ("scale_attn_by_inverse_layer_idx", True),
        ("use_qk_norm", True),
        ("num_experts", 4),
        ("heads_of_tomorrow", "two"),
    ],
)
def test_what_version_4_would_not_follow_is_refused(key: str, value: object) -> None:
    """Its own models know neither local attention nor another scale: the weights would compute something else."""
    config = {**SIZES, "attn_only": True, "init_weights": False, "device": "cpu", "seed": 3, key: value}
    with pytest.raises(fra.errors.FraError, match=f"says {key} = ") as caught:
        lens.load_native(config, {}, None, "cpu", torch.float32)
    one_sentence(caught.value)


def test_short_names_are_those_of_either_version(monkeypatch: pytest.MonkeyPatch, without_hooked: None) -> None:
    other = ModuleType("transformer_lens.supported_models")
    vars(other)["MODEL_ALIASES"] = {"EleutherAI/pythia-70m": ["Pythia-70M", "pythia"], "gpt2": ["gpt2-small"]}
    monkeypatch.setitem(sys.modules, other.__name__, other)
    monkeypatch.setattr(transformer_lens, "supported_models", other, raising=False)
    names = lens.model_names()
    assert names["pythia-70m"] == names["eleutherai/pythia-70m"] == "EleutherAI/pythia-70m"
    assert names["gpt2-small"] == "gpt2"


def test_its_absence_is_found_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens 4 raises ImportError for the names that it has no more."""
    bare = ModuleType("transformer_lens")
    monkeypatch.setitem(sys.modules, "transformer_lens", bare)
    other = ModuleType("lens_of_4")
    exec(compile(Path(lens.__file__).read_text(), lens.__file__, "exec"), vars(other))
    assert vars(other)["loading_from_pretrained"] is None
    assert not isinstance(bare, vars(other)["HookedTransformer"])


def test_a_model_that_the_other_class_cannot_load_is_a_bridge(tmp_path: Path) -> None:
    """HookedTransformer takes GPT-J's MLP to be four times as wide as its stream."""
    sizes = {"vocab_size": D_VOCAB, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    model = load_model(build_model("narrow", tmp_path, config=GPTJConfig(**sizes, n_inner=48)))
    assert isinstance(model, TransformerBridge)
    found = fra.resolve(model, tiny_sae("blocks.1.hook_resid_pre"), random_tokens(), head="L1H2")
    torch.testing.assert_close(found.frozen.attention(found.scores()), found.frozen.pattern[0, 2], rtol=0, atol=1e-5)
