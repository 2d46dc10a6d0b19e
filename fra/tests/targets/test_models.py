"""Loading a model from a directory: what the files lack is said, never filled in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fra.errors import FraError
from fra.targets.models import load_model
from fra.tests.models import build_model, tiny


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
