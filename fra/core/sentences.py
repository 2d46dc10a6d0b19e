"""Sentence-level sensitivity: how a head's attention from one sentence to another answers to one channel of its scores.

Phi[a,b,i,j] = mean_{t in a} sum_{s in b} A(t,s) (D(t,s) F_ij(t,s) - sum_u A(t,u) D(t,u) F_ij(t,u)), with D = 1 under
no softcap and 1 - (S_cap/c)^2 under one of c: the derivative of sentence a's attention to sentence b in the gain of
channel (i,j). So sum_b Phi = 0: what one sentence gains, others lose. Sentences that are joined add (over b) or average
by length (over a); with one token a sentence it is the sensitivity of single entries of the pattern.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.face import face, facing
from fra.core.coded import Channels
from fra.core.reductions import TERMS, TILE_ELEMENTS, feature_tiles
from fra.core.resolve import ResolvedHead, resolve
from fra.core.strongest import Strongest
from fra.core.weights import Model
from fra.errors import FraError

_END = re.compile(r"""[.!?…]+["'”’»)\]]*\s+|\n+\s*""")
_NO_END = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Sr|Jr|vs|etc|cf|e\.g|i\.e|[A-Z])\.\s+$")


@dataclass(frozen=True)
class Segments:
    """A tokenized text cut into BOS, prompt and sentences, each token in one of them."""

    tokens: Int[Tensor, " pos"]
    segment: Int[Tensor, " pos"]
    """Index of each token's segment; ascending from 0, none left out."""
    kinds: tuple[str, ...]
    """ "bos", "prompt" or "sentence", one a segment."""
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.kinds)


def sentence_starts(text: str) -> list[int]:
    """Characters at which a sentence begins: the first, and those after `.`, `!`, `?` or `…` (with closing quotes and
    brackets) and white space, or after a line break. Not after titles, initials and a few other abbreviations.
    """
    ends = (found.end() for found in _END.finditer(text) if not _NO_END.search(text[: found.end()]))
    return [0, *(end for end in ends if end < len(text))]


def segments(
    tokenizer: Any, text: str, *, prompt: str = "", bos: int | None = None, starts: Sequence[int] | None = None
) -> Segments:
    """`prompt` and `text`, tokenized as one string, cut into BOS (where given), the prompt as one segment, and the
    sentences of the text.

    tokenizer: a fast one of Hugging Face, whose offsets say which characters a token is of; a token belongs to the
    segment of its first character that is no white space. starts: characters of `text` at which sentences begin, in
    place of `sentence_starts`; the first is 0. Sentences without a token of their own join the one before.
    Raises FraError for a tokenizer without offsets, no text, and starts that do not ascend from 0 within the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise FraError("this tokenizer gives no offsets of its tokens: use a fast one of Hugging Face.")
    own = list(sentence_starts(text) if starts is None else starts)
    if not text.strip():
        raise FraError("the text is empty: give at least one sentence.")
    if not own or own[0] != 0 or own[-1] >= len(text) or any(a >= b for a, b in pairwise(own)):
        raise FraError("starts must ascend from 0 and lie within the text.")
    whole = prompt + text
    bounds = [0, *(len(prompt) + start for start in own)] if prompt else own
    names = ["prompt"] * bool(prompt) + ["sentence"] * len(own)
    coded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    at = [_first_character(whole, low, high) for low, high in coded["offset_mapping"]]
    place = (torch.searchsorted(torch.tensor(bounds), torch.tensor(at), right=True) - 1).cummax(0).values
    used, segment = torch.unique(place, return_inverse=True)
    ends = [*bounds[1:], len(whole)]
    spans = [whole[start:end] for start, end in zip(bounds, ends, strict=True)]
    kinds, texts = (tuple(many[k] for k in used.tolist()) for many in (names, spans))
    ids = coded["input_ids"]
    if bos is None:
        return Segments(torch.tensor(ids), segment, kinds, texts)
    first = torch.zeros(1, dtype=torch.long)
    return Segments(torch.tensor([bos, *ids]), torch.cat([first, segment + 1]), ("bos", *kinds), ("", *texts))


def _first_character(text: str, low: int, high: int) -> int:
    """Of a token's characters the first that is no white space; the last character where all are."""
    inside = text[low:high]
    return low + min(len(inside) - len(inside.lstrip()), max(len(inside) - 1, 0))


@face
def sensitivity(
    model: Model,
    sae: Any,
    tokens: Int[Tensor, " pos"],
    segment: Int[Tensor, " pos"],
    layer: int | None = None,
    head: int | str | None = None,
) -> Sensitivity:
    """Phi of one head (by numbers, or by name: head="L1H4") on one document; tokens and segment as in `Segments`.
    Raises FraError as `fra.resolve` does, and for segments that are not 0, 1, ... in ascending order, one a token.
    """
    return Sensitivity(resolve(model, sae, tokens, layer, head), segment)


