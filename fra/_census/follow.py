"""Where channels named beforehand contribute most, kept while documents are seen.

For every pair of a query entry of feature i and a key entry of feature j that it may attend, F_ij(t,s) is one number;
of each channel the strongest few are held, and nothing of the others. What two corpora hold merges into what the whole
would: `k` rows a channel at most, whatever was seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra._census.corpus import Corpus, Part
from fra._census.observe import Layer
from fra.errors import FraError

_ROWS_AT_ONCE = 2048
PAIRS_AT_ONCE = 1 << 18
"""Pairs of entries (some 100 bytes each) whose contributions are computed at once."""


@dataclass(frozen=True)
class Followed:
    """The `k` strongest contributions of each channel so far: by channel, then |value|, largest first, ties by document
    and position. All on the CPU.
    """

    channels: Int[Tensor, "channels 3"]
    """Head, query feature, key feature."""
    k: int
    at: Int[Tensor, "rows 4"]
    """Index into `channels`, document, q_pos, k_pos."""
    value: Float[Tensor, " rows"]

    @classmethod
    def nothing(cls, channels: Int[Tensor, "channels 3"], k: int, like: Tensor) -> Followed:
        """Before any document is seen. like: a tensor of the precision of the values."""
        return cls(channels.cpu().long(), k, torch.empty(0, 4, dtype=torch.long), like.new_empty(0, device="cpu"))

    def see(self, layer: Layer, corpus: Corpus) -> Followed:
        """With the documents of a corpus."""
        found = self
        for part in corpus.parts(_ROWS_AT_ONCE):
            for at, value in contributions(layer, part, self.channels):
                strong = value.abs() >= found._least()[at[:, 0]]
                found = found._with(at[strong], value[strong])
        return found

    def merge(self, other: Followed, shift: int = 0) -> Followed:
        """With what another one holds, whose documents' numbers are raised by `shift`."""
        at = other.at.clone()
        at[:, 1] += shift
        return self._with(at, other.value)

    def same(self, other: Followed | None) -> bool:
        """Whether the other one follows the same channels, and holds as much of each."""
        return other is not None and self.k == other.k and torch.equal(self.channels, other.channels)

    def _least(self) -> Float[Tensor, " channels"]:
        """What a contribution must reach to be held: of channels that hold `k`, the smallest |value|."""
        least = self.value.new_zeros(len(self.channels))
        bounds = torch.searchsorted(self.at[:, 0].contiguous(), torch.arange(len(self.channels) + 1))
        full = bounds.diff() >= self.k
        least[full] = self.value[bounds[1:][full] - 1].abs()
        return least

    def _with(self, at: Int[Tensor, "rows 4"], value: Float[Tensor, " rows"]) -> Followed:
        at, value = torch.cat((self.at, at)), torch.cat((self.value, value))
        order = torch.arange(len(at))
        # Stable, from the last that decides to the first.
        for key, falls in ((at[:, 3], False), (at[:, 2], False), (at[:, 1], False), (value.abs(), True)):
            order = order[key[order].argsort(stable=True, descending=falls)]
        order = order[at[order, 0].argsort(stable=True)]
        channel = at[order, 0].contiguous()
        rank = torch.arange(len(order)) - torch.searchsorted(channel, channel)
        order = order[rank < self.k]
        return replace(self, at=at[order], value=value[order])

    def frame(self) -> pd.DataFrame:
        """Columns head, q_feature, k_feature, document, q_pos, k_pos, value; channels in the order given."""
        ids = self.channels[self.at[:, 0]]
        columns = dict(zip(("head", "q_feature", "k_feature"), ids.T, strict=True))
        columns |= dict(zip(("document", "q_pos", "k_pos"), self.at.T[1:], strict=True))
        return pd.DataFrame({name: column.numpy() for name, column in {**columns, "value": self.value}.items()})

    def tensors(self) -> dict[str, Tensor]:
        """To be saved; `of_tensors` makes it again."""
        kept = {"channels": self.channels, "k": torch.tensor([self.k]), "at": self.at, "value": self.value}
        return {f"follow_{name}": tensor.contiguous() for name, tensor in kept.items()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Followed | None:
        """The inverse of `tensors`; None where there are none."""
        if "follow_channels" not in tensors:
            return None
        channels, k, at, value = (tensors[f"follow_{name}"] for name in ("channels", "k", "at", "value"))
        return cls(channels, int(k), at, value)


def channels_to_follow(follow: Tensor | pd.DataFrame, heads: Sequence[int], d_sae: int) -> Int[Tensor, "channels 3"]:
    """Head, query feature and key feature of each channel once, in the order given: of every head where none is named.

    Raises FraError for what names no channels, and for heads and features that are not there.
    """
    if isinstance(follow, pd.DataFrame):
        missing = [name for name in ("q_feature", "k_feature") if name not in follow]
        if missing:
            raise FraError(f"follow has no column {missing[0]}: give q_feature and k_feature, and head if you like.")
        ids = torch.tensor(follow[["q_feature", "k_feature"]].to_numpy().astype("int64"))
        of_head = torch.tensor(follow["head"].to_numpy().astype("int64")) if "head" in follow else None
    else:
        if follow.ndim != 2 or follow.shape[1] != 2 or follow.is_floating_point():
            raise FraError(
                "follow must be a DataFrame or a tensor [n, 2] of query and key "
                f"features, not {follow.dtype} of shape {list(follow.shape)}."
            )
        ids, of_head = follow.cpu().long(), None
    if not len(ids):
        raise FraError("follow names no channel: leave it out, or name some.")
    wrong = ids[(ids < 0) | (ids >= d_sae)]
    if len(wrong):
        raise FraError(f"feature {int(wrong[0])} of follow is out of range: the dictionary has {d_sae} features.")
    if of_head is None:
        of_head = torch.tensor(list(heads)).repeat_interleave(len(ids))
        ids = ids.repeat(len(heads), 1)
    absent = sorted(set(of_head.tolist()) - set(heads))
    if absent:
        raise FraError(f"follow names head {absent[0]}: the census is of heads {list(heads)}.")
    every = torch.cat((of_head[:, None], ids), dim=1).tolist()
    return torch.tensor(list(dict.fromkeys(map(tuple, every))))


def contributions(
    layer: Layer, part: Part, channels: Int[Tensor, "channels 3"], *, of_one: bool = False
) -> Iterator[tuple[Int[Tensor, "n 4"], Float[Tensor, " n"]]]:
    """All contributions of the channels on some documents: (channel, document, q_pos, k_pos) and value, on the CPU.
    of_one: the product of both coefficients alone, as with couplings of one.
    """
    corpus, home = part.corpus, part.corpus.device
    head, q_feature, k_feature = channels.to(home).T
    asked = torch.zeros(layer.d_sae, dtype=torch.bool, device=home)
    asked[channels[:, 1:].flatten().to(home)] = True
    n_rows = part.rows.stop - part.rows.start
    entry = asked[part.feature].nonzero()[:, 0]
    # By feature, then row: what a feature has on some rows is one stretch.
    code, order = (part.feature[entry] * n_rows + part.entry_row[entry]).sort()
    entry = entry[order]
    stretches = [torch.searchsorted(code, (q_feature + more) * n_rows) for more in (0, 1)]
    value, number = corpus.value[part.entries], corpus.number.to(home)[part.first : part.stop]
    couplings = Couplings(layer, head, q_feature, k_feature)
    for chosen in _cut((stretches[1] - stretches[0]).cumsum(0)):
        channel, place = _spread(stretches[0][chosen], stretches[1][chosen])
        channel = channel + chosen.start
        row = part.entry_row[entry[place]]
        first = row - part.row_pos[row]
        if layer.weights.window is not None:
            first = torch.maximum(first, row - layer.weights.window + 1)
        ahead = k_feature[channel] * n_rows
        begin, end = torch.searchsorted(code, ahead + first), torch.searchsorted(code, ahead + row, right=True)
        for some in _cut((end - begin).cumsum(0)):
            pair, k_place = _spread(begin[some], end[some])
            q_entry, k_entry, mine = entry[place[some]][pair], entry[k_place], channel[some][pair]
            q_row, k_row = part.entry_row[q_entry], part.entry_row[k_entry]
            both = value[q_entry] * value[k_entry]
            if corpus.gain_q is not None and corpus.gain_k is not None:
                gain_q, gain_k = corpus.gain_q[:, part.rows], corpus.gain_k[:, part.rows]
                both = both * gain_q[head[mine], q_row] * gain_k[head[mine], k_row]
            t, s = part.row_pos[q_row], part.row_pos[k_row]
            at = torch.stack((mine, number[part.row_doc[q_row]], t, s), dim=1)
            live = both != 0
            yield at[live].cpu(), (both if of_one else both * couplings(mine, t - s))[live].cpu()


class Couplings:
    """<u_i, v_j> of each channel, with rotation <R_k u_i, R_0 v_j> at offset k = t - s."""

    def __init__(self, layer: Layer, head: Tensor, q_feature: Tensor, k_feature: Tensor):
        self._rotary = layer.rotary
        u = layer.decoder.new_empty(len(head), layer.d_head)
        v = torch.empty_like(u)
        for number in torch.unique(head).tolist():
            mine = head == number
            u[mine] = layer.directions("query", number, q_feature[mine])
            v[mine] = layer.directions("key", number, k_feature[mine])
        self._u, self._v, self._plain = u, v, (u * v).sum(-1)

    def __call__(self, channel: Int[Tensor, " n"], offset: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        if self._rotary is None:
            return self._plain[channel]
        if not len(channel):
            return self._plain[:0]
        most = 1 + int(offset.max())
        asked, at = torch.unique(channel * most + offset, return_inverse=True)
        mine = asked // most
        v = self._rotary.rotate(self._v[mine], torch.zeros_like(mine))
        return (self._rotary.rotate(self._u[mine], asked % most) * v).sum(-1)[at]


def _spread(begin: Int[Tensor, " n"], end: Int[Tensor, " n"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Every number from begin to end of each stretch, and which stretch it is of."""
    count = (end - begin).clamp(min=0)
    which = torch.arange(len(count), device=count.device).repeat_interleave(count)
    within = torch.arange(len(which), device=count.device) - (count.cumsum(0) - count)[which]
    return which, begin[which] + within


def _cut(ends: Int[Tensor, " n"]) -> Iterator[slice]:
    """Consecutive stretches of which each has PAIRS_AT_ONCE pairs at most (or is one)."""
    low, before = 0, 0
    while low < len(ends):
        high = int(torch.searchsorted(ends, before + PAIRS_AT_ONCE, right=True))
        high = max(high, low + 1)
        yield slice(low, high)
        low, before = high, int(ends[high - 1])
