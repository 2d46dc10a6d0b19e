"""The arithmetic of block-diagonal dictionaries: one small matrix a head, multiplied as a batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.sae import SAE
from torch import Tensor, nn

from fra.errors import FraError

NORMALISATIONS = ("none", "expected_average_only_in")
"""The activation scalings of SAELens that look at no other head."""


def check_sizes(d_in: int, d_sae: int, n_heads: int, normalize_activations: str) -> None:
    """Raises FraError where the sizes do not divide, or the activation scaling would mix heads."""
    if n_heads < 1:
        raise FraError(f"a block-diagonal dictionary has one block a head: n_heads is {n_heads}, say how many heads.")
    for name, size in (("d_in", d_in), ("d_sae", d_sae)):
        if size < n_heads or size % n_heads:
            raise FraError(f"{name} is {size}, which {n_heads} heads cannot share equally: make it a multiple of them.")
    if normalize_activations not in NORMALISATIONS:
        raise FraError(
            f"normalize_activations={normalize_activations!r} mixes the heads, so that no feature would belong to one: "
            f"use {' or '.join(NORMALISATIONS)}."
        )


def check_k(k: int | float, per_head: int) -> None:
    """Raises FraError where a head cannot have k live features."""
    if not 0 < k <= per_head:
        raise FraError(f"k is {k} live features a head, and a head has {per_head}: k must lie between.")


def by_head(x: Float[Tensor, "*rows width"], n_heads: int) -> Float[Tensor, "n_heads n part"]:
    """Rows [..., n_heads * part] as one batch a head."""
    return x.reshape(-1, n_heads, x.shape[-1] // n_heads).transpose(0, 1)


def joined(x: Float[Tensor, "n_heads n part"], like: Tensor) -> Float[Tensor, "*rows width"]:
    """The inverse of `by_head`, with the leading dimensions of `like`."""
    return x.transpose(0, 1).reshape(*like.shape[:-1], x.shape[0] * x.shape[2])


def top_k(acts: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows n"]:
    """The k largest of the last dimension, those below zero left out, zeros elsewhere."""
    values, index = acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(acts).scatter(-1, index, values.relu())


def dead_reconstruction(
    hidden_pre: Float[Tensor, "*rows d_sae"], dead: Bool[Tensor, " d_sae"], n_heads: int, k: int
) -> Float[Tensor, "*rows d_sae"]:
    """Of each head, the k largest pre-activations of its dead features, signed, zeros elsewhere."""
    heads = hidden_pre.reshape(*hidden_pre.shape[:-1], n_heads, -1)
    among = torch.where(dead.view(n_heads, -1), heads, -torch.inf)
    values, index = among.topk(min(k, heads.shape[-1]), dim=-1, sorted=False)
    values = torch.where(values == -torch.inf, torch.zeros_like(values), values)
    return torch.zeros_like(heads).scatter(-1, index, values).reshape(hidden_pre.shape)


def _dense(blocks: Float[Tensor, "n_heads a b"]) -> Float[Tensor, "n_heads_a n_heads_b"]:
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


class Blocks(SAE[Any]):  # type: ignore[misc]  # sae_lens has no stubs
    """What the inference and the training class share: parameters stored as blocks, and their dense views.

    `W_enc_blocks` is [n_heads, d_head, d_sae / n_heads], `W_dec_blocks` [n_heads, d_sae / n_heads, d_head]; feature
    i belongs to head i // (d_sae / n_heads). `W_enc` [d_in, d_sae] and `W_dec` [d_sae, d_in] are dense copies for
    tools that read them: differentiable, made anew at each use, and writing into one changes nothing.
    """

    W_enc_blocks: nn.Parameter
    W_dec_blocks: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter

    @property
    def n_heads(self) -> int:
        """Heads, each with a block of its own."""
        return int(self.cfg.n_heads)

    @property
    def decoder_blocks(self) -> Float[Tensor, "n_heads d_block d_head"]:
        """The decoder as it is used."""
        return self.W_dec_blocks

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """The encoder as a dense matrix: a copy."""
        return _dense(self.W_enc_blocks)

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder as a dense matrix: a copy."""
        return _dense(self.decoder_blocks)

    def head_of(self) -> Tensor:
        """[d_sae] the head that each feature belongs to."""
        return torch.arange(self.n_heads, device=self.b_enc.device).repeat_interleave(self.cfg.d_sae // self.n_heads)

    def initialize_weights(self) -> None:
        """Random decoder blocks, the encoder their transpose, zero biases."""
        heads, d_head, width = self.n_heads, self.cfg.d_in // self.n_heads, self.cfg.d_sae // self.n_heads
        options = {"dtype": self.dtype, "device": self.device}
        # On `meta` this draws nothing: load_state_dict(assign=True) puts the stored blocks in place.
        bound = math.sqrt(6 / d_head)  # of kaiming_uniform_, as SAELens starts a decoder; fan-in is the head's width
        blocks = torch.empty(heads, width, d_head, **options).uniform_(-bound, bound)
        self.W_dec_blocks = nn.Parameter(blocks)
        self.W_enc_blocks = nn.Parameter(blocks.transpose(1, 2).clone().contiguous())
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, **options))
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_in, **options))

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """SAELens' own, with the head width known from the start, so that decoding may come first."""
        super().turn_on_forward_pass_hook_z_reshaping()
        self.d_head = self.cfg.d_in // self.n_heads

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The input as [..., d_in], less the decoder bias. Raises FraError for another shape."""
        wanted: tuple[int, ...] = (self.cfg.d_in,)
        if self.hook_z_reshaping_mode:
            wanted = (self.n_heads, self.cfg.d_in // self.n_heads)
        if tuple(sae_in.shape[-len(wanted) :]) != wanted:
            raise FraError(
                f"this dictionary of {self.n_heads} heads reads [..., "
                f"{', '.join(map(str, wanted))}] and was given {list(sae_in.shape)}."
            )
        return super().process_sae_in(sae_in)  # type: ignore[no-any-return]

    def pre_activations(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """One small matrix product a head, as a batch."""
        bias = self.b_enc.view(self.n_heads, 1, -1)
        return joined(torch.baddbmm(bias, by_head(x, self.n_heads), self.W_enc_blocks), x)

    def times_decoder(self, acts: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_in"]:
        """Activations times decoder blocks, without the bias."""
        return joined(torch.bmm(by_head(acts, self.n_heads), self.decoder_blocks), acts)

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """Norm of every decoder row, for gradients too."""
        norms: Tensor = torch.linalg.vector_norm(self.decoder_blocks, dim=-1)
        return norms.flatten()

    def decode(self, feature_acts: Float[Tensor, "*rows d_sae"]) -> Tensor:
        """The reconstruction, as [..., n_heads, d_head] where the input is so."""
        if self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts / self.decoder_norms()
        out = self.hook_sae_recons(self.scaled_back(self.times_decoder(feature_acts)) + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)  # type: ignore[no-any-return]

    def scaled_back(self, out: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """The inverse of the per-head input scale; the training class has one."""
        return out

    @torch.no_grad()
    def get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """Decoder norms, away from zero, as SAELens has them."""
        return self.decoder_norms().clamp(min=1e-8)

    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """Folds decoder norms into the encoder, in place, and returns them.

        Raises FraError for TopK that does not rank by decoder norm: folding would change what it picks.
        """
        if self.cfg.activation in ("topk", "batchtopk") and not self.cfg.rescale_acts_by_decoder_norm:
            raise FraError(
                "folding decoder norms would change which features this TopK dictionary picks: train it with "
                "rescale_acts_by_decoder_norm=True."
            )
        norms = self.get_W_dec_norm()
        block = norms.view(self.n_heads, -1)
        self.W_dec_blocks.data.div_(block[:, :, None])
        self.W_enc_blocks.data.mul_(block[:, None, :])
        self.b_enc.data.mul_(norms)
        return norms

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Folds a scaling of the input into the blocks: codes and reconstructions then come from raw activations."""
        self.W_enc_blocks.data.mul_(scaling_factor)
        self.W_dec_blocks.data.div_(scaling_factor)
        self.b_dec.data.div_(scaling_factor)
        self.cfg.normalize_activations = "none"

    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Refused: whitening mixes the heads. Raises FraError."""
        raise FraError("whitening the activations mixes the heads: a block-diagonal dictionary cannot absorb it.")
