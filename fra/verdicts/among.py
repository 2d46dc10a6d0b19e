"""A sample of which only some candidates may make a head pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fra.errors import FraError
from fra.statistics.stats import ClusterMeans, Floats


@dataclass(frozen=True)
class Among:
    """The candidates that were chosen on other sources, tested together with each other alone; the rest cannot hold.

    What is tested together pays for its number: in the maximum of the bootstrap, and in the floor of p. Candidates that
    fell short on documents of other sources need not be paid for.
    """

    sample: ClusterMeans
    chosen: NDArray[np.bool_]
    """[n_cand]"""

    def __post_init__(self) -> None:
        if np.shape(self.chosen) != (self.sample.n_cand,):
            raise FraError(
                f"chosen has the shape {np.shape(self.chosen)}; one truth value for each of {self.sample.n_cand} "
                "candidates is needed"
            )

    @cached_property
    def _few(self) -> ClusterMeans:
        return self.sample.only(self.chosen)

    def p_above(self, bar: float, simultaneous: bool) -> Floats:
        """[n_cand] p of "effect <= bar"; 1 of those not chosen."""
        return self._spread(np.ones(self.sample.n_cand), lambda few: few.p_above(bar, simultaneous))

    def p_below(self, bar: float, simultaneous: bool) -> Floats:
        """[n_cand] p of "effect >= bar"; 1 of those not chosen."""
        return self._spread(np.ones(self.sample.n_cand), lambda few: few.p_below(bar, simultaneous))

    def lower(self, level: float, simultaneous: bool) -> Floats:
        """[n_cand] lower bounds; -inf of those not chosen."""
        return self._spread(np.full(self.sample.n_cand, -np.inf), lambda few: few.lower(level, simultaneous))

    def upper(self, level: float, simultaneous: bool) -> Floats:
        """[n_cand] upper bounds; inf of those not chosen."""
        return self._spread(np.full(self.sample.n_cand, np.inf), lambda few: few.upper(level, simultaneous))

    def _spread(self, rest: Floats, of: Callable[[ClusterMeans], Floats]) -> Floats:
        if self.chosen.any():
            rest[self.chosen] = of(self._few)
        return rest
