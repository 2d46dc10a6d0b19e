"""The encoder of a dictionary of head outputs, or of what attention writes, as what it is once normalisations are
frozen: a linear map of each head's output, and a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import GatedSAE
from torch import Tensor

from fra.dictionaries.codes import check_kind, check_scaling, dictionary_hook
from fra.dictionaries.hooks import is_attention_output, output_layer_of
from fra.errors import FraError

_ROWS_CHECKED = 4
_STD_EPSILON = 1e-5
"""What SAELens adds to the standard deviation where it normalises as LayerNorm does."""


@dataclass(frozen=True)
class Encoder:
    """pre-activation of feature f at t = gain_t * (sum_h z[t,h] . weight[h,:,f] + b_O[f]) + bias[f], exactly."""

    hook_name: str
    layer: int
    weight: Float[Tensor, "n_heads d_head d_sae"]
    """Block h is what reads head h; a decoder-norm rescaling and the normalisation's centring are folded in, and W_O
    (`through`) of a dictionary of what attention writes.
    """
    bias: Float[Tensor, " d_sae"]
    """b_enc, less b_dec through the encoder where the dictionary subtracts it from its input."""
    normalisation: str
    """SAELens' `normalize_activations`."""
    b_O: Float[Tensor, " d_sae"] | None = None
    """What b_O brings before the gain; None at attn.hook_z, which lies before it."""

    @property
    def n_heads(self) -> int:
        """Heads of the layer."""
        return self.weight.shape[0]

    @property
    def d_sae(self) -> int:
        """Features of the dictionary."""
        return self.weight.shape[2]

    def through(self, W_O: Float[Tensor, "n_heads d_head d_model"], b_O: Float[Tensor, " d_model"]) -> Encoder:
        """An encoder of what attention writes ([n, 1, d_model], as one head) as one of the head outputs behind it."""
        (weight,) = self.weight
        return replace(self, weight=W_O @ weight, b_O=b_O @ weight)

    def gain(self, x: Float[Tensor, "*rows n_parts width"]) -> Float[Tensor, "*rows"]:
        """What the dictionary's run-time normalisation multiplies a position's activation by: frozen here. x: what
        stands at its hook.
        """
        flat = x.flatten(-2)
        if self.normalisation == "constant_norm_rescale":
            gain: Tensor = flat.shape[-1] ** 0.5 / flat.norm(dim=-1)
            return gain
        if self.normalisation == "layer_norm":
            return 1 / (flat.std(dim=-1) + _STD_EPSILON)
        return flat.new_ones(flat.shape[:-1])


def head_output_layer(sae: Any) -> int:
    """The layer whose head outputs the dictionary was trained on, each by itself or through W_O. Raises FraError for a
    dictionary of another hook.
    """
    name = dictionary_hook(sae)
    layer = output_layer_of(name)
    if layer is None:
        raise FraError(
            f"the dictionary at {name!r} is not one of head outputs: "
            "attribution to heads needs one trained at blocks.L.attn.hook_z or blocks.L.hook_attn_out."
        )
    return layer


@torch.no_grad()
def encoder(sae: Any, like: Float[Tensor, "*rows n_parts width"]) -> Encoder:
    """The encoder, in the precision and on the device of `like`, some of what stands at the dictionary's hook, on which
    it is compared with the dictionary itself: head outputs, or what attention writes as one part ([n, 1, d_model]; see
    `Encoder.through`).

    For a gated dictionary it is the path of the magnitudes. Raises FraError for what is no dictionary of head outputs
    with a linear encoder, for scaling that was not folded in, another width, and where the dictionary's own
    pre-activation is not this linear map.
    """
    check_kind(sae)
    layer = head_output_layer(sae)
    n_heads, d_head = like.shape[-2:]
    if sae.cfg.d_in != n_heads * d_head:
        raise FraError(
            f"the dictionary at {dictionary_hook(sae)!r} has width {sae.cfg.d_in} and the "
            f"{'attention' if is_attention_output(dictionary_hook(sae)) else 'head'} outputs there have "
            f"{n_heads * d_head}{f' ({n_heads} heads)' if n_heads > 1 else ''}: it belongs to another model."
        )
    return linear_encoder(sae, like, layer)


