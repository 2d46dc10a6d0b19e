"""Interventions inside a forward pass, against what the model itself makes of its own hooks."""

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
from fra.tests.models import ARCHITECTURES, D_SAE, N_CTX, NORMS_IN_FLOAT32, model_folder, random_tokens, tiny, tiny_sae

LAYER, HEAD = 1, 2  # a sliding window in Gemma and GPT-Neo; the second key-value head under GQA
ATTN = f"blocks.{LAYER}.attn"
SCORES, PATTERN, Z = f"{ATTN}.hook_attn_scores", f"{ATTN}.hook_pattern", f"{ATTN}.hook_z"
TOKENS = torch.stack([random_tokens(16, seed) for seed in (0, 1)])
BRIDGE_SOFTMAX = 2e-6
"""TransformerBridge takes the softmax in float32, whatever the model's precision."""


def hook_of(kind: str) -> str:
    return f"blocks.{LAYER}." + ("hook_resid_pre" if kind == "no_layernorm" else "ln1.hook_normalized")


def double(kind: str) -> Any:
    return tiny(kind, torch.float64)


def sae_of(kind: str) -> Any:
    return tiny_sae(hook_of(kind))


def at(kind: str) -> dict[str, Any]:
    """Where the interventions of this file are made."""
    return {"layer": LAYER, "head": HEAD, "dictionary": sae_of(kind)}


def tolerance(kind: str) -> float:
    """Scores here are of order 1 to 10."""
    return 1e-5 if kind in NORMS_IN_FLOAT32 else 1e-10


def seen(model: Any, *names: str, tokens: torch.Tensor = TOKENS, hooks: Any = ()) -> list[torch.Tensor]:
    """Activations at these hooks in one pass, under `hooks` and what else is on the model."""
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        cache = model.run_with_cache(tokens, names_filter=list(names))[1]
    return [cache[name].detach() for name in names]


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).detach()


def resolved(kind: str, tokens: torch.Tensor = TOKENS, hook: str | None = None) -> list[Any]:
    sae = tiny_sae(hook or hook_of(kind))
    return [fra.resolve(double(kind), sae, document, LAYER, HEAD) for document in tokens]


def strong(heads: list[Any], n: int = 12) -> torch.Tensor:
    """The strongest channels of the first document, and one that is live in the second."""
    tables = [heads[0].channels("abs", n=n), heads[1].channels("abs", n=1)]
    return torch.tensor(pd.concat(tables)[["q_feature", "k_feature"]].drop_duplicates().to_numpy())


def maps(heads: list[Any], channels: torch.Tensor) -> torch.Tensor:
    """Sum of the channels' maps, [batch, q_pos, k_pos]."""
    return torch.stack([sum(head.channel(int(i), int(j)) for i, j in channels) for head in heads])


def after(heads: list[Any], taken: torch.Tensor) -> torch.Tensor:
    """softcap(scores - taken), -inf where masked."""
    kept = [head.frozen.cap(head.scores() - part) for head, part in zip(heads, taken, strict=True)]
    return torch.stack(kept).masked_fill(~heads[0].frozen.mask, -torch.inf)


def check(kind: str, heads: list[Any], intervention: iv.Intervention, taken: torch.Tensor) -> None:
    """The model's scores and pattern under the intervention are those without `taken`; other heads are as before."""
    model, mask = double(kind), heads[0].frozen.mask
    assert float(taken.abs().max()) > 0.05, "nothing worth removing"
    before = seen(model, SCORES, PATTERN)
    with intervention:
        scores, pattern = seen(model, SCORES, PATTERN)
    expected = after(heads, taken)
    assert float((scores[:, HEAD] - expected)[:, mask].abs().max()) < tolerance(kind)
    assert float((pattern[:, HEAD] - expected.softmax(-1)).abs().max()) < max(tolerance(kind), BRIDGE_SOFTMAX)
    assert float((pattern[:, HEAD] - before[1][:, HEAD]).abs().max()) > 1e-3
    others = [head for head in range(pattern.shape[1]) if head != HEAD]
    assert torch.equal(pattern[:, others], before[1][:, others])
    assert torch.equal(scores[:, HEAD][:, ~mask], before[0][:, HEAD][:, ~mask])


