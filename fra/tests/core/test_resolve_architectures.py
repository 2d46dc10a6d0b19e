"""Every score of every architecture is the sum of its terms: measured against the model's own hook_attn_scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import fra
from fra.architectures.known import architecture_of
from fra.checkpoints.weights import quiet
from fra.core.frozen import check_scores, freeze, read_hooks
from fra.errors import FraError
from fra.targets import models as target_models
from fra.targets.processing import FLAGS, NAMED
from fra.tests.models import (
    ARCHITECTURES,
    NORMS_IN_FLOAT32,
    WINDOW,
    build_model,
    model_folder,
    random_tokens,
    tiny,
    tiny_sae,
)

TOKENS = random_tokens()
HOOKS = {
    0: ("blocks.0.ln1.hook_normalized", "blocks.0.hook_resid_pre"),
    1: ("blocks.1.ln1.hook_normalized", "blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def own_scores(model: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's scores after softcap [head, q_pos, k_pos], and where it does not mask."""
    name = f"blocks.{layer}.attn.hook_attn_scores"
    scores = model.run_with_cache(TOKENS[None], names_filter=[name])[1][name][0].detach()
    return scores, scores > torch.finfo(scores.dtype).min / 2


def absolute_terms(head: Any) -> torch.Tensor:
    """Sum of |term| of every score [q_pos, k_pos], from every pair of entries."""
    pos = torch.arange(head.n_pos)
    sides = [
        (torch.cat([side.entries.pos, pos, pos]), torch.cat([side.entries.vector, side.bias, side.error]))
        for side in (head.query, head.key)
    ]
    (q_pos, q), (k_pos, k) = sides
    by_query = torch.zeros(head.n_pos, len(k), dtype=q.dtype).index_add_(0, q_pos, (q @ k.mT).abs())
    return torch.zeros(head.n_pos, head.n_pos, dtype=q.dtype).index_add_(1, k_pos, by_query)


def yardstick(head: Any, scores: torch.Tensor, attended: torch.Tensor) -> float:
    """Largest error over the sum of absolute terms."""
    error = (head.frozen.cap(head.scores()) - scores)[attended].abs()
    return float((error / absolute_terms(head)[attended]).max())


def worst(model: Any, hooks: dict[int, tuple[str, ...]] = HOOKS, **sae_options: Any) -> float:
    """Largest yardstick over layers, hooks and heads, having checked that the masks agree."""
    found = 0.0
    for layer, names in hooks.items():
        scores, attended = own_scores(model, layer)
        for hook in names:
            if hook not in model.hook_dict:
                continue
            for head in range(scores.shape[0]):
                resolved = fra.resolve(model, tiny_sae(hook, **sae_options), TOKENS, layer, head)
                assert torch.equal(resolved.scores() > -torch.inf, attended[head])
                found = max(found, yardstick(resolved, scores[head], attended[head]))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("folded", [False, True], ids=["raw", "folded"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_are_the_sum_of_their_terms(kind: str, folded: bool, dtype: str) -> None:
    error = worst(tiny(kind, DTYPES[dtype], folded))
    if dtype == "float32":
        assert error <= 1e-6
    elif kind in NORMS_IN_FLOAT32:
        assert 1e-12 < error <= 1e-6  # if transformers' norm learns double precision, this bar can go down
    else:
        assert error <= 1e-12


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "pythia"])
def test_hooked_transformer_too(kind: str) -> None:
    folder = model_folder(kind)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for processing in NAMED.values():
        with quiet():
            model = target_models.load_hooked(
                folder, hf, "cpu", torch.float64, {flag: flag in processing for flag in FLAGS}
            )
        # HookedTransformer's own norms keep double precision; its rotary table does not always.
        assert worst(model) <= 1e-12


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_load_model_computes_what_the_files_say(kind: str) -> None:
    model = tiny(kind)
    assert type(model) is (HookedTransformer if kind in ("gpt_neo", "no_layernorm") else TransformerBridge)
    with torch.no_grad():
        logits = model(TOKENS[None])
        folded = tiny(kind, folded=True)(TOKENS[None])
        torch.testing.assert_close(folded.log_softmax(-1), logits.log_softmax(-1), atol=1e-4, rtol=1e-4)
        if kind != "no_layernorm":
            truth = AutoModelForCausalLM.from_pretrained(model_folder(kind))(TOKENS[None]).logits
            torch.testing.assert_close(logits, truth, atol=1e-4, rtol=1e-4)
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.to_tokens("three and four", prepend_bos=False)[0]) == "three and four"


