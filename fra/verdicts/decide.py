"""The one place that decides: what a claim measured, condition by condition, becomes evidence for the judge.

A claim says what it measured, a `Sampled`, a `Given` or a `Drawn` for each condition, and `decide` corrects for
everything that was looked at:

- "the head passes" is an intersection-union test: the head's p is the largest among its conditions (of the candidate
  for which that is least, simultaneous over the candidates where the column says so), and Holm goes over the heads
  (`fra.statistics.multiplicity`). The chance that any head of the family is SUPPORTED wrongly is bounded by the claim's
  level, for all of its conditions together, where the candidates of a head fail for one and the same reason; where
  each fails for another, by the level times the conditions that are tested over candidates.
- "the head is refuted" needs that of every candidate some condition is short of its bar. For the one that would make
  the claim true any of them may be wrong: Bonferroni over the samples that may refute, then Holm over the heads.

Nulls come last, one draw after another, and only for heads that pass everything else. Bounds are at the level at which
the head was tested, so that they exclude the bar exactly where the test rejects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fra.errors import FraError
from fra.statistics import stats
from fra.statistics.exact import exact_where_unbounded
from fra.statistics.multiplicity import HolmFamily, least_most, most_least
from fra.statistics.nulls import Ranks, sequential
from fra.statistics.rules import RULES
from fra.statistics.stats import Floats
from fra.statistics.unseen import sources_for
from fra.verdicts.among import Among
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.conditions import as_share, rank_condition, weakest

WHOLE = "all"
"""Stands for the head of a claim about the target as a whole."""


@runtime_checkable
class Sample(Protocol):
    """What one head (or dictionary) gave: something to test against a bar in either direction, for n_cand candidates.

    `fra.statistics.stats.ClusterMeans`, `fra.statistics.exact.Proportion` and `Number` are such.
    """

    @property
    def n_cand(self) -> int:
        """Candidates."""
        ...

    @property
    def estimate(self) -> ArrayLike:
        """[n_cand] in the bar's unit."""
        ...

    def p_above(self, bar: float, simultaneous: bool) -> Floats:
        """[n_cand] p of "effect <= bar"."""
        ...

    def p_below(self, bar: float, simultaneous: bool) -> Floats:
        """[n_cand] p of "effect >= bar"."""
        ...

    def lower(self, level: float, simultaneous: bool) -> Floats:
        """[n_cand] lower bounds, one-sided at the level."""
        ...

    def upper(self, level: float, simultaneous: bool) -> Floats:
        """[n_cand] upper bounds, one-sided at the level."""
        ...

    def power(self, worth: float, level: float, above: bool, simultaneous: bool) -> Floats:
        """[n_cand] the chance that an effect that lies `worth` beyond a bar (above it or below) is told from the bar
        at the level.
        """
        ...


@dataclass(frozen=True)
class Number:
    """A number in which all documents agree (L0 under TopK, say): it has no spread. It can be missed, and refutes
    nothing but an identity.
    """

    estimate: float
    n_cand: int = 1

    def p_above(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] 0 where it is above the bar, else 1."""
        return np.where(self.estimate > np.atleast_1d(bar), 0.0, 1.0)

    def p_below(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] 0 where it is below the bar, else 1."""
        return np.where(self.estimate < np.atleast_1d(bar), 0.0, 1.0)

    def lower(self, level: float, simultaneous: bool = False) -> Floats:
        """[1] itself."""
        return np.array([self.estimate])

    upper = lower

    def power(self, worth: float, level: float, above: bool = True, simultaneous: bool = False) -> Floats:
        """[1] nothing is known of it."""
        return np.full(1, np.nan)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A condition that samples of documents decide, for every head of a family."""

    name: str
    samples: Mapping[str, Sample | Sequence[Sample] | Mapping[str, Sample]]
    """By head. Where a head has several (one a seed; one a dictionary, by its name), the condition holds where it does
    for each of them, and any of them may refute; a head with fewer than another has its last one counted again.
    """
    simultaneous: bool = False
    """Candidates of a head are tested together."""
    chosen: Mapping[str, NDArray[np.bool_]] | None = None
    """By head [n_cand], samples being of documents: the candidates that may make it pass, chosen on other sources: only
    these are tested together. All where None.
    """
    shares: Mapping[str, tuple[float, float]] | None = None
    """By head (part, whole): the samples are those of part - bar * whole, tested against zero, and the condition is
    said as a share of the whole.
    """
    bounded: tuple[float, float] | None = None
    """The range of a cluster's value: an exact bound stands in where the bootstrap has none (fra.statistics.bounds)."""
    linearised: bool = False
    """A difference of two samples, linearised: the value of a cluster has that range only where all agree."""


