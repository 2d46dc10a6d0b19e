"""Crosscoders: one code for several hooks or models (slots), with an encoder and a decoder for each.

x_slot = sum_i f_i W_dec[i, slot] + b_dec[slot] + mean[slot] + error_slot, exactly, with f computed from all slots
together. `fra.crosscoders` reads them from files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fra.dictionaries.codes import ROWS_AT_ONCE, Codes, decoded
from fra.errors import FraError


@dataclass(frozen=True)
class Slot:
    """What a slot's activations are."""

    model: str
    """A name for the model: slots of one model have the same."""
    hook: str
    """In TransformerLens' words, as blocks.1.hook_resid_pre."""


@dataclass(frozen=True)
class Crosscoder:
    """A crosscoder with a ReLU, or with thresholds (what BatchTopK is once it is trained), in any precision; made by
    `fra.crosscoders`, or of tensors. Raises FraError for weights of other shapes, or that are not finite.
    """

    slots: tuple[Slot, ...]
    W_enc: Tensor
    """[n_slots, d, d_sae]"""
    W_dec: Tensor
    """[d_sae, n_slots, d]"""
    b_enc: Tensor
    """[d_sae]"""
    b_dec: Tensor
    """[n_slots, d]"""
    mean: Tensor | None = None
    """[n_slots, d]: what was subtracted from the activations; None where nothing was."""
    threshold: Tensor | None = None
    """[d_sae]: a feature is live where it exceeds its own, not below 0; None for a ReLU."""
    active_mean: Tensor | None = None
    """[d_sae]: each feature's mean while live, on the text that it was trained on; None where it is not known."""

    def __post_init__(self) -> None:
        n, d, d_sae = self.W_enc.shape if self.W_enc.ndim == 3 else (0, 0, 0)
        wanted = {"W_enc": (n, d, d_sae), "W_dec": (d_sae, n, d), "b_enc": (d_sae,), "b_dec": (n, d), "mean": (n, d)}
        wanted |= {"threshold": (d_sae,), "active_mean": (d_sae,)}
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape or not tensor.numel():
                raise FraError(
                    f"{name} of the crosscoder has shape {tuple(tensor.shape)}, and beside W_enc of shape "
                    f"{tuple(self.W_enc.shape)} (slots, d, features) it would be {shape}: give it in this layout."
                )
            if not bool(tensor.isfinite().all()):
                raise FraError(f"{name} of the crosscoder holds NaN or infinity: these weights are broken.")
        if self.threshold is not None and bool((self.threshold < 0).any()):
            raise FraError(
                "a threshold of the crosscoder is below 0: thresholds are those of a JumpReLU, not negative."
            )
        if len(self.slots) != n:
            raise FraError(
                f"the crosscoder has {n} slots, and {len(self.slots)} are named: say model and hook of each."
            )

    def __repr__(self) -> str:
        named = ", ".join(f"{slot.model} {slot.hook}" for slot in self.slots)
        return f"Crosscoder({self.d_sae} features; {named})"

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.W_dec)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Crosscoder:
        """The same on another device, in another precision."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "slots"}
        return replace(self, **{name: t.to(device, dtype) for name, t in tensors.items() if t is not None})

    def slot(self, number: int) -> Slot:
        """A slot by its number. Raises FraError where there is none."""
        if not 0 <= number < len(self.slots):
            raise FraError(
                f"slot {number} is out of range: the crosscoder has {len(self.slots)} slots, numbered from 0."
            )
        return self.slots[number]

    def features(self, activations: Float[Tensor, "n_slots rows d"]) -> Float[Tensor, "rows d_sae"]:
        """f: what all slots' encoders make of their activations together, and b_enc, where it exceeds its threshold (0
        of a ReLU), else 0.
        """
        if self.mean is not None:
            activations = activations - self.mean.to(activations)[:, None]
        total = torch.einsum("srd,sdf->rf", activations, self.W_enc.to(activations)) + self.b_enc.to(activations)
        return total.relu() if self.threshold is None else total * (total > self.threshold.to(total))

    def share_of(self, slot: int) -> Float[Tensor, " d_sae"]:
        """The relative decoder norm: of each feature's decoder norms over all slots the share of this one; 0.5 of two
        slots that it writes equally, 1 of one that it writes alone. 0 where a decoder is zero everywhere.
        """
        self.slot(slot)
        norms = self.W_dec.norm(dim=-1)
        share: Tensor = norms[:, slot] / norms.sum(1).clamp(min=torch.finfo(norms.dtype).tiny)
        return share

    @torch.no_grad()
    def codes(self, activations: Float[Tensor, "n_slots batch pos d"], slot: int) -> Codes:
        """The codes of one slot: features from all slots together, decoder, bias (mean included) and error its own, in
        the precision of `activations`, which are as the models have them, no mean subtracted.

        Raises FraError for activations of another shape, a slot that is not there, and where no feature is live.
        """
        self.slot(slot)
        n, width = self.b_dec.shape
        if activations.ndim != 4 or (activations.shape[0], activations.shape[-1]) != (n, width):
            raise FraError(
                f"the activations have shape {tuple(activations.shape)}, and the crosscoder reads [{n} slots, batch, "
                f"pos, {width}]: give those of every slot."
            )
        _, batch, pos, _ = activations.shape
        flat = activations.flatten(1, 2)
        rows, features, values = [], [], []
        for start in range(0, flat.shape[1], ROWS_AT_ONCE):
            acts = self.features(flat[:, start : start + ROWS_AT_ONCE])
            at, live = acts.nonzero(as_tuple=True)
            rows.append(at + start)
            features.append(live)
            values.append(acts[at, live])
        row, feature, value = torch.cat(rows), torch.cat(features), torch.cat(values)
        if not len(row):
            raise FraError(
                f"no feature of the crosscoder is live on any of the {flat.shape[1]} positions: wrong weights or hooks."
            )
        x = flat[slot]
        decoder = self.W_dec[:, slot].to(x)
        bias = (self.b_dec[slot] if self.mean is None else self.b_dec[slot] + self.mean[slot]).to(x)
        error = x - bias - decoded(row, feature, value, decoder, len(x))
        shape = (batch, pos)
        return Codes(row, feature, value, decoder, bias.expand(*shape, -1).contiguous(), error.view(*shape, -1), shape)


@dataclass(frozen=True)
class Placed:
    """A crosscoder where a model is one of its slots: what stands in the place of a dictionary of that model."""

    crosscoder: Crosscoder
    at: int
    """The slot that is the model."""
    models: Mapping[str, Any] = field(default_factory=dict)
    """The models of the other slots, by the names that the slots have."""

    def __post_init__(self) -> None:
        own = self.crosscoder.slot(self.at).model
        wanted = {slot.model for slot in self.crosscoder.slots} - {own}
        if missing := sorted(wanted - set(self.models)):
            raise FraError(
                f"the crosscoder reads the model {missing[0]!r} too, and it is not given: name it under models."
            )
        if vain := sorted(set(self.models) - wanted):
            raise FraError(
                f"models names {vain[0]!r}, which is no other model of the crosscoder's slots ({own!r} is the model "
                "itself): leave it out."
            )

    @property
    def hook(self) -> str:
        """The hook at which the model is read."""
        return self.crosscoder.slot(self.at).hook
