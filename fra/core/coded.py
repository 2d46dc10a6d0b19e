"""One layer on a batch of documents in the terms of its dictionary: codes, scores, couplings of pairs of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.frozen import FrozenLayer, Side, freeze, read_hooks
from fra.core.weights import Model
from fra.dictionaries.codes import Codes, codes
from fra.dictionaries.crosscoder import Crosscoder, Placed
from fra.dictionaries.hooks import layer_of
from fra.errors import FraError


@dataclass(frozen=True)
class Arm:
    """One arm (repeated or control) of a set of documents at one layer."""

    frozen: FrozenLayer
    codes: Codes

    @cached_property
    def _kept(self) -> dict[tuple[str, int], Any]:
        """What heads ask for again and again, computed once."""
        return {}

    def with_weights(self, frozen: FrozenLayer) -> Arm:
        """The same activations read by other weights; what does not depend on those is not computed again."""
        other = Arm(frozen, self.codes)
        other._kept.update({key: kept for key, kept in self._kept.items() if key[0] != "couplings"})
        return other

    def coefficients(
        self, side: Side, head: int, entries: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, " n_or_all"]:
        """What multiplies G in F_ij, of chosen entries or all: the code's value over the norm's scale, times the head's
        QK-norm gain.
        """
        key = ("coefficients", 0) if self._one_gain else (side, head)
        if key not in self._kept:
            self._kept[key] = self.codes.value * self.frozen.gain(side, head, self.codes.row)
        every: Tensor = self._kept[key]
        return every if entries is None else every[entries]

    @cached_property
    def _one_gain(self) -> bool:
        """Whether no head has a QK-norm: both sides of all have the same coefficients then."""
        return bool((self.frozen.gain_q == 1).all() and (self.frozen.gain_k == 1).all())

    def largest(self, side: Side, head: int) -> Float[Tensor, " d_sae"]:
        """The largest |coefficient| of each feature."""
        key = ("largest", 0) if self._one_gain else (f"largest {side}", head)
        if key not in self._kept:
            size = self.coefficients(side, head).abs()
            empty = size.new_zeros(len(self.codes.decoder))
            self._kept[key] = empty.scatter_reduce_(0, self.codes.feature, size, "amax")
        found: Tensor = self._kept[key]
        return found

    def couplings(self, head: int) -> tuple[Float[Tensor, "d_sae d_head"], Float[Tensor, "d_sae d_head"]]:
        """U, V with G_ij = U_i . V_j before rotation, the score's scale included: projections of every decoder row."""
        if ("couplings", head) not in self._kept:
            frozen, decoder = self.frozen, self.codes.decoder
            self._kept["couplings", head] = frozen.scale * decoder @ frozen.W_q[head], decoder @ frozen.W_k[head]
        U, V = self._kept["couplings", head]
        return U, V

    def columns(self, side: Side, head: int, features: Int[Tensor, " n"]) -> Float[Tensor, "batch pos n"]:
        """Coefficients of chosen features as dense columns."""
        batch, pos = self.codes.shape
        column, entries = self.codes.index.of(features)
        dense = self.codes.value.new_zeros(batch * pos, len(features))
        dense[self.codes.row[entries], column] = self.coefficients(side, head, entries)
        return dense.view(batch, pos, -1)

    def written(self, side: Side, head: int) -> Float[Tensor, "batch pos d_head"]:
        """What all features together add to the head's queries (the score's scale included) or keys, before rotation:
        coefficients times couplings, summed.
        """
        frozen, codes = self.frozen, self.codes
        rows = torch.arange(codes.shape[0] * codes.shape[1], device=frozen.x.device)
        decoded = (frozen.x - codes.bias - codes.error).flatten(0, 1)
        found = (decoded @ frozen.weights(side, head)[0]) * frozen.gain(side, head, rows)[:, None]
        return (frozen.scale * found if side == "query" else found).view(*codes.shape, -1)

    def in_place(self, vectors: Float[Tensor, "batch pos d_head"]) -> Float[Tensor, "batch pos d_head"]:
        """Queries or keys rotated to their positions, where the head rotates."""
        rotary, (batch, pos) = self.frozen.rotary, self.codes.shape
        if rotary is None:
            return vectors
        at = torch.arange(pos, device=vectors.device).repeat(batch)
        return rotary.rotate(vectors.flatten(0, 1), at).view_as(vectors)


@torch.no_grad()
def measure_arm(model: Model, sae: Any, tokens: Int[Tensor, "batch pos"], layer: int, hook_name: str) -> Arm:
    """Runs documents of equal (padded) length through the model and the dictionary, or a placed crosscoder."""
    frozen = freeze(model, tokens, layer, hook_name)
    if not isinstance(sae, Placed):
        return Arm(frozen, codes(sae, frozen.x))
    seen = activations_of(sae.crosscoder, model, tokens, sae.at, frozen.x, {}, sae.models)
    return Arm(frozen, sae.crosscoder.codes(seen, sae.at))


