"""Block-diagonal dictionaries of head outputs: every feature reads and writes one head alone.

A dictionary of the concatenated head outputs `hook_z` whose encoder and decoder are block-diagonal ("SAEs on
individual attention head outputs", in the literature). Parameters are *stored* as blocks and multiplied as a batch, so
that weights and multiply-adds are 1 / n_heads of those of a dense dictionary of the same width; biases do not shrink.

Importing this module registers the architecture "block_diagonal" with SAELens, for inference and for training;
`SAE.load_from_disk`, `SAE.from_pretrained`, `save_model`, folding, `to`, SAELens' trainer and its upload to the hub
then work as for any other dictionary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class, register_sae_training_class
from sae_lens.saes.sae import SAEConfig, SAEMetadata, TrainCoefficientConfig, TrainingSAE, TrainingSAEConfig
from torch import Tensor, nn

from fra.dictionaries.blocks import Blocks, by_head, check_k, check_sizes, dead_reconstruction, top_k
from fra.errors import FraError

__all__ = [
    "ARCHITECTURE",
    "BlockDiagonalSAE",
    "BlockDiagonalSAEConfig",
    "BlockDiagonalTrainingSAE",
    "BlockDiagonalTrainingSAEConfig",
]

ARCHITECTURE = "block_diagonal"


@dataclass
class BlockDiagonalSAEConfig(SAEConfig):  # type: ignore[misc]  # sae_lens has no stubs
    """Configuration for inference. Raises FraError where sizes, k or the activation scaling do not fit."""

    n_heads: int = 0
    """Heads whose outputs are concatenated; must be given."""
    activation: str = "topk"
    """ "topk", "jumprelu" or "relu"."""
    k: int = 1
    """Live features of each head at a position, at most; for "topk" alone."""
    rescale_acts_by_decoder_norm: bool = False
    """Whether TopK ranks features by activation times decoder norm, as SAELens' TopKSAE does; "topk" alone."""
    metadata: Any = field(default_factory=SAEMetadata)
    """As in SAELens, whose `from_dict` passes a plain dict at first."""

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens' registry."""
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self.d_in, self.d_sae, self.n_heads, self.normalize_activations)
        if self.activation not in ("topk", "jumprelu", "relu"):
            raise FraError(f"activation is {self.activation!r}: use topk, jumprelu or relu.")
        if self.activation == "topk":
            check_k(self.k, self.d_sae // self.n_heads)
        elif self.rescale_acts_by_decoder_norm:
            raise FraError(f"rescale_acts_by_decoder_norm is for topk alone; {self.activation} needs no ranking.")


class BlockDiagonalSAE(Blocks):
    """A block-diagonal dictionary for inference; see `fra.dictionaries.blocks.Blocks` for its parameters."""

    threshold: nn.Parameter

    def initialize_weights(self) -> None:
        """Blocks and biases; a threshold for each feature of a "jumprelu"."""
        super().initialize_weights()
        if self.cfg.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros_like(self.b_enc))

    def encode(self, x: Tensor) -> Float[Tensor, "*rows d_sae"]:
        """Activations of every feature; those of a head depend on its own output alone."""
        pre = self.hook_sae_acts_pre(self.pre_activations(self.process_sae_in(x)))
        match self.cfg.activation:
            case "topk":
                if self.cfg.rescale_acts_by_decoder_norm:
                    pre = pre * self.decoder_norms()
                acts = top_k(pre.unflatten(-1, (self.n_heads, -1)), self.cfg.k).flatten(-2)
            case "jumprelu":
                acts = pre.relu() * (pre > self.threshold)
            case _:
                acts = pre.relu()
        return self.hook_sae_acts_post(acts)  # type: ignore[no-any-return]

    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """As `Blocks` does it; thresholds are in units of the activation and grow with it."""
        norms = super().fold_and_get_W_dec_norm()
        if self.cfg.activation == "jumprelu":
            self.threshold.data.mul_(norms)
        return norms


