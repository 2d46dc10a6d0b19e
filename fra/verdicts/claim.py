"""A claim, as it is registered, and the evidence for it at one head. Neither torch nor pytest is needed for either."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal, TypeVar

from fra.errors import FraError
from fra.statistics.rules import RULES

Kind = Literal["finding", "identity", "control"]
"""A finding could be otherwise; an identity holds by algebra, and only a wrong computation breaks it; a control must
fail where something is broken on purpose."""
D = TypeVar("D")

_CLOSE = 1e-9
"""Rounding between a p-value and the bound that inverts it, as a share of the numbers."""
_ID = re.compile(r"[A-Za-z][A-Za-z0-9_]*([.-][A-Za-z0-9_]+)*")
STIMULI = {
    "natural": "the target's own text",
    "repeated_natural": "the target's text, repeated",
    "repeated_random": "random tokens, repeated",
    "repeated_planted": "repeated text with planted tokens",
    "variant_repeat": "text repeated in another surface form",
    "structured": "brackets, quotes and names that belong together",
    "random weights": "no text: made weights and activations",
    "made": "what the claim's own file makes",
}
"""What a claim may be measured on."""
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
    condition: str = "effect"
    """The name of the headline condition."""
    statistic: str
    """Name and version of the measurement ("set_effect/1"): raise the version when the numbers would change."""
    stimuli: tuple[str, ...]
    """The stimulus families that it is measured on: names of `STIMULI`; "made" for what its own file makes."""
    n: int
    """Documents that the design uses, at most."""
    kind: Kind = "finding"
    """What the claim is; findings, identities and controls are counted apart."""
    level: float = 0.05
    """Level of the test, family-wise over the heads, for all conditions together."""
    min_sources: int = 20
    """With fewer independent sources of documents the verdict is INCONCLUSIVE."""
    above: bool = True
    """True: the claim says effect > bar. False: it says effect < bar."""
    bars: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Bars of the further conditions, by name: each must be in the evidence, and nothing else may be."""
    below: tuple[str, ...] = ()
    """The further conditions that say effect < bar."""
    gates: Mapping[str, float] = field(default_factory=dict, hash=False)
    """What must be so before the claim can be asked of a head, by name; else the verdict is INCONCLUSIVE."""
    worth: Mapping[str, float] = field(default_factory=dict, hash=False)
    """By condition: the distance from its bar that the design must be able to see before the condition may refute.
    The bar's distance from zero where it is not given; a condition with its bar at zero and nothing given here can be
    missed and never refutes.
    """
    design: tuple[Any, ...] = field(default=(), hash=False)
    """Frozen dataclasses with every number that the measurement uses (how many draws, pairs, positions, thresholds)."""

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
        strange = [name for name in self.stimuli if name not in STIMULI]
        must(not strange, f"there are no stimuli {strange[:1]}: {', '.join(STIMULI)} (made by the claim's own file)")
        object.__setattr__(self, "below", tuple(self.below))
        object.__setattr__(self, "design", tuple(self.design))
        object.__setattr__(self, "bar", float(self.bar))
        for name in ("bars", "gates", "worth"):
            numbers = {str(key): float(value) for key, value in getattr(self, name).items()}
            object.__setattr__(self, name, numbers)
            must(all(map(math.isfinite, (self.bar, *numbers.values()))), f"every number in {name} must be finite")
        conditions = (self.condition, *self.bars)
        must(self.condition not in self.bars, f"{self.condition!r} is the headline: its bar is `bar`, not one of bars")
        for name, among in (("below", self.bars), ("worth", conditions)):
            strange = [key for key in getattr(self, name) if key not in among]
            must(not strange, f"{name} names {strange[:1]}, which is none of its conditions")
        must(all(value > 0 for value in self.worth.values()), "what is worth seeing is a distance: above 0")
        must(self.kind in ("finding", "identity", "control"), f"kind is {self.kind!r}: a finding, identity or control")
        must(0 < self.level < 1, f"level is {self.level}; it must lie between 0 and 1")
        must(
            self.n >= 1 and 1 <= self.min_sources <= self.n,
            f"min_sources ({self.min_sources}) must lie in 1..n ({self.n})",
        )
        for part in self.design:
            frozen = is_dataclass(part) and not isinstance(part, type) and part.__dataclass_params__.frozen  # type: ignore[attr-defined]
            must(frozen, f"design holds {part!r}, which is no frozen dataclass")
        must(len({type(part) for part in self.design}) == len(self.design), "design holds two of one class")

    def bar_of(self, name: str) -> float:
        """The registered bar of a condition. Raises FraError for one that is not registered."""
        if name == self.condition:
            return self.bar
        if name not in self.bars:
            raise FraError(f"claim {self.id!r} registers no condition {name!r}: it has {self.condition!r}, {self.bars}")
        return self.bars[name]

    def above_of(self, name: str) -> bool:
        """Whether a condition says effect > bar."""
        return self.above if name == self.condition else name not in self.below

    def worth_of(self, name: str) -> float | None:
        """The distance from its bar that is worth seeing; None for a condition that cannot refute."""
        return self.worth.get(name, abs(self.bar_of(name)) or None)

    def designed(self, kind: type[D]) -> D:
        """The part of the design that is of this class. Raises FraError where there is none."""
        for part in self.design:
            if isinstance(part, kind):
                return part
        raise FraError(f"claim {self.id!r} registers no {kind.__name__} in its design")

    def registration(self) -> dict[str, Any]:
        """What is registered: everything that could turn a verdict, and no prose."""
        return {
            "id": self.id,
            "h0": self.h0,
            "kind": self.kind,
            "condition": self.condition,
            "bar": self.bar,
            "above": self.above,
            "bars": dict(sorted(self.bars.items())),
            "below": sorted(self.below),
            "gates": dict(sorted(self.gates.items())),
            "worth": dict(sorted(self.worth.items())),
            "level": float(self.level),
            "statistic": self.statistic,
            "stimuli": list(self.stimuli),
            "n": int(self.n),
            "min_sources": int(self.min_sources),
            "design": {type(part).__name__: _plain(asdict(part)) for part in self.design},
            "rules": asdict(RULES),
        }

    @property
    def digest(self) -> str:
        """sha256 (64 hex digits) of `registration()`."""
        return hashlib.sha256(json.dumps(self.registration(), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A design in JSON's own types, so that its digest is that of the file it is registered in."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in sorted(value.items())}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Condition:
    """One number against its bar. NaN in `effect` says "not measured": such a condition neither holds nor fails.

    Raises FraError where a p-value or a power is no probability, or the interval is upside down.
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
    power: float | None = None
    """The chance to see an effect that is worth seeing, where the condition fails; None: not known, or not at issue."""
    refutes: bool = True
    """Whether it may refute at all, or only be missed."""
    needed: int | None = None
    """About how many independent sources would decide, where neither side of the bar is rejected."""

    def __post_init__(self) -> None:
        for name in ("effect", "low", "high", "bar", "p", "p_refute", "power"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, float(value))
        for name in ("p", "p_refute", "power"):
            p = getattr(self, name)
            if p is not None and not (math.isnan(p) or 0 <= p <= 1):
                raise FraError(f"condition {self.name!r}: {name} is {p}, which is no probability")
        if self.low > self.high:
            raise FraError(f"condition {self.name!r}: the interval [{self.low}, {self.high}] is upside down")

    @property
    def estimated(self) -> bool:
        """Whether the number has an uncertainty; an exact one can be missed, and refutes identities only."""
        return self.p is not None or self.p_refute is not None

    def contradiction(self, level: float) -> str | None:
        """What in the condition contradicts itself at this level, in words; None where nothing does."""
        if not self.finite:
            return None
        close = _CLOSE * max(1.0, *(abs(x) for x in (self.effect, self.low, self.high, self.bar) if math.isfinite(x)))
        if not self.low - close <= self.effect <= self.high + close:
            return "the effect lies outside its interval"
        near, far = (self.low, self.high) if self.above else (-self.high, -self.low)
        bar = self.bar if self.above else -self.bar
        for p, beyond, what in ((self.p, near - bar, "p"), (self.p_refute, bar - far, "p_refute")):
            if p is not None and (beyond < -close if p <= level else beyond > close):
                return f"{what} = {p:.3g} says otherwise than the interval"
        return None

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
    """Independent sources of documents that the numbers rest on."""
    power: float | None = None
    """Of a search: the chance that what was planted at the bars goes through every condition, its lower confidence
    bound; NaN where unknown. None: each condition has a power of its own.
    """
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
        if self.power is not None and not (math.isnan(self.power) or 0 <= self.power <= 1):
            raise FraError(f"{where}: power is {self.power}, which is no probability")
        registered = (self.claim.condition, *self.claim.bars)
        for conditions in self.candidates.values():
            names = [c.name for c in conditions]
            if not names:
                raise FraError(f"{where}: a candidate without conditions would be supported by nothing")
            if names[0] != self.claim.condition or sorted(names) != sorted(registered):
                lacking, strange = sorted(set(registered) - set(names)), sorted(set(names) - set(registered))
                said = f"lacks {lacking[0]!r}" if lacking else f"brings {strange[0]!r}" if strange else "has an order"
                raise FraError(
                    f"{where}: it {said}, where {', '.join(map(repr, registered))} are registered, the headline first; "
                    "a condition that was not measured has an effect of NaN"
                )
            for c in conditions:
                if c.above != self.claim.above_of(c.name):
                    raise FraError(f"{where}: condition {c.name!r} looks the other way than the claim registers")
                if c.bar != (bar := self.claim.bar_of(c.name)):
                    raise FraError(
                        f"{where}: condition {c.name!r} is held against {c.bar:g}, but {bar:g} is registered"
                    )
        layouts = {tuple(c.name for c in conditions) for conditions in self.candidates.values()}
        if len(layouts) > 1:
            raise FraError(f"{where}: candidates differ in the order of their conditions")
