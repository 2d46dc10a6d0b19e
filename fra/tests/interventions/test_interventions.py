"""Interventions inside a forward pass, against what the model itself makes of its own hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import fra
from fra.core import output as output_module
from fra.interventions import heads as whole_heads
from fra.interventions import scores as iv
from fra.tests.intervening import (
    ATTN,
    BRIDGE_SOFTMAX,
    HEAD,
    LAYER,
    PATTERN,
    SCORES,
    TOKENS,
    Z,
    after,
    at,
    check,
    double,
    hook_of,
    logits,
    maps,
    push,
    resolved,
    sae_of,
    seen,
    strong,
    tolerance,
)
from fra.tests.models import ARCHITECTURES, random_tokens, tiny_sae

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
    from fra.interventions.attach import before_cap

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
        output = output_module.resolve_output(model, sae, TOKENS[0], LAYER, head)
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
    output = output_module.resolve_output(model, sae, TOKENS[0], LAYER, HEAD)
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
    output = output_module.resolve_output(model, sae_of("gpt2"), TOKENS[0], LAYER, HEAD)
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
    with whole_heads.zero_ablate(model, layer=LAYER, head=HEAD):
        torch.testing.assert_close(logits(model), nothing, atol=1e-4, rtol=0)
    assert float((logits(model) - nothing).abs().max()) > 1e-2


def test_output_is_removed_as_this_pass_has_it_and_as_a_clean_pass_has_it() -> None:
    model, place = double("gpt2"), at("gpt2")
    heads = [output_module.resolve_output(model, sae_of("gpt2"), document, LAYER, HEAD) for document in TOKENS]
    features = heads[0].live[:20]
    with model.hooks(fwd_hooks=[push()]):
        pushed = [output_module.resolve_output(model, sae_of("gpt2"), document, LAYER, HEAD) for document in TOKENS]
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
        (whole_heads.zero_ablate(model, **place), by_hand(Z, put(0.0))),
        (whole_heads.zero_ablate(model, **place, rows=[4, 5, 6]), by_hand(Z, put(0.0, slice(4, 7)))),
        (whole_heads.zero_ablate(model, **place, share=0.25), by_hand(Z, lambda own: own[:, :, HEAD].mul_(0.75))),
        (whole_heads.mean_ablate(model, other, **place), by_hand(Z, put(z[:, :, HEAD].mean((0, 1))))),
        (
            whole_heads.mean_ablate(model, other, **place, reference_rows=counted),
            by_hand(Z, put(z[:, :, HEAD][counted].mean(0))),
        ),
        (whole_heads.mean_ablate(model, other, **place, by_position=True), by_hand(Z, put(z[:, :, HEAD].mean(0)))),
        (whole_heads.patch_output(model, other, **place), by_hand(Z, put(z[:, :, HEAD]))),
        (whole_heads.patch_output(model, other, **place, rows=[15]), by_hand(Z, put(z[:, 15:, HEAD], slice(15, 16)))),
        (
            whole_heads.patch_pattern(model, other, **place),
            by_hand(PATTERN, lambda own: own[:, HEAD].copy_(pattern[:, HEAD])),
        ),
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
    with whole_heads.freeze_scales(model, TOKENS, layer=0):
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
