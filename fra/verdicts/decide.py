"""The one place that decides: what a claim measured, condition by condition, becomes evidence for the judge.

A claim says what it measured, a `Sampled` or a `Given` for each condition, and `decide` corrects for everything that
was looked at. Every head is tested in both directions against the condition's bar:

- "the condition does not hold" is rejected by Holm over the heads of the family, over the best candidate of each (max-T
  within the head, where it is `simultaneous`);
- "the condition holds" is rejected by Bonferroni over the heads and over every sample that may refute by itself, or, in
  a claim of one condition, by Holm (`refuting`).

Bounds are at the level at which the head was tested, so that they exclude the bar exactly where the test rejects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from fra.errors import FraError
from fra.verdicts import stats
from fra.verdicts.bounds import exact_where_unbounded
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.conditions import as_share, rank_condition, weakest
from fra.verdicts.stats import Floats

WHOLE = "all"
"""Stands for the head of a claim about the target as a whole."""
Refuting = Literal["bonferroni", "holm"]


@runtime_checkable
class Sample(Protocol):
    """What one head (or dictionary) gave: something to test against a bar in either direction, for n_cand candidates.

    `fra.verdicts.stats.ClusterMeans`, `fra.verdicts.jackknife.Jackknifed` and `Number` are such.
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


@dataclass(frozen=True)
class Number:
    """A number in which all documents agree (L0 under TopK, say): it has no spread, and decides by itself."""

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


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A condition that samples of documents decide, for every head of a family."""

    name: str
    samples: Mapping[str, Sample | Sequence[Sample] | Mapping[str, Sample]]
    """By head. Where a head has several (one a seed; one a dictionary, by its name), the condition holds where it does
    for each of them, and any of them may refute; a head with fewer than another has its last one counted again.
    """
    bar: float | None = None
    """None: what the claim registers under this name, or its headline's bar."""
    above: bool = True
    """True: effect > bar."""
    simultaneous: bool = False
    """Candidates of a head are tested together."""
    shares: Mapping[str, tuple[float, float]] | None = None
    """By head (part, whole): the samples are those of part - bar * whole, tested against zero, and the condition is
    said as a share of the whole.
    """
    bounded: tuple[float, float] | None = None
    """The range of a cluster's value: an exact bound stands in where the bootstrap has none (fra.verdicts.bounds)."""
    linearised: bool = False
    """A difference of two samples, linearised: the value of a cluster has that range only where all agree."""


@dataclass(frozen=True)
class Given:
    """A condition that is no mean over documents: a rank among nulls, an exact number, an exact test."""

    name: str
    conditions: Mapping[str, Sequence[Condition]]
    """By head, one a candidate, or one for all."""
    refutes: bool = False
    """Whether it counts among those that may refute by themselves."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What stands beside a head's numbers."""

    n: int
    candidates: Sequence[str] = ("every condition",)
    """Names of the candidates, in the order of the samples."""
    power: float | None = None
    """The claim's own; used where `decide` is not asked for one."""
    undecided: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Power:
    """The chance to find an effect at the bar.

    headline: of the first condition, in every row. failing: the least among the conditions that fail.
    """

    of: Literal["headline", "failing"]
    null: float | Mapping[str, float] = 0.0
    """What an effect at the bar must be told from; by condition where they differ, and then only those have a power."""
    or_headline: bool = False
    """failing: the headline's where no condition fails; and at a bar that is the null itself there is nothing to tell
    apart, and a sample that the bootstrap cannot test has an exact bound instead: such conditions do not count.
    """


@dataclass(frozen=True)
class Decided:
    """Conditions by head and candidate, in the order of the table, and what they rest on."""

    conditions: Mapping[str, list[tuple[Condition, ...]]]
    raw: Mapping[str, float]
    """The headline's p before it was corrected over the heads, of each head's best candidate."""


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


def ranked(claim: Claim, name: str, p: Mapping[str, ArrayLike]) -> Given:
    """A condition that is a rank among nulls (`stats.rank_p`), from its p by head, one number or one a candidate: it
    can deny and never refutes.
    """
    return Given(
        name,
        {h: [rank_condition(name, float(x), claim.level) for x in np.atleast_1d(own)] for h, own in p.items()},
    )