@dataclass(frozen=True)
class Given:
    """A condition on numbers that are not estimated: it can be missed, and refutes identities only."""

    name: str
    values: Mapping[str, ArrayLike]
    """By head, one a candidate, or one for all."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Conditions that are ranks among draws of a null, `claim.bars[name]` being 1 - level: each can be missed and
    never refutes. Draws are made one after another while a head can still pass, at most `RULES.draws`.
    """

    observed: Mapping[str, Mapping[str, ArrayLike]]
    """By condition, by head: [n_cand] the head's own numbers."""
    draw: Callable[[str, int], Mapping[str, float]]
    """`draw(head, k)`: the k-th draw's numbers by condition, the largest over what would be its candidates. It depends
    on head and k alone, k = 0, 1, ....
    """
    most: Mapping[str, int] | None = None
    """By head: how many draws there are; None: as many as are asked for."""


Column = Sampled | Given | Drawn


@dataclass(frozen=True)
class Planted:
    """How many planted effects went through every condition, of how many."""

    found: int
    tried: int
    futile: bool = False
    """Whether planting was ended early, because the bound could not reach RULES.power any more."""

    @property
    def power(self) -> float:
        """The lower confidence bound of the share (RULES.power_level); NaN with fewer than RULES.plantings, unless no
        more could help.
        """
        if self.tried < RULES.plantings and not self.futile:
            return float("nan")
        return stats.clopper_pearson(self.found, self.tried, RULES.power_level)[0]


@dataclass(frozen=True)
class Beside:
    """What stands beside a head's numbers."""

    n: int | None = None
    """Independent sources; None: what the samples rest on."""
    candidates: Sequence[str] = ("every condition",)
    """Names of the candidates, in the order of the samples."""
    undecided: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decided:
    """Conditions by head and candidate, in the order of the columns, and what they rest on."""

    conditions: Mapping[str, list[tuple[Condition, ...]]]
    raw: Mapping[str, float]
    """Each head's p of "it passes", before the correction over the heads."""
    drawn: Mapping[str, int]
    """Draws of nulls that were made for each head."""


def means_of(
    claim: Claim,
    target: str,
    head: str,
    name: str,
    sums: ArrayLike,
    counts: ArrayLike | None = None,
    sources: Sequence[str] | None = None,
) -> stats.ClusterMeans:
    """The ratio mean of one condition at one head, seeded by what it is for; sources of the documents as clusters.

    sums: [n_docs] or [n_docs, n_cand]; counts: the same, ones where None.
    """
    table = np.asarray(sums, dtype=np.float64)
    n = np.ones_like(table) if counts is None else np.asarray(counts, dtype=np.float64)
    if sources is not None:
        table, n = stats.by_source(table, sources), stats.by_source(n, sources)
    return stats.ClusterMeans(table, n, seed=stats.seed_of(claim.digest, target, head, name))


def ranked(claim: Claim, name: str, observed: Mapping[str, ArrayLike], draws: Mapping[str, ArrayLike]) -> Drawn:
    """Ranks among draws that were all made beforehand, by head [n_draws]: where a draw costs nothing."""
    every = {h: np.asarray(own, dtype=np.float64).ravel() for h, own in draws.items()}
    return Drawn(
        observed={name: observed},
        draw=lambda h, k: {name: float(every[h][k])},
        most={h: own.size for h, own in every.items()},
    )


def corrected(claim: Claim, columns: Sequence[Column]) -> Decided:
    """Every condition of every head, corrected. The first column is the headline.

    A head that a column does not have, or has no candidates in, gets conditions that were not measured: they neither
    hold nor fail. Raises FraError for an empty table, and for columns whose candidates do not agree.
    """
    if not columns:
        raise FraError(f"{claim.id}: a claim without conditions would be supported by nothing")
    heads = list(dict.fromkeys(h for column in columns for h in _heads(column)))
    tests = {c.name: _Tests(claim, c) for c in columns if isinstance(c, Sampled)}
    for h in heads:
        _agree(claim, columns, h)
    sampled = {h: {name: t for name, t in tests.items() if h in t.up} for h in heads}
    refuting = sum(t.parts for t in tests.values() if t.refutes)
    against = [
        most_least([own for t in sampled[h].values() if t.refutes for own in t.down[h]])
        * (refuting / max(1, sum(t.parts for t in sampled[h].values() if t.refutes)))
        for h in heads
    ]
    down = HolmFamily(np.minimum(1.0, against), claim.level)
    p, ranks = _ranks(claim, columns, heads, tests)
    up = HolmFamily([least_most(p[h]) for h in heads], claim.level)
    found: dict[str, list[tuple[Condition, ...]]] = {}
    for k, h in enumerate(heads):
        own: list[list[Condition]] = []
        for column in columns:
            if isinstance(column, Drawn):
                own += [_of_ranks(claim, name, h, column, ranks, up, k) for name in column.observed]
            elif isinstance(column, Given):
                own.append(_given(claim, column, h))
            else:
                t = tests[column.name]
                own.append(t.conditions(h, k, up, down, refuting) if h in t.up else [_unmeasured(claim, column.name)])
        n_cand = max(map(len, own))
        found[h] = [tuple(each[c if len(each) > 1 else 0] for each in own) for c in range(n_cand)] if all(own) else []
    drawn = {h: max((r.n for (head, _), r in ranks.items() if head == h), default=0) for h in heads}
    return Decided(found, {h: float(up.p[k]) for k, h in enumerate(heads)}, drawn)


