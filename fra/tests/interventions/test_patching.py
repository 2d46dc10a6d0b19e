"""Patching of head-output features and of paths, against a forward pass written out by hand and the dictionary's own
decoder.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fra import interventions as iv
from fra.core import frozen
from fra.errors import FraError
from fra.interventions import patching
from fra.tests.intervening import LAYER, TOKENS, Z, double, logits, seen
from fra.tests.models import model_folder, tiny_sae

CLOSE = {"rtol": 0, "atol": 1e-5}  # dictionaries are float32, and these values of order 10
ROWS = patching.own_positions([9, 4], TOKENS.shape[1])


def head_sae(kind: str = "topk", layer: int = LAYER, **options: Any) -> Any:
    return tiny_sae(f"blocks.{layer}.attn.hook_z", kind, **options)


@torch.no_grad()
def reconstructed(sae: Any, z: torch.Tensor, without: torch.Tensor | None = None) -> torch.Tensor:
    """The dictionary's own reconstruction, features [n] or [batch, n] set to zero in its code."""
    acts = sae.encode(z.flatten(2).float()).to_dense().clone()
    if without is not None:
        for b in range(len(acts)):
            acts[b, :, without if without.ndim == 1 else without[b]] = 0
    return sae.decode(acts).double()


@torch.no_grad()
def strongest(sae: Any, z: torch.Tensor, n: int) -> torch.Tensor:
    return sae.encode(z.flatten(2).float()).to_dense().sum(1).topk(n, dim=-1).indices


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("topk", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("topk", {"reshape_activations": "hook_z"}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("jumprelu", {}),
    ],
    ids=str,
)
def test_an_ablated_feature_leaves_the_rest_and_the_error(kind: str, options: dict[str, Any]) -> None:
    model, sae = double("gpt2"), head_sae(kind, **options)
    z = seen(model, Z)[0]
    flat = z.flatten(2)
    if options.get("reshape_activations") == "hook_z":
        plain = head_sae(kind)
        truth_of = plain
    else:
        truth_of = sae
    ids = strongest(truth_of, z, 3)
    share = reconstructed(truth_of, z) - reconstructed(truth_of, z, ids)
    assert float(share.abs().max()) > 0.05
    with patching.ablate_features(model, ids, sae):
        changed = seen(model, Z)[0].flatten(2)
    torch.testing.assert_close(changed, flat - share, **CLOSE)
    with patching.ablate_features(model, ids, sae, rows=ROWS, factor=-1.0):
        changed = seen(model, Z)[0].flatten(2)
    torch.testing.assert_close(changed, flat - 2 * share * ROWS[..., None], **CLOSE)
    assert torch.equal(changed[~ROWS], flat[~ROWS])
    one = ids[0, :1]
    with patching.ablate_features(model, one, sae):
        changed = seen(model, Z)[0].flatten(2)
    torch.testing.assert_close(changed, flat - reconstructed(truth_of, z) + reconstructed(truth_of, z, one), **CLOSE)


def test_positions_are_each_prompts_own() -> None:
    assert ROWS.nonzero().tolist() == [[0, 9], [1, 4]]
    with pytest.raises(FraError, match="one integer in 0 to 15"):
        patching.own_positions([3, 16], 16)


