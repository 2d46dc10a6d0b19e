"""Lists of a document's strongest channels where the coupling belongs to relabelled key features, made fast.

A relabelling lets features change places with others of like frequency. Whatever it is, the value of a cell (i, j) of a
document is at most its activity times the largest |G_ij'| over the j' of j's bin: so the strongest of all relabellings
are among the cells of largest bound, and a document is gone through wholly only where the bound leaves it open.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.measures.pairs.activity import top

CELLS = 2_048


class BoundedCells:
    """The cells of some documents that can be among the strongest, for one head's weights."""

    def __init__(
        self,
        documents: Sequence[tuple[Int[Tensor, " _own"], Float[Tensor, "_own _own"]]],
        weight: Float[Tensor, "live live"],
        bins: Sequence[Int[Tensor, " _n"]],
    ) -> None:
        """documents: places of a document's features, and the activity of each pair. weight: what multiplies it, |G_ij|
        or nothing where a pair may not be on a list.
        """
        self._documents, self.weight = documents, weight
        self._n = len(weight)
        bin_of = torch.empty(self._n, dtype=torch.long, device=weight.device)
        largest = weight.new_empty(self._n, len(bins))
        for number, own in enumerate(bins):
            bin_of[own] = number
            largest[:, number] = weight[:, own].amax(1)
        i, j, activity, beyond = [], [], [], []
        for own, active in documents:
            bound = (active * largest[own][:, bin_of[own]]).flatten()
            cells = top(bound, CELLS)
            first = torch.cat([cells, cells.new_zeros(CELLS - len(cells))])
            i.append(own[first // len(own)])
            j.append(own[first % len(own)])
            value = active.flatten()[first]
            value[len(cells) :] = 0
            activity.append(value)
            beyond.append(bound[cells[-1]] if len(cells) == CELLS else bound.new_zeros(()))
        self._i, self._j, self._activity = torch.stack(i), torch.stack(j), torch.stack(activity)
        # the same few pairs lead in most documents: their weights are looked up once
        self._pairs, self._at = torch.unique(self._i * self._n + self._j, return_inverse=True)
        self._beyond = torch.stack(beyond)
        """The bound of the last cell: none that is left out is above it."""

    def strongest(self, label: Int[Tensor, " live"], n: int) -> list[Int[Tensor, "_n 2"]]:
        """Of every document its n strongest cells, strongest first, as places (query, key): the coupling of a key
        feature j is that of label[j].
        """
        q, k = self._pairs // self._n, self._pairs % self._n
        value = self._activity * self.weight.flatten()[q * self._n + label[k]][self._at]
        largest, at = value.topk(min(n, value.shape[1]), dim=1)
        pairs = torch.stack([self._i.gather(1, at), self._j.gather(1, at)], -1)
        found = list(pairs)
        for d in torch.nonzero(largest[:, -1] < self._beyond)[:, 0].tolist():
            own, active = self._documents[d]
            cells = top(active * self.weight[own][:, label[own]], n)
            found[d] = torch.stack([own[cells // len(own)], own[cells % len(own)]], 1)
        return found
