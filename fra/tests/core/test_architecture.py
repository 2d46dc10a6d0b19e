"""A family that the library has never heard of comes in through the public door, and is believed only where its numbers
are the model's own.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from sae_lens import SAE
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

import fra
from fra import attribution
from fra.dictionaries.hooks import LayerHooks
from fra.errors import FraError
from fra.tests.core.conftest import Register
from fra.tests.models import build_sae, folder, random_tokens, tiny, tiny_sae

WIDTH, QUERIES, GROUPS, HEAD, DEPTH, WORDS, LONGEST = 32, 4, 2, 8, 2, 300, 24
NEAR, TURNED = 6, 4
"""The second layer sees so many keys; so many dimensions of a head rotate, by neighbouring pairs."""
TOKENS = random_tokens(16)
OWN_POINTS = {
    "hook_resid_pre": "enter",
    "hook_resid_post": "leave",
    "ln1.hook_scale": "spread",
    "ln1.hook_normalized": "level",
    "attn.hook_attn_scores": "affinity",
    "attn.hook_pattern": "share",
    "attn.hook_v": "offered",
    "attn.hook_z": "mixed",
}


def angles(pos: int) -> Tensor:
    """Of position and pair, [pos, TURNED // 2]."""
    return torch.arange(pos)[:, None] * torch.tensor([1.0, 0.2])


def turned(v: Tensor) -> Tensor:
    """Neighbouring dimensions as complex numbers, [batch, pos, heads, HEAD]."""
    pairs = torch.view_as_complex(v[..., :TURNED].reshape(*v.shape[:-1], -1, 2).contiguous())
    turn = torch.polar(torch.ones(()), angles(v.shape[1]))[None, :, None]
    return torch.cat((torch.view_as_real(pairs * turn).flatten(-2), v[..., TURNED:]), dim=-1)


class MeadLayer(nn.Module):
    """Grouped keys in one fused map, a norm by mean absolute deviation whose weight is stored as a logarithm, a scale
    of its own, a softcap, and in the second layer a window.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.log_weight, self.offset = (nn.Parameter(0.3 * torch.randn(WIDTH)) for _ in range(2))
        self.fused = nn.Linear(WIDTH, (QUERIES + 2 * GROUPS) * HEAD)
        self.out = nn.Linear(QUERIES * HEAD, WIDTH)
        self.temper = 1.7 / (1 + number)
        for name in OWN_POINTS.values():
            setattr(self, name, HookPoint())

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        batch, pos, _ = x.shape
        centred = x - x.mean(-1, keepdim=True)
        level = self.level(centred / self.spread(centred.abs().mean(-1, keepdim=True)))
        fused = self.fused(level * self.log_weight.exp() + self.offset).view(batch, pos, -1, HEAD)
        q, k, v = fused.split((QUERIES, GROUPS, GROUPS), dim=2)
        q, k = turned(q), turned(k).repeat_interleave(QUERIES // GROUPS, dim=2)
        v = self.offered(v).repeat_interleave(QUERIES // GROUPS, dim=2)
        scores = 2.0 * torch.tanh(self.temper * torch.einsum("bthd,bshd->bhts", q, k) / 2.0)
        away = torch.arange(pos)[:, None] - torch.arange(pos)
        seen = (away >= 0) & ((away < NEAR) | (self.number == 0))
        scores = self.affinity(scores.masked_fill(~seen, -1e9))
        z = self.mixed(torch.einsum("bhts,bshd->bthd", self.share(scores.softmax(-1)), v))
        return self.leave(x + self.out(z.flatten(2)))


class Mead(HookedRootModule):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(MeadLayer(number) for number in range(DEPTH))
        self.to_words = nn.Linear(WIDTH, WORDS)
        self.setup()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.to_words(x)


class MeadArchitecture(fra.Architecture):
    """All that `fra` needs to know of it."""

    names = {  # noqa: RUF012
        f"blocks.{n}.{point}": f"layers.{n}.{own}" for n in range(DEPTH) for point, own in OWN_POINTS.items()
    }
    n_layers, n_heads, d_head, n_ctx, d_vocab = DEPTH, QUERIES, HEAD, LONGEST, WORDS

    def parts(self, layer: int) -> tuple[dict[str, Tensor], fra.Norm]:
        own = self.model.layers[layer]
        W = own.fused.weight.view(-1, HEAD, WIDTH).mT
        b = own.fused.bias.view(-1, HEAD)
        found = {}
        for name, part in zip("QKV", torch.arange(len(W)).split((QUERIES, GROUPS, GROUPS)), strict=True):
            part = part.repeat_interleave(QUERIES // len(part))
            found |= {f"W_{name}": W[part], f"b_{name}": b[part]}
        return found, fra.Norm(own.log_weight.exp(), own.offset, centred=True)

    def read_qk(self, layer: int) -> fra.RawQK:
        found, norm = self.parts(layer)
        maps = {name: found[name] for name in ("W_Q", "W_K", "b_Q", "b_K")}
        window = NEAR if layer else None
        return fra.RawQK(**maps, norm=norm, scale=self.model.layers[layer].temper, softcap=2.0, window=window)

    def read_ov(self, layer: int) -> fra.RawOV:
        found, norm = self.parts(layer)
        out = self.model.layers[layer].out
        return fra.RawOV(found["W_V"], found["b_V"], out.weight.T.view(QUERIES, HEAD, WIDTH), norm, out.bias)

    def rotary(self, layer: int, seen: Any, n_pos: int, dtype: torch.dtype) -> fra.Rotary:
        both = angles(n_pos).repeat_interleave(2, dim=1)
        return fra.Rotary(both.cos().to(dtype), both.sin().to(dtype), adjacent=True)


@cache
def mead() -> Mead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mead().eval()


@pytest.fixture
def known(registered: Register) -> Mead:
    registered(MeadArchitecture, Mead)
    return mead()


def shown(model: Mead, layer: int, own: str, tokens: Tensor = TOKENS) -> Tensor:
    name = f"layers.{layer}.{own}"
    with torch.no_grad():
        return model.run_with_cache(tokens[None], names_filter=[name])[1][name][0]


@pytest.mark.parametrize(
    ("layer", "hook"),
    [(layer, hook) for layer in range(DEPTH) for hook in LayerHooks(layer).inputs()],
)
def test_a_model_of_ones_own_is_resolved_exactly(known: Mead, layer: int, hook: str) -> None:
    own = shown(known, layer, "affinity")
    for head in range(QUERIES):
        resolved = fra.resolve(known, tiny_sae(hook), TOKENS, layer, head)
        scores = resolved.frozen.cap(resolved.scores())
        assert torch.equal(resolved.scores() > -torch.inf, own[head] > -1e8)
        attended = resolved.frozen.mask
        torch.testing.assert_close(scores[attended], own[head][attended], atol=1e-5, rtol=0)
        assert torch.equal(sum(resolved.blocks().values()).isfinite(), torch.ones_like(attended))
        output = fra.resolve_output(known, tiny_sae(hook), TOKENS, layer, head)
        torch.testing.assert_close(output.z(), shown(known, layer, "mixed")[:, head], atol=1e-5, rtol=0)


def test_its_census_is_the_sum_of_resolved_documents(known: Mead) -> None:
    sae, documents = tiny_sae(LayerHooks(1).resid_pre), [random_tokens(n, seed=n) for n in (9, 16, 12)]
    ids = ["q_feature", "k_feature"]
    found = fra.census(known, sae, documents, 1).channels(n=50)
    for head, strongest in found.groupby("head"):
        every = [fra.resolve(known, sae, document, 1, int(head)) for document in documents]
        for row in strongest.itertuples():
            total = sum(float(r.channel(row.q_feature, row.k_feature).sum()) for r in every)
            assert row.value == pytest.approx(total, abs=1e-4)
        assert len(strongest.drop_duplicates(ids)) == len(strongest)
    assert len(found) > 0


def test_removing_a_channel_takes_away_its_contribution(known: Mead) -> None:
    sae, head = tiny_sae(LayerHooks(1).resid_pre), 2
    resolved = fra.resolve(known, sae, TOKENS, 1, head)
    top = resolved.channels(n=3)
    taken = sum(resolved.channel(*pair) for pair in top[["q_feature", "k_feature"]].itertuples(index=False))
    before = shown(known, 1, "affinity")
    with fra.remove(known, top, layer=1, head=head, dictionary=sae) as intervention:
        after = shown(known, 1, "affinity")
    assert {name for name, _ in intervention.hooks} == {f"layers.1.{own}" for own in ("enter", "spread", "affinity")}
    attended = resolved.frozen.mask
    wanted = resolved.frozen.cap(resolved.scores() - taken)
    assert float(taken.abs().max()) > 1e-3
    torch.testing.assert_close(after[head][attended], wanted[attended], atol=1e-5, rtol=0)
    others = [h for h in range(QUERIES) if h != head]
    assert torch.equal(after[others], before[others])
    with fra.interventions.zero_ablate(known, layer=1, head=head):
        assert not shown(known, 1, "mixed")[:, head].any()


def test_its_head_outputs_are_attributed(known: Mead) -> None:
    sae = SAE.load_from_disk(build_sae("topk", QUERIES * HEAD, LayerHooks(1).z, folder() / "mead"))
    observed = attribution.observe(known, sae, TOKENS)
    features = torch.arange(5)
    acts = sae.hook_sae_acts_pre
    seen: list[Tensor] = []
    handle = acts.register_forward_hook(lambda module, inputs, output: seen.append(output))
    sae.encode(shown(known, 1, "mixed").flatten(1))
    handle.remove()
    torch.testing.assert_close(observed.pre_activation(features)[0], seen[0][:, features], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        observed.by_source(features)[0].sum(1), observed.by_head(features)[0].sum(1), atol=1e-5, rtol=0
    )


class ScaleOff(MeadArchitecture):
    def read_qk(self, layer: int) -> fra.RawQK:
        return replace(super().read_qk(layer), scale=1.0)


class ScaleForgotten(MeadArchitecture):
    def read_qk(self, layer: int) -> fra.RawQK:
        return replace(super().read_qk(layer), scale=1 / math.sqrt(HEAD))


class BiasForgotten(MeadArchitecture):
    def read_qk(self, layer: int) -> fra.RawQK:
        raw = super().read_qk(layer)
        return replace(raw, b_K=torch.zeros_like(raw.b_K))


class FoldedTwice(MeadArchitecture):
    def read_qk(self, layer: int) -> fra.RawQK:
        raw = super().read_qk(layer)
        return replace(raw, W_Q=raw.norm.weight[:, None] * raw.W_Q, W_K=raw.norm.weight[:, None] * raw.W_K)


class NotCentred(MeadArchitecture):
    def read_qk(self, layer: int) -> fra.RawQK:
        raw = super().read_qk(layer)
        return replace(raw, norm=replace(raw.norm, centred=False))


class Ungrouped(MeadArchitecture):
    def read_qk(self, layer: int) -> fra.RawQK:
        raw = super().read_qk(layer)
        return replace(raw, W_K=raw.W_K.roll(1, 0))


class OtherPairs(MeadArchitecture):
    def rotary(self, layer: int, seen: Any, n_pos: int, dtype: torch.dtype) -> fra.Rotary:
        both = angles(n_pos).repeat(1, 2)
        return fra.Rotary(both.cos().to(dtype), both.sin().to(dtype), adjacent=False)


@pytest.mark.parametrize(
    "wrong", [ScaleOff, ScaleForgotten, BiasForgotten, FoldedTwice, NotCentred, Ungrouped, OtherPairs]
)
def test_a_wrong_architecture_is_refused_by_name_with_a_figure(wrong: type[Any], registered: Register) -> None:
    registered(wrong, Mead)
    sae = tiny_sae(LayerHooks(1).resid_pre)
    message = rf"scores of layer 1 head \d .* as {wrong.__name__} reads them \(off by (\S+), where (\S+) is rounding\)"
    for ask in (
        lambda: fra.resolve(mead(), sae, TOKENS, 1, 0),
        lambda: fra.census(mead(), sae, [TOKENS], 1),
        lambda: fra.remove(mead(), [[0, 1]], layer=1, head=0, dictionary=sae),
    ):
        with pytest.raises(FraError, match=message) as caught:
            ask()
        off, rounding = map(float, re.search(message, str(caught.value)).groups())
        assert off > 10 * rounding
        assert "\n" not in str(caught.value)


def test_a_window_that_the_model_does_not_have_is_refused(registered: Register) -> None:
    class Wide(MeadArchitecture):
        def read_qk(self, layer: int) -> fra.RawQK:
            return replace(super().read_qk(layer), window=None)

    registered(Wide, Mead)
    with pytest.raises(FraError, match="masks other keys in layer 1"):
        fra.resolve(mead(), tiny_sae(LayerHooks(1).resid_pre), TOKENS, 1, 0)


def test_values_that_are_misread_are_refused(registered: Register) -> None:
    class NoValueBias(MeadArchitecture):
        def read_ov(self, layer: int) -> fra.RawOV:
            raw = super().read_ov(layer)
            return replace(raw, b_V=torch.zeros_like(raw.b_V))

    registered(NoValueBias, Mead)
    with pytest.raises(FraError, match=r"hook_z of layer 1 head 3 .* NoValueBias reads them \(off by [\d.e-]+"):
        fra.resolve_output(mead(), tiny_sae(LayerHooks(1).resid_pre), TOKENS, 1, 3)


def test_what_an_architecture_does_not_say_is_asked_for_by_name(known: Mead) -> None:
    own = fra.architecture_of(known)
    with pytest.raises(FraError, match="MeadArchitecture does not say how its weights are edited"):
        own.held(0, "b_K")
    with pytest.raises(FraError, match="MeadArchitecture does not say how logits are read"):
        fra.patching.readout(known, torch.zeros(1, 1, WIDTH))


def test_an_unknown_class_is_refused_with_the_way_out() -> None:
    with pytest.raises(FraError, match=r"Mead is a model of a class .* fra\.register_architecture"):
        fra.resolve(mead(), tiny_sae(LayerHooks(1).resid_pre), TOKENS, 1, 0)


def test_the_last_registration_counts_until_it_is_taken_back() -> None:
    model = tiny("gpt2")
    before = fra.architecture_of(model)
    assert fra.architecture_of(model) is before, "made once"
    take_back = fra.register_architecture(lambda other: other is model, MeadArchitecture)
    assert isinstance(fra.architecture_of(model), MeadArchitecture)
    assert not isinstance(fra.architecture_of(tiny("llama")), MeadArchitecture)
    take_back()
    take_back()
    assert type(fra.architecture_of(model)) is type(before)
    # where shapes and types are checked at run time, the signature refuses it first
    with pytest.raises((FraError, TypeCheckError), match="'gpt2'"):
        fra.register_architecture("gpt2", MeadArchitecture)  # type: ignore[arg-type]
    take_back = fra.register_architecture(Mead, lambda model: "a name")  # type: ignore[arg-type, return-value]
    try:
        with pytest.raises(FraError, match="made no Architecture but 'a name'"):
            fra.architecture_of(mead())
    finally:
        take_back()
