"""What no source showed: how far a tail may reach that the sample lacks, and how much of it may be missing.

No resampling draws what was not seen. A sample of n sources lacks altogether, with the chance `alpha`, what shows in a
share of `ln(1 / alpha) / n` of all sources: the smaller the level of a test, the more must be supposed to be missing.
`fra.statistics.stats.ClusterMeans` therefore tests with the guard, the shift, the least margin and the floor that are
found here. All are functions of the sample's shape alone: moving every effect by a constant moves none of them.

The numbers are among the rules (`fra.statistics.rules`). They were chosen on simulated samples, never on a model;
`fra/tests/CALIBRATION.md` tells on which.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy import stats as sps

from fra.statistics.rules import RULES

Floats = NDArray[np.float64]

GUARD, REACH, ONE_GUARD = RULES.guard, RULES.reach, RULES.one_guard
RARE = RULES.rare
HARMLESS, SHOWN, SEEN = RULES.harmless, RULES.harmless_shown, RULES.harmless_sources


def linearised(s: Floats, n: Floats) -> tuple[Floats, Floats, Floats]:
    """Ratio means [n_cand], their standard errors [n_cand], residuals s - E n [n_docs, n_cand]."""
    live = (n > 0).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = s.sum(axis=0) / n.sum(axis=0)
        residual = s - estimate * n
        se = np.sqrt(live / (live - 1) * (residual**2).sum(axis=0)) / n.sum(axis=0)
    return estimate, se, residual


def apart(s: Floats, n: Floats) -> Floats:
    """[n_docs, n_cand] how far each effect by row lies above the estimate; 0 where nothing is live."""
    _, _, residual = linearised(s, n)
    return np.asarray(residual / np.where(n > 0, n, 1.0))


def guard_distance(s: Floats, n: Floats) -> Floats:
    """[n_cand] how far below the estimate the guard of a test of "above" lies."""
    e = apart(s, n)
    harmful, harmless = -e.min(axis=0), e.max(axis=0)
    return np.asarray(np.maximum(GUARD * (harmful - harmless), REACH * harmful))


def harmlessly_skewed(s: Floats, n: Floats) -> NDArray[np.bool_]:
    """[n_cand] whether a test of "above" goes without the floor."""
    if len(s) < SHOWN:
        return np.zeros(s.shape[1], dtype=bool)
    e = apart(s, n)
    shown = np.partition(e, -SHOWN, axis=0)[-SHOWN] >= HARMLESS * -e.min(axis=0)
    return np.asarray(shown & ((n > 0).sum(axis=0) >= SEEN))


def guarded(s: Floats, n: Floats) -> tuple[Floats, Floats]:
    """The sample with the guard for tests of "above": one document more, with the mean number of rows."""
    if s.size == 0:
        return s, n
    estimate, _, _ = linearised(s, n)
    rows = n.sum(axis=0) / (n > 0).sum(axis=0)
    return np.vstack([s, rows * (estimate - guard_distance(s, n))]), np.vstack([n, rows])


def floor_of(n_live: NDArray[np.int64], among: int = 1) -> Floats:
    """The chance that sources show nothing of what a share RARE of all shows, at any of so many candidates."""
    return np.asarray(np.minimum(1.0, among * (1.0 - RARE) ** n_live))


def sources_for(level: float, among: int = 1) -> int:
    """The least number of sources whose floor is no larger than the level."""
    return int(np.ceil(np.log(among / level) / -np.log(1.0 - RARE) - 1e-9))


@dataclass(frozen=True)
class Margins:
    """What tests of "above" keep beside the guard; all [n_cand], in the effect's unit where they are lengths."""

    se: Floats
    """Standard error without the guard."""
    lift: Floats
    """The estimate without the guard, from that with it."""
    distance: Floats
    """Of the guard from the estimate."""
    n_live: NDArray[np.int64]
    exposed: NDArray[np.bool_]
    """Whether the floor holds."""

    @classmethod
    def above(cls, s: Floats, n: Floats) -> "Margins":
        """Of the tests of "above"."""
        if s.size == 0:
            none = np.zeros(0)
            return cls(none, none, none, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))
        estimate, se, _ = linearised(s, n)
        with_guard, _, _ = linearised(*guarded(s, n))
        return cls(se, estimate - with_guard, guard_distance(s, n), (n > 0).sum(axis=0), ~harmlessly_skewed(s, n))

    def floor(self, simultaneous: bool) -> Floats:
        """[n_cand] no p is smaller; by Bonferroni over the candidates that have one, where they are tested together."""
        among = int(self.exposed.sum()) if simultaneous else 1
        return np.where(self.exposed, floor_of(self.n_live, among), 0.0)

    def without_floor(self) -> "Margins":
        """The same for samples of any size."""
        return replace(self, exposed=np.zeros_like(self.exposed))

    def least(self, level: float) -> Floats:
        """[n_cand] Student's margin, the guard's and the shift's at a level, without a bootstrap."""
        missing = 1 + max(np.log(ONE_GUARD / level), 0.0)
        return np.asarray(sps.t.isf(level, self.n_live - 1) * self.se + missing / self.n_live * self.distance)

    def student(self, n_boot: int, some: slice) -> Floats:
        """[n_boot, some] the least margin at each p of the bootstrap, smallest p first: Student's, with n_live - 1
        degrees of freedom.

        The bootstrap-t of a symmetric sample with heavy tails rejects too often, Student's t does not (Benjamini 1983,
        JASA 78); of a skewed one it is the other way round. The larger margin holds for either.
        """
        live, place = np.unique(self.n_live[some], return_inverse=True)
        return np.stack([_student(n_boot, int(k) - 1) for k in live], axis=1)[:, place] * self.se[some]

    def shift(self, n_boot: int, some: slice) -> Floats:
        """[n_boot, some] what the mean would lose to the share of sources that a test at each p must suppose to be
        missing beside the guard, ln(ONE_GUARD / p) / n, were they as far out as the guard.
        """
        share = np.maximum(np.log(ONE_GUARD / p_of(n_boot)), 0.0)[:, None] / self.n_live[some]
        return np.asarray(share * self.distance[some])


