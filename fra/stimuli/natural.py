"""Natural documents of a target, with the sources that they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from fra.errors import CannotLoad
from fra.stimuli.designs import NaturalSets
from fra.stimuli.padding import Texts
from fra.stimuli.sources import spread

LONGEST = NaturalSets().longest

if TYPE_CHECKING:
    from fra.targets.documents import Document
    from fra.targets.target import Target


def natural_documents(target: Target, n: int, longest: int = LONGEST) -> list[Int[Tensor, " _pos"]]:
    """Token ids of n of the target's texts, from as many sources as there are: BOS first where the target has one, cut
    to the context.

    Raises CannotLoad where the target has fewer texts.
    """
    return natural_with_sources(target, n, longest)[0]


def natural_sources(target: Target, n: int) -> list[str]:
    """The sources of the documents that `natural_documents(target, n)` gives: clusters when they are resampled."""
    return [text.source for text in _spread(target, n)]


def natural_with_sources(
    target: Target, n: int, longest: int = LONGEST
) -> tuple[list[Int[Tensor, " _pos"]], tuple[str, ...]]:
    """The same documents with their sources: documents of one source are resampled together."""
    chosen = _spread(target, n)
    tokens = [target.tokens(text.text, longest) for text in chosen]
    return tokens, tuple(text.source for text in chosen)


def natural_texts(target: Target, n: int, longest: int = LONGEST) -> Texts:
    """The same as one batch, padded."""
    return Texts.of(*natural_with_sources(target, n, longest))


def _spread(target: Target, n: int) -> list[Document]:
    texts = target.documents()
    if len(texts) < n:
        raise CannotLoad(f"{target.name!r} has {len(texts)} documents where {n} are needed: add text to text.documents")
    return [texts[k] for k in spread([text.source for text in texts], n)]
