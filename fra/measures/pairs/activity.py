"""Joint activity of pairs of features on natural documents: the part of a channel that all heads of a layer share.

Without rotary positions F_ij(t,s) = a_i(t) a_j(s) G_ij. What is summed here are the first two factors and how often
both are live, over t > s (at t = s features occur together because decoders overlap), the first position left out (it
is the same token in every document, so that a channel on it would be stable by construction). Documents of one source
are one cluster, and every table is kept for two halves of the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.core.coded import Arm
from fra.errors import CannotLoad
from fra.verdicts.stats import seed_of

FLOOR = 10
"""Documents of a half in which a pair must be jointly live, where there is a minimum."""
FEWEST = 100
"""Pairs that must be jointly live in enough documents, or there is nothing to choose fifty from."""
TABLE_CELLS = 2**27


def halves(sources: Sequence[str], seed_parts: Sequence[str]) -> Bool[np.ndarray, " n_documents"]:
    """Which documents are in the first half: half of the sources, drawn at random. Raises CannotLoad for one source."""
    names = np.unique(np.asarray(sources))
    if len(names) < 2:
        raise CannotLoad("all documents are of one source: there are no halves to compare")
    drawn = np.random.default_rng(seed_of(*seed_parts, "halves")).permutation(names)[: len(names) // 2]
    return np.isin(np.asarray(sources), drawn)


@dataclass
class PairTables:
    """Sums over documents, [2 halves, live, live] each, query feature first."""

    products: Float[Tensor, "2 live live"]
    """Sum over t > s of a_i(t) a_j(s)."""
    count: Float[Tensor, "2 live live"]
    """Pairs of positions t > s at which both are live."""
    documents: Float[Tensor, "2 live live"]
    """Documents with such a pair."""


class Activity:
    """One layer's codes on documents, and the tables of its pairs."""

    def __init__(
        self,
        arm: Arm,
        lengths: Sequence[int],
        sources: Sequence[str],
        first: Bool[np.ndarray, " n"],
        floor: int = FLOOR,
    ) -> None:
        """`lengths`: of each document, padding left out. floor: documents in which a feature must be live.

        Raises CannotLoad for more live features than a table holds.
        """
        self.arm, self.lengths, self.first = arm, lengths, first
        self.names, self.source = np.unique(np.asarray(sources), return_inverse=True)
        codes = arm.codes
        batch, pos = codes.shape
        doc, at = codes.row // pos, codes.row % pos
        inside = (at > 0) & (at < torch.tensor(lengths, device=at.device)[doc])
        seen = torch.unique(codes.feature[inside] * batch + doc[inside]) // batch
        ids, times = torch.unique_consecutive(seen, return_counts=True)
        self.live: Int[Tensor, " live"] = ids[times >= floor]  # a pair in so many documents has features in as many
        if len(self.live) ** 2 > TABLE_CELLS:
            most = int(TABLE_CELLS**0.5)
            raise CannotLoad(f"{len(self.live)} live features make too large a table of pairs ({most} would fit)")
        self._entry = inside & torch.isin(codes.feature, self.live)

    def _entries(self, d: int) -> tuple[Tensor, Tensor, Tensor]:
        """Position, place among `live`, and coefficient of a document's entries."""
        codes, pos = self.arm.codes, self.arm.codes.shape[1]
        ends = torch.tensor([d * pos, (d + 1) * pos], device=codes.row.device)
        low, high = torch.searchsorted(codes.row, ends).tolist()
        kept = self._entry[low:high]
        row = codes.row[low:high][kept]
        value = codes.value[low:high][kept] / self.arm.frozen.sigma.flatten()[row]
        return row - d * pos, torch.searchsorted(self.live, codes.feature[low:high][kept]), value

    def document(self, d: int) -> tuple[Int[Tensor, " own"], Float[Tensor, "pos own"]]:
        """Places (among `live`) of the features of a document, and their coefficients at every position."""
        row, place, value = self._entries(d)
        own, column = torch.unique(place, return_inverse=True)
        dense = value.new_zeros(self.arm.codes.shape[1], len(own))
        dense[row, column] = value
        return own, dense

    @cached_property
    def tables(self) -> PairTables:
        """Summed over the documents of each half."""
        n, pos = len(self.live), self.arm.codes.shape[1]
        found = torch.zeros(3, 2, n, n, device=self.live.device)
        for half, which in enumerate((self.first, ~self.first)):
            stacked = torch.zeros(4, int(which.sum()), pos, n, device=self.live.device)
            for k, d in enumerate(np.flatnonzero(which).tolist()):
                row, place, value = self._entries(d)
                stacked[0, k, row, place], stacked[2, k, row, place] = value.float(), 1.0
                # somewhere j stands before i exactly where its first place is before i's last
                last = torch.full((n,), -1, device=row.device).scatter_reduce_(0, place, row, "amax")
                first = torch.full((n,), pos, device=row.device).scatter_reduce_(0, place, row, "amin")
                found[2, half] += first < last[:, None]
            for part in (0, 2):
                torch.sub(stacked[part].cumsum(1), stacked[part], out=stacked[part + 1])
            rows = stacked.flatten(1, 2)
            found[0, half], found[1, half] = rows[0].T @ rows[1], rows[2].T @ rows[3]
        return PairTables(*found)

    def too_few(self, of_each_half: bool = False) -> str | None:
        """Why so few pairs are jointly live in 20 documents (or in 10 of each half) that none can be chosen, in a
        sentence; None where there are enough.
        """
        documents = self.tables.documents
        if of_each_half:
            n, where = int((documents >= FLOOR).flatten(1).sum(1).min()), f"{FLOOR} documents of either half"
        else:
            n, where = int((documents.sum(0) >= 2 * FLOOR).sum()), f"{2 * FLOOR} documents"
        if n >= FEWEST:
            return None
        return f"only {n} pairs of features of layer {self.arm.frozen.layer} are jointly live in {where}: add text"

    def by_source(self, pairs: Int[Tensor, " n"]) -> Float[np.ndarray, "3 n_sources n"]:
        """Products, counts and documents of chosen pairs (linear in the places of `live`), by source."""
        n = len(self.live)
        out = np.zeros((3, len(self.names), len(pairs)))
        i, j = pairs // n, pairs % n
        place = torch.full((n + 1,), -1, device=pairs.device)
        for d, source in enumerate(self.source.tolist()):
            own, dense = self.document(d)
            place.fill_(-1)
            place[own] = torch.arange(len(own), device=pairs.device)
            both = torch.nonzero((place[i] >= 0) & (place[j] >= 0))[:, 0]
            before = dense.cumsum(0) - dense
            live = (dense != 0).to(dense)
            left, right = place[i[both]], place[j[both]]
            products = (dense.T[left] * before.T[right]).sum(1)
            count = (live.T[left] * (live.cumsum(0) - live).T[right]).sum(1)
            kept = both.cpu().numpy()
            for k, part in enumerate((products, count, (count > 0).to(count))):
                out[k, source, kept] += part.double().cpu().numpy()
        return out

    def couplings(self, head: int) -> Float[Tensor, "live live"]:
        """|G_ij| of the live features."""
        U, V = self.arm.couplings(head)
        return (U[self.live] @ V[self.live].T).abs()

    def shuffled(self, rng: np.random.Generator, bin_size: int = 64) -> Int[Tensor, " live"]:
        """A random relabelling of the live features among those of like frequency (bins of 64)."""
        frequency = torch.bincount(self.arm.codes.feature[self._entry], minlength=len(self.arm.codes.decoder))[
            self.live
        ]
        order = frequency.argsort(stable=True)
        turned = order.clone()
        for start in range(0, len(order), bin_size):
            part = order[start : start + bin_size]
            turned[start : start + bin_size] = part[torch.from_numpy(rng.permutation(len(part))).to(part.device)]
        relabelled = torch.empty_like(order)
        relabelled[order] = turned
        return relabelled


Values = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(products, counts, documents) of pairs to their rank value without the coupling; -inf where they have none."""


def mean_while_live(floor: int) -> Values:
    """Products over counts, for pairs jointly live in at least `floor` documents."""

    def value(products: np.ndarray, count: np.ndarray, documents: np.ndarray) -> np.ndarray:
        return np.where(documents >= max(1, floor), products / np.maximum(count, 1), -np.inf)

    return value


def summed(floor: int) -> Values:
    """Products, for pairs jointly live in at least `floor` documents."""

    def value(products: np.ndarray, count: np.ndarray, documents: np.ndarray) -> np.ndarray:
        return np.where(documents >= max(1, floor), products, -np.inf)

    return value
