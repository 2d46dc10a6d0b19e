"""What block-diagonal dictionaries are by construction, counted and not assumed: their cost, and whose features are
whose.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fra.dictionaries.blockdiag import (
    BlockDiagonalSAE,
    BlockDiagonalSAEConfig,
    BlockDiagonalTrainingSAE,
    BlockDiagonalTrainingSAEConfig,
)
from fra.dictionaries.hooks import LayerHooks
from fra.measures.block_diagonal.designs import Belonging, Cost
from fra.measures.block_diagonal.frontier import Frontier, encode, head_of
from fra.statistics.stats import seed_of
from fra.stimuli.natural import natural_documents
from fra.targets.target import Target
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.conditions import exact

MASKED = "masked dense dictionary: distance from 1 / n_heads"
CHANGED = "share of features that change without the other heads"
CHANGED_DENSE = "the same share in a dense dictionary"
BIASES = "biases: distance from 1"


class MaskedSAE(TopKSAE):  # type: ignore[misc]  # sae_lens has no stubs
    """The other way to a block-diagonal dictionary, as a control: dense matrices, zero off the blocks."""

    def mask(self, n_heads: int) -> None:
        """Sets everything off the blocks to zero."""
        d_in, d_sae = self.W_enc.shape
        row, column = torch.arange(d_in) // (d_in // n_heads), torch.arange(d_sae) // (d_sae // n_heads)
        blocks = row[:, None] == column
        with torch.no_grad():
            self.W_enc.mul_(blocks)
            self.W_dec.mul_(blocks.T)


def cost(sae: Any, d_in: int, rows: int) -> dict[str, int | float]:
    """Stored weights and biases, and the multiply-adds of a row: forward, and forward with backward."""
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0))
    sizes = {name: p.numel() for name, p in sae.named_parameters()}
    weights = sum(n for name, n in sizes.items() if name.startswith("W_"))
    with FlopCounterMode(display=False) as forward:
        sae(x)
    with FlopCounterMode(display=False) as training:
        if isinstance(sae, BlockDiagonalTrainingSAE):
            sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False)).loss.backward()
        else:
            (sae(x) - x).square().sum().backward()
    return {
        "weights": weights,
        "biases": sum(sizes.values()) - weights,
        "multiply-adds": forward.get_total_flops() / 2 / rows,
        "multiply-adds of a training step": training.get_total_flops() / 2 / rows,
    }


def cost_evidence(claim: Claim, target: Target) -> Evidence:
    """B01: dictionaries of the target's size, block-diagonal against dense; the masked dense one must not pass."""
    n_heads, d_in = target.n_heads, int(target.model.cfg.d_head) * target.n_heads
    if n_heads == 1:
        return Evidence(claim=claim, head=None, cannot="with one head a block-diagonal dictionary is a dense one")
    design = claim.designed(Cost)
    d_sae, rows = design.expansion * d_in, design.rows
    dense = cost(TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=n_heads)), d_in, rows)
    control = MaskedSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=n_heads))
    control.mask(n_heads)
    block = cost(BlockDiagonalSAE(BlockDiagonalSAEConfig(d_in=d_in, d_sae=d_sae, n_heads=n_heads, k=1)), d_in, rows)
    training = cost(
        BlockDiagonalTrainingSAE(BlockDiagonalTrainingSAEConfig(d_in=d_in, d_sae=d_sae, n_heads=n_heads, k=1)),
        d_in,
        rows,
    )
    masked = cost(control, d_in, rows)
    ratios = {
        "weights": block["weights"] / dense["weights"],
        "multiply-adds": block["multiply-adds"] / dense["multiply-adds"],
        "multiply-adds of a training step": training["multiply-adds of a training step"]
        / dense["multiply-adds of a training step"],
        "masked": masked["multiply-adds"] / dense["multiply-adds"],
        "biases": block["biases"] / dense["biases"],
    }

    def off(name: str, wanted: float) -> float:
        return abs(ratios[name] / wanted - 1)

    worst = max(off(name, 1 / n_heads) for name in ("weights", "multiply-adds", "multiply-adds of a training step"))
    conditions = (
        exact(claim.condition, worst, claim.bar, above=False),
        exact(BIASES, off("biases", 1.0), claim.bars[BIASES], above=False),
        exact(MASKED, off("masked", 1 / n_heads), claim.bars[MASKED]),
    )
    detail = {"1 / n_heads": 1 / n_heads, "ratios": ratios, "block-diagonal": block, "dense": dense, "masked": masked}
    return Evidence(claim=claim, head=None, candidates={"counted": conditions}, n=claim.n, detail=detail)


