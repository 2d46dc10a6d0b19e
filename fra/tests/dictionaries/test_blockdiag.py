"""Block-diagonal dictionaries against a masked dense computation, and all that SAELens does with a dictionary."""

from __future__ import annotations

import shutil
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig, upload_saes_to_huggingface
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainingSAE, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fra.dictionaries.blockdiag import (
    ARCHITECTURE,
    BlockDiagonalSAE,
    BlockDiagonalSAEConfig,
    BlockDiagonalTrainingSAE,
    BlockDiagonalTrainingSAEConfig,
)
from fra.dictionaries.codes import check_kind
from fra.errors import FraError

HEADS, D_HEAD, WIDTH = 4, 6, 10
D_IN, D_SAE = HEADS * D_HEAD, HEADS * WIDTH
VARIANTS = {
    "topk": {"activation": "topk", "k": 3},
    "batchtopk": {"activation": "batchtopk", "k": 2.5},
    "batchtopk, layer": {"activation": "batchtopk", "k": 2.5, "pool": "layer"},
    "topk unranked": {"activation": "topk", "k": 3, "rescale_acts_by_decoder_norm": False},
    "batchtopk unranked": {"activation": "batchtopk", "k": 2.5, "rescale_acts_by_decoder_norm": False},
    "relu": {"activation": "relu"},
    "relu, unit": {"activation": "relu", "l1_by_decoder_norm": False},
}


