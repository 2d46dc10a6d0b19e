"""What a row shows beside its numbers: texts and features of examples, packed for the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np
from jaxtyping import Float

from fra.plot.drawings import FAINTEST

BEST = "best channel on a document"
"""What a head's example is called in a row of the ledger."""


STRONGEST = "strongest channel on a document"


ON_NATURAL = "natural: where a document of the target's text begins"

ChannelPicture = TypedDict(
    "ChannelPicture",
    {
        "document": str,
        "channel": str,
        "query tokens": list[str],
        "key tokens": list[str],
        "pages": NotRequired[list[str]],
        "tokens": list[str],
        "maps": dict[str, list[str]],
    },
)
"""A channel on a document, as the ledger holds it and the report draws it.

Rows of the maps are texts of numbers parted by spaces, to three digits; zero stands for what is too faint to be drawn,
and zeros at a row's end are left out (`packed`).
"""


class SwapPicture(TypedDict):
    """A swapped token and what it does to a head's attention; maps as in ChannelPicture."""

    swap: str
    rows: str
    tokens: list[str]
    maps: dict[str, list[str]]


class Strip(TypedDict):
    """Tokens in a line, each with a number as text (parted by spaces), and which of them is meant."""

    tokens: list[str]
    values: str
    marked: int


class FeaturePicture(TypedDict):
    """A feature of head outputs where it fires most: strips by name."""

    feature: int
    dictionary: str
    activation: float
    pages: NotRequired[list[str]]
    strips: dict[str, Strip]


class CurvesPicture(TypedDict):
    """Curves by name over the numbers x; None where a curve has no value."""

    x: Sequence[int]
    curves: Mapping[str, Sequence[float | None]]


def features_on(page: str, pair: Sequence[int]) -> list[str]:
    """Addresses of features on Neuronpedia, each once."""
    return list(dict.fromkeys(f"{page}/{int(feature)}" for feature in pair))


def counted(tokens: Sequence[tuple[int, int]], text: Callable[[int], str]) -> list[str]:
    """Token ids and how often they stand there, in words."""
    return [f"{text(token)!r} x{times}" for token, times in tokens]


def packed(values: Float[np.ndarray, "q_pos k_pos"]) -> list[str]:
    """The lower triangle of a map as rows of text (`picture`)."""
    least = FAINTEST * float(np.abs(values).max(initial=0.0))
    rows = []
    for t, row in enumerate(values.tolist()):
        seen = [abs(v) >= least and v != 0 for v in row[: t + 1]]
        last = max((s for s, there in enumerate(seen) if there), default=-1)
        rows.append(" ".join(f"{v:.3g}" if there else "0" for v, there in zip(row[: last + 1], seen, strict=False)))
    return rows
