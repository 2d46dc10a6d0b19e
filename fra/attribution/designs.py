"""Designs of what is read off attention, for claims to register. Light: no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Receivers:
    """Heads whose attention from afar goes to few sentences (S02)."""

    apart: int = 4
    """Sentences between one that is attended to and the first whose attention counts: nearer ones are read as context.
    """
    fewest: int = 10
    """Sentences of a document, at least: of fewer no distribution can be told."""
    longest: int = 400
    """Tokens of a document, at most; a document ends with a whole sentence."""
    share: float = 0.05
    """Of all heads, those that are chosen: of largest kurtosis on other sources."""
    cuts: int = 20
    """Other cuts of every document, sentence lengths in another order."""
    documents: int = 120
    """Measured, at most; as many are chosen on."""