class ByHand:
    """GPT-2 written out, from the weights of the Hugging Face file."""

    def __init__(self) -> None:
        self.w = {
            name.removeprefix("transformer."): value.detach().double()
            for name, value in AutoModelForCausalLM.from_pretrained(model_folder("gpt2")).state_dict().items()
        }

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def dense(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def z(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        batch, pos, _ = x.shape
        qkv = self.dense(self.norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn")
        q, k, v = (part.view(batch, pos, 4, 8).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        scores = (q @ k.mT) / 8**0.5
        scores = scores.masked_fill(torch.ones(pos, pos, dtype=torch.bool).triu(1), -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        hidden = self.dense(self.norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        return self.dense(torch.nn.functional.gelu(hidden, approximate="tanh"), f"h.{layer}.mlp.c_proj")

    def logits(self, tokens: torch.Tensor, layer: int, head: int, rows: torch.Tensor, paths: set[str]) -> torch.Tensor:
        """One head's output put out at `rows` of `layer`, where only some paths see it: "mlp", "direct", "rest"."""
        x = self.w["wte.weight"][tokens] + self.w["wpe.weight"][: tokens.shape[1]]
        direct = torch.zeros_like(x)
        for n in (0, 1):
            z = self.z(x, n)
            mid = x + self.dense(z, f"h.{n}.attn.c_proj")
            if n != layer:
                x = mid + self.mlp(mid, n)
                continue
            gone = torch.zeros_like(z)
            gone[..., 8 * head : 8 * head + 8] = z[..., 8 * head : 8 * head + 8] * rows[..., None]
            delta = -gone @ self.w[f"h.{n}.attn.c_proj.weight"]
            seen_by_mlp = mid + delta if "mlp" in paths else mid
            x = mid + self.mlp(seen_by_mlp, n) + (delta if "rest" in paths else 0)
            direct = delta if "direct" in paths else direct
        return self.norm(x + direct, "ln_f") @ self.w["wte.weight"].T


@pytest.mark.parametrize("layer", [0, 1])
def test_paths_are_those_of_a_pass_by_hand(layer: int) -> None:
    model, hand = double("gpt2"), ByHand()
    change = iv.zero_ablate(model, layer=layer, head=2, rows=ROWS)
    close = {"rtol": 0, "atol": 1e-9}
    clean = logits(model)
    torch.testing.assert_close(clean, hand.logits(TOKENS, layer, 2, ROWS, set()), **close)
    with change:
        total = logits(model)
    torch.testing.assert_close(total, hand.logits(TOKENS, layer, 2, ROWS, {"mlp", "rest"}), **close)
    with patching.into_mlp(model, change, TOKENS, layer=layer):
        through_mlp = logits(model)
    torch.testing.assert_close(through_mlp, hand.logits(TOKENS, layer, 2, ROWS, {"mlp"}), **close)
    with patching.into_final(model, change, TOKENS, layer=layer):
        through_final = logits(model)
    torch.testing.assert_close(through_final, hand.logits(TOKENS, layer, 2, ROWS, {"direct"}), **close)
    both = patching.into_mlp(model, change, TOKENS, layer=layer)
    with both, patching.into_final(model, change, TOKENS, layer=layer):
        together = logits(model)
    torch.testing.assert_close(together, hand.logits(TOKENS, layer, 2, ROWS, {"mlp", "direct"}), **close)
    if layer == 1:  # the last layer has no other path
        torch.testing.assert_close(together, total, **close)
    assert min(float((x - clean).abs().max()) for x in (through_mlp, through_final, total)) > 1e-2
    assert float((through_final - clean).abs()[~ROWS].max()) < 1e-12


@pytest.mark.parametrize("kind", ["llama", "pythia", "gemma2", "gemma3", "qwen3", "gpt_neo", "no_layernorm"])
def test_in_the_last_layer_both_paths_together_are_the_whole_change(kind: str) -> None:
    model = double(kind)
    change = iv.zero_ablate(model, layer=LAYER, head=2)
    with change:
        total = logits(model)
    clean = logits(model)
    direct = patching.into_final(model, change, TOKENS, layer=LAYER)
    if kind == "no_layernorm":
        with direct:
            torch.testing.assert_close(logits(model), total, rtol=0, atol=1e-9)
        with pytest.raises(FraError, match="no MLP in layer 1"):
            patching.into_mlp(model, change, TOKENS, layer=LAYER)
        return
    with patching.into_mlp(model, change, TOKENS, layer=LAYER):
        alone = logits(model)
        with direct:
            torch.testing.assert_close(logits(model), total, rtol=0, atol=1e-4)
    moved = float((alone - clean).abs().max())
    assert moved == 0 if kind == "pythia" else moved > 1e-2  # in parallel blocks the MLP never sees the heads


def test_a_block_whose_hooks_do_not_add_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = double("gpt2"), frozen.read_hooks

    def normed(*given: Any) -> dict[str, torch.Tensor]:
        found = own(*given)
        return found | {"post": found["post"] / found["post"].norm(dim=-1, keepdim=True)}

    monkeypatch.setattr(patching, "read_hooks", normed)
    with pytest.raises(FraError, match="do not add up"):
        patching.into_final(model, iv.zero_ablate(model, layer=LAYER, head=2), TOKENS, layer=LAYER)


def test_patched_activations_are_the_sources_at_the_prompts_own_rows() -> None:
    model, name = double("gpt2"), "blocks.0.hook_attn_out"
    source = TOKENS.flip(0)
    theirs, mine = seen(model, name, tokens=source)[0], seen(model, name)[0]
    patch = patching.patch_activation(model, source, name, rows=ROWS)
    with patch:
        now, later = seen(model, name, "blocks.1.hook_resid_pre")
    assert torch.equal(now, torch.where(ROWS[..., None], theirs, mine))
    clean = seen(model, "blocks.1.hook_resid_pre")[0]
    apart = (later - clean).abs().amax(-1)
    assert float(apart[ROWS].min()) > 1e-3
    assert float(apart[~ROWS].max()) == 0


def test_losses_are_those_of_the_next_token() -> None:
    found = patching.losses(logits(double("gpt2")), TOKENS)
    truth = -logits(double("gpt2")).log_softmax(-1)[1, 6, TOKENS[1, 7]]
    assert float(found[1, 6]) == pytest.approx(float(truth), abs=1e-5)
    assert found.shape == (2, 15)


def test_a_spliced_activation_costs_what_it_costs() -> None:
    model, hook = double("gpt2"), "blocks.1.attn.hook_z"
    clean = patching.losses(logits(model), TOKENS)
    assert torch.equal(patching.losses_under(model, TOKENS), clean)
    own = seen(model, hook)[0]
    for same in (own, own.flatten(2), lambda z: z.clone()):
        assert torch.equal(patching.losses_under(model, TOKENS, patching.splice(model, hook, same)), clean)
    gone = patching.losses_under(model, TOKENS, patching.splice(model, hook, torch.zeros_like))
    by_hand = model.run_with_hooks(TOKENS, fwd_hooks=[(hook, lambda z, hook: torch.zeros_like(z))])
    assert torch.equal(gone, patching.losses(by_hand, TOKENS))
    assert float((gone - clean).abs().max()) > 1e-3
    with pytest.raises(FraError, match="no hook"):
        patching.splice(model, "blocks.1.nothing", own)


def test_bad_input_is_a_sentence() -> None:
    model, sae = double("gpt2"), head_sae()
    for features, says in (
        (torch.tensor([], dtype=torch.long), "integer ids"),
        ([3, 3], "named twice"),
        ([96], "range"),
    ):
        with pytest.raises(FraError, match=says):
            patching.ablate_features(model, features, sae)
    with pytest.raises(FraError, match="head outputs"):
        patching.ablate_features(model, [3], tiny_sae("blocks.1.ln1.hook_normalized"))
    with pytest.raises(FraError, match="3 prompts"), patching.ablate_features(model, torch.tensor([[1]] * 3), sae):
        logits(model)
    with pytest.raises(FraError, match="no hook"):
        patching.patch_activation(model, TOKENS, "blocks.1.nothing")