# ---- scores


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_pattern_after_removal_is_the_softmax_of_the_remaining_scores(kind: str) -> None:
    heads = resolved(kind)
    channels = strong(heads)
    check(kind, heads, fra.remove(double(kind), channels, **at(kind)), maps(heads, channels))


@pytest.mark.parametrize("hook", [f"blocks.{LAYER}.hook_resid_pre", f"blocks.{LAYER - 1}.hook_resid_post"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "gpt_neo"])
def test_dictionaries_before_the_norm_are_divided_by_its_scale(kind: str, hook: str) -> None:
    heads = resolved(kind, hook=hook)
    channels = strong(heads)
    place = at(kind) | {"dictionary": tiny_sae(hook)}
    check(kind, heads, fra.remove(double(kind), channels, **place), maps(heads, channels))


def test_a_dictionary_that_normalises_at_run_time() -> None:
    sae = tiny_sae(hook_of("gpt2"), normalize_activations="layer_norm")
    heads = [fra.resolve(double("gpt2"), sae, document, LAYER, HEAD) for document in TOKENS]
    channels = strong(heads)
    place = at("gpt2") | {"dictionary": sae}
    check("gpt2", heads, fra.remove(double("gpt2"), channels, **place), maps(heads, channels))


def inputs_without(model: Any, sae: Any, feature: int, name: str) -> torch.Tensor:
    """`name` (hook_q, hook_k or hook_v of all heads) as the model makes it of an input that lacks one feature."""
    x = seen(model, sae.cfg.metadata.hook_name)[0]
    acts = sae.encode(x.flatten(0, 1).float())[:, feature].view(x.shape[:2]).double()
    direction = sae.W_dec[feature].detach().double()
    rms = isinstance(model, TransformerBridge) and model.blocks[LAYER].ln1.uses_rms_norm
    direction = direction if rms else direction - direction.mean()
    edit = (sae.cfg.metadata.hook_name, lambda value, hook: value - acts[..., None] * direction)
    return seen(model, name, hooks=[edit])[0]


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "no_layernorm"])
def test_a_channel_is_the_mixed_difference_of_the_models_own_queries_and_keys(kind: str) -> None:
    """F_ij = S - S(q without i) - S(k without j) + S(both): scores from the model's hooks, a QK-norm's scale held."""
    model, sae = double(kind), sae_of(kind)
    q_feature, k_feature = (int(n) for n in strong(resolved(kind), 1)[0])
    lacking = {
        "hook_q": inputs_without(model, sae, q_feature, f"{ATTN}.hook_q"),
        "hook_k": inputs_without(model, sae, k_feature, f"{ATTN}.hook_k"),
    }
    cap = resolved(kind)[0].frozen.softcap
    mask = resolved(kind)[0].frozen.mask
    scales = [name for name in (f"{ATTN}.q_norm.hook_scale", f"{ATTN}.k_norm.hook_scale") if name in model.hook_dict]
    assert len(scales) == (2 if kind in ("gemma3", "qwen3") else 0)
    held = [
        (name, lambda _, hook, value=value: value) for name, value in zip(scales, seen(model, *scales), strict=True)
    ]

    def scores(*without: str) -> torch.Tensor:
        hooks = [(f"{ATTN}.{name}", lambda value, hook, name=name: lacking[name]) for name in without]
        hooks += held if without else []
        own = seen(model, SCORES, hooks=hooks)[0][:, HEAD][:, mask]
        return own if cap is None else cap * torch.atanh(own / cap)

    full, no_q, no_k, neither = scores(), scores("hook_q"), scores("hook_k"), scores("hook_q", "hook_k")
    channel = full - no_q - no_k + neither
    assert float(channel.abs().max()) > 0.05
    close = {"atol": tolerance(kind), "rtol": 0}
    with fra.remove(model, [[q_feature, k_feature]], **at(kind)):
        torch.testing.assert_close(full - scores(), channel, **close)
    with iv.scale(model, [[q_feature, k_feature]], -1.5, **at(kind)):
        torch.testing.assert_close(full - scores(), 2.5 * channel, **close)
    with iv.scale_features(model, [q_feature], "query", **at(kind)):
        torch.testing.assert_close(scores(), no_q, **close)
    with iv.scale_features(model, [k_feature], "key", 0.25, **at(kind)):
        torch.testing.assert_close(scores(), no_k + 0.25 * (full - no_k), **close)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_without_any_term_attention_is_uniform(kind: str) -> None:
    model, mask = double(kind), resolved(kind)[0].frozen.mask
    blocks = [(a, b) for a in ("feature", "bias", "error") for b in ("feature", "bias", "error")]
    with iv.scale_blocks(model, blocks, **at(kind)):
        scores, pattern = seen(model, SCORES, PATTERN)
    assert float(scores[:, HEAD][:, mask].abs().max()) < tolerance(kind)
    uniform = mask / mask.sum(-1, keepdim=True)
    assert float((pattern[:, HEAD] - uniform).abs().max()) < max(tolerance(kind), BRIDGE_SOFTMAX)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen3"])
