"""Random live sets of channels that move as much of a head's attention as a given set: what any disturbance of that
size does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.interventions.downstream import Head
from fra.measures.channels.transfer_designs import MatchedSets
from fra.statistics.stats import seed_of


@dataclass(frozen=True)
class Matched:
    """One random live set."""

    pairs: Int[np.ndarray, "n 2"]
    scale: float
    """How many times over it is taken out."""


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

    def draw(self, rng: np.random.Generator, window: int) -> Int[np.ndarray, "n 2"]:
        """As many channels as there are members, each one of the `window` nearest to a member in mass, none twice."""
        width = min(window, len(self.pairs))
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


class RandomSets:
    """The random live sets of one head, number by number: each is drawn anew from a seed of its own, and does not
    depend on which were drawn before.
    """

    def __init__(
        self,
        head: Head,
        share: Callable[[Int[Tensor, "n 2"]], Float[Tensor, "batch pos pos"]],
        pool: Pool,
        target: float,
        rows: Bool[Tensor, "batch pos"],
        design: MatchedSets,
        seed_parts: Sequence[str],
    ) -> None:
        """share: what a set of pairs adds to the head's scores. target: the attention that a set is to move, summed
        over `rows`.
        """
        self._head, self._share, self._pool = head, share, pool
        self._target, self._rows = target, rows
        self._design, self._seed_parts = design, tuple(seed_parts)

    def draw(self, number: int) -> Matched | None:
        """One set, taken out so many times over that it moves the target. One that moves less even at the largest scale
        is drawn again; None where none of so many can be matched.
        """
        rng = self._rng("matched set", number)
        return next(filter(None, (self._matched(rng) for _ in range(self._design.tries))), None)

    def matchable(self) -> bool:
        """Whether enough sets of a probe can be matched for there to be such a null at all."""
        if len(self._pool.pairs) < len(self._pool.wanted):
            return False
        probe = [self._matched(self._rng("probe", number)) for number in range(self._design.probe)]
        return sum(one is not None for one in probe) >= self._design.matchable * len(probe)

    def _rng(self, what: str, number: int) -> np.random.Generator:
        return np.random.default_rng(seed_of(*self._seed_parts, what, str(number)))

    @torch.no_grad()
    def _matched(self, rng: np.random.Generator) -> Matched | None:
        pairs = self._pool.draw(rng, self._design.window)
        taken = self._share(torch.from_numpy(pairs))
        scale = _scale(lambda c: float(displaced(self._head, c * taken, self._rows).sum()), self._target, self._design)
        return None if scale is None else Matched(pairs, scale)


def _scale(moves: Callable[[float], float], target: float, design: MatchedSets) -> float | None:
    """The factor at which `moves` reaches the target, within the tolerance; None where none that is allowed does."""
    low, high = 0.0, 1.0
    while moves(high) < target:
        low, high = high, 2 * high
        if high > design.largest_scale:
            return None
    for _ in range(design.halvings):
        middle = (low + high) / 2
        got = moves(middle)
        if abs(got - target) <= design.tolerance * target:
            return middle
        low, high = (middle, high) if got < target else (low, middle)
    return high
