"""TransformerLens 4 itself, which has no HookedTransformer: `pytest -p fra.tests.transformer_lens_4` with it installed.

What it shows is held against its own pattern, and a model in TransformerLens' own format against its weights in double
precision.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import fra
from fra.architectures.known import architecture_of
from fra.tests.models import ARCHITECTURES, build_model, load_model, random_tokens, tiny, tiny_sae

if int(version("transformer-lens").split(".")[0]) < 4:
    pytest.skip("TransformerLens 4 is not installed", allow_module_level=True)

TOKENS = random_tokens()
AFTERWARDS = ("gpt_neo", "gptj", "opt", "no_layernorm")


@pytest.mark.parametrize("folded", [False, True], ids=["none", "folded"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gptj", "opt"])
def test_scores_make_the_models_own_pattern(kind: str, layer: int, folded: bool) -> None:
    """Differences of scores in a row are those of the logarithm of its pattern."""
    model = tiny(kind, folded=folded)
    assert isinstance(model, TransformerBridge)
    assert architecture_of(model).fires_afterwards(layer) == (kind in AFTERWARDS)
    name = f"blocks.{layer}.attn.hook_pattern"
    pattern = model.run_with_cache(TOKENS[None], names_filter=[name])[1][name][0].double().log()
    for head in range(4):
        found = fra.resolve(model, tiny_sae(f"blocks.{layer}.hook_resid_pre"), TOKENS, layer, head)
        scores, own = found.frozen.cap(found.scores()).double(), found.frozen.mask & (pattern[head] > -15)
        first = own.int().argmax(1, keepdim=True)
        apart = (scores - scores.gather(1, first)) - (pattern[head] - pattern[head].gather(1, first))
        assert float(apart[own].abs().max()) < 1e-5 * float(scores[own].abs().max())


@pytest.mark.parametrize("kind", AFTERWARDS)
def test_scores_that_cannot_be_changed_are_not(kind: str) -> None:
    sae = tiny_sae("blocks.1.hook_resid_pre")
    with pytest.raises(fra.errors.FraError, match="cannot be changed by way of"):
        fra.remove(tiny(kind), [[0, 0]], layer=1, head=2, dictionary=sae)


def log_probs(state: dict[str, Tensor], tokens: Tensor, normed: bool) -> Tensor:
    """Of a model of attention alone, from its weights, in double precision."""
    weight = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        if not normed:
            return x
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight[f"{name}.w"] + weight[f"{name}.b"]

    x = weight["embed.W_E"][tokens] + weight["pos_embed.W_pos"][: len(tokens)]
    for layer in range(2):
        at, normal = f"blocks.{layer}.attn.", norm(x, f"blocks.{layer}.ln1")
        q, k, v = (
            torch.einsum("pd,hde->hpe", normal, weight[f"{at}W_{of}"]) + weight[f"{at}b_{of}"][:, None] for of in "QKV"
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        x = x + torch.einsum("hpe,hed->pd", scores.softmax(-1) @ v, weight[f"{at}W_O"]) + weight[f"{at}b_O"]
    return (norm(x, "ln_final") @ weight["unembed.W_U"] + weight["unembed.b_U"]).log_softmax(-1)


@pytest.mark.parametrize("folded", [False, True], ids=["none", "folded"])
@pytest.mark.parametrize("normed", [False, True], ids=["no norm", "LayerNorm"])
@torch.no_grad()
def test_a_model_in_the_libraries_own_format_is_what_its_weights_say(
    normed: bool, folded: bool, tmp_path: Path
) -> None:
    folder = build_model("no_layernorm", tmp_path)
    state: dict[str, Any] = load_file(folder / "model.safetensors")
    if normed:
        generator = torch.Generator().manual_seed(1)
        for name in ("blocks.0.ln1", "blocks.1.ln1", "ln_final"):
            state[f"{name}.w"], state[f"{name}.b"] = 1 + 0.3 * torch.randn(2, 32, generator=generator)
            state[f"{name}.b"] = state[f"{name}.b"].contiguous() - 1
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"normalization_type": "LN"}))
    assert float(state["unembed.b_U"].abs().max()) > 0.1
    found = load_model(folder, folded=folded)(TOKENS[None])[0].log_softmax(-1)
    assert float((found - log_probs(state, TOKENS, normed)).abs().max()) < 2e-5
