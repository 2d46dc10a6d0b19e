"""Tokens as text, and where in a document a feature is loudest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fra.dictionaries.codes import Codes


def text_of(tokenizer: Any) -> Callable[[int], str]:
    """A token's text by its id; the id itself where there is no tokenizer."""
    return str if tokenizer is None else lambda token: str(tokenizer.decode([token]))


def loudest(codes: Codes) -> dict[int, int]:
    """Of one document, for each live feature: the position at which its activation is largest, the first of equals."""
    value, row, feature = (column.cpu().numpy() for column in (codes.value, codes.row, codes.feature))
    order = np.lexsort((-row, value))  # a later entry takes the place of an earlier one
    return dict(zip(feature[order].tolist(), row[order].tolist(), strict=True))
