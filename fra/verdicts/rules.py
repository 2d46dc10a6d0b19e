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


RULES = Rules()
