"""Direct feature attribution is exact: against the dictionary's own pre-activation, by hand, and against the model with
single values taken out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fra import attribution
from fra.attribution.head_outputs import Live
from fra.errors import FraError
from fra.tests.models import ARCHITECTURES, random_tokens, tiny, tiny_sae

LAYER = 1
Z = f"blocks.{LAYER}.attn.hook_z"
TOKENS = torch.stack([random_tokens(16, seed) for seed in (0, 1)])
FEATURES = torch.arange(96)
DOUBLE = torch.float64
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("topk", {}),
    ("topk", {"apply_b_dec_to_input": False}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"normalize_activations": "layer_norm"}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ("jumprelu", {}),
    ("gated", {}),
    ("batchtopk", {}),
]


def head_sae(kind: str = "topk", **options: Any) -> Any:
    return tiny_sae(Z, kind, dtype="float64", reshape_activations="hook_z", **options)


def seen(model: Any, name: str, tokens: torch.Tensor = TOKENS, hooks: Any = ()) -> torch.Tensor:
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model.run_with_cache(tokens, names_filter=[name])[1][name].detach()


def own(sae: Any, z: torch.Tensor) -> torch.Tensor:
    """What the dictionary hands to its activation function, caught there."""
    caught: list[torch.Tensor] = []
    inner = sae.activation_fn

    def catch(x: torch.Tensor) -> torch.Tensor:
        caught.append(x.detach())
        return inner(x)

    shape = z.shape[:2]
    if isinstance(inner, torch.nn.Module):
        handle = inner.register_forward_pre_hook(lambda module, args: caught.append(args[0].detach()))
        sae.encode(z.reshape(*shape, 4, 8))
        handle.remove()
    else:
        sae.activation_fn = catch
        sae.encode(z.reshape(*shape, 4, 8))
        sae.activation_fn = inner
    return caught[0]


@pytest.mark.parametrize("folded", [False, True], ids=["raw", "folded"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_both_sums_are_the_dictionarys_own_pre_activation(kind: str, folded: bool) -> None:
    model, sae = tiny(kind, DOUBLE, folded), head_sae()
    o = attribution.observe(model, sae, TOKENS)
    truth = own(sae, seen(model, Z))
    by_head, by_source, bias = o.by_head(FEATURES), o.by_source(FEATURES), o.bias(FEATURES)
    # Gemma's patterns come from a softmax in float32: hook_z is made of the pattern that hook_pattern shows.
    torch.testing.assert_close(by_head.sum(2) + bias, truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(by_source.sum(2) + bias, truth, rtol=0, atol=1e-5 if kind.startswith("gemma") else 1e-6)
    torch.testing.assert_close(o.pre_activation(FEATURES), truth, rtol=0, atol=1e-10)
    for head in range(o.n_heads):
        alone = o.by_source(FEATURES, head).sum(2)
        torch.testing.assert_close(alone, by_head[:, :, head], rtol=0, atol=1e-6)
    # Leaving out the bias or mixing up the rows of the pattern is noticed.
    assert float((by_head.sum(2) - truth).abs().max()) > 1e-2
    assert float((by_source.flip(1).sum(2) + bias - truth).abs().max()) > 1e-2


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda value: str(value))
def test_every_kind_of_dictionary(kind: str, options: dict[str, Any]) -> None:
    model, sae = tiny("llama", DOUBLE), head_sae(kind, **options)
    o = attribution.observe(model, sae, TOKENS)
    z = seen(model, Z)
    truth = own(sae, z)
    torch.testing.assert_close(o.by_head(FEATURES).sum(2) + o.bias(FEATURES), truth, rtol=0, atol=1e-9)
    acts = sae.encode(z.reshape(2, 16, 4, 8)).to_dense()
    dense = torch.zeros_like(acts)
    dense[o.live.doc, o.live.pos, o.live.feature] = o.live.value
    assert torch.equal(dense, acts)
    assert len(o.live) > 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_against_loops_in_double_precision(kind: str) -> None:
    """Key-value groups, W_enc's blocks and rows of the pattern, each number by itself."""
    model, sae = tiny(kind, DOUBLE), head_sae()
    tokens = TOKENS[0]
    pattern = seen(model, f"blocks.{LAYER}.attn.hook_pattern", tokens[None])[0]
    values = seen(model, f"blocks.{LAYER}.attn.hook_v", tokens[None])[0]
    W = sae.W_enc.detach()
    group = 4 // values.shape[1]
    found = attribution.by_source(model, sae, tokens, torch.tensor([5, 17]))
    one_head = attribution.by_source(model, sae, tokens, torch.tensor([5, 17]), head=3)
    for t in (0, 7, 15):
        for s in (0, 3, 7, 15):
            for column, feature in enumerate((5, 17)):
                terms = [
                    pattern[h, t, s] * sum(values[s, h // group, d] * W[8 * h + d, feature] for d in range(8))
                    for h in range(4)
                ]
                assert float(found[t, s, column]) == pytest.approx(float(sum(terms)), abs=1e-12)
                assert float(one_head[t, s, column]) == pytest.approx(float(terms[3]), abs=1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3", "gpt_neo", "no_layernorm"])
def test_a_source_is_worth_what_the_model_loses_without_it(kind: str) -> None:
    model, sae = tiny(kind, DOUBLE), head_sae()
    o = attribution.observe(model, sae, TOKENS)

    def without(v: torch.Tensor, hook: Any) -> torch.Tensor:
        v = v.clone()
        v[:, 4] = 0
        return v

    before = own(sae, seen(model, Z))
    after = own(sae, seen(model, Z, hooks=[(f"blocks.{LAYER}.attn.hook_v", without)]))
    torch.testing.assert_close(o.by_source(FEATURES)[:, :, 4], before - after, rtol=0, atol=1e-6)


def test_entries_are_cells_of_the_rectangles() -> None:
    o = attribution.observe(tiny("qwen3", DOUBLE), head_sae(normalize_activations="constant_norm_rescale"), TOKENS)
    at, every = o.live, o.by_source(FEATURES)
    cells = every[at.doc, at.pos, :, at.feature]
    torch.testing.assert_close(o.sources(at), cells)
    by_head = o.by_head(FEATURES)[at.doc, at.pos, :, at.feature]
    torch.testing.assert_close(o.entries_by_head(at), by_head)
    chosen = by_head.argmax(1)
    expected = torch.stack([o.by_source(FEATURES, head)[at.doc, at.pos, :, at.feature] for head in range(4)], 1)
    torch.testing.assert_close(o.sources(at, chosen), expected[torch.arange(len(at)), chosen])
    torch.testing.assert_close(o.sources(at, 2), expected[:, 2])
    pos, value = o.top_sources(at, n=3)
    causal = cells.masked_fill(torch.arange(16) > at.pos[:, None], -torch.inf)
    torch.testing.assert_close(value, causal.sort(dim=1, descending=True).values[:, :3])
    finite = value.isfinite()
    torch.testing.assert_close(cells.gather(1, pos)[finite], value[finite])
    for n in (1, 3):
        where, strongest = o.strongest_sources(FEATURES, n)
        masked = every.masked_fill(torch.ones(16, 16).triu(1).bool()[None, :, :, None], -torch.inf)
        torch.testing.assert_close(strongest, masked.transpose(2, 3).sort(dim=-1, descending=True).values[..., :n])
        assert int((where > torch.arange(16)[None, :, None, None])[strongest.isfinite()].sum()) == 0


def test_documents_of_unequal_length_are_what_they_are_alone() -> None:
    model, sae = tiny("gpt2", DOUBLE), head_sae()
    documents = [random_tokens(9, 3), random_tokens(14, 4)]
    o = attribution.observe(model, sae, documents)
    assert o.real.sum(1).tolist() == [9, 14]
    for number, document in enumerate(documents):
        alone = attribution.by_head(model, sae, document, FEATURES)
        torch.testing.assert_close(o.by_head(FEATURES)[number, : len(document)], alone)
        own_live = attribution.observe(model, sae, document).live
        here = o.live.where(o.live.doc == number)
        assert torch.equal(here.pos, own_live.pos) and torch.equal(here.feature, own_live.feature)


def test_nothing_to_attribute() -> None:
    o = attribution.observe(tiny("gpt2"), head_sae(), TOKENS)
    none = o.live.where(o.live.value < 0)
    assert o.entries_by_head(none).shape == (0, 4) and o.sources(none).shape == (0, 16)
    assert o.top_sources(none)[0].shape == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, s: attribution.observe(m, tiny_sae("blocks.1.ln1.hook_normalized"), TOKENS), "one of head outputs"),
        (lambda m, s: attribution.observe(m, s, TOKENS.float()), "tokens must be integer ids"),
        (lambda m, s: attribution.observe(m, s, []), "not nothing"),
        (lambda m, s: attribution.observe(m, s, TOKENS + 300), "outside the vocabulary"),
        (lambda m, s: attribution.by_head(m, s, TOKENS[0], torch.tensor([96])), "feature 96 is out of range"),
        (lambda m, s: attribution.by_source(m, s, TOKENS[0], FEATURES, head=4), "head 4 is out of range"),
        (lambda m, s: attribution.observe(m, tiny_sae("blocks.7.attn.hook_z"), TOKENS), "layer 7 is out of range"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change: Any, message: str) -> None:
    with pytest.raises(FraError, match=message) as caught:
        change(tiny("gpt2"), head_sae())
    assert "\n" not in str(caught.value)


def test_an_encoder_that_is_not_linear_in_the_heads_is_refused() -> None:
    sae = head_sae()
    handle = sae.hook_sae_input.register_forward_hook(lambda module, inputs, output: output.abs())
    try:
        with pytest.raises(FraError, match="is not a linear map of the head outputs"):
            attribution.observe(tiny("gpt2", DOUBLE), sae, TOKENS)
    finally:
        handle.remove()


def test_scaling_that_was_not_folded_in_is_refused() -> None:
    with pytest.raises(FraError, match="was trained on rescaled activations"):
        attribution.observe(
            tiny("gpt2"), head_sae("standard", normalize_activations="expected_average_only_in"), TOKENS
        )


def test_what_would_not_fit_is_refused_before_it_is_made() -> None:
    o = attribution.observe(tiny("gpt2"), head_sae(), TOKENS)
    many = torch.zeros(1, dtype=torch.long).expand(2**28)
    with pytest.raises(FraError, match="ask for fewer entries"):
        o.sources(Live(many, many, many, torch.zeros(1).expand(2**28)))
