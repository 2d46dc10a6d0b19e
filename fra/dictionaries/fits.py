"""How well a dictionary fits activations, wherever they were read, and where else it may belong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.dictionaries.hooks import BEFORE_ATTENTION, LayerHooks, is_output, layer_of, point_of

POOR = 0.7
"""Explained variance below which other places are tried."""
_HALF = 0.5
_TENTH = 0.1
_RIGHT = 0.5
"""Explained variance that a dictionary has at least where it belongs, before another place is said to be its own."""


def reconstructed(
    sae: Any, x: Float[Tensor, "rows width"], n_heads: int
) -> tuple[Float[Tensor, "rows width"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """What the dictionary leaves of activations of its width, and row and feature of every live code; whatever hook
    they come from. n_heads: parts of a dictionary that takes head outputs apart.
    """
    rows = x.to(sae.W_dec)
    acts = sae.encode(rows.view(len(rows), n_heads, -1) if sae.cfg.reshape_activations == "hook_z" else rows)
    acts = acts.to_dense() if acts.is_sparse else acts
    row, feature = torch.nonzero(acts, as_tuple=True)
    return rows - sae.decode(acts).reshape(rows.shape), row, feature


def explained_variance(x: Float[Tensor, "rows width"], error: Float[Tensor, "rows width"]) -> float:
    """1 - (squared error) / (squared deviation from the mean), summed over positions and dimensions; NaN where nothing
    varies.
    """
    x, error = x.cpu().double(), error.cpu().double()
    spread = float((x - x.mean(0)).square().sum())
    return 1 - float(error.square().sum()) / spread if spread > 0 else float("nan")


def places(hook: str, n_layers: int) -> list[str]:
    """Where a dictionary declared at `hook` may belong: that hook first, the other points of its layer and of the
    layers beside it, and its own point in every layer.
    """
    at = layer_of(hook) or 0
    found = [hook]
    for layer in sorted({*range(at - 1, at + 2)} & {*range(n_layers)}, key=lambda layer: abs(layer - at)):
        own = LayerHooks(layer)
        found += [own.normalized, own.resid_pre, own.z, own.attn_out, own.resid_mid, own.mlp_out, own.resid_post]
    found += [f"blocks.{layer}.{point_of(hook)}" for layer in range(n_layers)]
    by_point: dict[str, str] = {}
    for place in found:
        by_point.setdefault(_point(place, n_layers), place)
    return list(by_point.values())


def _point(hook: str, n_layers: int) -> str:
    """One name for hooks that show the same activation: behind a layer is before the next one."""
    layer = layer_of(hook)
    last = layer is None or layer == n_layers - 1
    return hook if last or point_of(hook) != "hook_resid_post" else LayerHooks((layer or 0) + 1).resid_pre


def clearly_better(own: float, other: float) -> bool:
    """Whether a dictionary belongs where it explains `other` of the variance rather than where it explains `own`: it
    fits there, and leaves less than half as much unexplained.
    """
    return other >= _RIGHT and not (1 - other) >= _HALF * (1 - own)


def somewhat_better(own: float, other: float) -> bool:
    """The same of two processings of one model, which change an activation little: a tenth less is unexplained."""
    return other > 0 and not (1 - other) >= (1 - _TENTH) * (1 - own)


@dataclass(frozen=True)
class FitAt:
    """A dictionary at one hook of the model in one weight processing."""

    hook: str
    processing: str
    explained: float

    def advice(self, declared: str, processing: str) -> str:
        """What is to be written in the target file so that the dictionary is used here."""
        told = []
        if self.hook != declared:
            if not is_output(self.hook) and point_of(self.hook) not in BEFORE_ATTENTION:
                return "which is no hook that attention reads or writes: give another dictionary"
            told.append(f'hook = "{self.hook}" in its [[dictionary]]')
        if self.processing != processing:
            word = f'"{self.processing}"' if self.processing in ("none", "folded") else f"a table ({self.processing})"
            told.append(f"processing = {word} in [model]")
        return f"write {' and '.join(told)}"
