"""Ranks among draws of a null that come one after another, until nothing can change any more.

Besag and Clifford (1991), Biometrika 78: draws are made until h of them reach the observed number, and then p = h / l
after l draws; or n draws are made, and p = (1 + g) / (1 + n) with g that reach it (Phipson and Smyth 2010). With h the
fewest that make p exceed the level however few come after, stopping costs nothing: a head stopped early is one that the
full number of draws would deny.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fra.statistics.stats import Floats


@dataclass(frozen=True)
class Ranks:
    """What a head's candidates have in one condition."""

    p: Floats
    """[n_cand] raw; 1 where nothing was drawn."""
    n: int
    """Draws that were made."""


def sequential(
    observed: Mapping[str, Floats],
    draw: Callable[[int], Mapping[str, float]],
    standing: NDArray[np.bool_],
    level: float,
    most: int,
) -> dict[str, Ranks]:
    """Ranks of a head's candidates in several conditions that share their draws.

    observed: [n_cand] by condition. standing: [n_cand] candidates for which the outcome can still matter. Draws stop
    where none of these can meet every condition any more, and after `most`. A draw that is not a number counts against.
    """
    reached = {name: np.zeros(own.size) for name, own in observed.items()}
    at = {name: np.full(own.size, np.inf) for name, own in observed.items()}
    enough = int(np.floor(level * (most + 1))) + 1
    n = 0
    while n < most and observed and bool(_may(standing, reached, enough).any()):
        drawn = draw(n)
        n += 1
        for name, own in observed.items():
            reached[name] += ~(drawn[name] < own)
            at[name] = np.where((reached[name] >= enough) & np.isinf(at[name]), n, at[name])
    if n == 0:
        return {name: Ranks(np.ones(own.size), 0) for name, own in observed.items()}
    return {
        name: Ranks(np.where(np.isinf(at[name]), (1 + reached[name]) / (1 + n), enough / at[name]), n)
        for name in observed
    }


def _may(standing: NDArray[np.bool_], reached: Mapping[str, Floats], enough: int) -> NDArray[np.bool_]:
    """Candidates that may still meet every condition."""
    may = standing
    for own in reached.values():
        may = may & (own < enough)
    return may