@pytest.mark.parametrize("kind", ["smollm3", "qwen2_moe", "codegen"])
def test_layers_that_do_not_rotate_and_masks_of_other_numbers(kind: str) -> None:
    """SmolLM3's second layer never fires its angles, Qwen2-MoE states a window of 0, CodeGen divides masked scores."""
    model = tiny(kind)
    for layer in (0, 1):
        scores, _ = own_scores(model, layer)
        for head in range(4):
            resolved = fra.resolve(model, tiny_sae(f"blocks.{layer}.hook_resid_pre"), TOKENS, layer, head)
            assert torch.equal(resolved.frozen.mask, torch.ones(20, 20).tril().bool())
            assert yardstick(resolved, scores[head], resolved.frozen.mask) <= 1e-6
            assert (resolved.frozen.rotary is None) == (kind == "smollm3" and layer == 1)
    sae = tiny_sae("blocks.1.hook_resid_pre")
    found = fra.census(model, sae, [TOKENS], 1).channels(n=5)
    alone = fra.resolve(model, sae, TOKENS, 1, 0).channels(n=5)
    torch.testing.assert_close(torch.tensor(found.value[found["head"] == 0].to_numpy()), torch.tensor(alone.value))
    before = own_scores(model, 1)[0]
    with fra.remove(model, alone, layer=1, head=0, dictionary=sae):
        after = own_scores(model, 1)[0]
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1:], before[1:])
    assert torch.equal(after[0].triu(1), before[0].triu(1)), "no masked score is touched"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_shown_in_a_wider_precision_than_the_weights(dtype: torch.dtype) -> None:
    """OLMo has no norm weights, and its softmax in float32: the weights say how much rounding there is."""
    model = target_models.load_model(model_folder("olmo"), dtype=dtype)
    head = fra.resolve(model, tiny_sae("blocks.1.hook_resid_pre"), TOKENS, 1, 0)
    assert yardstick(head, own_scores(model, 1)[0][0].float(), head.frozen.mask) < 2e-2


def test_half_precision_is_resolved_in_float32() -> None:
    model = target_models.load_model(model_folder("llama"), dtype=torch.bfloat16)
    scores, attended = own_scores(model, 1)
    head = fra.resolve(model, tiny_sae("blocks.1.hook_resid_pre"), TOKENS, 1, 0)
    assert head.scores().dtype is torch.float32
    # bfloat16 keeps 8 bits of the model's own scores.
    assert yardstick(head, scores[0].float(), attended[0]) < 2e-2


@pytest.mark.parametrize(("kind", "layer"), [("gemma2", 1), ("gemma3", 1), ("gpt_neo", 1)])
def test_sliding_windows_mask_far_keys(kind: str, layer: int) -> None:
    head = fra.resolve(tiny(kind), tiny_sae(f"blocks.{layer}.hook_resid_pre"), TOKENS, layer, 0)
    assert bool(head.frozen.mask[10, 11 - WINDOW])
    assert not bool(head.frozen.mask[10, 10 - WINDOW])
    blocks = head.blocks()
    assert all(float(block[10, 10 - WINDOW]) == 0.0 for block in blocks.values())
    with pytest.raises(FraError, match="masked"):
        head.pair(10, 10 - WINDOW)


@pytest.mark.parametrize("kind", ["gpt_neo", "gptj", "opt"])
@pytest.mark.parametrize("layer", [0, 1])
def test_attention_that_shows_no_scores_is_resolved_by_its_own_queries_and_keys(kind: str, layer: int) -> None:
    """TransformerBridge shows GPT-Neo's pattern as its scores; HookedTransformer shows the scores themselves."""
    hf = AutoModelForCausalLM.from_pretrained(model_folder(kind), attn_implementation="eager")
    bridge = TransformerBridge.boot_transformers(str(model_folder(kind)), device="cpu", hf_model=hf).eval()
    hooked = tiny(kind)
    assert isinstance(hooked, HookedTransformer)
    name = f"blocks.{layer}.attn.hook_attn_scores"
    truth = hooked.run_with_cache(TOKENS[None], names_filter=[name])[1][name][0]
    for head in range(4):
        found = fra.resolve(bridge, tiny_sae(f"blocks.{layer}.hook_resid_pre"), TOKENS, layer, head)
        mask = found.frozen.mask
        size = float(truth[head][mask].abs().max())
        assert float((found.scores() - truth[head])[mask].abs().max()) <= 1e-5 * size
        assert float((found.frozen.model_scores[0, head] - truth[head])[mask].abs().max()) <= 1e-5 * size
        torch.testing.assert_close(found.frozen.attention(found.scores()), found.frozen.pattern[0, head])
    with pytest.raises(FraError, match=r"shows no scores of layer .* HookedTransformer"):
        read_hooks(bridge, TOKENS[None], layer, {"scores": name})


