"""Features of what attention writes (hook_attn_out): attributed through W_O, b_O and a norm after attention, against
the dictionary on the model's own hook and against the model with single values taken out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fra
from fra import attribution, patching
from fra.architectures.known import architecture_of
from fra.attribution.raised_tokens import direct_logits
from fra.dictionaries.encoder import encode, own_pre_activation
from fra.errors import FraError
from fra.targets.admission import admit
from fra.tests.attribution.test_attribution import DOUBLE, FEATURES, KINDS, LAYER, TOKENS, seen
from fra.tests.models import ARCHITECTURES, D_MODEL, build_sae, folder, tiny, tiny_sae
from fra.tests.tiny_targets import TEXT, signed_axes

OUT = f"blocks.{LAYER}.hook_attn_out"
POST = ("gemma2", "gemma3")


def dictionary(kind: str = "topk", **options: Any) -> Any:
    return tiny_sae(OUT, kind, dtype="float64", **options)


def truth_of(model: Any, sae: Any, hooks: Any = ()) -> Tensor:
    """The dictionary's own pre-activation of the model's own hook_attn_out."""
    written = seen(model, OUT, hooks=hooks)
    return own_pre_activation(sae, written.flatten(0, 1)[:, None]).view(*written.shape[:2], -1)


@pytest.mark.parametrize("folded", [False, True], ids=["raw", "folded"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_both_sums_are_the_dictionarys_own_pre_activation(kind: str, folded: bool) -> None:
    model, sae = tiny(kind, DOUBLE, folded), dictionary()
    o = attribution.observe(model, sae, TOKENS)
    truth = truth_of(model, sae)
    by_head, by_source, bias = o.by_head(FEATURES), o.by_source(FEATURES), o.bias(FEATURES)
    # transformers computes the norm after attention, and the softmax, of Gemma in float32
    near = 1e-5 if kind in POST else 1e-10
    torch.testing.assert_close(by_head.sum(2) + bias, truth, rtol=0, atol=near)
    torch.testing.assert_close(by_source.sum(2) + bias, truth, rtol=0, atol=max(near, 1e-6))
    torch.testing.assert_close(o.pre_activation(FEATURES), truth, rtol=0, atol=near)
    at = o.live
    torch.testing.assert_close(
        o.entries_by_head(at).sum(1) + o.entries_bias(at), truth[at.doc, at.pos, at.feature], rtol=0, atol=near
    )
    for head in range(o.n_heads):
        torch.testing.assert_close(o.by_source(FEATURES, head).sum(2), by_head[:, :, head], rtol=0, atol=1e-5)
    # Without b_O, and in Gemma without the scale of the norm after attention, it is another number.
    b_O, gain = o.encoder.b_O, o.gain
    if architecture_of(model).read_ov(LAYER).b_O is not None:
        assert b_O is not None and float((by_head.sum(2) + o.encoder.bias - truth).abs().max()) > 1e-2
    if kind in POST:
        assert float((by_head.sum(2) / gain[..., None] + bias - truth).abs().max()) > 1e-2


@pytest.mark.parametrize("model_kind", ["gpt2", "gemma2"])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda value: str(value))
def test_every_kind_of_dictionary(kind: str, options: dict[str, Any], model_kind: str) -> None:
    """Run-time normalisation multiplies b_O too, which is then another number at every position."""
    model, sae = tiny(model_kind, DOUBLE), dictionary(kind, **options)
    o = attribution.observe(model, sae, TOKENS)
    near = 1e-5 if model_kind in POST else 1e-9
    torch.testing.assert_close(o.pre_activation(FEATURES), truth_of(model, sae), rtol=0, atol=near)
    acts = sae.encode(seen(model, OUT)).to_dense()
    dense = torch.zeros_like(acts)
    dense[o.live.doc, o.live.pos, o.live.feature] = o.live.value
    assert torch.equal(dense, acts) and len(o.live) > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3", "gpt_neo", "no_layernorm"])
def test_a_source_is_worth_what_the_model_loses_without_it(kind: str) -> None:
    """With the scale of a norm after attention held, as attribution holds it."""
    model, sae = tiny(kind, DOUBLE), dictionary()
    o = attribution.observe(model, sae, TOKENS)
    held = []
    if kind in POST:
        scale = seen(model, f"blocks.{LAYER}.ln1_post.hook_scale")
        held = [(f"blocks.{LAYER}.ln1_post.hook_scale", lambda old, hook: scale)]

    def without(v: Tensor, hook: Any) -> Tensor:
        v = v.clone()
        v[:, 4] = 0
        return v

    before = truth_of(model, sae, held)
    after = truth_of(model, sae, [*held, (f"blocks.{LAYER}.attn.hook_v", without)])
    torch.testing.assert_close(o.by_source(FEATURES)[:, :, 4], before - after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "no_layernorm"])
def test_a_trace_from_what_attention_writes(kind: str) -> None:
    model, sae = tiny(kind, DOUBLE), dictionary()
    o = attribution.observe(model, sae, TOKENS[0])
    late = o.live.where(o.live.pos >= 9)
    at = late.where(torch.arange(len(late)) % 7 == 0)
    truth = truth_of(model, sae)[0][at.pos, at.feature]
    below = "blocks.0.hook_attn_out"
    for given in ({}, {below: tiny_sae(below, dtype="float64")}):
        trace = attribution.recursive(model, sae, TOKENS[0], at, given)
        torch.testing.assert_close(trace.total(), truth, rtol=0, atol=2e-5)
        # b_O of both layers, or of this one alone where the dictionary below has taken over
        layers = {term.layer for term in trace.terms if term.component == "b_O"}
        assert layers == ({1} if given else {0, 1})
    found = trace.features[below]
    acts = encode(given[below], seen(model, below, TOKENS[:1])[0][:, None])
    assert torch.equal(acts.nonzero(), torch.stack(found[:2], 1))
    if kind != "gemma2":
        assert float((trace.without("b_O") - truth).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3", "no_layernorm"])
def test_direct_logits_are_what_the_direction_adds_where_it_is_written(kind: str) -> None:
    """Added at the hook with MLPs and the final norm's scale held: in the order of the features' logits."""
    model, sae = tiny(kind, DOUBLE), dictionary()
    features = torch.tensor([3, 40, 77])
    tokens = TOKENS[:1]
    names = [] if kind == "no_layernorm" else [f"blocks.{LAYER}.hook_mlp_out", "ln_final.hook_scale"]
    clean = {n: seen(model, n, tokens) for n in names}
    held = [(n, lambda old, hook, n=n: clean[n]) for n in names]

    def logits(extra: list[Any]) -> Tensor:
        with torch.no_grad(), model.hooks(fwd_hooks=held + extra):
            return model(tokens)[0, -1].double()

    before = logits([])
    for feature, found in zip(features, direct_logits(model, sae, features), strict=True):
        direction = sae.W_dec.detach()[feature]
        change = logits([(OUT, lambda old, hook, d=direction: old + d)]) - before
        scale = (change @ found) / (found @ found)
        torch.testing.assert_close(change, scale * found, rtol=0, atol=1e-4)
        assert float(scale) > 0


def test_features_are_taken_out_where_attention_writes() -> None:
    model, sae = tiny("gpt2", DOUBLE), dictionary()
    o = attribution.observe(model, sae, TOKENS)
    feature = int(o.live.feature[0])
    with patching.ablate_features(model, [feature], sae):
        after = seen(model, OUT)
    share = torch.zeros_like(after)
    mine = o.live.where(o.live.feature == feature)
    share[mine.doc, mine.pos] = mine.value[:, None] * sae.W_dec.detach()[feature]
    torch.testing.assert_close(seen(model, OUT) - after, share, rtol=0, atol=1e-10)
    assert float(share.abs().max()) > 0


def test_a_target_with_one_is_admitted() -> None:
    """Signed axes, half of them kept: what is left is the error that the model's own hook has."""
    sae = type(dictionary()).load_from_disk(signed_axes(folder() / "axes of attention outputs", OUT, k=16))
    target = fra.load(tiny("gpt2"), sae, [TEXT, TEXT[::-1]], prepend_bos=True)
    (found,) = admit(target).dictionaries
    rows = [seen(target.model, OUT, target.tokens(text, 128)[None])[0, 1:] for text in (TEXT, TEXT[::-1])]
    x = torch.cat(rows).double()
    left = x.abs().sort(dim=1).values[:, :16].square().sum()
    explained = 1 - float(left / (x - x.mean(0)).square().sum())
    assert found.hook == OUT and found.l0 == pytest.approx(16)
    assert found.explained_variance == pytest.approx(explained, abs=1e-3)
    narrow = type(sae).load_from_disk(build_sae("topk", 16, OUT, folder() / "narrow"))
    with pytest.raises(FraError, match="has width 16 and the model there has 32"):
        fra.load(tiny("gpt2"), narrow, [TEXT])


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    model = tiny("gpt2", DOUBLE)
    narrow = type(dictionary()).load_from_disk(build_sae("topk", 16, OUT, folder() / "narrow attention outputs"))
    with pytest.raises(FraError, match=f"has width 16 and the attention outputs there have {D_MODEL}: it belongs") as e:
        attribution.observe(model, narrow, TOKENS)
    assert "\n" not in str(e.value)
    with pytest.raises(FraError, match="holds what attention writes, not an attention input"):
        fra.resolve(model, dictionary(), TOKENS[0], head="L1H0")

    def doubled(x: Tensor, hook: Any) -> Tensor:
        return 2 * x

    with model.hooks(fwd_hooks=[(OUT, doubled)]), pytest.raises(FraError, match="is not hook_z through W_O and b_O"):
        attribution.observe(model, dictionary(), TOKENS)