def test_blocks_and_keep_only(kind: str) -> None:
    model, heads = double(kind), resolved(kind)
    blocks = [head.blocks() for head in heads]
    names = [("feature", "feature"), ("error", "bias"), ("bias", "feature")]
    taken = sum(torch.stack([block[name] for block in blocks]) for name in names)
    check(kind, heads, iv.scale_blocks(model, names, **at(kind)), taken)
    check(
        kind,
        heads,
        iv.scale_blocks(model, names[1:], 0.5, **at(kind)),
        taken / 2 - sum(torch.stack([block[names[0]] for block in blocks]) for _ in (0,)) / 2,
    )
    features = torch.stack([block["feature", "feature"] for block in blocks])
    channels = strong(heads)
    check(kind, heads, iv.keep_only(model, channels, **at(kind)), features - maps(heads, channels))
    check(kind, heads, iv.keep_only(model, channels[:0], **at(kind)), features)
    live = [torch.cat([head.codes.feature for head in heads]).unique()] * 2
    everything = torch.cartesian_prod(*live)
    before = seen(model, SCORES)[0][:, HEAD][:, heads[0].frozen.mask]
    with iv.keep_only(model, everything, **at(kind)):
        now = seen(model, SCORES)[0][:, HEAD][:, heads[0].frozen.mask]
    assert float((now - before).abs().max()) < tolerance(kind)


def test_channels_may_be_a_table_and_named_twice() -> None:
    heads = resolved("llama")
    channels = strong(heads)
    table = pd.DataFrame(torch.cat([channels, channels]).numpy(), columns=["q_feature", "k_feature"])
    check("llama", heads, fra.remove(double("llama"), table, **at("llama")), maps(heads, channels))
    check("llama", heads, fra.remove(double("llama"), channels.numpy(), **at("llama")), maps(heads, channels))


def test_rows_keys_and_entries_choose_where() -> None:
    heads = resolved("gpt2")
    channels, model = strong(heads), double("gpt2")
    taken = maps(heads, channels)
    rows = torch.zeros(TOKENS.shape, dtype=torch.bool)
    rows[0, 9:], rows[1, 4:12] = True, True
    keys = [0, 1, 2, 5, 8]
    diagonal = torch.ones(16, 16, dtype=torch.bool).tril(-2)
    chosen = torch.zeros_like(taken)
    for b in range(2):
        for t in range(16):
            for s in keys:
                if rows[b, t] and t - s >= 2:
                    chosen[b, t, s] = taken[b, t, s]
    check("gpt2", heads, fra.remove(model, channels, **at("gpt2"), rows=rows, keys=keys, entries=diagonal), chosen)
    by_document = torch.stack([diagonal, ~diagonal])
    check("gpt2", heads, fra.remove(model, channels, **at("gpt2"), entries=by_document), taken * by_document)