@torch.no_grad()
def linear_encoder(sae: Any, like: Float[Tensor, "*rows n_parts d"], layer: int) -> Encoder:
    """The encoder of a dictionary at any hook; of an attention input, [rows, 1, d_in], as of one head. Raises FraError
    as `encoder` does, where its pre-activation is no linear map.
    """
    check_kind(sae)
    check_scaling(sae)
    n_heads, d_head = like.shape[-2:]
    weight, bias = sae.W_enc.detach().to(like), (sae.b_mag if isinstance(sae, GatedSAE) else sae.b_enc).detach()
    bias = bias.to(like)
    if isinstance(sae, GatedSAE):
        weight = weight * sae.r_mag.detach().to(like).exp()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        norms = sae.W_dec.detach().to(like).norm(dim=-1)
        weight, bias = weight * norms, bias * norms
    if sae.cfg.apply_b_dec_to_input:
        bias = bias - sae.b_dec.detach().to(like) @ weight
    if sae.cfg.normalize_activations == "layer_norm":
        weight = weight - weight.mean(0)
    found = Encoder(
        dictionary_hook(sae), layer, weight.view(n_heads, d_head, -1), bias, str(sae.cfg.normalize_activations)
    )
    _compare(found, sae, like.flatten(0, -3)[-_ROWS_CHECKED:])
    return found


def encode(sae: Any, x: Float[Tensor, "n n_parts width"]) -> Float[Tensor, "n d_sae"]:
    """The dictionary's own activations of head outputs, or of what attention writes as one part."""
    own = x.to(sae.W_dec.device)
    acts: Tensor = sae.encode(own if sae.cfg.reshape_activations == "hook_z" else own.flatten(1))
    return (acts.to_dense() if acts.is_sparse else acts).to(x)


def check_features(features: Int[Tensor, " n"], d_sae: int) -> None:
    """Raises FraError for ids that the dictionary does not have."""
    if len(features) and (int(features.min()) < 0 or int(features.max()) >= d_sae):
        wrong = int(features[(features < 0) | (features >= d_sae)][0])
        raise FraError(f"feature {wrong} is out of range: the dictionary has {d_sae} features.")


def own_pre_activation(sae: Any, z: Float[Tensor, "n n_parts width"]) -> Float[Tensor, "n d_sae"]:
    """What the dictionary itself computes before its activation function: the truth that attribution is held against.

    Raises FraError for a dictionary that does not show it.
    """
    seen: list[Tensor] = []
    handle = sae.hook_sae_acts_pre.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    try:
        encode(sae, z)
    finally:
        handle.remove()
    if not seen:
        raise FraError(
            f"the dictionary at {dictionary_hook(sae)!r} does not show its "
            "pre-activations (hook_sae_acts_pre), so they cannot be attributed."
        )
    own = seen[0].to(z).reshape(len(z), -1)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        own = own * sae.W_dec.detach().to(z).norm(dim=-1)
    return own


def _compare(found: Encoder, sae: Any, z: Float[Tensor, "n n_heads d_head"]) -> None:
    """Refuses a dictionary whose own pre-activation is something else (an encoder with a scale of its own, say)."""
    own = own_pre_activation(sae, z)
    parts = torch.einsum("nhd,hdf->nhf", z, found.weight) * found.gain(z)[:, None, None]
    size = parts.abs().sum(1) + found.bias.abs()
    tolerance = 1e-3 if sae.dtype in (torch.float32, torch.float64) else 5e-2
    if own.shape != size.shape or not bool(((parts.sum(1) + found.bias - own).abs() <= tolerance * size.max()).all()):
        raise FraError(
            f"the pre-activation of the dictionary at {found.hook_name!r} is not a linear map of the head outputs plus "
            f"a bias: this {sae.cfg.architecture()!r} dictionary cannot be attributed to heads."
        )
