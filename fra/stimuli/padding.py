"""Documents of unequal length as one batch, and back.

A document is padded on the right with its own first token: an id that the model knows, and causal attention never lets
padding reach a real row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def padded(documents: Sequence[Int[Tensor, " _pos"]], length: int | None = None) -> Int[Tensor, "batch pos"]:
    """Documents, none of them empty, as rows of one length: of the longest unless `length` says more."""
    longest = max(len(document) for document in documents) if length is None else length
    return torch.stack([torch.cat([row, row[:1].expand(longest - len(row))]) for row in documents])


def unpadded(tokens: Int[Tensor, "batch pos"], lengths: Sequence[int]) -> list[Int[Tensor, " _pos"]]:
    """The documents that were padded."""
    return [row[:length] for row, length in zip(tokens, lengths, strict=True)]


@dataclass(frozen=True)
class Texts:
    """Documents with their sources, padded."""

    tokens: Int[Tensor, "batch pos"]
    lengths: tuple[int, ...]
    sources: tuple[str, ...]
    """Documents of one source are one cluster when documents are resampled."""

    @classmethod
    def of(cls, documents: Sequence[Int[Tensor, " _pos"]], sources: Sequence[str]) -> Texts:
        """Documents of any lengths, each with its source."""
        return cls(padded(documents), tuple(map(len, documents)), tuple(sources))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """False on padding."""
        lengths = torch.tensor(self.lengths, device=self.tokens.device)
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < lengths[:, None]

    def documents(self) -> list[Int[Tensor, " _pos"]]:
        """The documents without padding."""
        return unpadded(self.tokens, self.lengths)

    def first(self, n: int) -> Texts:
        """The first n documents, as wide as all of them were."""
        return Texts(self.tokens[:n], self.lengths[:n], self.sources[:n])

    def every(self, step: int) -> Texts:
        """Every `step`-th document, as wide as all of them were."""
        return Texts(self.tokens[::step], self.lengths[::step], self.sources[::step])
