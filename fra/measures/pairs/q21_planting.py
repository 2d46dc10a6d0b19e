"""Channels of conceptual induction planted in a head (Q21): what the search must be able to find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from fra.measures.pairs.q21_search import CANDIDATES, ConceptEffects, ConceptStripe, HeadOnText
from fra.verdicts.stats import seed_of

_PLANTED, _TRIED, _STEPS = 12, 60, 6
_SIZES = (1.0, 4.0, 16.0)


def plant_concepts(
    on: HeadOnText,
    stripe: ConceptStripe,
    values: Float[np.ndarray, " m"],
    seed_parts: Sequence[str],
    bar: float = 0.10,
) -> tuple[int, int]:
    """How many channels were planted at the bars, and how many of them the search and the measurement find.

    Random pairs have their coupling raised, by bisection, until effect and head contrast reach `bar`; pairs that
    16 nats do not lift there are passed over. values: M of the head's candidates, strongest first.
    """
    rng = np.random.default_rng(seed_of(*seed_parts, "plant concepts", str(on.head)))
    able = np.argwhere(stripe.position_part > 0)
    drawn = able[rng.permutation(len(able))[:_TRIED]]
    planted = found = 0
    cut = float(values[-1]) if len(values) >= CANDIDATES else -np.inf
    for start in range(0, len(drawn), CANDIDATES):
        some = drawn[start : start + CANDIDATES]
        pairs = torch.from_numpy(np.stack([stripe.queries[some[:, 0]], stripe.search.key_features[some[:, 1]]], axis=1))
        grid = on.grid(pairs, 1)
        own = grid.couplings()
        without = grid.odds(-own)
        size = (on.arm.largest("query", on.head)[pairs[:, 0]] * on.arm.largest("key", on.head)[pairs[:, 1]]).clamp(
            min=1e-9
        )

        def measured(raise_: Tensor, grid: Any = grid, without: Tensor = without) -> ConceptEffects:
            odds = grid.odds(raise_[:, None])
            found: ConceptEffects = grid.effects(odds - without, odds)
            return found

        def meets(raise_: Tensor) -> Tensor:
            e = measured(raise_)
            return torch.from_numpy((e.mean() >= bar) & (e.mean("contrast") >= bar))

        low, high = torch.zeros_like(size), torch.full_like(size, torch.inf)
        for nats in _SIZES:
            up = meets(nats / size)
            high = torch.where(up & high.isinf(), nats / size, high)
            low = torch.where(~up, nats / size, low)
        able_to = ~high.isinf()
        high = torch.where(able_to, high, 0.0)
        low = torch.minimum(low, high)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            up = meets(middle)
            low, high = torch.where(up, low, middle), torch.where(up, middle, high)
        final = measured(high)
        mean, weight = final.mean(), final.weight
        n = np.maximum(final.documents, 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            residual = final.nats - np.where(np.isfinite(mean), mean, 0.0) * weight
            error = np.sqrt(n / (n - 1) * np.square(residual).sum(0)) / weight.sum(0)
        M = stripe.position_part[some[:, 0], some[:, 1]] * (own.mean(1) + high).numpy()
        seen = (cut <= M) & (mean > student.ppf(1 - 0.05 / CANDIDATES, n - 1) * error)
        for k in np.flatnonzero(able_to.numpy()):
            if planted == _PLANTED:
                return planted, found
            planted, found = planted + 1, found + int(seen[k])
    return planted, found
