"""The judge. It tests against the claim's registered **bar**, never against zero. For a claim "effect > bar":

| verdict | when |
|---|---|
| SUPPORTED | H0 "effect <= bar" is rejected for every condition of one and the same candidate |
| REFUTED | H0 "effect >= bar" is rejected for some condition of every candidate, and the design had power to see one |
| INCONCLUSIVE | neither; or too few sources, numbers that are not finite, a gate that was not met |
| CANNOT_RUN | something needed is not there: a GPU, weights, a dictionary at that hook |
| NOT_APPLICABLE | the head is not in the claim's family |

It trusts nobody: evidence that lacks a registered condition, brings another, or contradicts itself is refused.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from fra.errors import FraError
from fra.statistics.rules import RULES
from fra.verdicts.claim import Claim, Condition, Evidence


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

    Raises FraError where the evidence is another claim's, or contradicts itself: a condition that both holds and fails,
    a p-value that says otherwise than the interval, an effect outside its interval.
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
        if (wrong := c.contradiction(claim.level)) is not None:
            raise FraError(f"{claim.id} at {evidence.head}: condition {c.name!r} contradicts itself: {wrong} ({c})")
    if evidence.outside is not None:
        return verdict(Outcome.NOT_APPLICABLE, evidence.outside)
    if evidence.cannot is not None:
        return verdict(Outcome.CANNOT_RUN, evidence.cannot)
    if evidence.undecided is not None:
        return verdict(Outcome.INCONCLUSIVE, evidence.undecided)
    if evidence.n < claim.min_sources:
        few = f"{evidence.n} independent sources of documents, where {claim.min_sources} are needed"
        return verdict(Outcome.INCONCLUSIVE, few)
    if not evidence.candidates:
        return verdict(Outcome.INCONCLUSIVE, "there is no candidate to test")

    supported = [
        name for name, candidate in evidence.candidates.items() if all(c.holds(claim.level) for c in candidate)
    ]
    if supported:
        return verdict(Outcome.SUPPORTED, _passing(evidence, supported, headline))
    screened = len(evidence.candidates)
    against = {name: _against(evidence, candidate) for name, candidate in evidence.candidates.items()}
    refuting = {name: own[0] for name, own in against.items() if own}
    if len(refuting) == screened:
        short = next(iter(refuting.values()))
        of = "" if screened == 1 else f"none of the {screened} screened meets every condition; the first: "
        if claim.kind != "finding":
            return verdict(Outcome.REFUTED, f"{of}{short}", short)
        weakest = min(refuting.values(), key=lambda c: _power(evidence, c))
        if (power := _power(evidence, weakest)) >= RULES.power:
            return verdict(Outcome.REFUTED, f"{of}{short}; power {_power(evidence, short):.2f}", short)
        planted = (
            "" if evidence.power is None else f" (fewer than {RULES.plantings} effects could be planted at the bars)"
        )
        known = f"not known{planted}" if power < 0 else f"{power:.2f}, below {RULES.power}"
        said = f"the power to see an effect at the bar is {known}; else refuted: {of}{weakest}"
        return verdict(Outcome.INCONCLUSIVE, said, weakest)
    name = next(name for name, own in against.items() if not own)
    doubt = next(c for c in evidence.candidates[name] if not c.holds(claim.level))
    of = "" if screened == 1 else f"candidate {name!r} of {screened}: "
    if not doubt.finite:
        return verdict(Outcome.INCONCLUSIVE, f"{of}{doubt.name} is not a finite number, or was not measured", doubt)
    if not doubt.estimated or not doubt.refutes or doubt.fails(claim.level):
        return verdict(Outcome.INCONCLUSIVE, f"{of}not met, which alone does not refute: {doubt}", doubt)
    more = "" if doubt.needed is None else f"; about {doubt.needed} independent sources would decide"
    return verdict(Outcome.INCONCLUSIVE, f"{of}neither side of the bar is rejected: {doubt}{more}", doubt)


def _passing(evidence: Evidence, supported: list[str], headline: Condition | None) -> str:
    """What a candidate that passes everything says."""
    screened, further = len(evidence.candidates), len(evidence.claim.bars)
    of = "" if screened == 1 else f"{len(supported)} of {screened} candidates pass; the strongest: "
    more = f"; {further} further condition{'s' * (further > 1)} met" if further else ""
    return f"{of}{headline}{more}"


def _power(evidence: Evidence, c: Condition) -> float:
    """The power behind a refutation by this condition; -1 where nothing is known of it."""
    power = c.power if evidence.power is None else evidence.power
    return -1.0 if power is None or math.isnan(power) else power


def _against(evidence: Evidence, candidate: tuple[Condition, ...]) -> list[Condition]:
    """The conditions by which a candidate is refuted, the one with the most power first. A number that is not
    estimated refutes an identity or a control, and never a finding.
    """
    claim = evidence.claim
    failed = [c for c in candidate if c.fails(claim.level)]
    if claim.kind != "finding":
        return failed
    may = [c for c in failed if c.estimated and c.refutes and (evidence.power is not None or c.power is not None)]
    return sorted(may, key=lambda c: -_power(evidence, c))
