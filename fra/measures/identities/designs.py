"""How identities are checked: frozen, light designs for claims to register. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Exactness:
    """Q01, Q18, D02, D03: sums against the model's own numbers."""

    longest: int = 128
    """Tokens of a document, at most: every entry of it is checked."""


@dataclass(frozen=True)
class Rounding:
    """When an identity that misses its bar is limited by precision."""

    falls: float = 0.2
    """An error that is smaller in float64 than this share of what it was in less precision was rounding."""


@dataclass(frozen=True)
class Recursion:
    """D17: attribution through several layers."""

    longest: int = 128
    """Tokens of a document, at most."""
    firings: int = 16
    """Firings of a document that are traced, about."""
    late: float = 0.5
    """Share of a document before the first of them: early ones have little to read."""


@dataclass(frozen=True)
class Gauges:
    """Q13: weights that differ and do the same."""

    longest: int = 64
    """Tokens of a document, at most: longer ones would only take longer."""
    stays: float = 1e-10
    """What moves less, as a share of its size in float64, does not move: rounding is below 1e-12; sums need room."""
    moves: float = 1e-6
    """What moves more, moves: a million times what rounding does."""
    strongest: int = 50
    """Channels of a head, chosen on the first half of the documents."""
    seen: float = 1e-6
    """Share of a row's attention below which an effect is no yardstick for its own movement."""
    stretch: float = 2.0
    """The change of basis is orthogonal times a diagonal between 1 / this and this."""


@dataclass(frozen=True)
class Cut:
    """Q19: two texts that differ from one position on, and what is done to a head."""

    length: int = 24
    """Tokens of a document, at most."""
    cut: int = 12
    """From this position on all tokens are exchanged."""
    a_side: int = 8
    """Features on each side of the channels that are changed, at most."""
    scaled: float = 4.0
    """Factor of the channels."""
    blocks: float = -2.0
    """Factor of the blocks with bias or error."""
    output: float = 5.0
    """Factor of the features in the output."""


@dataclass(frozen=True)
class Sentences:
    """S01: sensitivities of sentences."""

    longest: int = 64
    """Tokens of a document, at most."""
    channels: int = 20
    """The strongest of each head, in each document."""
    step: float = 5e-2
    """Of the finite difference, in nats of score: the error of four points is of the order of its fourth power, and
    that of a softmax in single precision (which some architectures have in any) 6e-8 over it.
    """