def p_of(n_boot: int) -> Floats:
    """[n_boot] the p of a test when 0, 1, ... resamples reach the observed t (Phipson and Smyth 2010)."""
    return np.arange(1, n_boot + 1) / (1 + n_boot)


@lru_cache(maxsize=64)
def _student(n_boot: int, df: int) -> Floats:
    return np.asarray(-special.stdtrit(df, p_of(n_boot)))


@dataclass(frozen=True)
class Agreement:
    """What can be said above (in tests of "above") of candidates of which more than half of the sources agree."""

    estimate: Floats
    """[n_cand] where the bound is counted from: the mean; the common value where all agree to the last."""
    p: Floats
    """[n_cand] of "the mean is no higher than the bound"; 1 where no more than half agree."""
    lift: Floats
    """[n_cand] of the bound from the estimate."""

    @classmethod
    def above(cls, s: Floats, n: Floats) -> "Agreement":
        """From the sources that lie below the common value, and how far.

        Resamples of such a sample have no spread more often than a small level allows, and the bootstrap no bound.
        Sources that lie above the common value are counted as lying on it, which can only lower the mean. Of n sources
        k lie below: the chance of so few, were the share RARE of all sources unlike the rest, is the binomial
        P(k or fewer of n), which is the p; the floor of all other tests where k is 0. The bound is the mean less what
        the guard and the shift at that p take, which is nothing where k is 0.
        """
        if s.size == 0:
            return cls(np.full(s.shape[1], np.nan), np.ones(s.shape[1]), np.zeros(s.shape[1]))
        live = n > 0
        n_live = live.sum(axis=0)
        safe = np.maximum(n_live, 1)
        with np.errstate(invalid="ignore"):
            value = np.where(live, s / np.where(live, n, 1.0), np.inf)
        ordered = np.sort(value, axis=0)
        ends = [np.take_along_axis(ordered, at[None], axis=0)[0] for at in ((safe - 1) // 2, safe // 2)]
        middle = np.where(n_live > 0, (ends[0] + ends[1]) / 2, 0.0)
        close = 1e-12 * np.abs(np.where(live, value, 0.0)).max(axis=0)
        agree = (live & (np.abs(np.where(live, value, middle) - middle) <= close)).sum(axis=0)
        fewer = live & (value < middle - close)
        k = fewer.sum(axis=0)
        lowered = np.where(fewer, value, middle)
        low = (n * lowered).sum(axis=0) / n.sum(axis=0).clip(1e-300)
        harmful = low - lowered.min(axis=0)
        distance = np.maximum(GUARD * (harmful - (middle - low)), REACH * harmful)
        p = np.where((n_live >= 2) & (2 * agree > n_live), sps.binom.cdf(k, n_live, RARE), 1.0)
        bound = low - distance * (1 + np.maximum(np.log(ONE_GUARD / p), 0.0)) / safe
        estimate = np.where(agree == n_live, middle, s.sum(axis=0) / n.sum(axis=0).clip(1e-300))
        return cls(estimate, p, np.where(k == 0, middle, bound) - estimate)

    def chance(self, simultaneous: bool) -> Floats:
        """[n_cand] p; by Bonferroni over the candidates that have one, where they are tested together."""
        return np.minimum(1.0, self.p * int((self.p < 1).sum())) if simultaneous else self.p
