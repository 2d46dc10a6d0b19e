"""What the claims about dictionaries of head outputs are measured with: frozen designs, for claims to register. Light:
no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadOutputDocuments:
    """Natural documents of these claims; no source has documents in both sets."""

    discovery: int = 120
    """Where features, heads, components and groups are chosen."""
    measured: int = 120
    """Every quoted number, one of each source while there are so many."""
    longest: int = 64
    """Tokens of a document, at most: many short ones say more than few long ones."""


@dataclass(frozen=True)
class Alive:
    """Which features are looked at."""

    firings: int = 10
    """On discovery documents, at least: fewer say little about a feature's heads."""


@dataclass(frozen=True)
class DictionaryQuality:
    """What stands beside the share of loss recovered (D01)."""

    resamples: int = 999
    """Of documents, for the share of features that never fire."""
    usual_l0: int = 20
    usual_recovered: float = 0.8
    """What Kissane et al. 2024 aimed at, L0 and share of loss recovered: context for the reader, no bar."""


@dataclass(frozen=True)
class Dominance:
    """How features divide among heads (D04)."""

    shuffles: int = 60
    """Draws of the shuffled blocks. Each is measured on its own part of the sources, which are one cluster."""
    spread_below: float = 0.5
    """A feature is spread where its top head has less than this share of its squares ..."""
    second_at_least: float = 0.2
    """... and its second at least this."""


@dataclass(frozen=True)
class OwnTokens:
    """Induction features and the firings at which their sources are asked for (D05)."""

    share: float = 0.6
    """Of a feature's squared DFA, at least, that its head has on discovery documents."""
    firings: int = 10
    """On second copies of discovery documents, at least."""
    plantings: int = 12
    """Passages in which each own token is planted to learn how strongly its feature fires before it."""
    strong: float = 0.5
    """A firing counts above this share of the feature's median activation before its own token."""
    others_at_most: float = 0.1
    """Of the places before other planted tokens, the share at which an induction feature fires so strongly, at most."""
    measured: int = 24
    """Passages in which each own token is planted to be measured: other ones."""
    quarters: int = 4
    """Parts of a feature's activations between which its sources may change."""
    longest: int = 128
    """Tokens of a planted document, at most."""


@dataclass(frozen=True)
class IndirectObjects:
    """Prompts and features of D15."""

    names: int = 8
    """Single tokens among the names, at least."""
    prompts: int = 120
    choosing: int = 40
    """Of the prompts, those that choose layer and features; the others give the numbers."""
    few: int = 3
    """Features that should carry most."""
    screened: int = 20
    """Features live at S2 on most choosing prompts that are ablated one by one."""


@dataclass(frozen=True)
class GroupLikeness:
    """Groups of features that fire together (D16)."""

    features: int = 40
    """Of a head, at most: those in which it has the largest shares."""
    pairs: int = 10
    """The likest of their pairs, which are measured."""
    nearest: int = 5
    """A control is drawn among this many features of other heads that fire about as often."""
    draws: int = 5
    """Controls of every source."""


@dataclass(frozen=True)
class Widths:
    """Dictionaries of several widths (D18)."""

    deals: int = 20
    """Of the own tokens among the features, anew for every source."""