def corrected(claim: Claim, columns: Sequence[Sampled | Given], refuting: Refuting = "bonferroni") -> Decided:
    """Every condition of every head, corrected. The first column is the headline.

    A head that a column does not have, or has no candidates in, gets conditions that were not measured: they neither
    hold nor fail. Raises FraError for an empty table, and for columns whose candidates do not agree.
    """
    if not columns:
        raise FraError(f"{claim.id}: a claim without conditions would be supported by nothing")
    share = may_refute(columns)
    found: list[Mapping[str, Sequence[Condition]]] = []
    raw: dict[str, float] = {}
    for column in columns:
        if isinstance(column, Given):
            found.append(column.conditions)
            continue
        own, p = _column(column, bar_of(claim, column), claim.level, share, refuting)
        found.append(own)
        raw = raw or p
    table: dict[str, list[tuple[Condition, ...]]] = {}
    for h in dict.fromkeys(h for by_head in found for h in by_head):
        several = [by_head.get(h, ()) for by_head in found]
        n_cand = max(map(len, several))
        if any(len(own) not in (0, 1, n_cand) for own in several):
            counts = ", ".join(f"{len(own)} of {column.name!r}" for own, column in zip(several, columns, strict=True))
            raise FraError(f"{claim.id} at {h}: the conditions differ in their number of candidates ({counts})")
        table[h] = [
            tuple(
                own[c if len(own) > 1 else 0] if own else _unmeasured(claim, column)
                for own, column in zip(several, columns, strict=True)
            )
            for c in range(n_cand)
        ]
    return Decided(table, raw)


def decide(
    claim: Claim,
    columns: Sequence[Sampled | Given],
    rows: Mapping[str, Beside],
    *,
    power: Power | None = None,
    refuting: Refuting = "bonferroni",
    q_over: Sequence[str] | None = None,
) -> dict[str, Evidence]:
    """Evidence for every head of `rows`: conditions as `corrected` has them, power, and q over the heads.

    rows: {WHOLE: ...} for a claim about the whole target: its one row has head None. power: None where it is not at
    issue, or the rows bring their own. q_over: the heads over which q is taken (those without a candidate count as p =
    1); all rows where None, none where empty.
    """
    decided = corrected(claim, columns, refuting)
    over = list(rows) if q_over is None else list(q_over)
    q = dict(zip(over, stats.benjamini_hochberg([decided.raw.get(h, 1.0) for h in over]), strict=True))
    heads = max((len(column.samples) for column in columns if isinstance(column, Sampled)), default=1)
    found = {}
    for h, beside in rows.items():
        own = decided.conditions.get(h, [])
        chance = beside.power if power is None else power_of(claim, power, columns, h, own, heads)
        found[h] = Evidence(
            claim=claim,
            head=None if h == WHOLE else h,
            candidates=dict(zip(beside.candidates, own, strict=True)) if own else {},
            n=beside.n,
            power=chance,
            q=float(q[h]) if h in q else None,
            undecided=beside.undecided,
            detail=beside.detail,
        )
    return found


def power_of(
    claim: Claim,
    power: Power,
    columns: Sequence[Sampled | Given],
    head: str,
    conditions: Sequence[tuple[Condition, ...]],
    heads: int,
) -> float | None:
    """The chance to find an effect at the bar at one head, at the first step of Holm; None where it is not at issue.

    Of several samples of a condition the least, of several candidates the median.
    """
    tested = [c for c in columns if isinstance(c, Sampled) and head in c.samples]
    fails = [[c.name for c in own if c.fails(claim.level)] for own in conditions]
    if power.of == "headline" or (power.or_headline and not any(fails)):
        fails = [[tested[0].name] for _ in conditions] if tested else []
    asked = {name for own in fails for name in own}
    level, many = claim.level / heads, len(conditions) > 1
    chance: dict[str, Floats] = {}
    for column in tested:
        null = power.null.get(column.name) if isinstance(power.null, Mapping) else power.null
        bar, sign = bar_of(claim, column), 1 if column.above else -1
        samples = [m for m in _several(column.samples[head]) if isinstance(m, stats.ClusterMeans)]
        if column.name not in asked or null is None or not samples:
            continue
        if power.or_headline and (bar == null or not samples[0].testable.any()):
            continue
        each = [
            stats.power_above(
                m if column.above else m.turned(), sign * null, sign * bar, level, column.simultaneous and many
            )
            for m in samples
        ]
        chance[column.name] = np.min(each, axis=0)
    least = [[chance[name][n] for name in own if name in chance] for n, own in enumerate(fails)]
    powers = [min(own) for own in least if own]
    return float(np.median(powers)) if powers else None


