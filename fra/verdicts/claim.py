"""A claim, the evidence for it at one head, and the judge. Neither torch nor pytest is needed to reach a verdict.

The judge tests against the claim's registered **bar**, never against zero. For a claim "effect > bar":

| verdict | when |
|---|---|
| SUPPORTED | H0 "effect <= bar" is rejected for every condition of one and the same candidate |
| REFUTED | H0 "effect >= bar" is rejected for some condition of every candidate, and the design had power |
| INCONCLUSIVE | neither; or too few documents, numbers that are not finite, a gate that was not met |
| CANNOT_RUN | something needed is not there: a GPU, weights, a dictionary at that hook |
| NOT_APPLICABLE | the head is not in the claim's family |
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fra.errors import FraError

POWER = 0.8
"""The power that a refutation needs (Cohen 1988's convention, and CLAIMS': "found with power 0.8 or more")."""

_ID = re.compile(r"[A-Za-z][A-Za-z0-9_]*([.-][A-Za-z0-9_]+)*")
_HEAD = re.compile(r"L(0|[1-9]\d{0,3})H(0|[1-9]\d{0,3})", re.ASCII)


def parse_head(name: str) -> tuple[int, int]:
    """(layer, head) of a name such as "L1H3". Raises FraError for anything else."""
    if not (match := _HEAD.fullmatch(name)):
        raise FraError(f"{name!r} is not a head: write the layer and the head, as in L1H3")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed, registered before it is measured. Raises FraError where a field makes no sense."""

    id: str
    """Stable name: letters, digits, `_`; parts joined by `.` or `-` ("Q04.natural")."""
    title: str
    """The claim in a sentence: for people, not part of the digest."""
    h0: str
    """The null hypothesis, in a formula ("E_set <= 0.5 nat")."""
    bar: float
    """The bar of the headline condition, in the effect's unit."""
    statistic: str
    """Name and version of the measurement ("set_effect/1"): raise the version when the numbers would change."""
    stimuli: tuple[str, ...]
    """The stimulus families that it is measured on."""
    n: int
    """Documents that the design uses, at most."""
    level: float = 0.05
    """Level of the test, family-wise over the heads."""
    min_documents: int = 20
    """With fewer documents the verdict is INCONCLUSIVE."""
    above: bool = True
    """True: the claim says effect > bar. False: it says effect < bar."""
    bars: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Bars of further conditions and gates, by name."""

    def __post_init__(self) -> None:
        def must(fine: bool, what: str) -> None:
            if not fine:
                raise FraError(f"claim {self.id!r}: {what}")

        must(
            _ID.fullmatch(self.id) is not None,
            "an id is letters, digits and _, parts joined by . or -",
        )
        for name in ("title", "h0", "statistic"):
            must(
                isinstance(getattr(self, name), str) and bool(getattr(self, name).strip()),
                f"{name} must be a sentence or a name, not empty",
            )
        must(not isinstance(self.stimuli, str), 'stimuli is a tuple of names, as in ("natural",)')
        object.__setattr__(self, "stimuli", tuple(self.stimuli))
        object.__setattr__(self, "bar", float(self.bar))
        object.__setattr__(self, "bars", {str(name): float(bar) for name, bar in self.bars.items()})
        must(all(map(math.isfinite, (self.bar, *self.bars.values()))), "every bar must be a finite number")
        must(0 < self.level < 1, f"level is {self.level}; it must lie between 0 and 1")
        must(
            self.n >= 1 and 1 <= self.min_documents <= self.n,
            f"min_documents ({self.min_documents}) must lie in 1..n ({self.n})",
        )

    def registration(self) -> dict[str, Any]:
        """What is registered: everything that could turn a verdict, and no prose."""
        return {
            "id": self.id,
            "h0": self.h0,
            "bar": self.bar,
            "above": self.above,
            "bars": dict(sorted(self.bars.items())),
            "level": float(self.level),
            "statistic": self.statistic,
            "stimuli": list(self.stimuli),
            "n": int(self.n),
            "min_documents": int(self.min_documents),
        }

    @property
    def digest(self) -> str:
        """sha256 (64 hex digits) of `registration()`."""
        return hashlib.sha256(json.dumps(self.registration(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Condition:
    """One number against its bar. NaN in `effect` says "not measured": such a condition neither holds nor fails.

    Raises FraError where a p-value is no probability or the interval is upside down.
    """

    name: str
    effect: float
    """The estimate, in the bar's unit."""
    low: float
    high: float
    """One-sided bounds that invert the two tests at the adjusted level; -inf and inf where there is none."""
    bar: float
    p: float | None = None
    """Family-adjusted p of H0 "effect <= bar" (above) or "effect >= bar" (below); None for an exact number."""
    p_refute: float | None = None
    """Family-adjusted p of the opposite H0; None: the interval decides."""
    above: bool = True
    """True: the condition is effect > bar; False: effect < bar."""

    def __post_init__(self) -> None:
        for name in ("effect", "low", "high", "bar", "p", "p_refute"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, float(value))
        for name in ("p", "p_refute"):
            p = getattr(self, name)
            if p is not None and not (math.isnan(p) or 0 <= p <= 1):
                raise FraError(f"condition {self.name!r}: {name} is {p}, which is no probability")
        if self.low > self.high:
            raise FraError(f"condition {self.name!r}: the interval [{self.low}, {self.high}] is upside down")

    @property
    def finite(self) -> bool:
        """Whether the numbers can be judged: a finite effect, bounds and p-values that are not NaN."""
        others = (self.low, self.high, *(p for p in (self.p, self.p_refute) if p is not None))
        return math.isfinite(self.effect) and not any(map(math.isnan, others))

    def holds(self, level: float) -> bool:
        """Whether "effect is not beyond the bar" is rejected: p <= level, or, without p, the interval lies beyond the
        bar.
        """
        if not self.finite:
            return False
        if self.p is not None:
            return self.p <= level
        return self.low > self.bar if self.above else self.high < self.bar

    def fails(self, level: float) -> bool:
        """Whether "effect is beyond the bar" is rejected: p_refute <= level, or, without it, the interval lies on the
        other side.
        """
        if not self.finite:
            return False
        if self.p_refute is not None:
            return self.p_refute <= level
        return self.high < self.bar if self.above else self.low > self.bar

    def __str__(self) -> str:
        p = "" if self.p is None else f", p = {self.p:.2g}"
        bar = f"bar {'>' if self.above else '<'} {self.bar:g}"
        return f"{self.name} {self.effect:.3g} [{self.low:.3g}, {self.high:.3g}], {bar}{p}"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured for one claim at one head (or for a whole family: head None)."""

    claim: Claim
    head: str | None
    """ "L1H3", or None for a claim about a family."""
    candidates: Mapping[str, tuple[Condition, ...]] = field(default_factory=dict, hash=False)
    """Conditions by candidate, the same names in the same order for each; the first one is the headline."""
    n: int = 0
    """Documents that the numbers rest on."""
    power: float | None = None
    """Chance to find an effect at the bar; None where that is not at issue (an exact number), NaN where unknown."""
    q: float | None = None
    """Benjamini-Hochberg over the family: descriptive."""
    undecided: str | None = None
    """A gate that was not met, in a sentence: the verdict is INCONCLUSIVE."""
    cannot: str | None = None
    """What is missing, in a sentence: the verdict is CANNOT_RUN."""
    outside: str | None = None
    """Why the head is not in the claim's family, in a sentence: the verdict is NOT_APPLICABLE."""
    detail: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Whatever a reader should see beside the verdict: JSON values, numpy arrays, data frames."""

    def __post_init__(self) -> None:
        where = f"evidence for {self.claim.id} at {self.head or 'the family'}"
        if self.head is not None:
            parse_head(self.head)
        if self.n > self.claim.n:
            raise FraError(f"{where}: it rests on {self.n} documents, but {self.claim.n} are registered")
        layouts = {tuple((c.name, c.bar, c.above) for c in conditions) for conditions in self.candidates.values()}
        if len(layouts) > 1:
            raise FraError(f"{where}: candidates differ in their conditions; give those not measured an effect of NaN")
        for layout in layouts:
            if not layout:
                raise FraError(f"{where}: a candidate without conditions would be supported by nothing")
            if layout[0][2] != self.claim.above:
                raise FraError(f"{where}: the headline condition {layout[0][0]!r} looks the other way than the claim")
            for name, bar, _ in layout:
                registered = self.claim.bars.get(name, self.claim.bar)
                if bar != registered:
                    raise FraError(
                        f"{where}: condition {name!r} is held against {bar:g}, but {registered:g} is registered"
                    )


class Outcome(StrEnum):
    """What the judge can say."""

    SUPPORTED = "SUPPORTED"
    REFUTED = "REFUTED"
    INCONCLUSIVE = "INCONCLUSIVE"
    CANNOT_RUN = "CANNOT_RUN"
    NOT_APPLICABLE = "NOT_APPLICABLE"


@dataclass(frozen=True)
class Verdict:
    """The judge's answer."""

    outcome: Outcome
    reason: str
    """One sentence."""
    evidence: Evidence
    decided: Condition | None = None
    """What decided: of a refutation a condition that fails, of doubt one that does not hold, else the headline."""

    @property
    def met(self) -> tuple[int, int]:
        """How many conditions the candidate of `decided` meets, and of how many."""
        every = list(self.evidence.candidates.values())
        own = next((c for c in every if any(one is self.decided for one in c)), every[0] if every else ())
        return sum(c.holds(self.evidence.claim.level) for c in own), len(own)

    @property
    def best(self) -> str | None:
        """The candidate whose numbers stand for the head: the farthest beyond its bar of those that meet all
        conditions, else the first.
        """
        claim, candidates = self.evidence.claim, self.evidence.candidates
        passing = [name for name, conditions in candidates.items() if all(c.holds(claim.level) for c in conditions)]
        sign = 1 if claim.above else -1
        return (
            max(passing, key=lambda name: sign * candidates[name][0].effect)
            if passing
            else next(iter(candidates), None)
        )

    @property
    def headline(self) -> Condition | None:
        """The first condition of the best candidate; None where there is no candidate."""
        return None if self.best is None else self.evidence.candidates[self.best][0]


