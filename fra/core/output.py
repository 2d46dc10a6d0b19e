"""The OV side of a head: what each feature of the attention input contributes to the head's output, with its sign.

z_t = sum over keys s of A(t,s) v_s and v_s is linear in the attention input once the norm's scale is frozen, so that
z_t = sum_i ( sum_s A(t,s) a_i(s) g_s / sigma_s ) d_i W_V + (bias) + (error), and the head's result is z_t W_O.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.architecture import Architecture
from fra.architectures.face import face, facing
from fra.architectures.known import Tokens, architecture_of, one_document, place_of
from fra.core.coded import Arm
from fra.core.frozen import freeze, read_hooks
from fra.core.reductions import TERMS
from fra.core.weights import Model, OVWeights, check_layer_and_head, ov_weights
from fra.dictionaries.codes import check_dictionary, codes, dictionary_hook
from fra.dictionaries.hooks import LayerHooks
from fra.errors import FraError

Space = Literal["z", "result"]


def value_terms(
    arm: Arm, weights: OVWeights, head: int, terms: Collection[str] = TERMS
) -> Float[Tensor, "batch pos d_head"]:
    """What the named kinds of term ("feature", "bias", "error") bring to a head's value vectors, summed."""
    frozen, found = arm.frozen, arm.codes
    total = torch.zeros_like(frozen.x)
    if "feature" in terms:
        total = total + (frozen.x - found.bias - found.error)
    if "bias" in terms:
        total = total + found.bias
    if "error" in terms:
        total = total + found.error
    value = (total / frozen.sigma[..., None]) @ weights.W_V[head]
    return value + weights.b_V[head] if "bias" in terms else value


def value_features(
    arm: Arm, weights: OVWeights, head: int, features: Int[Tensor, " n"]
) -> Float[Tensor, "batch pos d_head"]:
    """What chosen features (each named once) bring to a head's value vectors, summed."""
    return source_gains(arm, features) @ (arm.codes.decoder[features] @ weights.W_V[head])


def source_gains(arm: Arm, features: Int[Tensor, " n"]) -> Float[Tensor, "batch pos n"]:
    """a_i(s) g_s / sigma_s for chosen features (each named once): what multiplies d_i W_V in the value at s."""
    batch, pos = arm.codes.shape
    place = torch.full((len(arm.codes.decoder),), -1, device=features.device)
    place[features] = torch.arange(len(features), device=features.device)
    column = place[arm.codes.feature]
    chosen = column >= 0
    dense = arm.codes.value.new_zeros(batch * pos, len(features))
    dense[arm.codes.row[chosen], column[chosen]] = arm.codes.value[chosen]
    return dense.view(batch, pos, -1) / arm.frozen.sigma[..., None]


@face
@torch.no_grad()
def resolve_output(
    model: Model, sae: Any, tokens: Tokens, layer: int | None = None, head: int | str | None = None
) -> ResolvedOutput:
    """Resolves the output of one head on one document into terms of a dictionary's features, exactly and with signs.

    Arguments as for `fra.resolve`. The attention pattern and LayerNorm's scale are frozen at their values here. Raises
    FraError as `fra.resolve` does, and where the model's own hook_z is not what its pattern and weights make (gated
    attention).
    """
    check_dictionary(sae)
    layer, head = place_of(layer, head)
    check_layer_and_head(model, layer, head)
    tokens = one_document(tokens)
    hook_name = dictionary_hook(sae)
    frozen = freeze(model, tokens[None], layer, hook_name)
    resolved = ResolvedOutput(Arm(frozen, codes(sae, frozen.x)), ov_weights(model, layer, hook_name), head)
    z = read_hooks(model, tokens[None].to(frozen.x.device), layer, {"z": LayerHooks(layer).z})["z"]
    own = by_head(z, frozen.n_heads)[0, :, head].to(frozen.x)
    values = value_terms(resolved.arm, resolved.weights, head)
    what = f"layer {layer} head {head}"
    check_output(architecture_of(model), what, resolved.z(), own, values, "its output cannot be resolved")
    return resolved


def by_head(z: Float[Tensor, "batch pos *heads"], n_heads: int) -> Float[Tensor, "batch pos n_heads d_head"]:
    """hook_z or hook_v by head: TransformerBridge shows heads side by side."""
    return z.flatten(2).view(*z.shape[:2], n_heads, -1)


def check_output(
    architecture: Architecture,
    what: str,
    made: Float[Tensor, "*z"],
    own: Float[Tensor, "*z"],
    values: Float[Tensor, "*values"],
    so: str,
) -> None:
    """Holds an architecture against the model's own hook_z (`own`). Raises FraError where it is not what pattern and
    values make (`made`), as with gated attention; `so` says what is therefore not done.
    """
    error = float((made - own).abs().max())
    allowed = architecture.tolerance * float(values.norm(dim=-1).max())
    if not error <= allowed:
        raise FraError(
            f"hook_z of {what} is not pattern times values as {type(architecture).__name__} "
            f"reads them (off by {error:.3g}, where {allowed:.3g} is rounding): this "
            f"architecture's attention does more than that and {so}."
        )


