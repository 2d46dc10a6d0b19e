"""Designs of the search for channels, its nulls and its plantings, for claims to register. Light: no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelSearch:
    """The search for a head's channels: exhaustive over live pairs of features, on discovery documents."""

    candidates: int = 50
    """Channels that the search puts first: a head's candidates, and together its CIH set."""
    floor: int = 20
    """Discovery documents in which a pair must be jointly live on the stripe: it looks at activity, never at effects.
    """
    least_documents: int = 20
    """Measured documents with live rows that a candidate needs."""
    stands: float = 0.25
    """Where one channel must pass everything, those alone are asked, and tested together, whose effect, attention and
    contrast on discovery documents reach this share of their bars.
    """
    sizes: tuple[int, ...] = (1, 50, 500, 5_000)
    """Channels of the sets that are removed together."""


@dataclass(frozen=True)
class ChannelNulls:
    """What a head's channels are held against."""

    first_lag: int = 2
    lags: int = 40
    """The same search at these many other lags: the first copy turned round by first_lag, first_lag + 1, ... tokens."""
    pool: int = 20_000
    """Random pairs of live features among which matched pairs are sought."""
    matched: int = 200
    """Pairs of the pool that are nearest to a candidate in frequency, magnitude and co-activation."""
    activity_documents: int = 30
    """Discovery documents on which frequency, magnitude and co-activation are counted."""
    scramble_documents: int = 100
    """Confirmation documents, evenly spaced, on which a head's channels are ranked among those of its scrambles."""
    spread_documents: int = 20
    """Confirmation documents on which the spread of a scrambled head's scores is matched to the head's."""
    set_documents: int = 60
    """Sets documents, evenly spaced, on which the head's set is ranked among those of its scrambles."""
    dictionaries: int = 20
    """Dictionaries of random atoms, each with its own search."""
    atom_documents: int = 30
    """Discovery and sets documents, evenly spaced, that are coded in random atoms; own features are sought and measured
    on the same ones for the comparison.
    """


@dataclass(frozen=True)
class Plantings:
    """Channels planted in a head's own scores, to count the power of its decision."""

    planted: int = 100
    tries: int = 800
    """Random pairs that are tried, at most."""
    hopeless: float = 0.001
    """Level of the bound on the share of pairs that can be lifted to the bars: where so many of `tries` would not make
    `planted`, no more are tried, and the power is not known.
    """
    live_share: float = 0.3
    """Planted are channels that have live rows in so many of the confirmation documents: rarer ones cannot be told from
    nothing there, and a refutation says nothing of them.
    """
    selectivity: float = 0.6
    """Pairs whose key feature is not that much more live at the stripe's key than elsewhere are passed over: no
    coupling makes a head attend there by them.
    """
    raises: tuple[float, ...] = (1.0, 4.0, 16.0)
    """Typical contributions (nats) to which a coupling is raised in turn: what the last does not lift to the bars
    cannot be lifted.
    """
    precision: float = 0.1
    """The smallest coupling that meets every bar is found to this share of itself."""
    at_once: int = 25
    """Plantings that are tested together; after each such number it is asked whether the power can still be reached."""
