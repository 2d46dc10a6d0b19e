"""Joint activity of pairs of features on natural documents: the part of a channel that all heads of a layer share.

Without rotary positions F_ij(t,s) = a_i(t) a_j(s) G_ij. What is summed here are the first two factors and how often
both are live, over t > s (at t = s features occur together because decoders overlap), the first position left out (it
is the same token in every document, so that a channel on it would be stable by construction).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.coded import Arm
from fra.errors import CannotLoad
from fra.measures.pairs.designs import PairTexts
from fra.stimuli.padding import Texts

TABLE_CELLS = 2**27
_SAMPLED_CELLS = 2**14


@dataclass(frozen=True)
class PairMeetings:
    """Where the features of one document meet, query feature first."""

    own: Int[Tensor, " own"]
    """Places of its features among those looked at."""
    products: Float[Tensor, "own own"]
    """Sum over t > s of a_i(t) a_j(s)."""
    count: Float[Tensor, "own own"]
    """Pairs of positions t > s at which both are live."""

    @cached_property
    def mean(self) -> Float[Tensor, "own own"]:
        """Mean product while both are live; 0 where they never are."""
        return self.products / self.count.clamp(min=1)


class OnText:
    """One layer's codes on documents, of chosen features."""

    def __init__(self, arm: Arm, texts: Texts, live: Int[Tensor, " live"]) -> None:
        self.arm, self.texts, self.live = arm, texts, live
        codes = arm.codes
        batch, pos = codes.shape
        doc, at = codes.row // pos, codes.row % pos
        inside = (at > 0) & (at < torch.tensor(texts.lengths, device=at.device)[doc])
        kept = torch.nonzero(inside & torch.isin(codes.feature, live))[:, 0]
        self._at = at[kept]
        self.place: Int[Tensor, " n"] = torch.searchsorted(live, codes.feature[kept])
        """Of every entry, its feature among `live`."""
        self._value = codes.value[kept] / arm.frozen.sigma.flatten()[codes.row[kept]]
        self._start = torch.searchsorted(doc[kept], torch.arange(batch + 1, device=doc.device)).tolist()

    def entries(self, d: int) -> tuple[Tensor, Tensor, Tensor]:
        """Position, place among `live`, and coefficient of a document's entries."""
        own = slice(*self._start[d : d + 2])
        return self._at[own], self.place[own], self._value[own]

    def document(self, d: int) -> tuple[Int[Tensor, " own"], Float[Tensor, "pos own"]]:
        """Places (among `live`) of the features of a document, and their coefficients at every position."""
        row, place, value = self.entries(d)
        own, column = torch.unique(place, return_inverse=True)
        dense = value.new_zeros(self.arm.codes.shape[1], len(own))
        dense[row, column] = value
        return own, dense

    def meetings(self, d: int) -> PairMeetings:
        """Of a document's features, over t > s."""
        own, dense = self.document(d)
        live = (dense != 0).to(dense)
        return PairMeetings(own, dense.T @ (dense.cumsum(0) - dense), live.T @ (live.cumsum(0) - live))


def live_features(arm: Arm, texts: Texts, least: int) -> Int[Tensor, " live"]:
    """Features that are live in at least so many documents, the first position and padding left out."""
    codes = arm.codes
    batch, pos = codes.shape
    doc, at = codes.row // pos, codes.row % pos
    inside = (at > 0) & (at < torch.tensor(texts.lengths, device=at.device)[doc])
    seen = torch.unique(codes.feature[inside] * batch + doc[inside]) // batch
    ids, times = torch.unique_consecutive(seen, return_counts=True)
    kept: Tensor = ids[times >= least]
    return kept


