"""How often a claim's tests are wrong on samples drawn from its own documents, and how strong an effect they find.

The documents of a claim are taken for the population: as many are drawn, with replacement, the same ones for all heads
and conditions, and `fra.verdicts.decide.corrected`, which decides the claim, decides again. The mean of such a
population is known. Put at the bar, whatever is rejected is rejected wrongly. `fra.tests.record` writes the samples,
`fra.tests.rates` the tables; tests: test_replay.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fra.claim import Claim, Condition
from fra.statistics import stats
from fra.statistics.stats import ClusterMeans, Floats
from fra.tests.samples import Decision, Member, Sample
from fra.tests.together import Together
from fra.verdicts import decide as decider
from fra.verdicts.decide import Sampled, corrected

STRENGTHS = (0.5, 1.0, 2.0)
"""Planted strengths, in units of what `fra.statistics.stats.detectable` says is found with power 0.8."""
POWER = 0.8
N_BOOT = 1_000
"""At least so many resamples; claims use 9,999."""
Conditions = dict[str, list[Condition]]


def decide(d: Decision, samples: Mapping[Member, decider.Sample]) -> Conditions:
    """The condition at every head, from these members' samples, as the claim decides it: the claim's other conditions
    are there to be corrected for.
    """
    by_head: dict[str, list[decider.Sample]] = {}
    for (head, _), sample in samples.items():
        by_head.setdefault(head, []).append(sample)
    column = Sampled(
        name="replayed",
        samples=by_head,
        simultaneous=d.simultaneous,
        bounded=d.bounded,
        linearised=d.linearised,
    )
    others = [f"another {k}" for k in range(d.share - max(map(len, by_head.values())))]
    claim = Claim(
        id="replayed",
        title="t",
        h0="h",
        condition="replayed",
        bar=d.bar,
        bars=dict.fromkeys(others, 1.0),
        worth={"replayed": 1.0},
        level=d.level,
        statistic="s",
        stimuli=(),
        n=1,
        min_sources=1,
    )
    beyond = [Sampled(name=name, samples=dict.fromkeys(by_head, _Met())) for name in others]
    found = corrected(claim, [column, *beyond])
    return {h: [own[0] for own in table] for h, table in found.conditions.items()}


class _Met:
    """A condition that is met beyond doubt, beside the one that is replayed: the hardest case for the family, whose
    heads then pass by that one alone.
    """

    n_cand, estimate = 1, np.array([2.0])

    def p_above(self, bar: float, simultaneous: bool) -> Floats:
        return np.zeros(1)

    def p_below(self, bar: float, simultaneous: bool) -> Floats:
        return np.ones(1)

    def lower(self, level: float, simultaneous: bool) -> Floats:
        return np.array([1.5])

    def upper(self, level: float, simultaneous: bool) -> Floats:
        return np.array([np.inf])

    def power(self, worth: float, level: float, above: bool, simultaneous: bool) -> Floats:
        return np.ones(1)


def alone(d: Decision, samples: Mapping[Member, decider.Sample]) -> dict[Member, list[Condition]]:
    """The condition at every member, for one part of the heads' samples at a time."""
    found = {}
    for part in d.parts:
        some = {member: sample for member, sample in samples.items() if member[1] == part}
        found |= {(head, part): own for head, own in decide(d, some).items()}
    return {member: found[member] for member in samples}


def as_recorded(d: Decision) -> dict[Member, list[Condition]]:
    """The condition at every member: recorded samples, recorded seeds, all resamples. For heads with one sample each it
    is what stands in the ledger, which has several for all together.
    """
    return alone(d, {member: ClusterMeans(s.sums, s.counts, seed=s.seed) for member, s in d.members.items()})


