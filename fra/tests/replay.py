"""How often a claim's tests are wrong on samples drawn from its own documents, and how strong an effect they find.

The documents of a claim are taken for the population: as many are drawn, with replacement, the same ones for all heads
and conditions, and the functions that decide the claim decide again (`fra.verdicts.conditions.two_sided`,
`fra.verdicts.pooled.worst`, `fra.verdicts.jackknife.conditions`). The mean of such a population is known. Put at the
bar, whatever is rejected is rejected wrongly. `fra.tests.record` writes the samples, `fra.tests.rates` the tables;
tests: test_replay.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fra.claim import Condition
from fra.tests.samples import Decision, Sample
from fra.tests.together import Together
from fra.verdicts import stats
from fra.verdicts.bounds import _exact_where_unbounded
from fra.verdicts.conditions import two_sided
from fra.verdicts.jackknife import Jackknifed
from fra.verdicts.jackknife import conditions as jackknife_conditions
from fra.verdicts.pooled import Measured, worst
from fra.verdicts.stats import ClusterMeans, Floats

STRENGTHS = (0.5, 1.0, 2.0)
"""Planted strengths, in units of what `fra.stats.detectable` says is found with power 0.8."""
POWER = 0.8
N_BOOT = 1_000
"""At least so many resamples; claims use 9,999."""
Conditions = dict[str, list[Condition]]


def decide(d: Decision, means: Mapping[str, ClusterMeans], raw: Mapping[str, Sample] | None = None) -> Conditions:
    """The condition at every head, as the claim decides it. raw: the samples themselves, which the exact bounds of a
    bounded condition need.
    """
    if d.kind == "worst":
        return {"worst": [worst(Measured(d.name, d.bar, {**means, **d.numbers}, above=d.above), d.level, d.share)]}
    found = two_sided(d.name, d.bar, means, d.level, d.share, d.simultaneous)
    for h, sample in (raw or {}).items() if d.bounded is not None else ():
        if means[h].n_cand == 1:  # as fra.verdicts.bounds.columns_tested does
            live = sample.counts.ravel() > 0
            values = sample.sums.ravel()[live] / sample.counts.ravel()[live]
            (own,) = found[h]
            found[h] = [_exact_where_unbounded(own, values, d.bounded, d.level, len(means), d.share)[0]]
    return found


def as_recorded(d: Decision) -> Conditions:
    """The condition at every head as it stands in the ledger: recorded samples, recorded seeds, all resamples. Of
    `worst`, which the ledger has for all dictionaries together, at each.
    """
    means = {h: ClusterMeans(s.sums, s.counts, seed=s.seed) for h, s in d.samples.items()}
    return _alone(d, means) if d.kind == "worst" else decide(d, means, d.samples)


def _alone(d: Decision, means: Mapping[str, ClusterMeans]) -> Conditions:
    """`worst` for one dictionary at a time; refuted by any, so corrected over all."""
    each = {h: Measured(d.name, d.bar, {h: m}, above=d.above) for h, m in means.items()}
    return {h: [worst(one, d.level, d.tests)] for h, one in each.items()}


@dataclass
class Counts:
    """What came out over all draws of one condition."""

    decision: Decision
    estimate: Floats
    """[columns] the mean of the population, heads' candidates one after the other; NaN where it cannot be tested."""
    heads: np.ndarray
    """[columns] which head each column is of."""
    detectable: Floats
    """[columns] what `fra.stats.detectable` says of the sample."""
    draws: int = 0
    above: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    """Draws in which anything was found above the bar; of `worst`, for each dictionary."""
    below: int = 0
    """Draws in which anything was found below it."""
    heads_above: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    """[heads or dictionaries] draws in which this one was found above it; below it."""
    heads_below: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    unseen: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    """[2, heads] of these draws, those that lacked the head's most outlying document."""
    covered: float = 0.0
    """Share of heads whose interval holds the mean of the population where that is, added over draws."""
    needed: list[Floats] = field(default_factory=list)
    """By draw: [columns] how far above the bar the effect would have had to lie to be found."""
    far: bool = False
    """Whether the null is of documents at the far end of the range, not of moved ones."""

    @cached_property
    def farthest(self) -> list[tuple[int, int]]:
        """[heads] how many documents there are, and which one lies farthest from the mean."""
        found = []
        for sample in self.decision.samples.values():
            apart = np.abs(sample.sums - pooled_mean(sample) * sample.counts)
            found.append((len(apart), int(np.nan_to_num(apart).max(1).argmax())))
        return found

    @property
    def outlying(self) -> Floats:
        """[columns] the share that one document has of the squared deviations from the mean; NaN without any."""
        parts = []
        for sample in self.decision.samples.values():
            apart = (sample.sums - pooled_mean(sample) * sample.counts) ** 2
            with np.errstate(invalid="ignore", divide="ignore"):
                parts.append(apart.max(0) / apart.sum(0))
        return np.concatenate(parts)

    @property
    def strength(self) -> Floats:
        """[columns] the smallest effect above the bar that is found with power 0.8."""
        return np.quantile(np.array(self.needed), POWER, axis=0, method="higher")

    def power(self, k: float) -> float:
        """How often an effect k times the detectable one is found, mean over the heads' candidates."""
        known = np.isfinite(self.detectable)
        hits = np.array(self.needed)[:, known] < k * self.detectable[known]
        return float(hits.mean()) if hits.size else float("nan")


