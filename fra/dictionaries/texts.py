"""Tokens as text, and where in a document a feature is loudest."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fra.dictionaries.codes import Codes

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_OF = {chr(byte): byte for byte in _PLAIN} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_PLAIN)))
}
"""The characters in which byte-level tokenizers (GPT-2's and after) write bytes."""


def text_of(tokenizer: Any) -> Callable[[int], str]:
    r"""A token's text by its id; the id itself where there is no tokenizer. Bytes that are no whole character are shown
    as \xf0, and a leading space that decoding drops (SentencePiece) is there.
    """
    return str if tokenizer is None else lambda token: _text(tokenizer, token)


def _text(tokenizer: Any, token: int) -> str:
    text, pieces = str(tokenizer.decode([token])), getattr(tokenizer, "convert_ids_to_tokens", None)
    piece = None if pieces is None else pieces(token)
    if not isinstance(piece, str):
        return text
    if "\ufffd" in text:
        if one := _BYTE.fullmatch(piece):
            return f"\\x{one[1].lower()}"
        if all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece).decode("utf-8", errors="backslashreplace")
    return f" {text}" if piece.startswith("\u2581") and not text.startswith((" ", "\u2581")) else text


def loudest(codes: Codes) -> dict[int, int]:
    """Of one document, for each live feature: the position at which its activation is largest, the first of equals."""
    value, row, feature = (column.cpu().numpy() for column in (codes.value, codes.row, codes.feature))
    order = np.lexsort((-row, value))  # a later entry takes the place of an earlier one
    return dict(zip(feature[order].tolist(), row[order].tolist(), strict=True))