def decide(
    claim: Claim,
    columns: Sequence[Column],
    rows: Mapping[str, Beside],
    *,
    planted: Callable[[str], Planted] | None = None,
    q_over: Sequence[str] | None = None,
) -> dict[str, Evidence]:
    """Evidence for every head of `rows`: conditions as `corrected` has them, power, and q over the heads.

    rows: {WHOLE: ...} for a claim about the whole target: its one row has head None. planted: for a search, how many
    planted effects go through every condition at a head; asked only where the head would be refuted. q_over: the heads
    over which q is taken (those without a candidate count as p = 1); all rows where None, none where empty.
    """
    decided = corrected(claim, columns)
    over = list(rows) if q_over is None else list(q_over)
    q = dict(zip(over, stats.benjamini_hochberg([decided.raw.get(h, 1.0) for h in over]), strict=True))
    found = {}
    for h, beside in rows.items():
        own = decided.conditions.get(h, [])
        detail, power = dict(beside.detail), None
        if planted is not None:
            power = float("nan")
            short = [any(c.refutes and c.estimated and c.fails(claim.level) for c in each) for each in own]
            if own and all(short) and beside.undecided is None:
                seen = planted(h)
                power = seen.power
                detail["planted at the bars and found"] = f"{seen.found} of {seen.tried}"
        if decided.drawn.get(h):
            detail["draws of the nulls"] = decided.drawn[h]
        found[h] = Evidence(
            claim=claim,
            head=None if h == WHOLE else h,
            candidates=dict(zip(beside.candidates, own, strict=True)) if own else {},
            n=_sources(columns, h) if beside.n is None else beside.n,
            power=power,
            q=float(q[h]) if h in q else None,
            undecided=beside.undecided,
            detail=detail,
        )
    return found


def may_refute(claim: Claim, columns: Sequence[Column]) -> int:
    """How many samples may refute, each by itself."""
    return sum(_parts(c) for c in columns if isinstance(c, Sampled) and claim.worth_of(c.name) is not None)


def _heads(column: Column) -> list[str]:
    if isinstance(column, Drawn):
        return [h for by_head in column.observed.values() for h in by_head]
    return list(column.samples if isinstance(column, Sampled) else column.values)


def _agree(claim: Claim, columns: Sequence[Column], head: str) -> None:
    """Raises FraError where the columns differ in the number of the head's candidates."""
    sizes: dict[str, int] = {}
    for column in columns:
        if isinstance(column, Drawn):
            sizes |= {name: np.size(own[head]) for name, own in column.observed.items() if head in own}
        elif isinstance(column, Given) and head in column.values:
            sizes[column.name] = np.size(column.values[head])
        elif isinstance(column, Sampled) and (several := _several(column.samples.get(head, ()))):
            sizes[column.name] = several[0].n_cand
    if len({size for size in sizes.values() if size > 1}) > 1:
        counts = ", ".join(f"{size} of {name!r}" for name, size in sizes.items())
        raise FraError(f"{claim.id} at {head}: the conditions differ in their number of candidates ({counts})")


def _several(samples: Sample | Sequence[Sample] | Mapping[str, Sample]) -> Sequence[Sample]:
    if isinstance(samples, Mapping):
        return tuple(samples.values())
    return samples if isinstance(samples, Sequence) else (samples,)


def _parts(column: Sampled) -> int:
    """Samples of the column that may refute by themselves."""
    return max((len(_several(own)) for own in column.samples.values()), default=1)