def pooled_mean(sample: Sample) -> Floats:
    """[n_cand] the ratio mean of a sample; NaN without rows."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sample.sums.sum(0) / sample.counts.sum(0))


def at_far_end(
    sample: Sample, rows: np.ndarray, bar: float, bounded: tuple[float, float], rng: np.random.Generator
) -> Sample:
    """A draw of documents whose mean is at the bar and whose values stay in their range: some of them, by chance, lie
    at the end beyond the bar, as seen from the mean.
    """
    mean = pooled_mean(sample)
    end = np.where(mean > bar, bounded[0], bounded[1])
    share = np.where(mean == bar, 0.0, (mean - bar) / (mean - end))
    sums, counts = sample.sums[rows], sample.counts[rows]
    return Sample(np.where(rng.random(sums.shape) < share, end * counts, sums), counts)


def moved_within(sample: Sample, bar: float, bounded: tuple[float, float]) -> Sample | None:
    """The sample moved to the bar; None where a document's value then leaves its range."""
    sums = sample.sums - (pooled_mean(sample) - bar) * sample.counts
    live = sample.counts > 0
    values = sums[live] / sample.counts[live]
    inside = ((values >= bounded[0] - 1e-9) & (values <= bounded[1] + 1e-9)).all()
    return Sample(sums, sample.counts) if inside else None


