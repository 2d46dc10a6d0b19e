"""Designs of what is measured on channels, for claims to register. Light: no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadExcess:
    """How heads that carry channels and induction heads are counted (Q06)."""

    effect: float = 0.10
    """Nats; with the next three the bars of an expressed channel (CLAIMS)."""
    contrast: float = 0.10
    """The head's own, on rows where the channel's i is live."""
    attention: float = 0.02
    coverage: float = 0.002
    """Share of rows with i live; a channel below it does not count."""
    candidates: int = 20
    """First channels of the search, of heads and scrambles alike."""
    scrambles: int = 20
    """Of each head: either test calls the head positive where it exceeds every one of them, which one scramble among
    the others does with a chance of 1 in `scrambles`.
    """
    planted: int = 10
    """Channels planted at the bars in each head that is neither, for the power."""
