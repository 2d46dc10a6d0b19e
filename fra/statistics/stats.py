"""Estimates, intervals, permutation and families; documents are the unit of everything.

A statistic is a *ratio mean* over documents, `E_c = sum_d sums[d, c] / sum_d counts[d, c]`: one number a candidate `c`,
documents as clusters. Documents are sparse and right-skewed (most show nothing, a few show a lot), so the tests are
studentised bootstraps against the claim's bar, not sign flips, which assume symmetry. What they do on such samples,
beside what else could have been used, is measured in `fra/tests/CALIBRATION.md`.

`level` is a test's level everywhere: 0.05, not 0.95; below 1.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy import stats as sps

from fra.errors import FraError
from fra.statistics import unseen
from fra.statistics.unseen import Agreement, Margins
from fra.statistics.unseen import Floats as Floats
from fra.statistics.unseen import guarded as guarded
from fra.statistics.unseen import linearised as linearised

BLOCK = 2**21  # numbers in one block of resamples (16 MiB); about ten such arrays live at once


class ClusterMeans:
    """Ratio means of many candidates, documents as clusters; their tests against a bar, the bounds that invert them.

    Parameters
    ----------
    sums: [n_docs, n_cand] or [n_docs], the effect summed over the live rows of each document, in the effect's unit.
    counts: same shape, the number of live rows; ones where None. With a count of 0 a document says nothing about that
        candidate, and its sum must be 0.
    seed: of the resampling; equal seeds and inputs give equal numbers. n_boot: the number of resamples, B.

    Attributes
    ----------
    sums, counts: [n_docs, n_cand], as given.
    estimate, se: [n_cand], the effect's unit; NaN where nothing can be said.
    n_live: [n_cand], documents with counts above 0.
    testable: [n_cand] bool, whether there is a variance. constant: [n_cand] bool, whether all live documents agree.

    The standard error is cluster-robust, by linearisation: `se^2 = G/(G-1) sum_d (s_d - E n_d)^2 / (sum_d n_d)^2`
    with G live documents (Cochran 1977, Sampling Techniques, ch. 6; weighted least squares on a constant with
    `cov_type="cluster"` gives the same). The reference is `t* = (E* - E) / se*` over B multinomial resamples of the
    documents (bootstrap-t: Hall 1992, The Bootstrap and Edgeworth Expansion, ch. 3). Simultaneous tests and bounds use
    its maximum over the candidates, in each direction its own (single-step max-T: Westfall and Young 1993,
    Resampling-Based Multiple Testing, ch. 2; Romano and Wolf 2005, Econometrica 73), whatever the dependence between
    candidates. `p = (1 + b) / (1 + B)`, never 0 (Phipson and Smyth 2010).

    A sample skewed towards where the test would be wrong probably lacks its worst documents, and no resampling draws
    what was not seen; the bare bootstrap-t then rejects 8 to 13 % at 5 %, and thirty times too often at 0.1 %. What
    each direction keeps instead, with numbers from `fra.statistics.unseen`; a is how far an effect by row lies from E
    at most on the side that speaks against rejection, o on the other:

    - the guard: one document more, max(GUARD (a - o), REACH a) from E on the side of a, with the mean number of rows;
    - the shift: at a level p below ONE_GUARD, E moves by ln(ONE_GUARD / p) / G of that distance;
    - the least margin: Student's, t_{G-1}(p) se;
    - the floor: p >= (1 - RARE)^G, by Bonferroni over candidates tested together, unless SEEN documents or more are
      live and even the SHOWN-th farthest on the other side lies HARMLESS a from E: a small share of all documents may
      hold what turns the verdict, and fewer than forty show none of it too often for 5 %;
    - where more than half of the documents agree, also the binomial test of how few do not (`unseen.Agreement`), which
      decides alone where all agree: p = (1 - RARE)^G, and both bounds are the value itself where that is reached.

    It is a correction, not a guarantee: what shows in fewer documents than RARE stays invisible, as to any method that
    knows no range. Where a range is known, `fra.statistics.bounds` has bounds without these margins.

    A candidate about which nothing can be said (fewer than two live documents, numbers not finite) has p = 1 and
    infinite bounds. It stays out of the maximum, as does a constant one.

    Raises FraError for shapes that do not agree, negative counts, or sums where nothing is live.

    """

    def __init__(self, sums: ArrayLike, counts: ArrayLike | None = None, *, seed: int, n_boot: int = 9_999) -> None:
        s = _as_table(sums)
        n = np.ones_like(s) if counts is None else _as_table(counts)
        if s.ndim != 2 or s.shape != n.shape:
            raise FraError(
                f"sums and counts must both be [n_docs, n_cand]; they are {list(s.shape)} and {list(n.shape)}"
            )
        if n_boot < 1:
            raise FraError(f"n_boot is {n_boot}; at least one resample is needed")
        if (n < 0).any():
            raise FraError("counts hold a negative number; they count the live rows of a document")
        if ((n == 0) & (s != 0) & np.isfinite(s)).any():
            raise FraError("sums are not 0 where counts are 0; a document without live rows has no effect to add")
        self.n_docs, self.n_cand = s.shape
        self.sums, self.counts = s, n
        self.seed, self.n_boot = seed, n_boot
        self.n_live: NDArray[np.int64] = (n > 0).sum(axis=0)
        finite = np.isfinite(s).all(axis=0) & np.isfinite(n).all(axis=0)
        s, n = np.where(finite, s, 0.0), np.where(finite, n, 0.0)
        estimate, se, _ = linearised(s, n)
        with np.errstate(divide="ignore", invalid="ignore"):
            # Rounding leaves a constant sample residuals of 1e-16 of its terms: no variance, and a t of 1e16.
            noise = 1e-12 * np.sqrt((s**2).sum(axis=0)) / n.sum(axis=0)
            self.testable: NDArray[np.bool_] = finite & (self.n_live >= 2) & np.isfinite(se) & (se > noise)
        self.constant: NDArray[np.bool_] = finite & (self.n_live >= 2) & ~self.testable
        self.estimate: Floats = np.where(self.testable, estimate, np.nan)
        self.estimate[self.constant] = self._agreed_above.estimate[self.constant]
        self.se: Floats = np.where(self.testable, se, np.where(self.constant, 0.0, np.nan))
        self._sums, self._counts = s[:, self.testable], n[:, self.testable]

    def p_above(self, bar: ArrayLike, simultaneous: bool = True) -> Floats:
        """[n_cand] p of H0: E <= bar (one number, or one a candidate); small when the effect is above the bar."""
        return self._p(self._above, self._margins_above, self._agreed_above, self._each(bar), simultaneous)

    def p_below(self, bar: ArrayLike, simultaneous: bool = True) -> Floats:
        """[n_cand] p of H0: E >= bar (one number, or one a candidate); small when the effect is below the bar."""
        return self._p(self._below, self._margins_below, self._agreed_below, -self._each(bar), simultaneous)

    def lower(self, level: ArrayLike, simultaneous: bool = True) -> Floats:
        """[n_cand] lower bounds: `p_above(bar) <= level` exactly where `lower(level) > bar`. -inf: none."""
        return self._bound(self._above, self._margins_above, self._agreed_above, self._each(level), simultaneous)

    def upper(self, level: ArrayLike, simultaneous: bool = True) -> Floats:
        """[n_cand] upper bounds: `p_below(bar) <= level` exactly where `upper(level) < bar`. inf: none."""
        return -self._bound(self._below, self._margins_below, self._agreed_below, self._each(level), simultaneous)

    def turned(self) -> "ClusterMeans":
        """The sample of -E, with the same resamples: "below" said as "above"."""
        return ClusterMeans(-self.sums, self.counts, seed=self.seed, n_boot=self.n_boot)

    def only(self, some: NDArray[np.bool_]) -> "ClusterMeans":
        """The sample of some candidates, with the same resamples."""
        return ClusterMeans(self.sums[:, some], self.counts[:, some], seed=self.seed, n_boot=self.n_boot)

    def power(self, worth: float, level: float, above: bool = True, simultaneous: bool = False) -> Floats:
        """[n_cand] the chance that an effect `worth` beyond a bar is told from it: `power_above`, either way round."""
        return power_above(self if above else self.turned(), 0.0, worth, level, simultaneous)

    def _p(self, tail: "Tail", margins: Margins, agreed: Agreement, bars: Floats, simultaneous: bool) -> Floats:
        p = np.ones(self.n_cand)
        p[self.testable] = tail.p(bars[self.testable], simultaneous, margins)
        reached = self._agreed_bound(tail, margins, agreed) > bars
        return np.where(reached, np.minimum(p, agreed.chance(simultaneous)), p)

    def _bound(self, tail: "Tail", margins: Margins, agreed: Agreement, levels: Floats, simultaneous: bool) -> Floats:
        bound = np.full(self.n_cand, -np.inf)
        bound[self.testable] = tail.bound(levels[self.testable], simultaneous, margins)
        reached = agreed.chance(simultaneous) <= levels
        return np.where(reached, np.maximum(bound, self._agreed_bound(tail, margins, agreed)), bound)

    def _agreed_bound(self, tail: "Tail", margins: Margins, agreed: Agreement) -> Floats:
        base = agreed.estimate.copy()
        base[self.testable] = tail.estimate + margins.lift
        return np.where(agreed.p < 1, base + agreed.lift, -np.inf)

    def _each(self, value: ArrayLike) -> Floats:
        return np.broadcast_to(np.asarray(value, dtype=np.float64), (self.n_cand,))

    @cached_property
    def _above(self) -> "Tail":
        return Tail(*guarded(self._sums, self._counts), seed=self.seed, n_boot=self.n_boot)

    @cached_property
    def _below(self) -> "Tail":
        return Tail(*guarded(-self._sums, self._counts), seed=self.seed, n_boot=self.n_boot)

    @cached_property
    def _margins_above(self) -> Margins:
        return Margins.above(self.sums[:, self.testable], self.counts[:, self.testable])

    @cached_property
    def _margins_below(self) -> Margins:
        return Margins.above(-self.sums[:, self.testable], self.counts[:, self.testable])

    @cached_property
    def _agreed_above(self) -> Agreement:
        return Agreement.above(np.where(self._says, self.sums, 0.0), np.where(self._says, self.counts, 0.0))

    @cached_property
    def _agreed_below(self) -> Agreement:
        return Agreement.above(np.where(self._says, -self.sums, 0.0), np.where(self._says, self.counts, 0.0))

    @property
    def _says(self) -> NDArray[np.bool_]:
        """[n_cand] whether all numbers are finite."""
        return np.asarray(np.isfinite(self.sums).all(axis=0) & np.isfinite(self.counts).all(axis=0))

    @cached_property
    def _unguarded_below(self) -> "Tail":
        """-t* of the sample as it is: how estimates vary, for power. Resamples without a t count as low estimates."""
        return Tail(-self._sums, self._counts, seed=self.seed, n_boot=self.n_boot)


class Tail:
    """The test of H0: E <= bar, and its lower bound, for candidates [n_docs, n_cand] that all have a variance."""

    def __init__(self, sums: Floats, counts: Floats, *, seed: int, n_boot: int) -> None:
        self.estimate, self.se, self._residual = linearised(sums, counts)
        self._counts, self._seed, self._n_boot = counts, seed, n_boot
        self._sorted: dict[int, Floats] = {}

    def p(self, bars: Floats, simultaneous: bool, margins: Margins | None = None) -> Floats:
        """[n_cand] p of H0: E <= bar; by the bootstrap alone without margins."""
        p = np.ones(bars.size)
        for some in self._columns():
            # Bounds are counted, not t's: test and bound compare the same rounded numbers, to the last bit.
            missed = (~(self._bounds(some, simultaneous, margins) > bars[some])).sum(axis=0)
            p[some] = (1 + missed) / (1 + self._n_boot)
        return p

    def bound(self, levels: Floats, simultaneous: bool, margins: Margins | None = None) -> Floats:
        """[n_cand] lower bounds."""
        bound = np.full(levels.size, -np.inf)
        p_of = unseen.p_of(self._n_boot)
        for some in self._columns():
            reach = (
                np.searchsorted(p_of, np.nan_to_num(levels[some]), side="right") - 1
            )  # the most that may; -1: no p is that small
            bounds = self._bounds(some, simultaneous, margins)
            bound[some] = np.where(reach >= 0, bounds[np.maximum(reach, 0), np.arange(reach.size)], -np.inf)
        return bound

    def _columns(self) -> Iterator[slice]:
        size = max(1, BLOCK // self._n_boot)
        for start in range(0, self.estimate.size, size):
            yield slice(start, start + size)

    def _bounds(self, some: slice, simultaneous: bool, margins: Margins | None) -> Floats:
        """[n_boot, some] the lower bound at each p, lowest first: what a resample's t gives, less the margins."""
        t = self._maximum[:, None] if simultaneous else self.marginal(some)
        with np.errstate(invalid="ignore"):
            bounds = np.asarray(self.estimate[some] - t[::-1] * self.se[some])
        if margins is None:
            return bounds
        student = self.estimate[some] + margins.lift[some] - margins.student(self._n_boot, some)
        bounds = np.minimum(bounds - margins.shift(self._n_boot, some), student)
        bounds[unseen.p_of(self._n_boot)[:, None] < margins.floor(simultaneous)[some]] = -np.inf
        return bounds

    @cached_property
    def _maximum(self) -> Floats:
        """[n_boot] the largest t* over all candidates, ascending."""
        return np.sort(np.concatenate([t.max(axis=1) for t in self.resamples(slice(None))]))

    def marginal(self, some: slice) -> Floats:
        """[n_boot, some] each candidate's own t*, ascending."""
        if some.start in self._sorted:
            return self._sorted[some.start]
        t = np.sort(np.concatenate(list(self.resamples(some))), axis=0)
        if self.estimate.size <= t.shape[1]:  # more than one block of candidates is computed again, not stored
            self._sorted[some.start] = t
        return t

    def resamples(self, some: slice) -> Iterator[Floats]:
        """Blocks [resamples, some] of t*, the same for a seed whatever the size of a block.

        Undefined t* (one document drawn, or none, or only equal ones) count as inf, which can only widen a bound,
        unless the resample lies below the estimate.
        """
        r, n = self._residual[:, some], self._counts[:, some]
        live = (n > 0).astype(np.float64)
        n_docs = len(r)
        size = max(1, BLOCK // max(r.shape[1], n_docs))
        whole = size >= self._n_boot  # above and below draw alike, one after the other
        for w in (_drawn_whole if whole else times_drawn)(self._seed, n_docs, self._n_boot, size):
            rows, groups, squares = w @ n, w @ live, w @ r**2
            with np.errstate(divide="ignore", invalid="ignore"):
                shift = (w @ r) / rows
                variance = squares - 2 * shift * (w @ (r * n)) + shift**2 * (w @ n**2)
                t = shift * rows / np.sqrt(groups / (groups - 1) * np.maximum(variance, 0.0))
                defined = (groups > 1.5) & (variance > 1e-12 * squares)
                below = shift * rows < -1e-9 * np.sqrt(squares)  # rounding must not choose the direction
            yield np.where(defined, t, np.where(below, -np.inf, np.inf))


def times_drawn(seed: int, n_docs: int, n_boot: int, size: int) -> Iterator[Floats]:
    """Blocks [up to `size`, n_docs] of how often each document is drawn, n_docs draws with replacement a resample:
    multinomial counts, the same for a seed whatever the size of a block.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, n_boot, size):
        many = min(size, n_boot - start)
        drawn = rng.integers(n_docs, size=(many, n_docs))
        drawn += n_docs * np.arange(many)[:, None]
        yield np.bincount(drawn.ravel(), minlength=many * n_docs).reshape(many, n_docs).astype(np.float64)


@lru_cache(maxsize=1)
def _drawn_whole(seed: int, n_docs: int, n_boot: int, size: int) -> tuple[Floats, ...]:
    return tuple(times_drawn(seed, n_docs, n_boot, size))


def _as_table(values: ArrayLike) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    return table[:, None] if table.ndim == 1 else table


def holm(p: ArrayLike) -> Floats:
    """Holm-adjusted p-values (Holm 1979, Scandinavian Journal of Statistics 6); NaN counts as 1.

    What `statsmodels.stats.multitest.multipletests(method="holm")` gives, without its `gc.collect()` at every call,
    which takes seconds beside a loaded model.
    """
    values = _as_p(p)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def holm_levels(p: ArrayLike, level: float) -> Floats:
    """Holm's level for each raw p-value: `p <= holm_levels` exactly where `holm(p) <= level`.

    Of m, the k-th smallest has level / (m - k + 1) if it is rejected; all others have the level of the first step that
    failed. A bound at its level excludes the bar exactly where Holm rejects: it inverts the test, and is no
    simultaneous confidence bound.
    """
    values = _as_p(p)
    rejected = holm(values) <= level
    m = values.size
    rank = np.where(rejected, sps.rankdata(values, method="min") - 1, rejected.sum())
    levels = level / (m - np.minimum(rank, m - 1))
    # holm() multiplies where this divides: keep the last bit from turning a verdict.
    exact = np.where(rejected, np.maximum(levels, values), np.minimum(levels, np.nextafter(values, 0)))
    return np.asarray(exact, dtype=np.float64)


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Benjamini-Hochberg q-values (scipy); NaN counts as 1."""
    values = _as_p(p)
    return np.asarray(sps.false_discovery_control(values), dtype=np.float64) if values.size else values


def rank_p(observed: float, null: ArrayLike) -> float:
    """(1 + #{null >= observed}) / (1 + len(null)) (Phipson and Smyth 2010). NaN counts against, on either side."""
    draws = np.asarray(null, dtype=np.float64).ravel()
    return float((1 + (~(draws < observed)).sum()) / (1 + draws.size))


@lru_cache(maxsize=4096)
def clopper_pearson(k: int, n: int, level: float) -> tuple[float, float]:
    """Exact bounds of a share, each one-sided at `level` (29 of 29 at 0.05: above 0.90); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    low = sps.binomtest(k, n, alternative="greater").proportion_ci(1 - level, method="exact").low
    high = sps.binomtest(k, n, alternative="less").proportion_ci(1 - level, method="exact").high
    return float(low), float(high)


def seed_of(*parts: str) -> int:
    """A seed from the sha256 of the parts, and of the run's own (`use_seed`): 63 bits, which numpy and torch both take.
    ("ab", "c") is not ("a", "bc").
    """
    of_run = (f"seed {_run.seed}",) if _run.seed else ()
    return int.from_bytes(hashlib.sha256(json.dumps([*of_run, *parts]).encode()).digest()[:8], "big") >> 1


def use_seed(seed: int) -> None:
    """Let every seed of this process depend on this number too (`--seed`); 0, which is where a process begins, changes
    nothing.
    """
    _run.seed = seed


class _OfRun:
    """One a process, for all of its threads."""

    seed = 0


_run = _OfRun()


def power_above(
    means: ClusterMeans, bar: ArrayLike, effect: ArrayLike, level: ArrayLike, simultaneous: bool = True
) -> Floats:
    """[n_cand] the chance of `p_above(bar) <= level` if the true effect were `effect`, documents varying as here.

    The test rejects when the estimate is more than its margin m = estimate - lower(level) above the bar (with all that
    `ClusterMeans` keeps, and the maximum where simultaneous), and (estimate - truth) / se is distributed as the
    bootstrap t: the power is the share of resamples with t* > (m - (effect - bar)) / se. 0 where nothing can be said
    at that level; where all documents agree they would again, and the power is 1 where effect - bar > m, else 0. Of a
    mean whose bound is Clopper-Pearson's the power is `fra.statistics.bounds.power_of_share`.
    """
    gain = np.broadcast_to(np.asarray(effect, dtype=np.float64) - np.asarray(bar, dtype=np.float64), (means.n_cand,))
    ok, tail = means.testable, means._unguarded_below
    margin = means.estimate - means.lower(level, simultaneous)
    need = ((margin - gain)[ok]) / means.se[ok]
    share = np.zeros(need.size)
    for some in tail._columns():
        share[some] = (-tail.marginal(some) > need[some]).mean(axis=0)
    out = np.where(gain > margin, 1.0, 0.0)  # False where there is no margin
    out[ok] = share
    return out


def detectable(means: ClusterMeans, level: ArrayLike, power: float = 0.8, simultaneous: bool = True) -> Floats:
    """[n_cand] the smallest true effect, counted *from the bar*, that `p_above` finds at `level` with this power.

    m + u se, with m the test's margin as in `power_above` and u the quantile of -t* at `power`: by resampling, because
    the normal formula (t_{1-level} + t_{power}) se, to which it comes down for one candidate with normal documents,
    knows neither the maximum nor the skew. inf where nothing can be said at that level; 0 where all documents agree.
    """
    ok, tail = means.testable, means._unguarded_below
    margin = means.estimate - means.lower(level, simultaneous)
    quantile = np.zeros(int(ok.sum()))
    for some in tail._columns():
        quantile[some] = np.quantile(tail.marginal(some), power, axis=0, method="higher")
    out = np.where(np.isnan(margin), np.inf, margin)
    out[ok] = margin[ok] + quantile * means.se[ok]
    return out


def sources_needed(
    means: ClusterMeans, bar: float, level: float, direction: Literal["above", "below"] = "above"
) -> int | None:
    """About how many independent sources with live rows would decide "above" or "below" the bar at this level, were
    they as these; of several candidates (each tested by itself) the fewest. None where no number would: the effect is
    at the bar or on the other side of it.

    With margin m (the distance of estimate and bound) at n live sources, and the estimate d from the bar, n (m / d)^2:
    a margin shrinks with the root of n. No fewer than the floor of p asks for (`unseen.sources_for`), where it holds;
    and m without the floor, which no margin is. Half of such samples would decide; four in five with some (1 + 0.84 se
    / m)^2 times as many.
    """
    side = means if direction == "above" else means.turned()
    gain = side.estimate - (bar if direction == "above" else -bar)
    margins, tail = side._margins_above, side._above
    margin = np.zeros(means.n_cand)
    if side.testable.any():
        bound = tail.bound(np.full(tail.estimate.size, level), False, margins.without_floor())
        # The bootstrap has no bound: too few resamples for the level, or too many without a spread.
        normal = tail.estimate + margins.lift - margins.least(level)
        base = side.estimate[side.testable]
        margin[side.testable] = base - np.where(np.isfinite(bound), bound, normal)
    exposed = side.constant.copy()
    exposed[side.testable] = margins.exposed
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = np.ceil(side.n_live * (margin / gain) ** 2)
    needed = np.maximum(needed, np.where(exposed, unseen.sources_for(level), 2))
    can = np.isfinite(needed) & (gain > 1e-12 * np.abs(side.estimate))
    return int(needed[can].min()) if can.any() else None


def _as_p(p: ArrayLike) -> Floats:
    values = np.asarray(p, dtype=np.float64)
    return np.where(np.isnan(values), 1.0, values)


def by_source(
    values: Float[np.ndarray, "n_documents *rest"],  # noqa: F821
    sources: Sequence[str],
) -> Float[np.ndarray, "n_sources *rest"]:  # noqa: F821
    """Sums over documents of one source: what is resampled as one."""
    names, index = np.unique(np.asarray(sources), return_inverse=True)
    out = np.zeros((len(names), *values.shape[1:]))
    np.add.at(out, index, values)
    return out