@dataclass
class Counts:
    """What came out over all draws of one condition."""

    decision: Decision
    estimate: Floats
    """[columns] the mean of the population, members' candidates one after the other; NaN where it cannot be tested."""
    heads: np.ndarray
    """[columns] which member each column is of."""
    detectable: Floats
    """[columns] what `fra.statistics.stats.detectable` says of the sample."""
    draws: int = 0
    above: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    """[parts] draws in which anything was found above the bar, one part of the heads' samples being there at a time."""
    below: int = 0
    """Draws in which anything was found below it."""
    heads_above: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    """[members] draws in which this one was found above it; below it."""
    heads_below: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    unseen: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    """[2, members] of these draws, those that lacked the member's most outlying document."""
    covered: float = 0.0
    """Share of heads whose interval holds the mean of the population where that is, added over draws."""
    needed: list[Floats] = field(default_factory=list)
    """By draw: [columns] how far above the bar the effect would have had to lie to be found."""
    far: bool = False
    """Whether the null is of documents at the far end of the range, not of moved ones."""

    @cached_property
    def farthest(self) -> list[tuple[int, int]]:
        """[members] how many documents there are, and which one lies farthest from the mean."""
        found = []
        for sample in self.decision.members.values():
            apart = np.abs(sample.sums - pooled_mean(sample) * sample.counts)
            found.append((len(apart), int(np.nan_to_num(apart).max(1).argmax())))
        return found

    @property
    def outlying(self) -> Floats:
        """[columns] the share that one document has of the squared deviations from the mean; NaN without any."""
        parts = []
        for sample in self.decision.members.values():
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
        self._places: dict[tuple[int, Member], tuple[int, int]] = {}
        self._sides: dict[int, list[Sample]] = {}
        for k, d in enumerate(self.decisions):
            for member, sample in d.members.items():
                side = self._sides.setdefault(len(sample.sums), [])
                self._places[k, member] = len(sample.sums), len(side)
                side.append(sample)
        self._whole = self._together({n: slice(None) for n in self._sides}, 0)
        self.refuted = 0
        """Draws in which any condition that the verdict rests on was found below its bar."""
        self.counts = [self._start(k) for k in range(len(self.decisions))]

    def _together(self, rows: Mapping[int, np.ndarray | slice], seed: int) -> dict[int, Together]:
        return {n: Together(side, rows[n], seed, self.n_boot) for n, side in self._sides.items()}

    def _start(self, k: int) -> Counts:
        d = self.decisions[k]
        estimate = np.concatenate([pooled_mean(s) for s in d.members.values()])
        members = np.repeat(np.arange(len(d.members)), [s.sums.shape[1] for s in d.members.values()])
        counts = Counts(d, estimate, members, np.full(len(estimate), np.nan))
        counts.above = np.zeros(len(d.parts), dtype=int)
        counts.heads_above, counts.heads_below = np.zeros((2, len(d.members)), dtype=int)
        counts.unseen = np.zeros((2, len(d.members)), dtype=int)
        places = [self._places[k, member] for member in d.members]
        samples = [self._whole[n].part(place) for n, place in places]
        counts.estimate = np.concatenate([m.estimate for m in samples])
        level = d.level / len(d.heads)
        counts.detectable = np.concatenate([stats.detectable(m, level, POWER, d.simultaneous) for m in samples])
        if d.bounded is not None:
            inside = [moved_within(s, d.bar, d.bounded) for s in d.members.values()]
            counts.far = any(sample is None for sample in inside)
        return counts

    def run(self, seed: int) -> None:
        """Draw, decide and count."""
        rng = np.random.default_rng(seed)
        sizes = {len(s.sums) for d in self.decisions for s in d.members.values()}
        for _ in range(self.draws):
            rows = {n: rng.integers(n, size=n) for n in sorted(sizes)}
            drawn = self._together(rows, int(rng.integers(2**62)))
            refuted = False
            for k, d in enumerate(self.decisions):
                refuted |= self._one(k, drawn, rows, rng) and d.judged
            self.refuted += refuted

    def forget(self) -> None:
        """Let go of what only drawing needs."""
        self._whole, self._sides = {}, {}

    def _one(
        self, k: int, drawn: Mapping[int, Together], rows: Mapping[int, np.ndarray], rng: np.random.Generator
    ) -> bool:
        d, counts = self.decisions[k], self.counts[k]
        split = np.split(counts.estimate, np.flatnonzero(np.diff(counts.heads)) + 1)
        as_is: dict[Member, decider.Sample] = {}
        at_bar: dict[Member, decider.Sample] = {}
        for member, estimate in zip(d.members, split, strict=True):
            for found, moved in ((as_is, np.zeros_like(estimate)), (at_bar, np.nan_to_num(d.bar - estimate))):
                n, place = self._places[k, member]
                found[member] = drawn[n].part(place, moved)
        null = at_bar if d.bounded is None else self._bounded(d, counts.far, rows, rng)
        by_member = alone(d, null)
        held = np.array([any(c.holds(d.level) for c in own) for own in by_member.values()])
        failed = np.array([any(c.fails(d.level) for c in own) for own in by_member.values()])
        counts.draws += 1
        counts.above += [any(h for h, (_, own) in zip(held, d.members, strict=True) if own == part) for part in d.parts]
        counts.below += failed.any()
        unseen = np.array([k not in rows[n] for n, k in counts.farthest])
        counts.heads_above += held
        counts.heads_below += failed
        counts.unseen += [held & unseen, failed & unseen]
        counts.covered += self._covered(d, as_is, split)
        level = d.level / len(d.heads)
        counts.needed.append(d.bar - np.concatenate([m.lower(level, d.simultaneous) for m in at_bar.values()]))
        return bool(failed.any())

    def _bounded(
        self, d: Decision, far: bool, rows: Mapping[int, np.ndarray], rng: np.random.Generator
    ) -> dict[Member, decider.Sample]:
        """The condition's null where values have a range: made, not moved, since the exact bounds look at values."""
        assert d.bounded is not None
        at = {}
        for member, s in d.members.items():
            inside, own = None if far else moved_within(s, d.bar, d.bounded), rows[len(s.sums)]
            at[member] = (
                at_far_end(s, own, d.bar, d.bounded, rng)
                if inside is None
                else Sample(inside.sums[own], inside.counts[own])
            )
        seed = int(rng.integers(2**62))
        return {member: ClusterMeans(s.sums, s.counts, seed=seed, n_boot=self.n_boot) for member, s in at.items()}

    @staticmethod
    def _covered(d: Decision, drawn: Mapping[Member, decider.Sample], truth: Sequence[Floats]) -> float:
        """Share of heads all of whose bounds hold what they are bounds of; what cannot be tested is left out."""
        numbers = {m: float(s.sums[0, 0]) for m, s in d.samples.items() if s.kind == "number"}
        known = dict(zip(d.members, truth, strict=True)) | {m: np.array([x]) for m, x in numbers.items()}
        found = decide(d, {**drawn, **{m: decider.Number(x) for m, x in numbers.items()}})
        inside = [
            all(
                c.low <= t <= c.high
                for c, t in zip(own, np.min([known[m] for m in known if m[0] == h], axis=0), strict=True)
                if np.isfinite(t)
            )
            for h, own in found.items()
        ]
        return float(np.mean(inside))