def _sources(columns: Sequence[Column], head: str) -> int:
    """The fewest clusters that a sample of the head rests on; 0 without samples."""
    of = [m for c in columns if isinstance(c, Sampled) and head in c.samples for m in _several(c.samples[head])]
    return min((n for m in of if (n := getattr(m, "n_docs", None)) is not None), default=0)


class _Tests:
    """One column's samples against its bar, in both directions: raw p-values by head."""

    def __init__(self, claim: Claim, column: Sampled) -> None:
        self.claim, self.column = claim, column
        self.bar = 0.0 if column.shares is not None else claim.bar_of(column.name)
        self.above, self.parts = claim.above_of(column.name), _parts(column)
        self.refutes = claim.worth_of(column.name) is not None
        self.samples: dict[str, list[Sample]] = {}
        self.up: dict[str, Floats] = {}
        """[n_cand] of "the condition does not hold", of the part of which that is least clear."""
        self.down: dict[str, list[Floats]] = {}
        """[n_cand] a part, of "the condition holds"."""
        self.each_up: dict[str, list[Floats]] = {}
        for h, samples in column.samples.items():
            several = _several(samples)
            if not several or not several[0].n_cand:
                continue
            own = [self._sample(several[min(k, len(several) - 1)]) for k in range(self.parts)]
            self.samples[h] = own
            self.each_up[h] = [self._p_up(h, m) for m in own]
            down = [m.p_below if self.above else m.p_above for m in own]
            self.down[h] = [np.atleast_1d(p(self.bar, False)) for p in down]
            self.up[h] = np.max(self.each_up[h], axis=0)

    def may_hold(self, head: str, m: Sample) -> Sample | Among:
        """The sample as it is tested for "the condition holds"."""
        if self.column.chosen is None:
            return m
        if not isinstance(m, stats.ClusterMeans):
            raise FraError(f"{self.column.name} at {head}: candidates are chosen among samples of documents alone")
        return Among(m, self.column.chosen[head])

    def _p_up(self, head: str, m: Sample) -> Floats:
        up = self.may_hold(head, m)
        return np.atleast_1d((up.p_above if self.above else up.p_below)(self.bar, self.column.simultaneous))

    def _sample(self, m: Sample) -> Sample:
        """The sample itself, or an exact one in its place."""
        column = self.column
        if column.bounded is None or not isinstance(m, stats.ClusterMeans) or m.n_cand != 1:
            return m
        return exact_where_unbounded(m, column.bounded, column.linearised) or m

    def conditions(self, head: str, number: int, up: HolmFamily, down: HolmFamily, refuting: int) -> list[Condition]:
        """Of every candidate of a head, at the levels at which the head was tested."""
        level, other = float(up.levels[number]), float(down.levels[number]) / max(1, refuting)
        together, found = self.column.simultaneous, []
        for k, m in enumerate(self.samples[head]):
            up_of = self.may_hold(head, m)
            low, high = (up_of.lower, m.upper) if self.above else (up_of.upper, m.lower)
            near, far = np.atleast_1d(low(level, together)), np.atleast_1d(high(other, False))
            p = up.adjusted(number, self.each_up[head][k])
            p_refute = down.adjusted(number, np.minimum(1.0, self.down[head][k] * max(1, refuting)))
            estimate, fixed = np.atleast_1d(np.asarray(m.estimate, dtype=np.float64)), isinstance(m, Number)
            lows, highs = (near, far) if self.above else (far, near)
            found.append(
                [
                    self._with_power(
                        head,
                        Condition(
                            self.column.name,
                            float(estimate[c]),
                            float(lows[c]),
                            float(highs[c]),
                            self.bar,
                            p=None if fixed else float(p[c]),
                            p_refute=None if fixed else float(p_refute[c]),
                            above=self.above,
                            refutes=self.refutes,
                        ),
                        m,
                        c,
                        self.claim.level / len(up.p),
                        refuting,
                    )
                    for c in range(m.n_cand)
                ]
            )
        candidates = [list(each) for each in zip(*found, strict=True)]
        joined = [own[0] if len(own) == 1 else weakest(own) for own in candidates]
        if self.column.shares is None:
            return joined
        part, whole = self.column.shares[head]
        return [as_share(c, part, whole, self.claim.bar_of(self.column.name)) for c in joined]

    def _with_power(
        self, head: str, own: Condition, m: Sample, candidate: int, level: float, refuting: int
    ) -> Condition:
        """The condition with the power behind it where it fails, and what it would take where it is undecided."""
        claim, worth = self.claim, self.claim.worth_of(self.column.name)
        if worth is None or not own.finite or own.holds(claim.level):
            return own
        if self.column.shares is not None:
            worth *= abs(self.column.shares[head][1])  # as the samples are: part - bar * whole
        if own.fails(claim.level):
            together = self.column.simultaneous and m.n_cand > 1
            power = np.atleast_1d(m.power(worth, level, self.above, together))
            return replace(own, power=float(power[candidate]))
        if isinstance(m, stats.ClusterMeans):
            # on the claim's side of the bar more sources would support, on the other refute, at its deeper level
            side: Literal["above", "below"] = "above" if own.effect > own.bar else "below"
            up = (side == "above") == self.above
            return replace(
                own, needed=self._needed(head, m, candidate, side, level if up else level / max(1, refuting))
            )
        return own

    def _needed(
        self, head: str, m: stats.ClusterMeans, candidate: int, side: Literal["above", "below"], level: float
    ) -> int | None:
        """About how many sources would decide, live or not. Of one among several candidates it is said where too few
        sources have it live for any bound, and as many as that takes.
        """
        if not m.n_live[candidate]:
            return None
        if m.n_cand == 1:
            live = stats.sources_needed(m, self.bar, level, side)
        else:
            up = (side == "above") == self.above
            chosen = None if self.column.chosen is None else self.column.chosen[head]
            among = max(1, m.n_cand if chosen is None else int(chosen.sum())) if up and self.column.simultaneous else 1
            live = sources_for(level, among)
            live = None if live <= m.n_live[candidate] else live
        return None if live is None else int(np.ceil(live * m.n_docs / m.n_live[candidate]))


