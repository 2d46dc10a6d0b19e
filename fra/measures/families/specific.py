"""Activations against a proxy: how much of what is strong is right, and how much of the proxy is missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from fra.attribution.planted import PlantedHalf
from fra.statistics.stats import Floats

STRONG, PERMUTED, MASS, MISSED = (
    "precision of strong activations",
    "over permuted documents",
    "activation mass",
    "missed",
)


@dataclass(frozen=True)
class Specificity:
    """Sums by document over some features; activations in units of each feature's scale."""

    strong: Floats
    """Activations that are strong."""
    right: Floats
    """Of them, those that the proxy calls right."""
    elsewhere: Floats
    """Of them, those that another document's proxy would call right, expected."""
    mass: Floats
    mass_right: Floats
    wanted: Floats
    """Rows of the proxy."""
    missed: Floats
    """Of them, those without a strong activation."""

    def columns(self) -> dict[str, tuple[Floats, Floats]]:
        """(sums, counts) of the conditions that claims make of them."""
        return {
            STRONG: (self.right, self.strong),
            PERMUTED: (self.right - self.elsewhere, self.strong),
            MASS: (self.mass_right, self.mass),
            MISSED: (self.missed, self.wanted),
        }


RANGES = {STRONG: (0.0, 1.0), PERMUTED: (-1.0, 1.0), MASS: (0.0, 1.0), MISSED: (0.0, 1.0)}
"""Between what a document's value lies."""


def planted_specificity(
    planting: PlantedHalf,
    features: Int[np.ndarray, " n"],
    tokens: Int[np.ndarray, " n"],
    scale: Float[np.ndarray, " n"],
    strong: float,
) -> Specificity:
    """Features against strict induction of their tokens, each in the planted documents that hold its token: there the
    proxy is one row in as many as the document has, whatever else was planted.

    scale: of each feature, from other documents. strong: from this much of the scale up.
    """
    n, width = planting.texts.tokens.shape
    lengths = np.asarray(planting.texts.lengths)
    sums: Mapping[str, Floats] = {name: np.zeros(n) for name in Specificity.__dataclass_fields__}
    doc, pos, feature, value = (
        getattr(planting.live, name).cpu().numpy() for name in ("doc", "pos", "feature", "value")
    )
    order = np.argsort(feature, kind="stable")
    starts = np.searchsorted(feature[order], features, "left"), np.searchsorted(feature[order], features, "right")
    seconds_doc, seconds_pos, seconds_token = planting.seconds
    for k, token in enumerate(tokens.tolist()):
        own = seconds_token == token
        row_in = np.full(n, -1)
        row_in[seconds_doc[own]] = seconds_pos[own]
        entries = order[starts[0][k] : starts[1][k]]
        entries = entries[row_in[doc[entries]] >= 0]
        at, row, size = doc[entries], pos[entries], value[entries] / scale[k]
        right, is_strong = row_in[at] == row, size >= strong
        held = seconds_doc[own]
        proxy = np.bincount(seconds_pos[own], minlength=width)  # documents whose proxy is this row
        longer = (lengths[held][:, None] > np.arange(width)).sum(0)  # documents that have it
        expected = (proxy[row] - right) / np.maximum(longer[row] - 1, 1)
        np.add.at(sums["strong"], at, is_strong)
        np.add.at(sums["right"], at, is_strong & right)
        np.add.at(sums["elsewhere"], at, is_strong * expected)
        np.add.at(sums["mass"], at, size)
        np.add.at(sums["mass_right"], at, size * right)
        np.add.at(sums["wanted"], held, 1)
        np.add.at(sums["missed"], held, 1)
        np.add.at(sums["missed"], at, -1.0 * (is_strong & right))
    return Specificity(**sums)