def round_trip(sae: Any, scale: float) -> Any:
    """The dictionary saved, loaded, its activation scale and decoder norms folded, saved and loaded again."""
    device = str(sae.b_dec.device)
    with tempfile.TemporaryDirectory() as folder:
        sae.save_model(Path(folder) / "one")
        again = SAE.load_from_disk(Path(folder) / "one", device=device)
        again.fold_activation_norm_scaling_factor(scale)
        if again.cfg.activation != "topk" or again.cfg.rescale_acts_by_decoder_norm:
            again.fold_W_dec_norm()  # any other TopK refuses it: its choice would change
        again.save_model(Path(folder) / "two")
        return SAE.load_from_disk(Path(folder) / "two", device=device)


def off_block(sae: Any, n_heads: int) -> int:
    """Entries of the dense encoder and decoder outside the blocks that are not exactly zero."""
    enc, dec = sae.W_enc.detach(), sae.W_dec.detach()
    row = torch.arange(enc.shape[0], device=enc.device) // (enc.shape[0] // n_heads)
    column = torch.arange(enc.shape[1], device=enc.device) // (enc.shape[1] // n_heads)
    outside = row[:, None] != column
    return int((enc[outside] != 0).sum() + (dec.T[outside] != 0).sum())


@torch.no_grad()
def changed(sae: Any, z: Float[Tensor, "n n_heads d_head"]) -> float:
    """Share of the features live in z whose activations differ anywhere when all heads but their own are put to
    zero.
    """
    whole, owner = encode(sae, z), head_of(sae, z.shape[1])
    live = (whole > 0).any(0)
    differs = torch.zeros_like(live)
    for head in range(z.shape[1]):
        alone = torch.zeros_like(z)
        alone[:, head] = z[:, head]
        differs |= (owner == head) & (encode(sae, alone) != whole).any(0)
    return float(differs[live].double().mean())


def belonging_evidence(claim: Claim, target: Target, frontier: Frontier | None) -> Evidence:
    """B02: the study's block-diagonal dictionaries, else one freshly started, and dense ones that must not pass."""
    n_heads, d_in = target.n_heads, int(target.model.cfg.d_head) * target.n_heads
    if n_heads == 1:
        return Evidence(claim=claim, head=None, cannot="with one head every feature belongs to it")
    trained = {
        arm: target.study(arm)[:1] for arm in ("block-width", "block-parameters", "block-l1", "dense", "dense-l1")
    }
    design = claim.designed(Belonging)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(claim.digest, target.name))
        config: dict[str, Any] = {"d_in": d_in, "d_sae": design.expansion * d_in, "device": target.device}
        k = max(1, int(design.live * d_in / n_heads))
        fresh = BlockDiagonalSAE(
            BlockDiagonalSAEConfig(**config, n_heads=n_heads, k=k, rescale_acts_by_decoder_norm=True)
        )
        dense = TopKSAE(TopKSAEConfig(**config, k=k * n_heads, rescale_acts_by_decoder_norm=True))
        masked = MaskedSAE(dense.cfg)
    hook = frontier.hook if frontier else LayerHooks(target.n_layers - 1).z
    z = _head_outputs(target, hook, claim.n, design.longest)
    blocks = [fresh, *(sae for arm, saes in trained.items() if arm.startswith("block") for sae in saes)]
    controls = [dense, *(sae for arm, saes in trained.items() if arm.startswith("dense") for sae in saes)]
    masked.mask(n_heads)  # its weights are zero off the blocks, but its heads compete for one TopK
    after = [round_trip(sae, design.folded) for sae in blocks]
    outside = float(sum(off_block(sae, n_heads) for sae in after))
    share = max(changed(sae, z) for sae in (*blocks, *after))
    least = min(changed(sae, z) for sae in controls)
    conditions = (
        exact(claim.condition, outside, claim.bar, above=False),
        exact(CHANGED, share, claim.bars[CHANGED], above=False),
        exact(CHANGED_DENSE, least, claim.bars[CHANGED_DENSE]),
    )
    detail = {
        "dictionaries": len(blocks),
        "off-block weights that are not zero in a dense dictionary": off_block(dense, n_heads),
        "share of features that change under a global TopK, off-block weights zero": changed(masked, z),
    }
    return Evidence(claim=claim, head=None, candidates={"counted": conditions}, n=claim.n, detail=detail)


@torch.no_grad()
def _head_outputs(target: Target, hook: str, n: int, longest: int) -> Float[Tensor, "rows n_heads d_head"]:
    found = []
    for tokens in natural_documents(target, n, longest):
        _, cache = target.model.run_with_cache(tokens[None].to(target.device), names_filter=[hook])
        found.append(cache[hook][0].reshape(len(tokens), target.n_heads, -1))
    return torch.cat(found).float()