def _given(claim: Claim, column: Given, head: str) -> list[Condition]:
    """Numbers that are not estimated, as conditions."""
    if head not in column.values:
        return [_unmeasured(claim, column.name)]
    values = np.atleast_1d(np.asarray(column.values[head], dtype=np.float64))
    bar, above = claim.bar_of(column.name), claim.above_of(column.name)
    return [Condition(column.name, v, v, v, bar, above=above) for v in values.tolist()]


def _given_p(claim: Claim, column: Given, head: str) -> Floats:
    return np.array([float(not c.holds(claim.level)) for c in _given(claim, column, head)])


def _ranks(
    claim: Claim, columns: Sequence[Column], heads: Sequence[str], tests: Mapping[str, _Tests]
) -> tuple[dict[str, list[Floats]], dict[tuple[str, str], Ranks]]:
    """Raw p-values of every head, by condition, and the ranks among nulls: drawn for heads that pass all else."""
    p: dict[str, list[Floats]] = {h: [] for h in heads}
    for column in columns:
        for h in heads:
            if isinstance(column, Sampled):
                t = tests[column.name]
                p[h].append(t.up[h] if h in t.up else np.ones(1))
            elif isinstance(column, Given):
                p[h].append(_given_p(claim, column, h))
    ranks: dict[tuple[str, str], Ranks] = {}
    step = claim.level / max(1, len(heads))
    most = min(RULES.draws, int(np.ceil(RULES.draws_a_step / step)) - 1)
    for column in (c for c in columns if isinstance(c, Drawn)):
        for h in heads:
            observed = {n: np.atleast_1d(np.asarray(own[h], float)) for n, own in column.observed.items() if h in own}
            n_cand = max(max(map(np.size, p[h]), default=1), *(own.size for own in observed.values()), 1)
            worst = np.max([np.zeros(n_cand), *(np.broadcast_to(own, (n_cand,)) for own in p[h])], axis=0)
            standing = worst <= claim.level
            limit = most if column.most is None else min(most, column.most.get(h, most))
            for name, own in sequential(observed, partial(column.draw, h), standing, claim.level, limit).items():
                ranks[h, name] = own
                p[h].append(own.p)
            p[h] += [np.ones(1)] * (len(column.observed) - len(observed))
    return p, ranks


def _of_ranks(
    claim: Claim,
    name: str,
    head: str,
    column: Drawn,
    ranks: Mapping[tuple[str, str], Ranks],
    up: HolmFamily,
    number: int,
) -> list[Condition]:
    if head not in column.observed[name] or (head, name) not in ranks or not ranks[head, name].n:
        size = np.size(column.observed[name].get(head, [0.0]))
        return [_unmeasured(claim, name)] * size
    own = ranks[head, name]
    adjusted = up.adjusted(number, own.p)
    return [rank_condition(name, float(p), float(a), claim.bar_of(name)) for p, a in zip(own.p, adjusted, strict=True)]


def _unmeasured(claim: Claim, name: str) -> Condition:
    return Condition(name, np.nan, -np.inf, np.inf, claim.bar_of(name), above=claim.above_of(name))
