"""The token dictionary: what of an activation its current and its previous token tell, learnt on other documents.

The null that asks whether features beat tokens. Position t is written as a mean, a direction of the token at t and a
direction of the token at t - 1; what these leave is the error term, so that the sum is exact as with any dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.dictionaries.codes import Codes
from fra.errors import CannotLoad

_SWEEPS = 2


def shrinkage(count: Float[Tensor, " n"], mean: Float[Tensor, "n width"], square: Tensor) -> Float[Tensor, " n"]:
    """By how much the mean of each group is to be multiplied to predict what the group shows elsewhere.

    Groups are random effects around zero with one variance between groups, b, and one within, w: the best linear
    prediction is n b / (n b + w) times the mean (Searle, Casella & McCulloch 1992, Variance Components, ch. 7); b and
    w by the method of moments. count: values of each group; mean: theirs, zero where there are none; square: the sum of
    all squared values. Zeros where the groups do not differ, or no group has two values.
    """
    rows, groups = float(count.sum()), int((count > 0).sum())
    between = float((count * mean.square().sum(-1)).sum())
    if rows <= groups:
        return torch.zeros_like(count)
    within = max(float(square) - between, 0.0) / (rows - groups)
    spread = max(between - groups * within, 0.0) / rows
    if spread == 0.0:
        return torch.zeros_like(count)
    return count * spread / (count * spread + within)


def group_means(
    values: Float[Tensor, "n width"], group: Int[Tensor, " n"], n_groups: int
) -> tuple[Float[Tensor, "n_groups width"], Float[Tensor, " n_groups"]]:
    """Shrunk mean of each group (zero where it has no value), and the number of its values."""
    wide = values.double() if values.device.type != "mps" else values
    count = torch.bincount(group, minlength=n_groups).to(wide)
    if values.shape[1] == 1:
        total = torch.bincount(group, wide[:, 0], n_groups)[:, None]
    else:
        total = wide.new_zeros(n_groups, values.shape[1]).index_add_(0, group, wide)
    mean = total / count.clamp(min=1)[:, None]
    return (mean * shrinkage(count, mean, wide.square().sum())[:, None]).to(values), count


@dataclass(frozen=True)
class TokenDictionary:
    """Mean, directions of current tokens, directions of previous tokens; made by `learn`."""

    vocabulary: Int[Tensor, " n"]
    """Token ids that were seen, ascending."""
    first: Float[Tensor, " d_model"]
    """The mean activation at position 0, which has no previous token and is often a sink."""
    mean: Float[Tensor, " d_model"]
    """Over all later positions."""
    current: Float[Tensor, "n d_model"]
    previous: Float[Tensor, "n d_model"]
    seen: Bool[Tensor, "2 n"]
    """Whether a token was seen as the current one, and as the previous one."""

    def slots(self, tokens: Int[Tensor, "*shape"]) -> tuple[Int[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
        """Place of each token in the vocabulary, and whether it is there at all."""
        slot = torch.searchsorted(self.vocabulary, tokens).clamp(max=len(self.vocabulary) - 1)
        return slot, self.vocabulary[slot] == tokens

    def predict(self, tokens: Int[Tensor, "docs pos"]) -> Float[Tensor, "docs pos d_model"]:
        """The activation that the tokens alone tell: mean, current and previous direction (none for unseen tokens)."""
        slot, known = self.slots(tokens)
        out = self.mean.expand(*tokens.shape, -1).clone()
        out[:, 1:] += self.current[slot[:, 1:]] * known[:, 1:, None]
        out[:, 1:] += self.previous[slot[:, :-1]] * known[:, :-1, None]
        out[:, 0] = self.first
        return out

    def codes(self, x: Float[Tensor, "docs pos d_model"], tokens: Int[Tensor, "docs pos"]) -> Codes:
        """x as codes in this dictionary: one entry for the current token and one for the previous, each with value 1.

        Feature ids: 0 the first position; 1 + n the n-th token of the vocabulary as the current one; 1 + N + n as the
        previous one. Tokens not seen in their role have no entry: what they bring is error.
        """
        docs, pos = tokens.shape
        size = len(self.vocabulary)
        slot, known = self.slots(tokens)
        before, known_before = slot.roll(1, dims=1), known.roll(1, dims=1)
        feature = torch.stack((1 + slot, 1 + size + before), dim=-1)
        live = torch.stack((known & self.seen[0][slot], known_before & self.seen[1][before]), dim=-1)
        feature[:, 0, 0], live[:, 0, 0], live[:, 0, 1] = 0, True, False
        row = torch.arange(docs * pos, device=x.device)[:, None].expand(-1, 2).reshape(-1)
        keep = live.flatten()
        row, ids = row[keep], feature.flatten()[keep]
        decoder = torch.cat((self.first - self.mean, self.current.flatten(), self.previous.flatten())).view(
            -1, len(self.mean)
        )
        bias = self.mean.expand_as(x).contiguous()
        left = (x - bias).flatten(0, 1).index_add(0, row, -decoder[ids])
        return Codes(row, ids, x.new_ones(len(row)), decoder, bias, left.view_as(x), (docs, pos))


def learn(
    x: Float[Tensor, "docs pos d_model"], tokens: Int[Tensor, "docs pos"], lengths: Sequence[int]
) -> TokenDictionary:
    """The token dictionary of the activations x (only the first `lengths[d]` positions of a document count).

    Directions of current tokens are shrunk means of x less the overall mean and the directions of previous tokens;
    those of previous tokens likewise, in turn (backfitting: Buja, Hastie & Tibshirani 1989, Annals of Statistics 17).
    A token seen once is trusted little (`shrinkage`). Raises CannotLoad where there are no documents.
    """
    if not len(tokens) or max(lengths) < 2:
        raise CannotLoad("the token dictionary needs documents of two tokens or more to learn from")
    real = torch.arange(tokens.shape[1], device=x.device) < torch.tensor(lengths, device=x.device)[:, None]
    vocabulary = torch.unique(tokens[real])
    slot = torch.searchsorted(vocabulary, tokens).clamp(max=len(vocabulary) - 1)
    later = real[:, 1:]
    rest, now, before = x[:, 1:][later], slot[:, 1:][later], slot[:, :-1][later]
    mean = rest.mean(0)
    rest = rest - mean
    current, previous = rest.new_zeros(2, len(vocabulary), rest.shape[1])
    for _ in range(_SWEEPS):
        current, n_current = group_means(rest - previous[before], now, len(vocabulary))
        previous, n_previous = group_means(rest - current[now], before, len(vocabulary))
    seen = torch.stack((n_current > 0, n_previous > 0))
    return TokenDictionary(vocabulary, x[:, 0].mean(0), mean, current, previous, seen)
