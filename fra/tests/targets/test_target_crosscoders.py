"""Crosscoders in target files: loaded, admitted, resolved through; against the models' hooks and numpy in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fra
from fixtures import crosscoding
from fra import crosscoders, targets
from fra.core.coded import measure_arm
from fra.errors import FraError
from fra.targets.admission import dictionary_notes
from fra.tests.models import D_MODEL, build_model, random_tokens
from fra.tests.tiny_targets import NORMALIZED, one_sentence, refused, write_target, write_text

D_SAE, TOKENS = 3 * D_MODEL, random_tokens(12, 1)


def axes(folder: Path, slots: list[tuple[str, str]]) -> Path:
    """A crosscoder whose slot 1 is explained by construction, by the signed axes; slot 0 has a small say in every code,
    and features beyond the axes are of both.
    """
    rng = np.random.default_rng(3)
    own, other = np.concatenate((np.eye(D_MODEL), -np.eye(D_MODEL))), rng.normal(0, 0.02, (D_SAE, D_MODEL))
    mixed = np.concatenate((own, rng.normal(0, 0.02, (D_MODEL, D_MODEL))))
    tensors = {
        "W_enc": np.stack((other.T, mixed.T)), "W_dec": np.stack((other, mixed), axis=1),
        "b_enc": np.full(D_SAE, -0.02), "b_dec": np.zeros((2, D_MODEL)), "mean": rng.normal(0, 0.1, (2, D_MODEL)),
        "threshold": np.full(D_SAE, 0.2), "active_mean": rng.uniform(0.5, 2, D_SAE),
    }  # fmt: skip
    folder.mkdir()
    save_file(
        {name: torch.from_numpy(t).contiguous() for name, t in tensors.items()}, folder / "crosscoder.safetensors"
    )
    named = {"slots": [{"model": model, "hook": hook} for model, hook in slots]}
    (folder / "crosscoder.json").write_text(json.dumps(named))
    return folder


def made(folder: Path, *, slot: str = "slot = 1", models: str | None = None, hook: str = NORMALIZED) -> Path:
    """A target whose model is slot 1 of a crosscoder, another model being slot 0."""
    here, other = (build_model("gpt2", folder / name, seed) for seed, name in enumerate(("here", "other")))
    axes(folder / "cc", [("before", NORMALIZED), ("after", NORMALIZED)])
    models = f"models = {{ before = {json.dumps(other.name)} }}" if models is None else models
    table = f'[[dictionary]]\nkind = "crosscoder"\nhook = "{hook}"\npath = "cc"\n{slot}\n{models}\n'
    return write_target(folder, here, {}, write_text(folder / "text"), heads=table)


def test_a_target_resolves_through_its_crosscoder(tmp_path: Path) -> None:
    target = targets.load_target(made(tmp_path), dtype="float64")
    placed = target.crosscoders["cc"]
    m = fra.resolve(target.model, placed, TOKENS, head="L1H2")
    truth = target.model.run_with_cache(TOKENS[None])[1]
    other = targets.models.load_model(tmp_path / "other", dtype=torch.float64)
    x = np.stack([own[NORMALIZED][0].detach().numpy() for own in (other.run_with_cache(TOKENS[None])[1], truth)])
    w = {name: tensor.numpy() for name, tensor in saved(tmp_path / "cc").items()}
    pre = sum((x[s] - w["mean"][s]) @ w["W_enc"][s] for s in (0, 1)) + w["b_enc"]
    np.testing.assert_allclose(m.codes.dense()[0].numpy(), pre * (pre > w["threshold"]), atol=1e-10)
    seen = m.frozen.mask
    own = truth["blocks.1.attn.hook_attn_scores"][0, 2]
    torch.testing.assert_close(m.scores()[seen], own[seen], rtol=0, atol=1e-6)
    # The same through the function that measures batches.
    arm = measure_arm(target.model, placed, TOKENS[None], 1, NORMALIZED)
    torch.testing.assert_close(arm.codes.dense(), m.codes.dense(), rtol=0, atol=1e-12)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "crosscoder.safetensors")


def test_a_pair_is_what_the_reference_function_returns(tmp_path: Path) -> None:
    """By the reference's own steps: projections of decoder rows, times means while live; and activations over means."""
    target = targets.load_target(made(tmp_path), dtype="float64")
    placed = target.crosscoders["cc"]
    m = fra.resolve(target.model, placed, TOKENS, head="L1H2")
    t, s = 9, 4
    found = m.pair(t, s)
    q, k, values = found
    w = {name: tensor.numpy() for name, tensor in saved(tmp_path / "cc").items()}
    code, attn = m.codes.dense()[0].numpy(), target.model.blocks[1].attn
    ln = target.model.blocks[1].ln1.weight.detach().numpy()
    W_Q, W_K = (W[2].detach().numpy() for W in (attn.W_Q, attn.W_K))
    assert (q.numpy() == np.flatnonzero(code[t])).all()
    assert (k.numpy() == np.flatnonzero(code[s])).all()
    rows = [w["W_dec"][ids.numpy(), 1] for ids in (q, k)]
    rows = [(row - row.mean(1, keepdims=True)) * ln for row in rows]
    means = [w["active_mean"][ids.numpy()] for ids in (q, k)]
    unscaled = (rows[0] @ W_Q) @ (rows[1] @ W_K).T / W_Q.shape[1] ** 0.5 * means[0][:, None] * means[1]
    scaling = (code[t, q.numpy()] / means[0])[:, None] * (code[s, k.numpy()] / means[1])
    np.testing.assert_allclose(found.unscaled.numpy(), unscaled, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.scaling.numpy(), scaling, rtol=1e-9)
    np.testing.assert_allclose((found.unscaled * found.scaling).numpy(), values.numpy(), rtol=1e-9, atol=1e-12)
    plain = m.pair(t, s, active_mean=torch.ones(D_SAE))
    np.testing.assert_allclose(plain.scaling.numpy(), np.outer(code[t, q.numpy()], code[s, k.numpy()]), rtol=1e-9)
    with pytest.raises(FraError, match="mean while live is 0"):
        m.pair(t, s, active_mean=torch.zeros(D_SAE))
    with pytest.raises(FraError, match="one for each of 96 features"):
        m.pair(t, s, active_mean=torch.ones(3))


