"""Channels that meet on stripes t - s = k, as a sorted list: far fewer than a table has cells.

Every pair of rows (t, t - k) gives a small block, [live at t, live at s]. Which channel each of its numbers belongs to
is sorted out once for all heads; with rotation a block's terms are in closed form, <R_t u, R_s v> = <R_k u, R_0 v>.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra._census_blocks import WORK_BYTES, add_at
from fra._census_corpus import Corpus
from fra._census_observe import Layer

PAIR_BYTES = 40
"""Of one pair of entries while channels are sorted out."""


class RowPairs(NamedTuple):
    """Pairs of rows (t, s), whose busiest row is about as wide in all of them, on the CPU."""

    q_row: Int[Tensor, " n"]
    k_row: Int[Tensor, " n"]
    width: int
    """Most live features of any of these rows."""


class _Group(NamedTuple):
    q_entry: Int[Tensor, "n w"]
    k_entry: Int[Tensor, "n w"]
    """Entries of the rows side by side; what is beyond a row's own is cut off by `place`."""
    offset: Int[Tensor, " n"]
    doc: Int[Tensor, " n"]
    place: Int[Tensor, " n_w_w"]
    """Of each term among the channels, 0 for none."""


def stripe_rows(corpus: Corpus, window: int | None) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Rows of the queries and of their keys on the stripes of every document, on the CPU."""
    q_rows, k_rows, starts = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)], corpus.row_start
    for doc, offsets in enumerate(corpus.stripes):
        first, stop = starts[doc], starts[doc + 1]
        for offset in offsets:
            if offset < (window or stop):
                q_rows.append(torch.arange(first + offset, stop))
                k_rows.append(torch.arange(first, stop - offset))
    return torch.cat(q_rows), torch.cat(k_rows)


def n_stripe_pairs(corpus: Corpus, window: int | None) -> int:
    """Pairs of entries that meet on the stripes."""
    per_row = corpus.entry_start.diff()
    q_row, k_row = stripe_rows(corpus, window)
    return int((per_row[q_row] * per_row[k_row]).sum())


def graded(corpus: Corpus, q_row: Tensor, k_row: Tensor, cell_bytes: int) -> Iterator[RowPairs]:
    """The pairs of rows by how busy they are, so that little is padded, in groups of about WORK_BYTES for blocks of
    width * width cells.
    """
    per_row = corpus.entry_start.diff()
    busiest = torch.maximum(per_row[q_row], per_row[k_row])
    both = torch.minimum(per_row[q_row], per_row[k_row]) > 0
    grade = busiest.double().log2().ceil().long()
    for level in torch.unique(grade[both]).tolist():
        chosen = ((grade == level) & both).nonzero()[:, 0]
        width = int(busiest[chosen].max())
        for some in chosen.split(max(1, WORK_BYTES // (cell_bytes * width * width))):
            yield RowPairs(q_row[some], k_row[some], width)


class StripeChannels:
    """All channels that meet on the stripes of a corpus."""

    def __init__(self, layer: Layer, corpus: Corpus):
        self.layer, self.corpus = layer, corpus
        home, n_live = corpus.device, len(corpus.live)
        slots = torch.zeros(layer.d_sae, dtype=torch.long, device=home)
        slots[corpus.live] = torch.arange(n_live, device=home)
        self._slot = slots[corpus.feature.long()]
        codes, groups, first_rows = [], [], torch.tensor(corpus.row_start[:-1])
        for rows in graded(corpus, *stripe_rows(corpus, layer.weights.window), 4 * 8):
            (q, live_q), (k, live_k) = (self._entries(row, rows.width) for row in (rows.q_row, rows.k_row))
            # 0 stands for none, and real channels are numbered from 1.
            code = (1 + self._slot[q] * n_live)[:, :, None] + self._slot[k][:, None, :]
            codes.append((code * (live_q[:, :, None] & live_k[:, None, :])).flatten())
            doc = torch.searchsorted(first_rows, rows.q_row, right=True) - 1
            groups.append((q, k, (rows.q_row - rows.k_row).to(home), doc.to(home)))
        every = torch.cat((torch.zeros(1, dtype=torch.long, device=home), *codes))
        # int32 is sorted in less than half the time.
        every = every.int() if n_live**2 < 2**31 - 1 else every
        found, place, count = torch.unique(every, return_inverse=True, return_counts=True)
        places = place[1:].split([len(code) for code in codes])
        self._groups = [_Group(*group, place) for group, place in zip(groups, places, strict=True)]
        code, self.count = found[1:].long() - 1, count[1:]
        self.q_feature, self.k_feature = corpus.live[code // n_live], corpus.live[code % n_live]
        """By query feature, then key feature."""

    def documents(self) -> Int[Tensor, " channels"]:
        """In how many documents each channel meets on a stripe."""
        n_docs = len(self.corpus.number)
        seen = [
            (group.place.view(len(group.doc), -1) * n_docs + group.doc[:, None]).flatten() for group in self._groups
        ]
        places = torch.unique(torch.cat([self.count.new_empty(0), *seen])) // n_docs
        return torch.bincount(places, minlength=len(self.count) + 1)[1:]

    def _entries(self, row: Int[Tensor, " n"], width: int) -> tuple[Int[Tensor, "n w"], Tensor]:
        """Entries of some rows, side by side, and which of them are there."""
        bounds, beside = self.corpus.entry_start, torch.arange(width)
        first, count = bounds[row][:, None], (bounds[row + 1] - bounds[row])[:, None]
        home = self.corpus.device
        return (first + beside).clamp(max=int(bounds[-1]) - 1).to(home), (beside < count).to(home)

    def values(
        self, kind: str, head: int, q_side: Float[Tensor, "live d_head"], k_side: Float[Tensor, "live d_head"]
    ) -> Float[Tensor, " channels"]:
        """Sums, absolute sums or maxima of one head over the stripes; the sides are the live features' directions."""
        corpus, rotary = self.corpus, self.layer.rotary
        found = corpus.value.new_full((len(self.count) + 1,), -torch.inf if kind == "max" else 0.0)
        q_value, k_value = corpus.value, corpus.value
        if corpus.gain_q is not None and corpus.gain_k is not None:
            row = torch.arange(len(corpus.per_row), device=corpus.device)
            row = row.repeat_interleave(corpus.per_row.long(), output_size=len(corpus.value))
            q_value, k_value = q_value * corpus.gain_q[head, row], k_value * corpus.gain_k[head, row]
        if rotary is not None:
            k_side = rotary.rotate(k_side, torch.zeros(len(k_side), dtype=torch.long, device=k_side.device))
        for group in self._groups:
            q = q_side[self._slot[group.q_entry]] * q_value[group.q_entry][..., None]
            k = k_side[self._slot[group.k_entry]] * k_value[group.k_entry][..., None]
            if rotary is not None:
                q = rotary.rotate(q.transpose(0, 1), group.offset).transpose(0, 1)
            terms = (q @ k.mT).flatten()
            if kind == "max":
                found.scatter_reduce_(0, group.place, terms, "amax")
            else:
                add_at(found, group.place, terms.abs_() if kind == "abs" else terms)
        return found[1:]
