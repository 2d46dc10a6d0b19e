"""Loading a model from a directory: what the files lack is said, never filled in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fra.errors import FraError
from fra.targets.models import load_model
from fra.targets.processing import FLAGS
from fra.tests.models import ARCHITECTURES, build_model, model_folder, random_tokens, tiny
from fra.tests.tiny_targets import one_sentence


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "name"), [("gpt2", "transformer.h.1.attn.c_attn.weight"), ("no_layernorm", "blocks.1.attn.W_Q")]
)
def test_weights_that_lack_a_tensor_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    # The libraries would fill it with random numbers, and warn at most.
    folder = change_weights(build_model(kind, tmp_path), lambda state: state.pop(name))
    with pytest.raises(FraError, match=f"lack '{name}': the file is incomplete"):
        load_model(folder)


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "model.layers.0.self_attn.k_proj.weight"), ("no_layernorm", "blocks.0.attn.W_K")]
)
def test_weights_of_another_shape_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    def narrow(state: dict[str, torch.Tensor]) -> None:
        state[name] = state[name][:-1].contiguous()

    with pytest.raises(FraError, match=r"do not fit its config\.json") as caught:
        load_model(change_weights(build_model(kind, tmp_path), narrow))
    assert "\n" not in str(caught.value)


def test_a_config_of_neither_format_is_refused(tmp_path: Path) -> None:
    folder = build_model("no_layernorm", tmp_path)
    (folder / "config.json").write_text(json.dumps({"layers": 2}))
    with pytest.raises(FraError, match="no model_type, and is no TransformerLens configuration either"):
        load_model(folder)


def test_unknown_processing_and_missing_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FraError, match="unknown weight processing 'fold_everything': the flags are fold_ln,"):
        load_model(tmp_path, processing={"fold_everything"})
    with pytest.raises(FraError, match="there is no directory"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("words", ["llama", "albert-t5", "gemma-2-2b"])
def test_words_in_the_path_decide_nothing(words: str, tmp_path: Path) -> None:
    """TransformerLens guesses architectures from them when it makes a HookedTransformer."""
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        logits = load_model(build_model("gpt_neo", tmp_path / words))(tokens)
        torch.testing.assert_close(logits, tiny("gpt_neo")(tokens))


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "no_layernorm"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_loaded_model_is_the_checkpoints_own(kind: str, folded: bool) -> None:
    tokens = random_tokens(24)[None]
    hf = AutoModelForCausalLM.from_pretrained(model_folder(kind), attn_implementation="eager").eval()
    with torch.no_grad():
        truth, found = hf(tokens).logits.log_softmax(-1), tiny(kind, folded=folded)(tokens).log_softmax(-1)
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-5)


OTHERS = {"cohere": "CohereForCausalLM", "cohere2": "Cohere2", "hunyuan": "HunYuan", "unscaled_gpt2": "GPT2LMHeadModel"}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_the_library_computes_otherwise_is_refused(kind: str, tmp_path: Path) -> None:
    """TransformerLens turns other pairs than Cohere, norms HunYuan's heads before it turns them, scales GPT-2."""
    with pytest.raises(FraError, match=f"off by [0-9.]+ from those of transformers .{OTHERS[kind]}") as caught:
        load_model(build_model(kind, tmp_path))
    one_sentence(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_processing_that_changes_the_function_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """BitNet norms again between its values and its output, so that nothing can be folded through."""
    folder = build_model("bitnet", tmp_path)
    load_model(folder, dtype=dtype)
    with pytest.raises(FraError, match=r"weight processing \(fold_ln, .*set processing = .none.") as caught:
        load_model(folder, dtype=dtype, processing=FLAGS)
    one_sentence(caught.value)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "smollm3", "gemma2"])
def test_half_precision_is_no_other_function(kind: str, tmp_path: Path) -> None:
    folder = build_model(kind, tmp_path)
    for processing in ((), FLAGS):
        load_model(folder, dtype=torch.bfloat16, processing=processing)
