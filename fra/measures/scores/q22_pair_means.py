"""What the attention map alone tells of a score: means over token pairs, lags and matches, seen on other documents.

The baseline against which feature-resolved attention is held, made as strong as counting allows: a row-centred score
is a sum of shrunk means by lag, by the key's token, by the token before the key, by whether either of them is the
query's own token, and by the pairs (query token, key token) and (query token, token before the key), each fitted to
what the ones before it leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.dictionaries.tokens import group_means


@dataclass(frozen=True)
class Places:
    """Scores to speak about: query and key position of each, with the tokens at the query, at the key, and before it.

    A key at position 0 has no token before it: -1.
    """

    query: Int[Tensor, " n"]
    key: Int[Tensor, " n"]
    at_query: Int[Tensor, " n"]
    at_key: Int[Tensor, " n"]
    before_key: Int[Tensor, " n"]


def places(
    tokens: Int[Tensor, "docs pos"], doc: Int[Tensor, " n"], query: Int[Tensor, " n"], key: Int[Tensor, " n"]
) -> Places:
    """The places (doc, query, key)."""
    before = tokens[doc, (key - 1).clamp(min=0)].masked_fill(key == 0, -1)
    return Places(query, key, tokens[doc, query], tokens[doc, key], before)


def _labels(p: Places, vocabulary: int, longest: int) -> list[Int[Tensor, " n"]]:
    """One integer a place and stage; equal ones share a mean."""
    first = p.key == 0
    lag = torch.where(first, longest + p.query, p.query - p.key)  # the first key is told apart, row by row
    distinct = p.query > p.key  # a query is no match of itself
    match = 2 * ((p.at_query == p.at_key) & distinct).long() + ((p.at_query == p.before_key) & ~first).long()
    pair = p.at_query * vocabulary + p.at_key
    return [lag, p.at_key, p.before_key + 1, match, pair, p.at_query * (vocabulary + 1) + p.before_key + 1]


class PairMeans:
    """Groups of the places that means are taken over, and where the places asked about stand among them.

    Depends on tokens alone: made once, used for every head. Means of groups that are not asked about are needed too,
    for what they leave to later stages.
    """

    def __init__(self, seen: Places, asked: Sequence[Places], vocabulary: int):
        longest = 1 + max(int(p.query.max()) for p in (seen, *asked))
        self._group, self._size, self._asked = [], [], []
        of_asked = [_labels(p, vocabulary, longest) for p in asked]
        for stage, label in enumerate(_labels(seen, vocabulary, longest)):
            known, group = torch.unique(label, return_inverse=True)
            self._group.append(group)
            self._size.append(len(known))
            where = []
            for labels in of_asked:
                at = torch.searchsorted(known, labels[stage]).clamp(max=len(known) - 1)
                where.append(torch.where(known[at] == labels[stage], at, len(known)))  # the last group is empty
            self._asked.append(where)

    def predict(self, scores: Float[Tensor, " n"]) -> tuple[list[Float[Tensor, " m"]], list[Float[Tensor, " m"]]]:
        """Predicted row-centred scores of the places asked about, from those seen: by lag alone, and by every stage."""
        found = [scores.new_zeros(len(where)) for where in self._asked[0]]
        rest, by_lag = scores, found
        for stage, (group, size, asked) in enumerate(zip(self._group, self._size, self._asked, strict=True)):
            mean = group_means(rest[:, None], group, size + 1)[0][:, 0]
            rest = rest - mean[group]
            found = [own + mean[where] for own, where in zip(found, asked, strict=True)]
            if stage == 0:
                by_lag = found
        return by_lag, found