@dataclass(kw_only=True)
class BlockDiagonalTrainingSAEConfig(TrainingSAEConfig):  # type: ignore[misc]
    """Configuration for training. Raises FraError where sizes, k or the activation scaling do not fit.

    The four switches of the recipe are `head_scale`, `tied_init`, `zero_biases` and `l1_by_decoder_norm`.
    """

    n_heads: int = 0
    """Heads whose outputs are concatenated; must be given."""
    activation: str = "topk"
    """ "topk", "batchtopk" (saved as "jumprelu", as SAELens does) or "relu"."""
    k: int | float = 1
    """Live features of each head at a position ("topk", a whole number) or on average ("batchtopk")."""
    pool: str = "head"
    """Where "batchtopk" picks: in each "head" by itself, or in the "layer", whose heads then compete in training (at
    inference a threshold decides, and no head sees another).
    """
    rescale_acts_by_decoder_norm: bool = True
    """Whether TopK ranks by activation times decoder norm; without meaning for "relu"."""
    aux_loss_coefficient: float = 1.0
    """Of the loss that lets dead features explain what is left of their own head ("topk", "batchtopk")."""
    topk_threshold_lr: float = 0.01
    """Rate at which "batchtopk" learns its threshold."""
    l1_coefficient: float = 1.0
    """Of the penalty on activations ("relu")."""
    l1_warm_up_steps: int = 0
    head_scale: bool = True
    """Whether each head's input is divided by its own size on the first batch, so that quiet heads count as much as
    loud ones in loss and penalty. Folded away when saved.
    """
    tied_init: bool = True
    """Encoder starts as the decoder's transpose, decoder rows at `decoder_init_norm`. False: both start as those of an
    nn.Linear over the whole layer, untied.
    """
    zero_biases: bool = True
    """Biases start at zero. False: as those of an nn.Linear over the whole layer."""
    l1_by_decoder_norm: bool = True
    """True: the penalty weighs activations by decoder norm, which is free (Anthropic, April 2024). False: it does
    not, and decoder rows are held at norm 1 (Bricken et al. 2023).
    """

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens' registry."""
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self.d_in, self.d_sae, self.n_heads, self.normalize_activations)
        if self.activation not in ("topk", "batchtopk", "relu"):
            raise FraError(f"activation is {self.activation!r}: use topk, batchtopk or relu.")
        if self.pool not in ("head", "layer"):
            raise FraError(f"pool is {self.pool!r}: use head or layer.")
        if self.activation == "relu":
            self.rescale_acts_by_decoder_norm = False
        else:
            check_k(self.k, self.d_sae // self.n_heads)
        if self.activation == "topk" and self.k != int(self.k):
            raise FraError(f"k is {self.k}: TopK picks a whole number of features a head; batchtopk takes fractions.")

    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        """SAELens' own, with BatchTopK turned into JumpReLU."""
        cfg: dict[str, Any] = super().get_inference_sae_cfg_dict()
        topk = self.activation == "topk"
        kept = {"activation": "jumprelu"} if self.activation == "batchtopk" else {}
        ranked = topk and self.rescale_acts_by_decoder_norm
        return cfg | kept | {"k": int(self.k) if topk else 1, "rescale_acts_by_decoder_norm": ranked}

    @property
    def unit_decoder(self) -> bool:
        """Whether decoder rows are held at norm 1."""
        return self.activation == "relu" and not self.l1_by_decoder_norm


class BlockDiagonalTrainingSAE(Blocks, TrainingSAE[BlockDiagonalTrainingSAEConfig]):  # type: ignore[misc]
    """A block-diagonal dictionary in training, for SAELens' trainer.

    The loss is the squared error in units of each head's input scale. Saved by `save_inference_model`, with decoder
    norms and input scales folded in.
    """

    input_scale: Tensor
    topk_threshold: Tensor
    n_scaled: Tensor

    def __init__(self, cfg: BlockDiagonalTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        device = self.b_dec.device
        self.register_buffer("input_scale", torch.ones(cfg.n_heads, dtype=self.dtype, device=device))
        self.register_buffer("n_scaled", torch.zeros((), dtype=torch.int64, device=device))
        # Double precision, as SAELens has it: small steps towards a number of another size.
        self.register_buffer("topk_threshold", torch.zeros(cfg.n_heads, dtype=torch.float64, device=device))
        self.mse_loss_fn = self._squared_error
        self._estimated = not cfg.head_scale

    def initialize_weights(self) -> None:
        """As the recipe's switches say."""
        super().initialize_weights()
        cfg = self.cfg
        with torch.no_grad():
            if cfg.tied_init:
                if cfg.decoder_init_norm is not None:
                    norms = self.W_dec_blocks.norm(dim=-1, keepdim=True)
                    self.W_dec_blocks.mul_(cfg.decoder_init_norm / norms)
                self.W_enc_blocks.copy_(self.W_dec_blocks.transpose(1, 2))
            else:
                self.W_enc_blocks.uniform_(-1, 1).div_(math.sqrt(cfg.d_in))
                self.W_dec_blocks.uniform_(-1, 1).div_(math.sqrt(cfg.d_sae))
            if not cfg.zero_biases:
                self.b_enc.uniform_(-1, 1).div_(math.sqrt(cfg.d_in))
                self.b_dec.uniform_(-1, 1).div_(math.sqrt(cfg.d_sae))

    @property
    def decoder_blocks(self) -> Float[Tensor, "n_heads d_block d_head"]:
        """The decoder as it is used; with rows held at norm 1 its gradient has no part along them."""
        if self.cfg.unit_decoder:
            return torch.nn.functional.normalize(self.W_dec_blocks, dim=-1)
        return self.W_dec_blocks

    @torch.no_grad()
    def estimate_input_scale(self, x: Float[Tensor, "*rows d_in"]) -> None:
        """Sets each head's scale to mean |x_h| / sqrt(d_head) on these rows, 1 for a head that is silent."""
        heads = by_head(x.detach().to(self.input_scale), self.n_heads)
        size = heads.norm(dim=-1).mean(dim=-1) / math.sqrt(heads.shape[-1])
        self.input_scale.copy_(torch.where(size > 0, size, torch.ones_like(size)))
        self.n_scaled.fill_(heads.shape[1])
        self._estimated = True

    def _wide(self, per_head: Tensor) -> Tensor:
        return per_head.repeat_interleave(self.cfg.d_in // self.n_heads)

    def scaled_back(self, out: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """The inverse of the per-head input scale."""
        return out * self._wide(self.input_scale) if self.cfg.head_scale else out

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The input less the decoder bias, in units of each head's scale."""
        x = super().process_sae_in(sae_in)
        return x / self._wide(self.input_scale) if self.cfg.head_scale else x

    def _squared_error(self, preds: Tensor, target: Tensor) -> Tensor:
        error = preds - target
        return (error / self._wide(self.input_scale) if self.cfg.head_scale else error).square()

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Float[Tensor, "*rows d_sae"], Float[Tensor, "*rows d_sae"]]:
        """Activations and pre-activations (in units of decoder norm where TopK ranks by it)."""
        pre = self.hook_sae_acts_pre(self.pre_activations(self.process_sae_in(x)))
        if self.cfg.rescale_acts_by_decoder_norm:
            pre = pre * self.decoder_norms()
        match self.cfg.activation:
            case "topk":
                acts = top_k(pre.unflatten(-1, (self.n_heads, -1)), int(self.cfg.k)).flatten(-2)
            case "batchtopk":
                acts = self._batch_top_k(pre)
            case _:
                acts = pre.relu()
        return self.hook_sae_acts_post(acts), pre

    def _batch_top_k(self, pre: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        heads = by_head(pre, self.n_heads)
        n = int(self.cfg.k * heads.shape[1])
        flat = top_k(heads.flatten(), n * self.n_heads) if self.cfg.pool == "layer" else top_k(heads.flatten(1), n)
        return flat.view(heads.shape).transpose(0, 1).reshape(pre.shape)

    def training_forward_pass(self, step_input: Any) -> Any:
        """One step's loss; the first one sets the input scales, each one of "batchtopk" moves its threshold."""
        if not self._estimated:
            if int(self.n_scaled) == 0:  # else it came with a checkpoint
                self.estimate_input_scale(step_input.sae_in)
            self._estimated = True
        if self.cfg.unit_decoder:
            with torch.no_grad():
                self.W_dec_blocks.div_(self.W_dec_blocks.norm(dim=-1, keepdim=True))
        output = super().training_forward_pass(step_input)
        if self.cfg.activation == "batchtopk":
            self._move_threshold(output.feature_acts)
        return output

    @torch.no_grad()
    def _move_threshold(self, acts: Tensor) -> None:
        heads = by_head(acts, self.n_heads).flatten(1).double()
        least = torch.where(heads > 0, heads, torch.inf).amin(dim=1)
        if self.cfg.pool == "layer":
            least = least.amin().expand_as(least)
        rate = self.cfg.topk_threshold_lr
        moved = (1 - rate) * self.topk_threshold + rate * least
        self.topk_threshold.copy_(torch.where(least.isfinite(), moved, self.topk_threshold))

    def calculate_aux_loss(
        self, step_input: Any, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The penalty of "relu"; for the others, what dead features explain of their own head's error (Gao et al. 2024,
        appendix A.2, head by head).
        """
        if self.cfg.activation == "relu":
            weight = self.decoder_norms() if self.cfg.l1_by_decoder_norm else 1.0
            return {"l1_loss": step_input.coefficients["l1"] * (feature_acts * weight).sum(-1).mean()}
        dead = step_input.dead_neuron_mask
        if dead is None or not bool(dead.any()):
            return {"auxiliary_reconstruction_loss": sae_out.new_tensor(0.0)}
        half = self.cfg.d_in // self.n_heads // 2
        acts = dead_reconstruction(hidden_pre, dead, self.n_heads, max(half, 1))
        if self.cfg.rescale_acts_by_decoder_norm:
            acts = acts / self.decoder_norms()
        residual = self._over_scale((step_input.sae_in - sae_out).detach())
        share = (dead.view(self.n_heads, -1).sum(dim=1) / max(half, 1)).clamp(max=1.0)
        per_head = by_head(self.times_decoder(acts) - residual, self.n_heads).square().sum(-1).mean(-1)
        return {"auxiliary_reconstruction_loss": self.cfg.aux_loss_coefficient * (share * per_head).sum()}

    def _over_scale(self, x: Tensor) -> Tensor:
        return x / self._wide(self.input_scale) if self.cfg.head_scale else x

    def get_coefficients(self) -> dict[str, TrainCoefficientConfig | float]:
        """The penalty's coefficient, for the trainer's warm-up."""
        if self.cfg.activation != "relu":
            return {}
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """As `Blocks` does it; rows that are held at norm 1 have nothing to fold."""
        if self.cfg.unit_decoder:
            self.W_dec_blocks.copy_(self.decoder_blocks)
            return torch.ones_like(self.b_enc)
        return super().fold_and_get_W_dec_norm()

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """As `Blocks` does it; activations, and the threshold with them, change where the decoder's norm is no part
        of them.
        """
        if self.cfg.unit_decoder:
            self.b_enc.data.div_(scaling_factor)
            self.b_dec.data.div_(scaling_factor)
            self.cfg.normalize_activations = "none"
            return
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            self.topk_threshold /= scaling_factor

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Folds decoder norms (where features are ranked by them) and input scales; thresholds one a feature."""
        super().process_state_dict_for_saving_inference(state_dict)
        heads, width = self.n_heads, self.cfg.d_sae // self.n_heads
        for name in ("input_scale", "n_scaled"):
            state_dict.pop(name)
        threshold = state_dict.pop("topk_threshold").to(self.b_enc).repeat_interleave(width)
        scale = (self.input_scale if self.cfg.head_scale else torch.ones_like(self.input_scale)).detach()
        norms = torch.ones_like(self.b_enc)
        state_dict["W_dec_blocks"] = self.decoder_blocks.detach().clone()
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = self.get_W_dec_norm()
            state_dict["W_dec_blocks"] = state_dict["W_dec_blocks"] / norms.view(heads, width, 1)
        state_dict["W_enc_blocks"] = state_dict["W_enc_blocks"] * norms.view(heads, 1, width)
        # With activations in units of the raw input the encoder needs no scale: only what is added to them does.
        state_dict["b_enc"] = state_dict["b_enc"] * norms * scale.repeat_interleave(width)
        if self.cfg.activation == "batchtopk":
            state_dict["threshold"] = threshold * scale.repeat_interleave(width)


if ARCHITECTURE not in SAE_CLASS_REGISTRY:
    register_sae_class(ARCHITECTURE, BlockDiagonalSAE, BlockDiagonalSAEConfig)
    register_sae_training_class(ARCHITECTURE, BlockDiagonalTrainingSAE, BlockDiagonalTrainingSAEConfig)
