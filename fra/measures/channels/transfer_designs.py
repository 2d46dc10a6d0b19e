"""Designs of the claims about channels that are taken out, looked for on other tokens, and said in other dictionaries.
Light: no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelSet:
    """The CIH set of a head: the strongest channels of the search on discovery documents."""

    size: int = 50
    """Channels that are removed together."""
    floor: int = 20
    """Discovery documents in which a channel must be live on the stripe."""


@dataclass(frozen=True)
class Removal:
    """Channels taken out of a head inside a forward pass (Q07, Q17)."""

    measured: int = 90
    """Documents on which everything is measured, of those for sets."""
    ranked: int = 10
    """The shortest of them, on which random sets are ranked: a pass costs a quarter there."""
    tuned: int = 10
    """The shortest confirmation documents, on which random sets are matched, the head's mean output is taken and the
    ablation at equal suppression is found.
    """
    summed: int = 24
    """Discovery documents from which the channels of largest plain sum are taken."""
    sizes: tuple[int, ...] = (1, 500, 5_000)
    """Channels of the further sets, which stand in the detail."""
    steps: int = 10
    """Steps from no ablation to mean ablation between which the equal suppression is found by a straight line."""
    again: float = 0.5
    """Share of the screen's channels that the same search must find again among twice as many; else it is refused."""


@dataclass(frozen=True)
class MatchedSets:
    """Random live sets that move as much of a head's attention as its CIH set does (Q07)."""

    pool: int = 20_000
    """Live channels of largest mass that members are drawn from."""
    window: int = 40
    """A member is stood for by one of as many live channels nearest to it in mass."""
    largest_scale: float = 16.0
    """How many times over a random set may be taken out at most."""
    tolerance: float = 0.01
    """How far what it moves may be off, as a share."""
    halvings: int = 30
    """Of the interval that holds the scale, at most."""
    tries: int = 20
    """Sets that are drawn for one draw of the null until one can be matched; a draw without any counts against."""
    probe: int = 20
    """Sets that are drawn before the null, to see whether there is one."""
    matchable: float = 0.5
    """Share of the probe that must be matched; else the ranks are not measured."""


@dataclass(frozen=True)
class VariantRepeat:
    """Documents whose second copy says the same words in other tokens (Q08)."""

    discovery: int = 60
    """Plain repeats, on which channels are chosen."""
    measured: int = 120
    """First copies, each with every second copy."""
    shortest_word: int = 2
    """Letters of a word, at least."""
    fewest_words: int = 48
    """Words with variants and neighbours that the vocabulary must have."""
    cosine_within: float = 0.05
    """How far a neighbour's embedding cosine may lie from the variant's."""
    choices: int = 12
    """Neighbours among which one is drawn, the nearest in cosine."""


@dataclass(frozen=True)
class UnseenTokens:
    """Documents over two halves of the vocabulary (Q16)."""

    discovery: int = 60
    """Documents over one half, on which channels are chosen."""
    measured: int = 120
    """Documents over either half, on which they are measured."""
    live_documents: int = 20
    """Documents in which a channel must be live to be tested by itself."""
    lags: tuple[int, ...] = tuple(range(2, 26))
    """Other stripes on which the same search is made."""


@dataclass(frozen=True)
class DictionarySeeds:
    """Dictionaries of one hook that differ by their seed (Q20)."""

    fewest: int = 3
    """Dictionaries that are needed."""


@dataclass(frozen=True)
class Exclusive:
    """Features that only the later of two checkpoints has (C03)."""

    bound: float = 0.9
    """Relative decoder norm above which a feature is exclusive to the model."""
    cells: int = 4
    """Features are relabelled within cells of like decoder norm and activity: as many of either, squared in all."""
    earlier: str = "before"
    """Name of the checkpoint before induction forms, in the crosscoder's slots."""
    late: str = "late"
    """Name of the late one, in the slots of another crosscoder."""