def test_a_crosscoder_is_admitted_and_named_in_the_ledger(tmp_path: Path) -> None:
    target = targets.load_target(made(tmp_path))
    report = targets.admit(target)
    quality = report.crosscoders["cc"]
    assert quality.explained_variance > 0
    assert 0 < quality.l0 < D_SAE / 2
    (note,) = dictionary_notes(target, report)
    assert (note["role"], note["source"], note["d_sae"]) == ("crosscoder", "cc", D_SAE)
    before = note["sha256"], target.fingerprint()
    # Another model in the other slot makes other codes: it is part of what the target is.
    build_model("gpt2", tmp_path / "other", 7)
    again = targets.load_target(tmp_path / "tiny.toml")
    assert dictionary_notes(again, report)[0]["sha256"] != before[0]
    assert again.fingerprint() != before[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slot": ""}, ("a crosscoder needs its path", "slot")),
        ({"slot": "slot = 2"}, ("has 2 slots", "numbered from 0")),
        ({"slot": "slot = -1"}, ("dictionary.0.slot",)),
        ({"slot": "slot = 0"}, ("reads the model 'after' too",)),
        ({"models": ""}, ("reads the model 'before' too",)),
        ({"models": 'models = { before = "nowhere" }'}, ("nowhere", "missing")),
        ({"models": 'models = { before = "other", third = "other" }'}, ("'third'", "leave it out")),
        ({"hook": "blocks.0.ln1.hook_normalized"}, ("slot 1", NORMALIZED)),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(made(tmp_path, **change), *words)


def test_keys_of_a_crosscoder_belong_to_one(tmp_path: Path) -> None:
    file = made(tmp_path)
    file.write_text(file.read_text().replace('kind = "crosscoder"\n', ""))
    refused(file, 'slot and models go with kind = "crosscoder"')


def test_two_models_of_other_widths_are_refused(tmp_path: Path) -> None:
    target = targets.load_target(made(tmp_path))
    placed = target.crosscoders["cc"]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "other")
    config.n_embd *= 2
    wide = build_model("gpt2", tmp_path / "wide", 0, config)
    other = crosscoders.Placed(placed.crosscoder, 1, {"before": targets.models.load_model(wide)})
    with pytest.raises(FraError, match="do not fit") as caught:
        fra.resolve(target.model, other, TOKENS, head="L1H2")
    one_sentence(caught.value)


def test_the_trainer_finds_features_of_one_slot_and_of_both(tmp_path: Path) -> None:
    """Planted: directions of both slots, and directions of one alone. Each must be found in its own slots."""
    generator = torch.Generator().manual_seed(5)
    d, n_true, rows = 24, 16, 256
    true = torch.nn.functional.normalize(torch.randn(n_true, 2, d, generator=generator), dim=-1)
    true[:4, 0], true[4:8, 1] = 0, 0
    offset = torch.randn(2, 1, d, generator=generator)

    def batches() -> Any:
        while True:
            live = torch.rand(rows, n_true, generator=generator) < 0.12
            size = live * (0.5 + torch.rand(rows, n_true, generator=generator))
            yield torch.einsum("rf,fsd->srd", size, true) + offset

    slots = (crosscoders.Slot("before", NORMALIZED), crosscoders.Slot("after", NORMALIZED))
    recipe = crosscoding.Recipe(d_sae=24, k=2, steps=700, learning_rate=5e-3, dead_after=50, k_dead=8)
    crosscoding.save(crosscoding.train(batches(), slots, recipe), tmp_path / "cc")
    read = crosscoders.load(tmp_path / "cc").to("cpu", torch.float32)
    x = next(batches())
    f = read.features(x)
    back = torch.einsum("rf,fsd->srd", f, read.W_dec) + read.b_dec[:, None] + read.mean[:, None]
    explained = 1 - (x - back).square().sum() / (x - x.mean(1, keepdim=True)).square().sum()
    assert explained > 0.9
    assert 1 < float((f > 0).float().sum(1).mean()) < 4
    share = read.share_of(1)
    unit = torch.nn.functional.normalize(read.W_dec.flatten(1), dim=1)
    cosine = unit @ torch.nn.functional.normalize(true.flatten(1), dim=1).T
    best = cosine.argmax(0)
    assert float(cosine.max(0).values.min()) > 0.9
    assert bool((share[best[:4]] > 0.9).all())
    assert bool((share[best[4:8]] < 0.1).all())
    assert bool((share[best[8:]] - 0.5).abs().max() < 0.15)
    torch.testing.assert_close(share + read.share_of(0), torch.ones(24))
    live = f > 0
    seen = live.sum(0) > 20
    mean = (f.sum(0) / live.sum(0).clamp(min=1))[seen]
    torch.testing.assert_close(read.active_mean[seen], mean, rtol=0.35, atol=0.05)
