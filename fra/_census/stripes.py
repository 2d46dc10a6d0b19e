"""Channels that meet on stripes t - s = k, as a sorted list: far fewer than a table has cells.

With rotation the terms of a pair of rows are in closed form, <R_t u, R_s v> = <R_k u, R_0 v>.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra._census.corpus import Corpus
from fra._census.observe import Layer
from fra.core.blocks import add_at
from fra.core.meetings import Meetings


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


class StripeChannels:
    """All channels that meet on the stripes of a corpus, in at least `floor` documents."""

    def __init__(self, layer: Layer, corpus: Corpus, floor: int = 0):
        self.layer, self.corpus = layer, corpus
        slots = torch.zeros(layer.d_sae, dtype=torch.long, device=corpus.device)
        slots[corpus.live] = torch.arange(len(corpus.live), device=corpus.device)
        self._slot = slots[corpus.feature.long()]
        q_row, k_row = stripe_rows(corpus, layer.weights.window)
        doc = torch.searchsorted(torch.tensor(corpus.row_start[:-1]), q_row, right=True) - 1
        self._found = Meetings(self._slot, corpus.entry_start, len(corpus.live), (q_row, k_row, doc), floor)
        self._offset = (q_row - k_row).to(corpus.device)
        self.q_slot, self.k_slot = self._found.q_slot, self._found.k_slot
        """Places among the live features: by query feature, then key feature."""

    @property
    def count(self) -> Int[Tensor, " channels"]:
        """Pairs (t, s) on the stripes at which each channel is live."""
        return self._found.count

    def values(
        self, kind: str, head: int, q_side: Float[Tensor, "live d_head"], k_side: Float[Tensor, "live d_head"]
    ) -> Float[Tensor, " channels"]:
        """Sums, absolute sums or maxima of one head over the stripes; the sides are the live features' directions.

        Single terms, not position parts times couplings: most channels meet once or twice, and picking both directions
        of a channel costs more than the few products of its block.
        """
        corpus, rotary = self.corpus, self.layer.rotary
        found = corpus.value.new_full((len(self.q_slot) + 1,), -torch.inf if kind == "max" else 0.0)
        q_value, k_value = corpus.value, corpus.value
        if corpus.gain_q is not None and corpus.gain_k is not None:
            row = torch.arange(len(corpus.per_row), device=corpus.device)
            row = row.repeat_interleave(corpus.per_row.long(), output_size=len(corpus.value))
            q_value, k_value = q_value * corpus.gain_q[head, row], k_value * corpus.gain_k[head, row]
        if rotary is not None:
            k_side = rotary.rotate(k_side, torch.zeros(len(k_side), dtype=torch.long, device=k_side.device))
        for block in self._found.blocks:
            q = q_side[self._slot[block.q_entry]] * q_value[block.q_entry][..., None]
            k = k_side[self._slot[block.k_entry]] * k_value[block.k_entry][..., None]
            if rotary is not None:
                q = rotary.rotate(q.transpose(0, 1), self._offset[block.chosen]).transpose(0, 1)
            terms = (q @ k.mT).flatten()
            if kind == "max":
                found.scatter_reduce_(0, block.place.long(), terms, "amax")
            else:
                add_at(found, block.place, terms.abs_() if kind == "abs" else terms)
        return found[1:]
