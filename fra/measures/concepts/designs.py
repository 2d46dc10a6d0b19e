"""Designs of what is measured of conceptual induction on natural text, for claims to register. Light: no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConceptTexts:
    """Q21: documents on which channels are searched for, and others on which they are measured; no source in both."""

    discovery: int = 120
    """From the sources with the most documents."""
    confirmation: int = 200
    """One of each of the other sources."""
    longest: int = 128
    """Tokens of a document, at most."""


@dataclass(frozen=True)
class Concepts:
    """Q21: search, matching and nulls."""

    candidates: int = 20
    """Channels of a head that the search hands on."""
    checked: int = 400
    """The strongest pairs, among which those that are live in enough documents are taken."""
    live_in: int = 20
    """Documents in which a channel must have keys: for the search, and for a mean effect."""
    rows: int = 100
    """Rows of a feature that are measured: more of them tell little, documents being the unit."""
    run: int = 4
    """Positions of keys are matched in runs of so many."""
    octaves: int = 16
    """Where a head rotates, the search takes couplings at lags of 1, 2, 4, ... up to two to this."""
    first_lag: int = 2
    """The nearest other stripe: keys with i live so many positions before them."""
    lags: int = 20
    """Other stripes: a longer lag leaves few keys in a document."""
    dictionaries: int = 20
    """Dictionaries of random atoms, the largest of which counts."""
    plantings: int = 100
    """Channels planted in a head before its refutation is believed."""
    tried: int = 200
    """Pairs that planting is tried with, at most."""
    largest_raise: float = 16.0
    """Nats by which a planted coupling may lift the largest product of its features' activations."""
    steps: int = 8
    """Bisections of a planted coupling between the smallest raise that is enough and the largest that is not."""
