"""Designs of what is measured on pairs of features on natural text, for claims to register. Light: no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PairTexts:
    """Documents of Q09, Q10 and Q11: lists and pairs are chosen on some sources and measured on others."""

    measured: int = 120
    """Documents that every number is taken on, from as many sources as there are."""
    selection: int = 120
    """Documents that lists and pairs are chosen on, of other sources."""
    longest: int = 64
    """Tokens of a document, at most: more documents tell more than longer ones."""
    live_in: int = 10
    """Selection documents in which a feature must be live to be looked at."""
    together_in: int = 20
    """Selection documents in which a pair must be jointly live to be chosen."""
    fewest: int = 100
    """Pairs that must be so, or there is nothing to choose from."""


@dataclass(frozen=True)
class SelfChannels:
    """Q09: how many of a document's strongest channels read a feature by itself."""

    strongest: int = 50
    """Channels of one document that are looked at."""
    bin_size: int = 64
    """Relabelled key features change places with as many of like frequency."""
    ranked: int = 40
    """Measured documents on which a head is ranked among relabellings: these are many."""


@dataclass(frozen=True)
class Stability:
    """Q11: the list of a head's top channels, and how it is held against other documents."""

    strongest: int = 50
    """Channels on the list."""
    bin_size: int = 64
    """Relabelled key features change places with as many of like frequency."""
    ranked: int = 40
    """Measured documents on which a head is ranked among relabellings: these are many."""
    dictionaries: int = 20
    """Dictionaries of random atoms, each measured on an equal part of the sources."""


@dataclass(frozen=True)
class PairPredictions:
    """Q10: the pairs whose couplings are held against attention."""

    pairs: int = 4_000
    """Pairs, drawn evenly from those that are jointly live in enough selection documents."""
    live_in: int = 10
    """Measured documents in which a pair must be live, or it has no ratio."""
    group: int = 10
    """About as many pairs are matched with each other, to be permuted among."""


@dataclass(frozen=True)
class SingleTerms:
    """Q12: single terms that are taken out of a forward pass."""

    length: int = 40
    """Tokens of a document."""
    terms_a_head: int = 2
    """Terms of every head on a document: keys are drawn uniformly and by attention in turn."""
    first_row: int = 8
    """Rows before this see too few keys."""
