"""How much is measured on: frozen designs of documents, for claims to register. Light: no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Made:
    """How repeated documents are made, whatever the claim."""

    shortest_period: int = 16
    """Tokens that are repeated, at least."""
    too_rare: float = 0.25
    too_frequent: float = 0.025
    """Shares of the vocabulary, by frequency, that random passages do without."""
    frequency_documents: int = 32
    frequency_tokens: int = 128
    """How many texts, and of each how many tokens, say how frequent tokens are."""


@dataclass(frozen=True)
class RepeatedSets:
    """Documents of each set of repeated text. Natural text is what there is: its sets get these shares of it, each
    source in one set only.
    """

    status: int = 120
    discovery: int = 100
    confirmation: int = 120
    made_confirmation: int = 320
    """Where documents are made, each is a source, and costs a forward pass: what is told of a channel is told by the
    documents in which it is live.
    """
    sets: int = 90
    longest: int = 128
    """Tokens of a document, at most."""
    made: Made = Made()

    def sizes(self, made: bool) -> tuple[int, ...]:
        """In the order of `fra.stimuli.sets.SETS`; made: whether the documents are made, or natural text."""
        return self.status, self.discovery, self.made_confirmation if made else self.confirmation, self.sets


@dataclass(frozen=True)
class NaturalSets:
    """Documents of each set of natural text, each source in one set only."""

    measured: int = 120
    """Every quoted number."""
    selection: int = 40
    """Where channels are chosen and predictors tuned."""
    estimation: int = 120
    """Where token dictionary and token means come from."""
    longest: int = 128
    """Tokens of a document, at most."""


@dataclass(frozen=True)
class PlantedTokens:
    """The behaviour test: tokens planted in repeated random passages, in two halves that share no document."""

    repeats: int = 12
    """Documents of each half in which a token stands."""
    hits_above: float = 0.60
    """A feature passes that fires before more than this share of second occurrences of its token ..."""
    firsts_below: float = 0.20
    """... and before less than this share of first ones: it waits for the repeat."""
    longest: int = 128
    """Tokens of a document, at most."""
