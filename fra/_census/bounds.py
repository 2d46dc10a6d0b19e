"""How strong a channel can be at most, from each of its features alone: what cannot be among the strongest is not
multiplied.

|F_ij(t,s)| <= |c_i(t)| |u_i| |c_j(s)| |v_j| (Cauchy and Schwarz; a rotation keeps lengths), so that over any pairs of
positions |sum F_ij| <= sum |F_ij| <= (|u_i| sum_t |c_i(t)|) (|v_j| sum_s |c_j(s)|), and likewise with maxima, for the
largest term and the mean. Features in descending order of such a bound leave a staircase of channels that can reach a
threshold: the first rows of a table, fewer from column to column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra._census.corpus import Corpus, Part
from fra._census.job import Source
from fra.core.blocks import add_at
from fra.core.strongest import Strongest

_ROUNDING = 1e-3
"""Computed values may exceed a bound by so much of it, and never do."""


class Staircase:
    """Which channels of each source can still be among its strongest."""

    def __init__(self, sources: Sequence[Source], q: Float[Tensor, "sources live"], k: Float[Tensor, "sources live"]):
        """Bounds of every live feature on either side, inf where there are none."""
        self._at = {source: place for place, source in enumerate(sources)}
        self._bounded = [bool(row.isfinite().all()) for row in q]
        self._q, self._k = q, k
        self.arrange({})

    def bounded(self, source: Source) -> bool:
        """Whether anything bounds this source."""
        return self._bounded[self._at[source]]

    def arrange(self, best: Mapping[Source, Strongest]) -> None:
        """Puts features in order, by what the thresholds so far leave; without thresholds by the bounds alone."""
        scores = torch.zeros(2, self._q.shape[1])
        for source, at in self._at.items():
            if self._bounded[at]:
                q, k = self._q[at], self._k[at]
                mean_q, mean_k = (max(float(bound.mean()), 1e-30) for bound in (q, k))
                threshold = best[source].threshold if source in best else 0.0
                # A channel can reach the threshold where the product of both scores is at least 1.
                reach = (threshold / mean_q / mean_k) ** 0.5 if threshold > 0 else 1.0
                scores[0] = torch.maximum(scores[0], q / (mean_q * reach))
                scores[1] = torch.maximum(scores[1], k / (mean_k * reach))
        self._place(*scores.argsort(dim=1, descending=True, stable=True))

    def leave_in_place(self) -> None:
        """Puts features in the order of their ids."""
        same = torch.arange(self._q.shape[1])
        self._place(same, same)

    def _place(self, q_order: Int[Tensor, " live"], k_order: Int[Tensor, " live"]) -> None:
        self.q_order, self.k_order = q_order, k_order
        """Places among the live features, those of the strongest possible channels first."""
        # The largest bound from each place on, since the order is one for all sources; ascending, to be searched.
        self._q_falls = -self._q[:, q_order].flip(1).cummax(1).values.flip(1).numpy()
        self._k_falls = -self._k[:, k_order].flip(1).cummax(1).values.flip(1).numpy()

    def rows(self, source: Source, column: int, best: Strongest) -> int:
        """How many of the first query features can have a channel as strong as `best` asks for, with any key feature
        from `column` on.
        """
        at, n_live = self._at[source], self._q.shape[1]
        if column >= n_live:
            return 0
        if not self._bounded[at] or best.threshold <= 0:
            return n_live
        highest = -float(self._k_falls[at, column]) * (1 + _ROUNDING)
        if highest <= 0:
            return 0
        return int(self._q_falls[at].searchsorted(-best.threshold / highest, side="right"))


def staircase(
    corpus: Corpus,
    sources: Sequence[Source],
    q_norm: dict[int, Float[Tensor, " live"]],
    k_norm: dict[int, Float[Tensor, " live"]],
) -> Staircase:
    """Of sums, absolute sums, largest terms, means and counts; the lengths are those of each head's directions."""
    whole, n_live = Part(corpus, 0, len(corpus.length)), len(corpus.live)
    slot = torch.searchsorted(corpus.live, whole.feature)
    number = torch.bincount(slot, minlength=n_live).float().cpu()
    bounds = torch.full((2, len(sources), n_live), torch.inf)
    known: dict[tuple[int, bool, int | None], Tensor] = {}
    for at, (name, head) in enumerate(sources):
        for side, (gain, norm) in enumerate(((corpus.gain_q, q_norm), (corpus.gain_k, k_norm))):
            if name == "count":
                bounds[side, at] = number
            elif name in ("sum", "abs", "max", "mean"):
                key = side if gain is not None else 0, name in ("max", "mean"), None if gain is None else head
                if key not in known:
                    size = whole.coefficient(gain, head).abs().double()
                    found = size.new_zeros(n_live)
                    if key[1]:
                        found.scatter_reduce_(0, slot, size, "amax")
                    else:
                        add_at(found, slot, size)
                    known[key] = found.float().cpu()
                bounds[side, at] = known[key] * norm[head].float().cpu()
    return Staircase(sources, bounds[0], bounds[1])