@torch.no_grad()
def activations_of(
    crosscoder: Crosscoder,
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    slot: int,
    x: Float[Tensor, "batch pos d"],
    given: Mapping[int, Float[Tensor, "_batch _pos _d"]],
    models: Mapping[str, Model] | None = None,
) -> Float[Tensor, "n_slots batch pos d"]:
    """Every slot's activations of these documents: `x` of this slot, those of the same model's other hooks read from
    it, those of other models as given, or read from these where `models` has them. Raises FraError where some are
    missing, given in vain, or of another shape.
    """
    own, models = crosscoder.slot(slot).model, models or {}
    others = {k for k, at in enumerate(crosscoder.slots) if at.model != own}
    if missing := sorted(k for k in others - set(given) if crosscoder.slots[k].model not in models):
        at = crosscoder.slots[missing[0]]
        raise FraError(
            f"slot {missing[0]} of the crosscoder is {at.model!r} at {at.hook!r}, another model than {own!r} of slot "
            f"{slot}: give its activations of these tokens, activations={{{missing[0]}: [pos, d]}}."
        )
    if vain := sorted(set(given) - others):
        raise FraError(f"activations of slot {vain[0]} are given, and those of {own!r} are read from the model itself.")
    if wrong := [k for k in sorted(given) if given[k].shape != x.shape]:
        raise FraError(
            f"the activations of slot {wrong[0]} have shape {tuple(given[wrong[0]].shape[1:])}, and these tokens make "
            f"{tuple(x.shape[1:])} (pos, d): give those of the same tokens."
        )
    found = {slot: x} | {k: value.to(x) for k, value in given.items()}
    for name in {at.model for at in crosscoder.slots}:
        hooks = {str(k): at.hook for k, at in enumerate(crosscoder.slots) if at.model == name and k not in found}
        if hooks:
            last = max(layer_of(hook) or 0 for hook in hooks.values())
            read = read_hooks(model if name == own else models[name], tokens.to(x.device), last, hooks)
            found |= {int(k): value.to(x) for k, value in read.items()}
    if wrong := [k for k in sorted(found) if found[k].shape != x.shape]:
        raise FraError(
            f"slot {wrong[0]} of the crosscoder ({crosscoder.slots[wrong[0]].hook}) has width "
            f"{found[wrong[0]].shape[-1]} in its model, and slot {slot} has {x.shape[-1]}: these models do not fit."
        )
    return torch.stack([found[k] for k in range(len(crosscoder.slots))])


def coupling_parts(arm: Arm, head: int, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "n parts"]:
    """G_ij as it does not depend on the offset: itself, for a head that does not rotate; else its parts
    (`Rotary.relative`), of which `Rotary.turns` makes it at any offset. What is added to the last part is added to G_ij
    at all offsets.
    """
    U, V = arm.couplings(head)
    u, v = U[pairs[:, 0]], V[pairs[:, 1]]
    rotary = arm.frozen.rotary
    return (u * v).sum(-1, keepdim=True) if rotary is None else rotary.relative(u, v)


def pair_couplings(
    arm: Arm, head: int, pairs: Int[Tensor, "n 2"], offsets: Int[Tensor, " n_offsets"]
) -> Float[Tensor, "n one_or_n_offsets"]:
    """G_ij at each offset t - s; one column for a head that does not rotate, whatever the offsets."""
    parts, rotary = coupling_parts(arm, head, pairs), arm.frozen.rotary
    return parts if rotary is None else parts @ rotary.turns(offsets).T


def log_odds(scores: Float[Tensor, "n k_pos"], key: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """logit of the attention to `key`: its score less the log-sum-exp of all others (-inf where masked)."""
    own = scores.gather(-1, key[..., None])[..., 0]
    return own - scores.scatter(-1, key[..., None], -torch.inf).logsumexp(-1)


def capped_scores(arm: Arm, scores: Float[Tensor, "n k_pos"]) -> Float[Tensor, "n k_pos"]:
    """Scores after softcap; masked keys stay at -inf, which the cap would make finite."""
    return (
        scores if arm.frozen.softcap is None else arm.frozen.cap(scores).masked_fill(scores == -torch.inf, -torch.inf)
    )


Channels: TypeAlias = pd.DataFrame | Tensor | np.ndarray | Sequence[Sequence[int]]
"""[n, 2] ids (query feature, key feature), or a DataFrame with columns q_feature and k_feature."""