def judge(claim: Claim, evidence: Evidence) -> Verdict:
    """The verdict that the evidence gives on the claim (the table at the top of this module).

    Raises FraError where the evidence is another claim's, or contradicts itself (a condition that both holds and
    fails).
    """
    if evidence.claim != claim:
        raise FraError(f"evidence for {evidence.claim.id} cannot decide {claim.id}")

    headline = Verdict(Outcome.INCONCLUSIVE, "", evidence).headline

    def verdict(outcome: Outcome, reason: str, decided: Condition | None = headline) -> Verdict:
        return Verdict(outcome, reason, evidence, decided)

    conditions = [c for candidate in evidence.candidates.values() for c in candidate]
    for c in conditions:
        if c.holds(claim.level) and c.fails(claim.level):
            raise FraError(f"{claim.id} at {evidence.head}: condition {c.name!r} both holds and fails ({c})")
    if evidence.outside is not None:
        return verdict(Outcome.NOT_APPLICABLE, evidence.outside)
    if evidence.cannot is not None:
        return verdict(Outcome.CANNOT_RUN, evidence.cannot)
    if evidence.undecided is not None:
        return verdict(Outcome.INCONCLUSIVE, evidence.undecided)
    if evidence.n < claim.min_documents:
        return verdict(Outcome.INCONCLUSIVE, f"{evidence.n} documents, where {claim.min_documents} are needed")
    if not evidence.candidates:
        return verdict(Outcome.INCONCLUSIVE, "there is no candidate to test")

    supported = [
        name for name, candidate in evidence.candidates.items() if all(c.holds(claim.level) for c in candidate)
    ]
    failed = [any(c.fails(claim.level) for c in candidate) for candidate in evidence.candidates.values()]
    screened = len(evidence.candidates)
    if supported:
        of = "" if screened == 1 else f"{len(supported)} of {screened} candidates pass; the strongest: "
        further = len(conditions) // screened - 1
        more = f"; {further} further condition{'s' * (further > 1)} met" if further else ""
        return verdict(Outcome.SUPPORTED, f"{of}{headline}{more}")
    if all(failed):
        of = (
            ""
            if screened == 1
            else f"none among the {screened} screened reaches the bar of every condition; the first: "
        )
        short = next(c for c in next(iter(evidence.candidates.values())) if c.fails(claim.level))
        what = f"{of}{short}"
        if evidence.power is None:
            return verdict(Outcome.REFUTED, what, short)
        if evidence.power >= POWER:
            return verdict(Outcome.REFUTED, f"{what}; power {evidence.power:.2f} at the bar", short)
        known = "not known" if math.isnan(evidence.power) else f"{evidence.power:.2f}, below {POWER}"
        said = f"the power to find an effect at the bar is {known}; else refuted: {what}"
        return verdict(Outcome.INCONCLUSIVE, said, short)
    name = next(name for name, fails in zip(evidence.candidates, failed, strict=True) if not fails)
    doubt = next(c for c in evidence.candidates[name] if not c.holds(claim.level))
    of = "" if screened == 1 else f"candidate {name!r} of {screened}: "
    if not doubt.finite:
        return verdict(Outcome.INCONCLUSIVE, f"{of}{doubt.name} is not a finite number, or was not measured", doubt)
    return verdict(Outcome.INCONCLUSIVE, f"{of}neither side of the bar is rejected: {doubt}", doubt)