@facing
class Sensitivity:
    """Phi[a,b,i,j] of a resolved head over segments of its document; made by `sensitivity`.

    Nothing of the size of all channels is stored: chosen channels are computed in blocks, the strongest are streamed.
    In double precision, and the pattern anew from the terms, so that identities hold to rounding.
    """

    def __init__(self, resolved: ResolvedHead, segment: Int[Tensor, " pos"]) -> None:
        steps = segment.diff()
        if len(segment) != resolved.n_pos or int(segment[0]) != 0 or bool(((steps < 0) | (steps > 1)).any()):
            raise FraError("segments must be one number a token, ascending from 0 without a gap.")
        self.resolved, self.segment = resolved, segment.to(resolved.frozen.x.device)
        self.n = int(segment[-1]) + 1

    @cached_property
    def _slopes(self) -> tuple[Float[Tensor, "pos pos"], Float[Tensor, "pos pos"]]:
        """A, and A times the slope of the softcap."""
        frozen = self.resolved.frozen
        sides = (self.resolved.query, self.resolved.key)
        q, k = (torch.stack([side.sum(term) for term in TERMS]).sum(0) for side in sides)
        scores = q @ k.mT
        A, capped = frozen.attention(scores), frozen.cap(scores)
        return A, A if frozen.softcap is None else A * (1 - (capped / frozen.softcap) ** 2)

    @cached_property
    def _member(self) -> Float[Tensor, "pos n_segments"]:
        """1 where the token is in the segment."""
        member: Tensor = torch.nn.functional.one_hot(self.segment, self.n).to(self._slopes[0])
        return member

    def attention(self) -> Float[Tensor, "n_segments n_segments"]:
        """Mean over the rows of a segment of the attention to each segment."""
        return self.average(self._slopes[0])

    def average(self, by_token: Float[Tensor, "*n pos pos"]) -> Float[Tensor, "*n n_segments n_segments"]:
        """Of any [pos, pos]: mean over the rows of a segment of the sum over the keys of each."""
        return self._over_rows(by_token @ self._member)

    def joined(self) -> Sensitivity:
        """The same with segments joined two by two."""
        return Sensitivity(self.resolved, self.segment // 2)

    def _over_rows(self, by_row: Float[Tensor, "*n pos n_segments"]) -> Float[Tensor, "*n n_segments n_segments"]:
        mean = self._member / self._member.sum(0)
        return mean.mT @ by_row

    def of_scores(self, scores: Float[Tensor, "*n pos pos"]) -> Float[Tensor, "*n n_segments n_segments"]:
        """The derivative of the attention between segments in the gain of any part of the scores before softcap."""
        A, sloped = self._slopes
        by_segment = (sloped * scores.to(A).masked_fill(~self.resolved.frozen.mask, 0.0)) @ self._member
        return self._over_rows(by_segment - (A @ self._member) * by_segment.sum(-1, keepdim=True))

    def phi(self, channels: Channels) -> Float[Tensor, "n_segments n_segments n"]:
        """Phi[a, b] of chosen channels ([n, 2] ids, or a DataFrame with q_feature and k_feature), in the order given.

        Raises FraError for what are no ids of the dictionary.
        """
        pairs = self._ids(channels)
        size = max(1, TILE_ELEMENTS // self.resolved.n_pos**2)
        parts = [self.of_scores(self._maps(some)) for some in torch.split(pairs, size)]
        return torch.cat(parts).movedim(0, -1)

    def _ids(self, channels: Channels) -> Int[Tensor, "n 2"]:
        if isinstance(channels, pd.DataFrame):
            channels = channels[["q_feature", "k_feature"]].to_numpy(copy=True)
        pairs = torch.as_tensor(channels)
        fits = pairs.ndim == 2 and pairs.shape[1] == 2 and len(pairs) > 0 and not pairs.is_floating_point()
        if not fits or int(pairs.min()) < 0 or int(pairs.max()) >= self.resolved.d_sae:
            raise FraError(f"channels are [n, 2] feature ids, from 0 to {self.resolved.d_sae - 1}.")
        return pairs

    def _maps(self, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "n pos pos"]:
        """F_ij of each pair."""
        return self.resolved.query.of(pairs[:, 0]) @ self.resolved.key.of(pairs[:, 1]).mT

    def strongest(self, a: int, b: int, n: int) -> pd.DataFrame:
        """The n channels of largest |Phi[a,b]| of all live ones: columns q_feature, k_feature, value; ties by ids.

        Streams. Raises FraError for segments that are not there, and for n below 1.
        """
        if not (0 <= a < self.n and 0 <= b < self.n):
            raise FraError(f"segments {a} and {b}: there are {self.n}, numbered from 0.")
        if n < 1:
            raise FraError(f"n={n} asks for nothing: give a positive number.")
        q, k = self.resolved.query.entries, self.resolved.key.entries
        weight = self._weight(a, b)
        best = Strongest(n)
        for tile, at in feature_tiles(q, k, self.resolved.n_pos):
            value = q.vector.new_zeros(len(k.live), tile.stop - tile.start)
            for rows in torch.split(at, max(1, TILE_ELEMENTS // len(k.pos))):
                terms = (q.vector[rows] @ k.vector.mT) * weight[q.pos[rows]][:, k.pos]
                by_query = terms.new_zeros(tile.stop - tile.start, len(k.pos))
                by_query.index_add_(0, q.slot[rows] - tile.start, terms)
                value.index_add_(0, k.slot, by_query.mT)
            column, row = ((value != 0) & (value.abs() >= best.threshold)).nonzero(as_tuple=True)
            code = q.live[row + tile.start] * self.resolved.d_sae + k.live[column]  # int64
            best.offer(value[column, row].abs(), code, value[column, row])
        _, code, value = best.result()
        d_sae = self.resolved.d_sae
        columns = {"q_feature": code // d_sae, "k_feature": code % d_sae, "value": value}
        return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})

    def _weight(self, a: int, b: int) -> Float[Tensor, "pos pos"]:
        """w with Phi[a,b] = sum_{t,s} w(t,s) F(t,s)."""
        A, sloped = self._slopes
        toward = self._member[:, b] - (A @ self._member[:, b])[:, None]
        return (self._member[:, a] / self._member[:, a].sum())[:, None] * sloped * toward
