"""Which heads are token induction heads: a design for claims to register. Light: no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenInduction:
    """Which heads are token induction heads (TIHs), by their attention contrast on status documents (CLAIMS, common
    definitions).
    """

    tih_at_least: float = 0.20
    """TIH: the lower bound of the contrast is at least this."""
    not_tih_at_most: float = 0.05
    """No TIH: the upper bound is at most this."""
    level: float = 0.05
    """One-sided, simultaneous over all heads of the model."""
