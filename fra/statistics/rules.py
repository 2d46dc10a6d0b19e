"""The rules that every claim is decided by, in one place: registered with each of them, so that none changes unseen."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Constants that can move a verdict of any claim."""

    power: float = 0.8
    """The power that a refutation needs (Cohen 1988's convention)."""
    power_level: float = 0.05
    """Where power is counted on planted effects, its one-sided Clopper-Pearson bound at this level must reach it."""
    plantings: int = 100
    """Planted effects that a count of power rests on, at least."""
    resamples: int = 9_999
    """Bootstrap resamples of a sample."""
    draws: int = 999
    """Draws of a null for one head, at most."""
    draws_a_step: int = 4
    """Draws of a null in units of the fewest with which a head could pass the first step of Holm: with four of them up
    to three may be as large as the head's own number.
    """
    guard: float = 1.5
    """How far out the guard of a test lies (`fra.statistics.unseen`), in units of the excess that was seen: of the
    farthest effect on the side that speaks against rejection over the farthest on the other.
    """
    reach: float = 0.8
    """The least distance of the guard, in units of the farthest effect on that side."""
    one_guard: float = 0.05
    """The level at which a guard of one source is enough; what smaller ones suppose beside it is the shift."""
    rare: float = 0.073
    """The share of sources that may all be unlike the rest, as far away as it takes: p is no smaller than the chance
    (1 - rare)^n that n sources show none of them. Forty sources reach 5 %, 61 reach 1 %, 101 reach 0.05 %.
    """
    harmless: float = 1.5
    harmless_shown: int = 3
    harmless_sources: int = 20
    """A sample of so many live sources has no such floor if its third farthest effect to the harmless side lies 1.5
    times as far out as the farthest to the other: it is skewed, and where to is known.
    """


RULES = Rules()