def may_refute(columns: Sequence[Sampled | Given]) -> int:
    """How many samples and given conditions may refute, each by itself."""
    return sum(c.refutes if isinstance(c, Given) else _parts(c) for c in columns)


def bar_of(claim: Claim, column: Sampled | Given) -> float:
    """The bar of a column: its own, else what the claim registers under its name, else the headline's."""
    own = column.bar if isinstance(column, Sampled) else None
    return claim.bars.get(column.name, claim.bar) if own is None else own


def _several(samples: Sample | Sequence[Sample] | Mapping[str, Sample]) -> Sequence[Sample]:
    if isinstance(samples, Mapping):
        return tuple(samples.values())
    return samples if isinstance(samples, Sequence) else (samples,)


def _parts(column: Sampled) -> int:
    """Samples of the column that may refute by themselves."""
    return max((len(_several(own)) for own in column.samples.values()), default=1)


def _column(
    column: Sampled, bar: float, level: float, share: int, refuting: Refuting
) -> tuple[dict[str, list[Condition]], dict[str, float]]:
    """The conditions of one column by head and candidate, and the heads' raw p."""
    at = 0.0 if column.shares is not None else bar
    raw: dict[str, float] = {}
    parts: list[dict[str, list[Condition]]] = []
    for k in range(_parts(column)):
        own = {h: several[min(k, len(several) - 1)] for h, s in column.samples.items() if (several := _several(s))}
        parts.append(_tested(column, own, at, level, share, refuting, raw))
    found: dict[str, list[Condition]] = {}
    for h in parts[0]:
        candidates = [list(each) for each in zip(*(part[h] for part in parts), strict=True)]
        found[h] = [own[0] if len(own) == 1 else weakest(own) for own in candidates]
        if column.shares is not None:
            part, whole = column.shares[h]
            found[h] = [as_share(c, part, whole, bar) for c in found[h]]
    return found, raw


def _tested(
    column: Sampled,
    samples: Mapping[str, Sample],
    bar: float,
    level: float,
    share: int,
    refuting: Refuting,
    raw: dict[str, float],
) -> dict[str, list[Condition]]:
    """One sample a head against the bar, in both directions."""
    if not samples:
        return {}
    together = column.simultaneous
    up = [(m.p_above if column.above else m.p_below)(bar, together) for m in samples.values()]
    down = [(m.p_below if column.above else m.p_above)(bar, together) for m in samples.values()]
    best = [float(p.min(initial=1.0)) for p in up]
    levels, adjusted = stats.holm_levels(best, level), stats.holm_within(up, level)
    if refuting == "holm":
        other_levels = stats.holm_levels([float(p.min(initial=1.0)) for p in down], level)
        refuted = stats.holm_within(down, level)
    else:
        tests = share * len(samples)
        other_levels = np.full(len(samples), level / tests)
        refuted = [np.minimum(1.0, p * tests) for p in down]
    found: dict[str, list[Condition]] = {}
    for k, (h, m) in enumerate(samples.items()):
        near, far = (levels[k], other_levels[k]) if column.above else (other_levels[k], levels[k])
        low, high = m.lower(float(near), together), m.upper(float(far), together)
        estimate, fixed = np.atleast_1d(np.asarray(m.estimate, dtype=np.float64)), isinstance(m, Number)
        found[h] = [
            Condition(
                column.name,
                float(estimate[c]),
                float(low[c]),
                float(high[c]),
                bar,
                p=None if fixed else float(adjusted[k][c]),
                p_refute=None if fixed else float(refuted[k][c]),
                above=column.above,
            )
            for c in range(m.n_cand)
        ]
        raw[h] = min(raw.get(h, 1.0), best[k])
        if column.bounded is not None and isinstance(m, stats.ClusterMeans) and m.n_cand == 1:
            exact, p = exact_where_unbounded(
                found[h][0], m, column.bounded, level, len(samples), share, column.linearised
            )
            found[h], raw[h] = [exact], raw[h] if p is None else p
    return found


def _unmeasured(claim: Claim, column: Sampled | Given) -> Condition:
    above = column.above if isinstance(column, Sampled) else True
    return Condition(column.name, np.nan, -np.inf, np.inf, bar_of(claim, column), above=above)
