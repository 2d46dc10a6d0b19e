"""How block-diagonal dictionaries are measured: frozen, light designs for claims to register. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """B01: dictionaries of the target's size, counted."""

    expansion: int = 4
    """Features a dimension."""
    rows: int = 64
    """Rows of random input that multiply-adds are counted over."""


@dataclass(frozen=True)
class Belonging:
    """B02: what a feature is without the other heads."""

    expansion: int = 2
    """Features a dimension of the dictionaries that are freshly started."""
    live: float = 1 / 8
    """L0 of one of their heads, as a share of its dimensions."""
    folded: float = 0.7
    """The activation scale that is folded into a dictionary before it is saved again."""
    longest: int = 128
    """Tokens of a document, at most."""


@dataclass(frozen=True)
class Study:
    """The documents that a study of dictionaries is measured on."""

    documents: int = 240
    """Every other one for selection, the rest measured; each from a source of its own, where there are so many."""
    longest: int = 128
    """Tokens of a document, at most."""


@dataclass(frozen=True)
class ComparedArms:
    """B03, B04, B07: two arms of a study, compared at equal L0."""

    runs: int = 3
    """Training runs of each arm, at least: with fewer, arms cannot be told from runs."""
    least_gap: float = 0.05
    """Nats a token that putting the hook to zero must cost, before a share of it says anything."""
    least_ratio: float = 1.1
    """How many times its lowest L0 the range must reach that the arms share."""
    grid: int = 5
    """Sparsities in that range at which the arms are compared, geometrically spaced."""
    described: int = 999
    """Resamples of sources for the intervals of single dictionaries, which are described beside."""


@dataclass(frozen=True)
class FeatureLikeness:
    """B05: features that fire together."""

    alive: int = 20
    """Positions of the selection at which a feature must be live."""
    shuffles: int = 20
    """Shuffled sets of documents, by which the best match of shuffled sequences is found and measured."""
    like: float = 0.3
    """Jaccard from which features of several heads make one set."""
    least_sets: int = 10
    """Sets without which nothing is said of them."""
    match: float = 0.5
    """Jaccard of a match, in what is described beside."""


@dataclass(frozen=True)
class Alikeness:
    """B06: heads whose features fire at one kind of token."""

    alive: int = 20
    """Positions of the selection at which a feature must be live."""
    least_features: int = 8
    """Live features of a head without which nothing is said of it."""
    resamples: int = 1_999
    """Of sources."""
    described: int = 200
    """Random heads that are described beside."""
    described_quantile: float = 0.05
    """Of these."""
