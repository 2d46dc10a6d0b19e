"""Random live sets of channels that move as much of a head's attention as a given set: what any disturbance of that
size does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.interventions.downstream import Head

WINDOW = 40
"""A member is stood for by one of the WINDOW live channels nearest to it in mass."""
LARGEST_SCALE = 16.0
"""How many times over a random set may be taken out to move as much attention as the given set does."""
_TOLERANCE = 0.01
_HOPELESS = 20  # draws without any success


@dataclass(frozen=True)
class Matched:
    """One random live set."""

    pairs: Int[np.ndarray, "n 2"]
    scale: float
    """How many times over it is taken out."""
    taken: Float[Tensor, "batch pos pos"]
    """What that takes out of the scores."""


class Pool:
    """Live channels of one head with their mass, sum A(t,s) |F(t,s) - sum_u A(t,u) F(t,u)| over the documents."""

    def __init__(self, channels: pd.DataFrame, members: Int[np.ndarray, "n 2"]) -> None:
        """channels: columns q_feature, k_feature, value (the mass). `members` are left out of what is drawn, and looked
        up: a member that is not there has the least mass.
        """
        pairs = channels[["q_feature", "k_feature"]].to_numpy().astype(np.int64)
        mass = channels["value"].to_numpy().astype(np.float64)
        known = {(int(i), int(j)): float(m) for (i, j), m in zip(pairs, mass, strict=True)}
        own = {(int(i), int(j)) for i, j in members}
        others = np.array([(int(i), int(j)) not in own for i, j in pairs], dtype=bool)
        order = np.argsort(mass[others], kind="stable")
        self.pairs, self.mass = pairs[others][order], mass[others][order]
        least = float(self.mass[0]) if len(self.mass) else 0.0
        self.wanted = np.array([known.get((int(i), int(j)), least) for i, j in members])

    def draw(self, rng: np.random.Generator) -> Int[np.ndarray, "n 2"]:
        """As many channels as there are members, each near one of them in mass, none twice."""
        width = min(WINDOW, len(self.pairs))
        chosen: list[int] = []
        taken: set[int] = set()
        for start in np.clip(np.searchsorted(self.mass, self.wanted) - width // 2, 0, len(self.pairs) - width):
            free = [k for k in range(start, start + width) if k not in taken]
            if not free:  # more members here than channels
                free = [k for k in range(len(self.pairs)) if k not in taken]
            chosen.append(int(rng.choice(free)))
            taken.add(chosen[-1])
        pairs: np.ndarray = self.pairs[np.array(chosen)]
        return pairs


def displaced(
    head: Head, taken: Float[Tensor, "batch pos pos"], rows: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Attention that moves on each row where `taken` is taken out of the scores: half the sum of absolute changes; zero
    outside `rows`.
    """
    moved: Tensor = head.moved(taken).abs().sum(-1) / 2
    return moved * rows


def matched_sets(
    head: Head,
    share: Callable[[Int[Tensor, "n 2"]], Float[Tensor, "batch pos pos"]],
    pool: Pool,
    target: float,
    rows: Bool[Tensor, "batch pos"],
    n: int,
    rng: np.random.Generator,
) -> list[Matched]:
    """n random sets, each taken out so many times over that it moves `target` of attention, summed over `rows`.

    share: what a set of pairs adds to the head's scores. Sets that move less even at LARGEST_SCALE are drawn again;
    fewer than n come back where that happens more often than not, and none where the first ones all do.
    """
    found: list[Matched] = []
    if len(pool.pairs) < len(pool.wanted):
        return found
    for tried in range(2 * n):
        if len(found) == n or (tried == _HOPELESS and not found):
            break
        pairs = pool.draw(rng)
        taken = share(torch.from_numpy(pairs))
        scale = _scale(lambda c, taken=taken: float(displaced(head, c * taken, rows).sum()), target)  # type: ignore[misc]
        if scale is not None:
            found.append(Matched(pairs, scale, scale * taken))
    return found


def _scale(moves: Callable[[float], float], target: float) -> float | None:
    """The factor at which `moves` reaches the target, within 1 % of it; None where none below LARGEST_SCALE does."""
    low, high = 0.0, 1.0
    while moves(high) < target:
        low, high = high, 2 * high
        if high > LARGEST_SCALE:
            return None
    for _ in range(30):
        middle = (low + high) / 2
        got = moves(middle)
        if abs(got - target) <= _TOLERANCE * target:
            return middle
        low, high = (middle, high) if got < target else (low, middle)
    return high