def training(seed: int = 0, **options: Any) -> BlockDiagonalTrainingSAE:
    """Random weights, biases and scales, so that no term is zero or one by luck."""
    config = {"d_in": D_IN, "d_sae": D_SAE, "n_heads": HEADS, "dtype": "float64", **options}
    sae = BlockDiagonalTrainingSAE(BlockDiagonalTrainingSAEConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    sae.estimate_input_scale(inputs(1))
    sae.topk_threshold.copy_(torch.linspace(0.2, 0.5, HEADS))
    return sae


def inputs(seed: int = 0, n: int = 32) -> Tensor:
    """Head outputs of unequal size."""
    x = torch.randn(n, HEADS, D_HEAD, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * torch.tensor([0.3, 1.0, 2.0, 5.0], dtype=torch.float64)[:, None]).flatten(1)


def masked(sae: Any) -> dict[str, Tensor]:
    """Dense matrices, filled entry by entry from the blocks, with every off-block entry there and zero."""
    enc, dec = torch.zeros(D_IN, D_SAE, dtype=torch.float64), torch.zeros(D_SAE, D_IN, dtype=torch.float64)
    for h, i, j in product(range(HEADS), range(D_HEAD), range(WIDTH)):
        enc[h * D_HEAD + i, h * WIDTH + j] = sae.W_enc_blocks.detach()[h, i, j]
        dec[h * WIDTH + j, h * D_HEAD + i] = sae.decoder_blocks.detach()[h, j, i]
    return {"W_enc": enc, "W_dec": dec, "b_enc": sae.b_enc.detach().clone(), "b_dec": sae.b_dec.detach().clone()}


def dense_loss(sae: Any, w: dict[str, Tensor], x: Tensor, l1: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, reconstruction and loss as the docstrings say, with dense matrices and loops."""
    cfg = sae.cfg
    scale = torch.cat([sae.input_scale[h].expand(D_HEAD) for h in range(HEADS)]) if cfg.head_scale else torch.ones(D_IN)
    norms = torch.stack([row.square().sum().sqrt() for row in w["W_dec"]])
    pre = ((x - w["b_dec"]) / scale) @ w["W_enc"] + w["b_enc"]
    ranked = cfg.activation != "relu" and cfg.rescale_acts_by_decoder_norm
    if ranked:
        pre = pre * norms
    keep = torch.zeros_like(pre)
    for h in range(HEADS):
        block = slice(h * WIDTH, (h + 1) * WIDTH)
        if cfg.activation == "topk":
            for t in range(len(x)):
                keep[t, block] = (pre[t, block] >= pre[t, block].sort().values[-int(cfg.k)]).double()
        elif cfg.activation == "batchtopk" and cfg.pool == "head":
            keep[:, block] = (pre[:, block] >= pre[:, block].flatten().sort().values[-int(cfg.k * len(x))]).double()
        elif cfg.activation == "relu":
            keep[:, block] = 1
    if cfg.activation == "batchtopk" and cfg.pool == "layer":
        keep = (pre >= pre.flatten().sort().values[-int(cfg.k * len(x)) * HEADS]).double()
    acts = pre.clamp(min=0) * keep
    out = ((acts / norms if ranked else acts) @ w["W_dec"]) * scale + w["b_dec"]
    loss = ((out - x) / scale).square().sum() / len(x)
    if cfg.activation == "relu":
        loss = loss + l1 * (acts * (norms if cfg.l1_by_decoder_norm else 1)).sum() / len(x)
    return acts, out, loss


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradient_are_those_of_a_masked_dense_dictionary(variant: str, scaled: bool) -> None:
    sae, x = training(head_scale=scaled, **VARIANTS[variant]), inputs()
    if sae.cfg.unit_decoder:
        sae.fold_W_dec_norm()
    w = {name: tensor.detach().requires_grad_() for name, tensor in masked(sae).items()}
    acts, out, loss = dense_loss(sae, w, x, l1=0.7)
    step = sae.training_forward_pass(TrainStepInput(x, {"l1": 0.7}, None, 0, False))
    torch.testing.assert_close(step.feature_acts, acts)
    torch.testing.assert_close(step.sae_out, out)
    torch.testing.assert_close(step.loss, loss)
    assert 0 < float((acts > 0).double().mean()) < 1
    loss.backward()
    step.loss.backward()
    dec = torch.block_diag(*sae.W_dec_blocks.grad)
    expected = w["W_dec"].grad * torch.block_diag(*torch.ones_like(sae.W_dec_blocks))
    if sae.cfg.unit_decoder:  # what lies along a row of norm 1 is no direction to move in
        rows = w["W_dec"].detach()
        expected = expected - (expected * rows).sum(1, keepdim=True) * rows
    torch.testing.assert_close(dec, expected)
    enc = w["W_enc"].grad * torch.block_diag(*torch.ones_like(sae.W_enc_blocks))
    torch.testing.assert_close(torch.block_diag(*sae.W_enc_blocks.grad), enc)
    torch.testing.assert_close(sae.b_enc.grad, w["b_enc"].grad)
    torch.testing.assert_close(sae.b_dec.grad, w["b_dec"].grad)


def test_dead_features_explain_what_is_left_of_their_own_head() -> None:
    sae, x = training(k=2), inputs()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[0, 1, 2, 3, 4, WIDTH + 1]] = True  # five of head 0, one of head 1
    step = sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    scale = sae.input_scale.repeat_interleave(D_HEAD)
    w = masked(sae)
    norms, total = w["W_dec"].norm(dim=1), 0.0
    left = ((x - step.sae_out) / scale).detach()
    pre = (((x - w["b_dec"]) / scale) @ w["W_enc"] + w["b_enc"]) * norms
    for h, among, k, share in ((0, [0, 1, 2, 3, 4], 3, 1.0), (1, [WIDTH + 1], 1, 1 / 3)):
        error = left.clone()
        for t in range(len(x)):
            for f in sorted(among, key=lambda f: -float(pre[t, f]))[:k]:
                error[t] -= pre[t, f] / norms[f] * w["W_dec"][f]
        total += share * error[:, h * D_HEAD : (h + 1) * D_HEAD].square().sum() / len(x)
    torch.testing.assert_close(step.losses["auxiliary_reconstruction_loss"], total)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_what_was_trained(tmp_path: Path, variant: str, scaled: bool) -> None:
    sae, x = training(head_scale=scaled, **VARIANTS[variant]), inputs()
    sae.save_inference_model(tmp_path / "saved")
    found = SAE.load_from_disk(tmp_path / "saved")
    assert isinstance(found, BlockDiagonalSAE)
    assert found.cfg.architecture() == ARCHITECTURE
    if sae.cfg.activation == "batchtopk":
        assert found.cfg.activation == "jumprelu"
        scale = sae.input_scale if scaled else torch.ones(HEADS)
        norms = sae.decoder_norms() if sae.cfg.rescale_acts_by_decoder_norm else 1
        s = scale.repeat_interleave(D_HEAD)
        pre = (((x - sae.b_dec) / s) @ sae.W_enc + sae.b_enc) * norms
        acts = (pre * (pre > sae.topk_threshold.repeat_interleave(WIDTH))).clamp(min=0)
        out = (acts / norms) @ sae.W_dec * s + sae.b_dec
    else:
        acts, _ = sae.encode_with_hidden_pre(x)
        out = sae.decode(acts)
    assert torch.equal(found.encode(x) > 0, acts > 0)
    torch.testing.assert_close(found(x), out)
    stored = load_file(tmp_path / "saved" / "sae_weights.safetensors")
    assert stored["W_enc_blocks"].shape == (HEADS, D_HEAD, WIDTH)
    assert stored["W_dec_blocks"].shape == (HEADS, WIDTH, D_HEAD)
    assert sum(t.numel() for n, t in stored.items() if n.startswith("W_")) * HEADS == 2 * D_IN * D_SAE
    found.save_model(tmp_path / "again")
    again = SAE.load_from_disk(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), again.state_dict().values(), strict=True))
    assert again.to(torch.float32).encode(x.float()).dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_folding_keeps_the_reconstruction(tmp_path: Path, variant: str) -> None:
    sae, x = training(**VARIANTS[variant]), inputs()
    sae.save_inference_model(tmp_path)
    found = SAE.load_from_disk(tmp_path)
    before = found(x)
    scale = 0.37
    found.fold_activation_norm_scaling_factor(scale)
    torch.testing.assert_close(found(x / scale), before / scale)
    if "unranked" in variant and "batch" not in variant:
        with pytest.raises(FraError, match="which features this TopK dictionary picks"):
            found.fold_W_dec_norm()
        return
    found.fold_W_dec_norm()
    torch.testing.assert_close(found(x / scale), before / scale)
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))
    off = 1 - torch.block_diag(*torch.ones(HEADS, D_HEAD, WIDTH, dtype=torch.float64))
    assert (found.W_enc * off).count_nonzero() == 0
    assert (found.W_dec.T * off).count_nonzero() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_form_folds_like_its_saved_form(tmp_path: Path, variant: str) -> None:
    sae, x, scale = training(**VARIANTS[variant]), inputs(), 0.37
    sae.save_inference_model(tmp_path / "a")
    sae.fold_activation_norm_scaling_factor(scale)
    if "unranked" not in variant:
        sae.fold_W_dec_norm()
    sae.save_inference_model(tmp_path / "b")
    before, after = SAE.load_from_disk(tmp_path / "a"), SAE.load_from_disk(tmp_path / "b")
    assert 0 < float((before.encode(x) > 0).double().mean()) < 1
    torch.testing.assert_close(after(x / scale), before(x) / scale)


def test_checkpoint_goes_on_where_it_stopped(tmp_path: Path) -> None:
    sae, x = training(activation="batchtopk", k=2), inputs()
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    one, two = (s.training_forward_pass(TrainStepInput(x, {}, None, 0, False)) for s in (sae, again))
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(sae.topk_threshold, again.topk_threshold)


def test_each_switch_does_what_it_says() -> None:
    def fresh(**options: Any) -> BlockDiagonalTrainingSAE:
        torch.manual_seed(0)
        return BlockDiagonalTrainingSAE(
            BlockDiagonalTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, n_heads=HEADS, dtype="float64", **options)
        )

    tied = fresh()
    assert torch.equal(tied.W_enc, tied.W_dec.T)
    torch.testing.assert_close(tied.decoder_norms(), torch.full((D_SAE,), 0.1, dtype=torch.float64))
    assert not tied.b_enc.any() and not tied.b_dec.any()
    plain = fresh(tied_init=False, zero_biases=False)
    assert not torch.allclose(plain.W_enc, plain.W_dec.T)
    for tensor, fan_in in ((plain.W_enc_blocks, D_IN), (plain.b_enc, D_IN), (plain.W_dec_blocks, D_SAE)):
        assert 0.5 * fan_in**-0.5 < float(tensor.detach().abs().max()) <= fan_in**-0.5
    step = TrainStepInput(inputs(), {}, None, 0, False)
    tied.training_forward_pass(step)
    sizes = inputs().view(-1, HEADS, D_HEAD).square().sum(-1).sqrt().mean(0) / D_HEAD**0.5
    torch.testing.assert_close(tied.input_scale, sizes)
    off = fresh(head_scale=False)
    off.training_forward_pass(step)
    assert torch.equal(off.input_scale, torch.ones(HEADS, dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_saelens_trainer_trains_it(tmp_path: Path, variant: str) -> None:
    torch.manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(HEADS, WIDTH, D_HEAD), dim=-1)

    def batches() -> Any:
        while True:
            codes = torch.rand(64, HEADS, WIDTH) * (torch.rand(64, HEADS, WIDTH) < 0.15)
            yield torch.einsum("nhf,hfd->nhd", codes, atoms).flatten(1)

    options = {**VARIANTS[variant], "l1_coefficient": 0.05}
    sae = BlockDiagonalTrainingSAE(
        BlockDiagonalTrainingSAEConfig(
            d_in=D_IN, d_sae=D_SAE, n_heads=HEADS, normalize_activations="expected_average_only_in", **options
        )
    )
    config = SAETrainerConfig(
        total_training_samples=64 * 150,
        train_batch_size_samples=64,
        lr=1e-2,
        lr_end=1e-3,
        dead_feature_window=20,
        n_batches_for_norm_estimate=3,
    )
    data = batches()
    test = torch.cat([next(data) for _ in range(10)])
    SAETrainer(config, sae, data).fit()
    sae.save_inference_model(tmp_path)
    found = SAE.load_from_disk(tmp_path)
    assert found.cfg.normalize_activations == "none"
    left = (found(test).detach() - test).square().sum() / (test - test.mean(0)).square().sum()
    assert float(left) < 0.5
    if sae.cfg.unit_decoder:
        torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("variant", ["topk", "batchtopk, layer", "relu"])
def test_no_feature_sees_another_head(tmp_path: Path, variant: str) -> None:
    training(**VARIANTS[variant]).save_inference_model(tmp_path)
    sae, x = SAE.load_from_disk(tmp_path), inputs()
    for h in range(HEADS):
        alone = torch.zeros_like(x)
        alone[:, h * D_HEAD : (h + 1) * D_HEAD] = x[:, h * D_HEAD : (h + 1) * D_HEAD]
        own = sae.head_of() == h
        assert torch.equal(sae.encode(alone)[:, own], sae.encode(x)[:, own])


def test_head_outputs_by_head_and_decoding_first() -> None:
    def reading(form: Any) -> BlockDiagonalSAE:
        torch.manual_seed(0)
        metadata = SAEMetadata(hook_name="blocks.0.attn.hook_z")
        config = BlockDiagonalSAEConfig(d_in=D_IN, d_sae=D_SAE, n_heads=HEADS, k=3, metadata=metadata)
        config.reshape_activations = form
        return BlockDiagonalSAE(config)

    flat, heads = reading("none"), reading("hook_z")
    acts = torch.rand(2, 5, D_SAE)
    assert heads.decode(acts).shape == (2, 5, HEADS, D_HEAD)
    x = inputs(n=10).float().view(2, 5, HEADS, D_HEAD)
    assert torch.equal(heads.encode(x), flat.encode(x.flatten(2)))
    assert torch.equal(heads(x).flatten(2), flat(x.flatten(2)))
    for sae, wrong in ((heads, x.flatten(2)), (flat, x), (heads, x.view(2, 5, HEADS // 2, 2 * D_HEAD))):
        with pytest.raises(FraError, match="4 heads reads"):
            sae.encode(wrong)


def test_hub_upload_and_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.training import upload_saes_to_huggingface as upload

    def upload_folder(self: Any, *, folder_path: Any, path_in_repo: str, **_: Any) -> None:
        shutil.copytree(folder_path, tmp_path / "hub" / path_in_repo, dirs_exist_ok=True)

    def download(repo_id: str, filename: str, **_: Any) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        if not (tmp_path / "hub" / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / "hub" / filename)

    monkeypatch.setattr(upload.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(upload, "_repo_exists", lambda *_: True)
    monkeypatch.setattr(loaders, "hf_hub_download", download)
    training(k=3).save_inference_model(tmp_path / "saved")
    sae = SAE.load_from_disk(tmp_path / "saved")
    upload_saes_to_huggingface({"layer_1": sae}, "someone/heads", add_default_readme=False, show_progress=False)
    found = SAE.from_pretrained("someone/heads", "layer_1", dtype="float64")
    assert torch.equal(found.encode(inputs()), sae.encode(inputs()))


def test_weights_and_multiply_adds_are_a_head_th() -> None:
    options = {"d_in": 64, "d_sae": 128, "k": 2}
    block = BlockDiagonalSAE(BlockDiagonalSAEConfig(n_heads=8, **options))
    dense = TopKSAE(TopKSAEConfig(**options))
    x = torch.randn(16, 64)

    def counted(sae: Any) -> tuple[int, int, int]:
        with FlopCounterMode(display=False) as counter:
            sae(x)
        sizes = {name: p.numel() for name, p in sae.named_parameters()}
        weights = sum(n for name, n in sizes.items() if name.startswith("W_"))
        return weights, sum(sizes.values()) - weights, counter.get_total_flops()

    (weights, biases, flops), whole = counted(block), counted(dense)
    assert (8 * weights, biases, 8 * flops) == whole


def test_it_is_a_dictionary_for_this_library() -> None:
    check_kind(BlockDiagonalSAE(BlockDiagonalSAEConfig(d_in=D_IN, d_sae=D_SAE, n_heads=HEADS, k=3)))
    with pytest.raises(FraError, match="still in training form"):
        check_kind(training(k=3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_heads": 0}, "one block a head"),
        ({"n_heads": 5}, "d_in is 24"),
        ({"d_sae": 42}, "d_sae is 42"),
        ({"k": 0}, "k is 0"),
        ({"k": WIDTH + 1}, "k is 11"),
        ({"normalize_activations": "layer_norm"}, "mixes the heads"),
        ({"normalize_activations": "covariance_whitening"}, "mixes the heads"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
    ],
)
@pytest.mark.parametrize("kind", [BlockDiagonalSAEConfig, BlockDiagonalTrainingSAEConfig])
def test_refusals(kind: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(FraError, match=words):
        kind(**{"d_in": D_IN, "d_sae": D_SAE, "n_heads": HEADS, "k": 3, **options})


def test_further_refusals() -> None:
    base = {"d_in": D_IN, "d_sae": D_SAE, "n_heads": HEADS}
    with pytest.raises(FraError, match="whole number"):
        BlockDiagonalTrainingSAEConfig(k=2.5, **base)
    with pytest.raises(FraError, match="pool is"):
        BlockDiagonalTrainingSAEConfig(pool="batch", **base)
    with pytest.raises(FraError, match="topk alone"):
        BlockDiagonalSAEConfig(activation="relu", rescale_acts_by_decoder_norm=True, **base)
    sae = BlockDiagonalSAE(BlockDiagonalSAEConfig(**base))
    with pytest.raises(FraError, match="whitening"):
        sae.fold_activation_whitening(torch.zeros(D_IN), torch.eye(D_IN), torch.eye(D_IN))
    assert {f.name for f in fields(BlockDiagonalSAEConfig)} <= {f.name for f in fields(BlockDiagonalTrainingSAEConfig)}