def resamples(decisions: Sequence[Decision]) -> int:
    """How many: B with (1 + B) times the smallest adjusted level a whole number, so that what p can reach is no
    coarser than that level, and a small B costs power but no size.
    """
    unit = max(round(d.tests / d.level) for d in decisions)
    return unit * -(-N_BOOT // unit) - 1


class Replay:
    """All conditions of one claim, drawn together."""

    def __init__(self, decisions: Sequence[Decision], draws: int) -> None:
        self.decisions = list(decisions)
        self.n_boot = resamples(self.decisions)
        self.draws = draws
        self._places: dict[tuple[int, str], tuple[int, int]] = {}
        self._sides: dict[int, list[Sample]] = {}
        for k, d in enumerate(self.decisions):
            for h, sample in d.samples.items() if d.kind != "jackknife" else ():
                side = self._sides.setdefault(len(sample.sums), [])
                self._places[k, h] = len(sample.sums), len(side)
                side.append(sample)
        self._whole = self._together({n: slice(None) for n in self._sides}, 0)
        self.refuted = 0
        """Draws in which any condition that the verdict rests on was found below its bar."""
        self.counts = [self._start(k) for k in range(len(self.decisions))]

    def _together(self, rows: Mapping[int, np.ndarray | slice], seed: int) -> dict[int, Together]:
        return {n: Together(side, rows[n], seed, self.n_boot) for n, side in self._sides.items()}

    def _start(self, k: int) -> Counts:
        d = self.decisions[k]
        estimate = np.concatenate([pooled_mean(s) for s in d.samples.values()])
        heads = np.repeat(np.arange(len(d.samples)), [s.sums.shape[1] for s in d.samples.values()])
        counts = Counts(d, estimate, heads, np.full(len(estimate), np.nan))
        counts.above = np.zeros(len(d.samples) if d.kind == "worst" else 1, dtype=int)
        counts.heads_above, counts.heads_below = np.zeros((2, len(d.samples)), dtype=int)
        counts.unseen = np.zeros((2, len(d.samples)), dtype=int)
        if d.kind == "jackknife":
            return counts
        parts = [self._whole[self._places[k, h][0]].part(self._places[k, h][1]) for h in d.samples]
        counts.estimate = np.concatenate([p.estimate for p in parts])
        if d.above:
            counts.detectable = np.concatenate(
                [stats.detectable(p, self._power_level(d), POWER, d.simultaneous) for p in parts]
            )
        if d.bounded is not None:
            inside = [moved_within(s, d.bar, d.bounded) for s in d.samples.values()]
            counts.far = any(sample is None for sample in inside)
        return counts

    @staticmethod
    def _power_level(d: Decision) -> float:
        return d.level if d.kind == "worst" else d.level / len(d.samples)

    def run(self, seed: int) -> None:
        """Draw, decide and count."""
        rng = np.random.default_rng(seed)
        sizes = {len(s.sums) for d in self.decisions for s in d.samples.values()}
        for _ in range(self.draws):
            rows = {n: rng.integers(n, size=n) for n in sorted(sizes)}
            drawn = self._together(rows, int(rng.integers(2**62)))
            refuted = False
            for k, d in enumerate(self.decisions):
                failed = self._jackknife(k, rows) if d.kind == "jackknife" else self._one(k, drawn, rows, rng)
                refuted |= failed and d.judged
            self.refuted += refuted

    @staticmethod
    def _add(counts: Counts, held: np.ndarray, failed: np.ndarray, rows: Mapping[int, np.ndarray]) -> None:
        unseen = np.array([k not in rows[n] for n, k in counts.farthest])
        counts.heads_above += held
        counts.heads_below += failed
        counts.unseen += [held & unseen, failed & unseen]

    def forget(self) -> None:
        """Let go of what only drawing needs."""
        self._whole, self._sides = {}, {}

    def _one(
        self, k: int, drawn: Mapping[int, Together], rows: Mapping[int, np.ndarray], rng: np.random.Generator
    ) -> bool:
        d, counts = self.decisions[k], self.counts[k]
        split = np.split(counts.estimate, np.flatnonzero(np.diff(counts.heads)) + 1)
        as_is, at_bar = {}, {}
        for (h, _), estimate in zip(d.samples.items(), split, strict=True):
            n, place = self._places[k, h]
            as_is[h] = drawn[n].part(place)
            at_bar[h] = drawn[n].part(place, np.nan_to_num(d.bar - estimate))
        raw = at = None
        null: Mapping[str, ClusterMeans] = at_bar
        if d.bounded is not None:
            raw = {h: Sample(s.sums[rows[len(s.sums)]], s.counts[rows[len(s.sums)]]) for h, s in d.samples.items()}
            null, at = self._bounded(d, counts.far, rows, rng)
        found = decide(d, null, at)
        counts.draws += 1
        held = np.array([any(c.holds(d.level) for c in own) for own in found.values()])
        failed = np.array([any(c.fails(d.level) for c in own) for own in found.values()])
        if d.kind == "worst":  # one dictionary at the bar, the others beyond it
            alone = [c for own in _alone(d, null).values() for c in own]
            held, failed = np.array([[c.holds(d.level), c.fails(d.level)] for c in alone]).T
            counts.above += held
        else:
            counts.above += held.any()
        counts.below += failed.any()
        self._add(counts, held, failed, rows)
        counts.covered += self._covered(d, decide(d, as_is, raw), split)
        if d.above:
            level = self._power_level(d)
            counts.needed.append(d.bar - np.concatenate([p.lower(level, d.simultaneous) for p in at_bar.values()]))
        return bool(failed.any())

    def _bounded(
        self, d: Decision, far: bool, rows: Mapping[int, np.ndarray], rng: np.random.Generator
    ) -> tuple[dict[str, ClusterMeans], dict[str, Sample]]:
        """The condition's null where values have a range: made, not moved, since the exact bounds look at values."""
        assert d.bounded is not None
        at = {}
        for h, s in d.samples.items():
            inside, own = None if far else moved_within(s, d.bar, d.bounded), rows[len(s.sums)]
            at[h] = (
                at_far_end(s, own, d.bar, d.bounded, rng)
                if inside is None
                else Sample(inside.sums[own], inside.counts[own])
            )
        seed = int(rng.integers(2**62))
        return {h: ClusterMeans(s.sums, s.counts, seed=seed, n_boot=self.n_boot) for h, s in at.items()}, at

    @staticmethod
    def _covered(d: Decision, found: Conditions, truth: Sequence[Floats]) -> float:
        """Share of heads all of whose bounds hold what they are bounds of; what cannot be tested is left out."""
        if d.kind == "worst":
            pick = np.min if d.above else np.max
            truth = [np.array([pick(np.concatenate([*truth, list(d.numbers.values())]))])]
        inside = [
            all(c.low <= t <= c.high for c, t in zip(own, each, strict=True) if np.isfinite(t))
            for own, each in zip(found.values(), truth, strict=True)
        ]
        return float(np.mean(inside))

    def _jackknife(self, k: int, rows: Mapping[int, np.ndarray]) -> bool:
        d, counts = self.decisions[k], self.counts[k]

        def drawn(s: Sample, moved: float) -> Jackknifed:
            values = s.sums[rows[len(s.sums)], 0] + moved
            return Jackknifed(float(values.mean()), (values.sum() - values) / (len(values) - 1), s.least)

        as_is = {h: drawn(s, 0.0) for h, s in d.samples.items()}
        at_bar = {h: drawn(s, d.bar - float(s.sums.mean())) for h, s in d.samples.items()}
        found = jackknife_conditions(d.name, d.bar, at_bar, d.level, d.share)
        held, failed = np.array([[c.holds(d.level), c.fails(d.level)] for c in found.values()]).T
        counts.draws += 1
        counts.above += held.any()
        counts.below += failed.any()
        self._add(counts, held, failed, rows)
        seen = jackknife_conditions(d.name, d.bar, as_is, d.level, d.share)
        inside = [c.low <= float(d.samples[h].sums.mean()) <= c.high for h, c in seen.items()]
        counts.covered += float(np.mean(inside))
        alone = [jackknife_conditions(d.name, d.bar, {h: j}, d.level / len(at_bar))[h].low for h, j in at_bar.items()]
        counts.needed.append(d.bar - np.array(alone))
        return bool(failed.any())
