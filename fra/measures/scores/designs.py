"""What the claims about scores use beside documents: frozen designs for them to register. Light: no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Concentration:
    """How few channels hold the mass (Q03)."""

    documents: int = 110
    """Of the measured ones, from as many sources as there are."""
    share: float = 0.9
    """Of the mass: what "carries" means in a count of channels."""


@dataclass(frozen=True)
class Truncation:
    """How many features of a position are kept (Q14)."""

    kept: float = 0.5
    """As a share of the dictionary's mean L0 on selection documents."""
    curve: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers kept for the curve beside the verdict."""


@dataclass(frozen=True)
class StrongestChannels:
    """Which channels of a head are its strongest (Q15)."""

    channels: int = 50
    """The size of a CIH set."""
    selected_on: int = 12
    """Selection documents, from as many sources as there are."""


@dataclass(frozen=True)
class Swapping:
    """Which tokens are exchanged, where it is looked at, and what predictors may be tuned to (Q22)."""

    measured: int = 2
    """Swaps in a measured document."""
    tuning: int = 2
    """Swaps in a selection document."""
    seen: int = 10
    """New tokens are drawn from those that the estimation documents hold at least so often: every predictor knows them.
    """
    stride: int = 4
    """Of the rows behind s + 1 every fourth is looked at, and counts four times: they are many, and alike."""
    factors: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0)
    """What a predictor's change may be multiplied by; 0 is "no change"."""
    least: float = 1e-6
    """Squared change of attention in a document below which nothing happens there but rounding: it says nothing."""