class PairSelection:
    """What is chosen from: pairs of features on the selection documents, and nothing of any other document."""

    def __init__(self, on: OnText, design: PairTexts, tables: Float[Tensor, "3 live live"] | None = None) -> None:
        """tables: `tables`, where they are known."""
        self.on, self.arm, self.live, self.design = on, on.arm, on.live, design
        self._tables = tables

    @classmethod
    def of(cls, arm: Arm, texts: Texts, design: PairTexts, least: int) -> PairSelection:
        """Of features that are live in at least so many documents. Raises CannotLoad for more of them than a table
        holds.
        """
        live = live_features(arm, texts, least)
        if len(live) ** 2 > TABLE_CELLS:
            most = int(TABLE_CELLS**0.5)
            raise CannotLoad(f"{len(live)} live features make too large a table of pairs ({most} would fit)")
        return cls(OnText(arm, texts, live), design)

    def restricted(self, least: int) -> PairSelection:
        """The same documents, of features that are live in at least so many of them."""
        live = live_features(self.arm, self.on.texts, least)
        kept = torch.searchsorted(self.live, live)
        return PairSelection(OnText(self.arm, self.on.texts, live), self.design, self.tables[:, kept][:, :, kept])

    @property
    def tables(self) -> Float[Tensor, "3 live live"]:
        """Sums over the documents, query feature first: of a_i(t) a_j(s) over t > s; of pairs of positions t > s at
        which both are live; of documents with such a pair.
        """
        if self._tables is None:
            self._tables = self._summed()
        return self._tables

    def _summed(self) -> Float[Tensor, "3 live live"]:
        n, found = len(self.live), torch.zeros(3, len(self.live), len(self.live), device=self.live.device)
        pos, documents = self.arm.codes.shape[1], range(len(self.on.texts))
        for some in torch.split(torch.tensor(documents), max(1, TABLE_CELLS // (4 * pos * max(n, 1)))):
            stacked = torch.zeros(4, len(some), pos, n, device=self.live.device)
            for k, d in enumerate(some.tolist()):
                row, place, value = self.on.entries(d)
                stacked[0, k, row, place], stacked[2, k, row, place] = value.float(), 1.0
                # somewhere j stands before i exactly where its first place is before i's last
                last = torch.full((n,), -1, device=row.device).scatter_reduce_(0, place, row, "amax")
                first = torch.full((n,), pos, device=row.device).scatter_reduce_(0, place, row, "amin")
                found[2] += first < last[:, None]
            for part in (0, 2):
                torch.sub(stacked[part].cumsum(1), stacked[part], out=stacked[part + 1])
            rows = stacked.flatten(1, 2)
            found[0] += rows[0].T @ rows[1]
            found[1] += rows[2].T @ rows[3]
        return found

    @cached_property
    def frequency(self) -> Int[Tensor, " live"]:
        """Positions at which each feature is live."""
        return torch.bincount(self.on.place, minlength=len(self.live))

    @property
    def too_few(self) -> str | None:
        """Why so few pairs are jointly live in enough documents that none can be chosen, in a sentence; None where
        there are enough.
        """
        least = self.design.together_in
        n = int((self.tables[2] >= least).sum())
        if n >= self.design.fewest:
            return None
        layer = self.arm.frozen.layer
        return f"only {n} pairs of features of layer {layer} are jointly live in {least} documents: add text"

    def couplings(self, head: int) -> tuple[Float[Tensor, "live d_head"], Float[Tensor, "live d_head"]]:
        """U, V of the live features: G_ij = U_i . V_j."""
        U, V = self.arm.couplings(head)
        return U[self.live], V[self.live]

    def bins(self, size: int) -> list[Int[Tensor, " _n"]]:
        """Places of features of like frequency, so many together, the rarest first."""
        return list(torch.split(self.frequency.argsort(stable=True), size))

    def relabelled(self, rng: np.random.Generator, size: int) -> Int[Tensor, " live"]:
        """A random relabelling of the live features among those of like frequency: for each place, that of another."""
        label = torch.empty_like(self.live)
        for own in self.bins(size):
            label[own] = own[torch.from_numpy(rng.permutation(len(own))).to(own.device)]
        return label


def top(values: Float[Tensor, "*shape"], n: int) -> Int[Tensor, " n"]:
    """Linear places of the n largest, strongest first."""
    flat = values.flatten()
    n = min(n, len(flat))
    if n == 0:
        return torch.zeros(0, dtype=torch.long, device=flat.device)
    few = flat[:: max(1, len(flat) // _SAMPLED_CELLS)]
    floor = few.topk(n).values[-1] if len(few) >= n else flat.min()  # the n largest are not below
    places = torch.nonzero(flat >= floor)[:, 0]
    found: Tensor = places[flat[places].topk(n).indices]
    return found