def output_map(
    own: Architecture, layer: int, post_scale: Float[Tensor, "batch pos 1"] | None, dtype: torch.dtype
) -> tuple[Float[Tensor, "n_heads d_head d_model"], Float[Tensor, " d_model"], Float[Tensor, "*batch_pos"]]:
    """W_O and b_O, the weight of a norm after attention in both, and what that norm divides by (1 where none is)."""
    raw, norm = own.read_ov(layer), own.norm_after(layer)
    W_O = raw.W_O.detach().to(own.device, dtype)
    b_O = W_O.new_zeros(W_O.shape[-1]) if raw.b_O is None else raw.b_O.detach().to(W_O)
    if norm is None or post_scale is None:
        return W_O, b_O, W_O.new_ones(())
    weight = norm.weight_or_ones(W_O)
    return W_O * weight, b_O * weight, post_scale[..., 0].to(W_O)


def check_written(
    own: Architecture,
    layer: int,
    z: Float[Tensor, "batch pos n_heads d_head"],
    W_O: Float[Tensor, "n_heads d_head d_model"],
    b_O: Float[Tensor, " d_model"],
    scale: Tensor,
    written: Float[Tensor, "batch pos d_model"],
) -> None:
    """Holds `output_map` against the model's own hook_attn_out. Raises FraError where that is something else."""
    made = (torch.einsum("bthd,hdm->btm", z, W_O) + b_O) / scale[..., None]
    off, allowed = float((made - written).abs().max()), own.tolerance * float(written.norm(dim=-1).max())
    if not off <= allowed:
        raise FraError(
            f"hook_attn_out of layer {layer} is not hook_z through W_O and b_O as {type(own).__name__} reads them (off "
            f"by {off:.3g}, where {allowed:.3g} is rounding): this architecture does more than that, and features "
            "there cannot be attributed to heads; use a dictionary at attn.hook_z."
        )


@facing
class ResolvedOutput:
    """One head's output on one document, resolved; made by `resolve_output`.

    `space` says where: "z" (the head's output before W_O, `d_head`) or "result" (what it writes to the residual stream,
    `d_model`, without b_O and before a norm after attention, where the model has one).
    """

    def __init__(self, arm: Arm, weights: OVWeights, head: int) -> None:
        self.arm = arm
        self.weights = weights
        self.head = head
        self.pattern: Float[Tensor, "q_pos k_pos"] = arm.frozen.pattern[0, head]
        self.live: Int[Tensor, " n_live"] = torch.unique(arm.codes.feature)
        """Ids of the features that are live anywhere in the document, ascending."""

    def z(self) -> Float[Tensor, "pos d_head"]:
        """Every term summed: the model's own hook_z."""
        return torch.stack(list(self.terms().values())).sum(0)

    def result(self) -> Float[Tensor, "pos d_model"]:
        """Every term summed: what the head writes to the residual stream."""
        return self._to(self.z(), "result")

    def terms(self, space: Space = "z") -> dict[str, Float[Tensor, "pos d"]]:
        """The three sums, "feature", "bias" (with b_V) and "error"; they add up to `z` or `result`."""
        return {
            term: self._to(self.pattern @ value_terms(self.arm, self.weights, self.head, (term,))[0], space)
            for term in TERMS
        }

    def gains(self) -> Float[Tensor, "pos n_live"]:
        """sum_s A(t,s) a_i(s) g_s / sigma_s of every live feature: its contribution is this times its direction."""
        return self.pattern @ source_gains(self.arm, self.live)[0]

    def directions(self, space: Space = "z") -> Float[Tensor, "n_live d"]:
        """d_i W_V, or d_i W_V W_O, of every live feature."""
        return self._to(self.arm.codes.decoder[self.live] @ self.weights.W_V[self.head], space)

    def feature(self, feature: int, space: Space = "z") -> Float[Tensor, "pos d"]:
        """What one feature contributes at every position; zero where it is not attended to.

        Raises FraError for an id outside the dictionary.
        """
        if not 0 <= feature < len(self.arm.codes.decoder):
            raise FraError(
                f"feature {feature} is out of range: the dictionary has {len(self.arm.codes.decoder)} features."
            )
        chosen = torch.tensor([feature], device=self.live.device)
        return self._to(self.pattern @ value_features(self.arm, self.weights, self.head, chosen)[0], space)

    def along(self, direction: Float[Tensor, "*pos d"], space: Space = "z") -> Float[Tensor, "pos n_live"]:
        """Signed contribution of every live feature along one direction, or one for each position.

        With those of `terms` "bias" and "error" they add up to the output along it.
        """
        return self.gains() * (direction @ self.directions(space).mT)

    def sources(self, q_pos: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Every feature term of the output at one position: key positions, feature ids, and what multiplies the
        feature's direction, A(t,s) a_i(s) g_s / sigma_s.

        Raises FraError for a position outside the document.
        """
        if not 0 <= q_pos < len(self.pattern):
            raise FraError(f"position {q_pos} is out of range: the document has {len(self.pattern)} tokens.")
        found, sigma = self.arm.codes, self.arm.frozen.sigma[0]
        attended = self.arm.frozen.mask[q_pos][found.row]
        row, feature = found.row[attended], found.feature[attended]
        return row, feature, self.pattern[q_pos][row] * found.value[attended] / sigma[row]

    def _to(self, vectors: Tensor, space: Space) -> Tensor:
        return vectors @ self.weights.W_O[self.head] if space == "result" else vectors
