"""Holm over heads of what each head has for all of its conditions and candidates together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as sps

from fra.statistics import stats
from fra.statistics.stats import Floats


class HolmFamily:
    """Heads that are tested together, from one p-value a head: the p of "the head passes".

    A head passes where it meets every condition (intersection-union test: Berger 1982, Technometrics 24), so that the
    largest p of its conditions is a p-value of its own whatever their dependence; of several candidates the least
    counts, whose p must be simultaneous over them. Holm (1979) over the heads then bounds the chance of any wrong head
    by the level, for all conditions together.
    """

    def __init__(self, p: ArrayLike, level: float) -> None:
        values = np.asarray(p, dtype=np.float64)
        self.p, self.level = np.where(np.isnan(values), 1.0, values), level
        self.levels: Floats = stats.holm_levels(self.p, level)
        """[n_heads] the level at which each head was tested: a p of one of its conditions counts against this."""
        order = np.argsort(self.p, kind="stable")
        holm, m = stats.holm(self.p), self.p.size
        passed = holm <= level
        rank = sps.rankdata(self.p, method="min") - 1
        self._steps = m - np.minimum(np.where(passed, rank, passed.sum()), m - 1)
        before = np.zeros(m)
        before[order[1:]] = holm[order[:-1]]
        self._reached = np.where(passed, before, 0.0)

    def adjusted(self, head: int, p: ArrayLike) -> Floats:
        """[n] p-values of one of the head's conditions, adjusted: the smallest level at which Holm comes to the head
        and the raw one is within what the head then has. `<= level` exactly where the raw one is `<=` the head's level,
        to the last bit.
        """
        own = np.asarray(p, dtype=np.float64)
        own = np.where(np.isnan(own), 1.0, own)
        stepped = np.minimum(1.0, np.maximum(own * self._steps[head], self._reached[head]))
        within = own <= self.levels[head]
        beyond = np.nextafter(self.level, 1.0)
        return np.asarray(np.where(within, np.minimum(stepped, self.level), np.maximum(stepped, beyond)))


def least_most(by_condition: Sequence[Sequence[float] | Floats]) -> float:
    """The p of a head: over its candidates the least of what the worst of their conditions has; 1 without any."""
    if not by_condition:
        return 1.0
    n = max(np.size(own) for own in by_condition)
    worst = np.max([np.broadcast_to(np.asarray(own, dtype=np.float64), (n,)) for own in by_condition], axis=0)
    return float(worst.min(initial=1.0))


def most_least(by_condition: Sequence[Sequence[float] | Floats]) -> float:
    """The p of a head's refutation: over its candidates, all of which must fail, the largest of what the best of
    several tests gives, Bonferroni over those; 1 without any.
    """
    if not by_condition:
        return 1.0
    n = max(np.size(own) for own in by_condition)
    if not n:
        return 1.0
    best = np.min([np.broadcast_to(np.asarray(own, dtype=np.float64), (n,)) for own in by_condition], axis=0)
    return min(1.0, float(best.max()) * len(by_condition))