def push(layer: int = LAYER) -> tuple[str, Callable[..., torch.Tensor]]:
    """Somebody else's edit of the residual stream."""
    noise = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return f"blocks.{layer}.hook_resid_pre", lambda x, hook: x + 0.7 * noise


@pytest.mark.parametrize("hook", [f"blocks.{LAYER}.ln1.hook_normalized", f"blocks.{LAYER}.hook_resid_pre"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_neo"])
def test_what_is_removed_is_what_this_very_pass_has(kind: str, hook: str) -> None:
    """Also where the other edit is made at the same hook point, and later than ours."""
    model, place = double(kind), at(kind) | {"dictionary": tiny_sae(hook)}
    clean = resolved(kind, hook=hook)
    with model.hooks(fwd_hooks=[push()]):
        pushed = resolved(kind, hook=hook)
    channels = torch.cat([strong(pushed), strong(clean)]).unique(dim=0)
    mask, taken = clean[0].frozen.mask, maps(pushed, channels)
    assert float((taken - maps(clean, channels)).abs().max()) > 0.05
    with fra.remove(model, channels, **place):
        scores = seen(model, SCORES, hooks=[push()])[0][:, HEAD]
    assert float((scores - after(pushed, taken))[:, mask].abs().max()) < tolerance(kind)
    with fra.remove(model, channels, **place, clean=TOKENS):
        scores = seen(model, SCORES, hooks=[push()])[0][:, HEAD]
    assert float((scores - after(pushed, maps(clean, channels)))[:, mask].abs().max()) < tolerance(kind)
    with model.hooks(fwd_hooks=[push()]), fra.remove(model, channels, **place, clean=TOKENS):
        again = seen(model, SCORES)[0][:, HEAD]
    assert torch.equal(again[:, mask], scores[:, mask])


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_interventions_nest_and_add_up(kind: str) -> None:
    model, heads = double(kind), resolved(kind)
    channels = strong(heads)
    first, second = channels[:5], channels[5:]
    with fra.remove(model, first, **at(kind)):
        check_inner = fra.remove(model, second, **at(kind))
        with check_inner:
            both = seen(model, SCORES)[0][:, HEAD]
        one = seen(model, SCORES)[0][:, HEAD]
    mask = heads[0].frozen.mask
    assert float((both - after(heads, maps(heads, channels)))[:, mask].abs().max()) < tolerance(kind)
    assert float((one - after(heads, maps(heads, first)))[:, mask].abs().max()) < tolerance(kind)


def test_a_removal_sees_what_a_removal_in_an_earlier_layer_has_changed() -> None:
    model, below = double("gpt2"), "blocks.0.ln1.hook_normalized"
    early = fra.resolve(model, tiny_sae(below), TOKENS[0], 0, 1).channels("abs", n=400)
    upstream = iv.scale(model, early, -30.0, layer=0, head=1, dictionary=tiny_sae(below))
    clean = resolved("gpt2")
    with upstream:
        heads = resolved("gpt2")
    channels = torch.cat([strong(heads), strong(clean)]).unique(dim=0)
    assert float((maps(heads, channels) - maps(clean, channels)).abs().max()) > 0.05
    for order in ((0, 1), (1, 0)):
        pair = [upstream, fra.remove(model, channels, **at("gpt2"))]
        with pair[order[0]], pair[order[1]]:
            scores = seen(model, SCORES)[0][:, HEAD]
        assert float((scores - after(heads, maps(heads, channels)))[:, heads[0].frozen.mask].abs().max()) < 1e-10


def test_near_saturation_the_score_before_the_cap_is_computed_anew() -> None:
    """In float32 tanh rounds to one there, and its inverse to infinity."""
    from fra._intervention import before_cap

    frozen = resolved("gemma2")[0].frozen.to(torch.float32)
    own = frozen.scores(HEAD) * 8
    big = type(frozen)(**{**vars(frozen), "scale": frozen.scale * 8})
    capped = big.cap(own)
    found = before_cap(big, HEAD, capped)[:, big.mask]
    assert float((capped.abs() / frozen.softcap)[:, big.mask].max()) == 1.0
    torch.testing.assert_close(found, own[:, big.mask], atol=1e-3, rtol=0)
    moved = capped - 0.25 * capped.sign()  # somebody else's edit: it is kept
    torch.testing.assert_close(
        big.cap(before_cap(big, HEAD, moved))[:, big.mask], moved[:, big.mask], atol=1e-5, rtol=0
    )


# ---- outputs


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_output_terms_sum_to_the_models_own_head_output(kind: str) -> None:
    model, sae = double(kind), sae_of(kind)
    attn_out = f"{ATTN}.hook_out" if f"{ATTN}.hook_out" in model.hook_dict else f"blocks.{LAYER}.hook_attn_out"
    z, written = seen(model, Z, attn_out)
    total = torch.zeros_like(written[0])
    for head in range(z.shape[2]):
        output = iv.resolve_output(model, sae, TOKENS[0], LAYER, head)
        assert float((output.z() - z[0, :, head]).abs().max()) < max(tolerance(kind), BRIDGE_SOFTMAX)
        terms = output.terms("result")
        assert min(float(term.abs().max()) for term in terms.values()) > 1e-2  # b_V or b_dec, error: none is idle
        total += output.result()
        torch.testing.assert_close(sum(terms.values()), output.result())
    b_O = model.blocks[LAYER].attn.b_O
    total += 0 if b_O is None else b_O.detach()
    assert float((total - written[0]).abs().max()) < 1e-5  # heads' results and b_O are the attention's output


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gpt_neo"])
def test_a_features_contribution_is_what_the_models_own_values_lack_without_it(kind: str) -> None:
    """Values from the model on an input without the feature, mixed by the model with its own pattern held."""
    model, sae = double(kind), sae_of(kind)
    output = iv.resolve_output(model, sae, TOKENS[0], LAYER, HEAD)
    strongest = output.gains().abs().sum(0) * output.directions().norm(dim=-1)
    feature = int(output.live[int(strongest.argmax())])
    z, pattern = seen(model, Z, PATTERN)
    v = inputs_without(model, sae, feature, f"{ATTN}.hook_v")
    held = [(f"{ATTN}.hook_v", lambda value, hook: v), (PATTERN, lambda value, hook: pattern)]
    truth = (z - seen(model, Z, hooks=held)[0])[:, :, HEAD]
    assert float(truth[0].abs().max()) > 0.05
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(output.feature(feature), truth[0], **close)
    W_O = model.blocks[LAYER].attn.W_O[HEAD].detach()
    torch.testing.assert_close(output.feature(feature, "result"), truth[0] @ W_O, **close)
    column = output.live.tolist().index(feature)
    along = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(output.along(along, "result")[:, column], truth[0] @ W_O @ along, **close)
    keys, ids, gain = output.sources(9)
    here = ids == feature
    assert bool(output.pattern[9][keys].gt(0).all())
    torch.testing.assert_close(gain[here].sum() * output.directions()[column], truth[0, 9], **close)
    with iv.remove_output(model, [feature], **at(kind)):
        torch.testing.assert_close(seen(model, Z)[0][:, :, HEAD], z[:, :, HEAD] - truth, **close)
    with iv.scale_output(model, [feature], 3.0, **at(kind), rows=[9]):
        changed = seen(model, Z)[0] - z
    torch.testing.assert_close(changed[:, 9, HEAD], 2 * truth[:, 9], **close)
    changed[:, 9, HEAD] = 0
    assert not bool(changed.any())
    v_there = seen(model, f"{ATTN}.hook_v")[0]
    v_there[:, [2, 3, 7]] = v[:, [2, 3, 7]]
    held[0] = (f"{ATTN}.hook_v", lambda value, hook: v_there)
    some = seen(model, Z, hooks=held)[0][:, :, HEAD]
    with iv.remove_output(model, [feature], **at(kind), keys=[2, 3, 7]):
        torch.testing.assert_close(seen(model, Z)[0][:, :, HEAD], some, **close)


def test_signed_contributions_sum_along_a_direction_and_norms_do_not() -> None:
    model = double("gpt2")
    output = iv.resolve_output(model, sae_of("gpt2"), TOKENS[0], LAYER, HEAD)
    direction = output.z() / output.z().norm(dim=-1, keepdim=True)
    terms = output.terms()
    rest = ((terms["bias"] + terms["error"]) * direction).sum(-1)
    signed = (output.gains()[:, :, None] * output.directions() * direction[:, None]).sum((1, 2))
    one = output.along(direction[5])[5].sum()
    torch.testing.assert_close(signed + rest, output.z().norm(dim=-1))
    torch.testing.assert_close(one, signed[5])
    norms = (output.gains().abs() * output.directions().norm(dim=-1)).sum(-1)
    assert float((norms + rest - output.z().norm(dim=-1)).abs().min()) > 0.1


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_neo"])
def test_a_head_without_any_output_term_is_a_zeroed_head(kind: str) -> None:
    model = double(kind)
    with iv.remove_output(model, [], terms=("feature", "bias", "error"), **at(kind)):
        z, nothing = seen(model, Z)[0], logits(model)
    assert float(z[:, :, HEAD].abs().max()) < max(tolerance(kind), BRIDGE_SOFTMAX)
    with iv.zero_ablate(model, layer=LAYER, head=HEAD):
        torch.testing.assert_close(logits(model), nothing, atol=1e-4, rtol=0)
    assert float((logits(model) - nothing).abs().max()) > 1e-2


def test_output_is_removed_as_this_pass_has_it_and_as_a_clean_pass_has_it() -> None:
    model, place = double("gpt2"), at("gpt2")
    heads = [iv.resolve_output(model, sae_of("gpt2"), document, LAYER, HEAD) for document in TOKENS]
    features = heads[0].live[:20]
    with model.hooks(fwd_hooks=[push()]):
        pushed = [iv.resolve_output(model, sae_of("gpt2"), document, LAYER, HEAD) for document in TOKENS]
        z = seen(model, Z)[0][:, :, HEAD]
    expected = [torch.stack([sum(o.feature(int(f)) for f in features) for o in some]) for some in (pushed, heads)]
    assert float((expected[0] - expected[1]).abs().max()) > 1e-2
    for clean, taken in zip((None, TOKENS), expected, strict=True):
        with iv.remove_output(model, features, **place, clean=clean):
            torch.testing.assert_close(seen(model, Z, hooks=[push()])[0][:, :, HEAD], z - taken, atol=1e-6, rtol=0)


# ---- whole heads


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neo"])
def test_ablation_and_patching_are_the_same_edits_made_by_hand(kind: str) -> None:
    model = double(kind)
    other = torch.stack([random_tokens(16, seed) for seed in (7, 8)])
    z, pattern = seen(model, Z, PATTERN, tokens=other)
    counted = torch.ones(2, 16, dtype=torch.bool)
    counted[1, 10:] = False
    place: dict[str, Any] = {"layer": LAYER, "head": HEAD}

    def by_hand(name: str, edit: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        def hook(value: torch.Tensor, hook: Any) -> torch.Tensor:
            value = value.clone()
            edit(value)
            return value

        with torch.no_grad(), model.hooks(fwd_hooks=[(name, hook)]):
            return model(TOKENS)

    def put(value: torch.Tensor | float, rows: slice = slice(None)) -> Callable[[torch.Tensor], Any]:
        return lambda own: own[:, rows, HEAD].copy_(torch.as_tensor(value).expand_as(own[:, rows, HEAD]))

    cases = [
        (iv.zero_ablate(model, **place), by_hand(Z, put(0.0))),
        (iv.zero_ablate(model, **place, rows=[4, 5, 6]), by_hand(Z, put(0.0, slice(4, 7)))),
        (iv.zero_ablate(model, **place, share=0.25), by_hand(Z, lambda own: own[:, :, HEAD].mul_(0.75))),
        (iv.mean_ablate(model, other, **place), by_hand(Z, put(z[:, :, HEAD].mean((0, 1))))),
        (
            iv.mean_ablate(model, other, **place, reference_rows=counted),
            by_hand(Z, put(z[:, :, HEAD][counted].mean(0))),
        ),
        (iv.mean_ablate(model, other, **place, by_position=True), by_hand(Z, put(z[:, :, HEAD].mean(0)))),
        (iv.patch_output(model, other, **place), by_hand(Z, put(z[:, :, HEAD]))),
        (iv.patch_output(model, other, **place, rows=[15]), by_hand(Z, put(z[:, 15:, HEAD], slice(15, 16)))),
        (iv.patch_pattern(model, other, **place), by_hand(PATTERN, lambda own: own[:, HEAD].copy_(pattern[:, HEAD]))),
    ]
    plain = logits(model)
    for number, (intervention, truth) in enumerate(cases):
        assert float((truth - plain).abs().max()) > 1e-3, number
        with intervention:
            torch.testing.assert_close(logits(model), truth, msg=f"case {number}")


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gemma3", "gpt_neo"])
def test_frozen_scales_hold_downstream_only(kind: str) -> None:
    model = double(kind)
    scales = [name for name in model.hook_dict if name.endswith("hook_scale") and name.startswith(("blocks", "ln_f"))]
    changed = torch.stack([random_tokens(16, seed) for seed in (7, 8)])
    before = dict(zip(scales, seen(model, *scales), strict=True))
    with iv.freeze_scales(model, TOKENS, layer=0):
        held = dict(zip(scales, seen(model, *scales, tokens=changed), strict=True))
        output = logits(model, changed)
        (stream,) = seen(model, f"blocks.{LAYER}.hook_resid_post", tokens=changed)
    free = dict(zip(scales, seen(model, *scales, tokens=changed), strict=True))
    own = [name for name in scales if name.startswith(("blocks.0.ln1.", "blocks.0.attn."))]
    assert own
    for name in scales:
        assert torch.equal(held[name], (free if name in own else before)[name]), name
        assert not torch.equal(free[name], before[name])
    # the logits are what the held scale makes of the final stream
    centred = kind in ("gpt2", "gpt_neo")
    normed = (stream - stream.mean(-1, keepdim=True) if centred else stream) / before["ln_final.hook_scale"]
    forced = ("ln_final.hook_normalized", lambda value, hook: normed)
    with torch.no_grad(), model.hooks(fwd_hooks=[forced]):
        torch.testing.assert_close(model(changed), output, atol=1e-5, rtol=1e-5)
    assert float((logits(model, changed) - output).abs().max()) > 1e-2


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


def test_a_scores_hook_that_shows_something_else_is_refused(plain_attention: Any) -> None:
    assert isinstance(tiny("gpt_neo"), HookedTransformer)
    for build in (
        lambda: fra.remove(plain_attention, [[0, 0]], **at("gpt_neo")),
        lambda: iv.remove_output(plain_attention, [0], **at("gpt_neo")),
    ):
        with pytest.raises(FraError, match="HookedTransformer"):
            build()


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