@torch.no_grad()
def test_queries_that_do_not_make_the_pattern_are_refused() -> None:
    """Scores that `fra` makes itself are believed only where the pattern is theirs."""
    hf = AutoModelForCausalLM.from_pretrained(model_folder("gpt_neo"), attn_implementation="eager")
    for block in hf.transformer.h:  # what the module computes is no longer what its configuration and class say
        attention = block.attn.attention
        attention._attn = lambda q, k, v, mask=None, attn=attention._attn: attn(1.1 * q, k, v, mask)
    bridge = TransformerBridge.boot_transformers(str(model_folder("gpt_neo")), device="cpu", hf_model=hf).eval()
    with pytest.raises(FraError, match="is not hook_pattern in layer 1"):
        fra.resolve(bridge, tiny_sae("blocks.1.hook_resid_pre"), TOKENS, 1, 0)


def test_positions_in_the_scores_are_refused_by_name() -> None:
    model = tiny("bloom")
    with pytest.raises(FraError, match="'alibi'"):
        fra.resolve(model, tiny_sae("blocks.1.hook_resid_pre"), TOKENS, 1, 0)


def test_hook_normalized_of_a_model_without_layernorm_is_refused() -> None:
    with pytest.raises(FraError, match=r"no hook 'blocks\.1\.ln1\.hook_normalized'; it has no LayerNorm"):
        fra.resolve(tiny("no_layernorm"), tiny_sae("blocks.1.ln1.hook_normalized"), TOKENS, 1, 0)


@pytest.mark.parametrize(
    ("layer", "head", "tokens", "message"),
    [
        (2, 0, TOKENS, "layer 2 is out of range: the model has 2 layers"),
        (-1, 0, TOKENS, "layer -1 is out of range"),
        (1, 4, TOKENS, "head 4 is out of range: the model has 4 heads"),
        (1, 0, TOKENS[:0], "tokens are empty"),
        (1, 0, torch.full((4,), 300), "token id 300 is outside the vocabulary of 300"),
        (1, 0, torch.tensor([0, -1]), "token id -1 is outside the vocabulary"),
        (1, 0, torch.zeros(33, dtype=torch.long), "33 tokens and the model's context holds 32"),
    ],
)
def test_bad_input_is_one_sentence(layer: int, head: int, tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(FraError, match=message) as caught:
        fra.resolve(tiny("gpt2"), tiny_sae("blocks.1.hook_resid_pre"), tokens, layer, head)
    assert "\n" not in str(caught.value)


def test_dictionary_of_another_layer_is_refused() -> None:
    with pytest.raises(FraError, match="attention input of layer 0, not of layer 1"):
        fra.resolve(tiny("gpt2"), tiny_sae("blocks.0.hook_resid_pre"), TOKENS, 1, 0)


def test_nan_in_weights_is_refused_at_loading_and_at_resolving(tmp_path: Any) -> None:
    model = target_models.load_model(build_model("gpt2", tmp_path))
    with torch.no_grad():
        model.blocks[1].attn.k.weight[0, 0] = torch.nan
    with pytest.raises(FraError, match="NaN"):
        fra.resolve(model, tiny_sae("blocks.1.hook_resid_pre"), TOKENS, 1, 0)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_neo"])
def test_a_padding_mask_is_not_mistaken_for_a_causal_one(kind: str) -> None:
    frozen = freeze(tiny(kind), TOKENS[None], 1, "blocks.1.hook_resid_pre")
    scores = frozen.model_scores.clone()
    scores[..., 3] = torch.finfo(scores.dtype).min
    padded = replace(frozen, model_scores=scores, pattern=scores.masked_fill(~frozen.mask, -torch.inf).softmax(-1))
    with pytest.raises(FraError, match="masks other keys"):
        check_scores(padded, architecture_of(tiny(kind)))
