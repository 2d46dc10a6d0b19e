"""Heads through crosscoders, against numpy in float64 and the model's own scores; files in the layouts of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fra
from fra import crosscoders
from fra.errors import FraError
from fra.tests.models import D_MODEL, random_tokens, tiny

D_SAE, TOKENS = 40, random_tokens(12, 1)
HOOKS = ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre")
MODELS = ("here", "here", "other")
SLOTS = list(zip(MODELS, HOOKS, strict=True))


def weights(n: int = 3) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(4)
    shapes = {"W_enc": (n, D_MODEL, D_SAE), "W_dec": (D_SAE, n, D_MODEL), "b_enc": (D_SAE,), "b_dec": (n, D_MODEL)}
    drawn = {name: torch.from_numpy(rng.normal(0, 0.3, shape)) for name, shape in shapes.items()}
    return drawn | {"mean": torch.from_numpy(rng.normal(1, 1, (n, D_MODEL)))}


def written(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    save_file(tensors or weights(), folder / "crosscoder.safetensors")
    named = {"slots": [{"model": model, "hook": hook} for model, hook in SLOTS]}
    (folder / "crosscoder.json").write_text(json.dumps(named))
    return folder


def features(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    """By the definition, in numpy: x [n_slots, pos, d]."""
    total = sum((x[s] - w.get("mean", np.zeros_like(w["b_dec"]))[s]) @ w["W_enc"][s] for s in range(len(x)))
    return np.maximum(np.asarray(total) + w["b_enc"], 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("slot", [0, 1])
def test_a_head_through_a_slot_sums_to_the_models_scores(kind: str, slot: int, tmp_path: Path) -> None:
    model, w = tiny(kind, torch.float64), {name: tensor.numpy() for name, tensor in weights().items()}
    other = torch.from_numpy(np.random.default_rng(9).normal(0, 1, (len(TOKENS), D_MODEL)))
    cc = crosscoders.load(written(tmp_path))
    layer = 1 - slot
    m = fra.resolve(model, cc, TOKENS, layer=layer, head=2, slot=slot, activations={2: other})
    _, cache = model.run_with_cache(TOKENS[None], names_filter=[*HOOKS[:2], f"blocks.{layer}.attn.hook_attn_scores"])
    x = np.stack([*(cache[hook][0].detach().numpy() for hook in HOOKS[:2]), other.numpy()])
    f = features(x, w)
    np.testing.assert_allclose(m.codes.dense()[0].numpy(), f, atol=1e-10)
    error = x[slot] - f @ w["W_dec"][:, slot] - w["b_dec"][slot] - w["mean"][slot]
    np.testing.assert_allclose(m.codes.error[0].numpy(), error, atol=1e-10)
    own = cache[f"blocks.{layer}.attn.hook_attn_scores"][0, 2]
    seen = m.frozen.mask
    torch.testing.assert_close(m.scores()[seen], own[seen], rtol=0, atol=1e-6)
    torch.testing.assert_close(sum(m.blocks().values())[seen], own[seen], rtol=0, atol=1e-6)
    # Without the mean in the bias term the sum is another.
    without = m.codes.bias - torch.from_numpy(w["mean"][slot])
    spoilt = type(m)(m.frozen, type(m.codes)(**{**vars_of(m.codes), "bias": without}), m.head)
    assert float((spoilt.scores() - own)[seen].abs().max()) > 1e-3


def vars_of(codes: Any) -> dict[str, Any]:
    return {name: getattr(codes, name) for name in ("row", "feature", "value", "decoder", "bias", "error", "shape")}


def test_public_layouts_are_the_same_crosscoder(tmp_path: Path) -> None:
    w = {name: tensor for name, tensor in weights(2).items() if name != "mean"}
    save_file(w, tmp_path / "diffing.safetensors")
    learnt = {
        "encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].transpose(0, 1).contiguous(), "decoder.bias": w["b_dec"],
    }  # fmt: skip
    save_file(learnt, tmp_path / "learning.safetensors")
    x = torch.from_numpy(np.random.default_rng(2).normal(0, 1, (2, 3, 5, D_MODEL)))
    plain = {name: tensor.numpy() for name, tensor in w.items()}
    read = (
        crosscoders.from_model_diffing(tmp_path / "diffing.safetensors", SLOTS[:2]),
        crosscoders.from_dictionary_learning(tmp_path / "learning.safetensors", SLOTS[:2]),
    )
    for cc in read:
        for slot in (0, 1):
            found = cc.codes(x, slot)
            f = features(x.flatten(1, 2).numpy(), plain)
            np.testing.assert_allclose(found.dense().flatten(0, 1).numpy(), f, atol=1e-12)
            decoded = f @ plain["W_dec"][:, slot] + plain["b_dec"][slot]
            whole = x[slot].flatten(0, 1).numpy()
            np.testing.assert_allclose(found.error.flatten(0, 1).numpy(), whole - decoded, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: fra.resolve(m, c, TOKENS, head="L1H0"), "say which slot"),
        (lambda m, c: fra.resolve(m, c, TOKENS, head="L1H0", slot=3), "slot 3 is out of range"),
        (lambda m, c: fra.resolve(m, c, TOKENS, head="L1H0", slot=0), "slot 2 of the crosscoder is 'other' at"),
        (
            lambda m, c: fra.resolve(m, c, TOKENS, head="L1H0", slot=0, activations={2: torch.zeros(3, 3)}),
            "same tokens",
        ),
        (lambda m, c: c.codes(torch.zeros(2, 1, 3, D_MODEL), 0), "give those of every slot"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(call: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(FraError, match=message) as caught:
        call(tiny("gpt2", torch.float64), crosscoders.load(written(tmp_path)))
    assert "\n" not in str(caught.value)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    w = weights()
    with pytest.raises(FraError, match="W_dec of the crosscoder has shape"):
        crosscoders.load(written(tmp_path, w | {"W_dec": w["W_dec"].transpose(0, 1).contiguous()}))
    with pytest.raises(FraError, match="lacks 'b_dec'"):
        crosscoders.load(written(tmp_path, {name: w[name] for name in ("W_enc", "W_dec", "b_enc")}))
    with pytest.raises(FraError, match="holds 'log_threshold' too"):
        crosscoders.load(written(tmp_path, w | {"log_threshold": w["b_enc"].clone()}))
    (tmp_path / "crosscoder.safetensors").write_bytes(b"\x80\x04\x95")
    with pytest.raises(FraError, match="pickle"):
        crosscoders.load(tmp_path)
