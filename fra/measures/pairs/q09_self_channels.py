"""Q09: how many of a document's strongest channels read a feature by itself (i = j).

Every measured document gives one number a head: the share of i = j among its fifty channels of largest sum |F_ij(t,s)|
over t > s, so that the statistic is a mean over sources and no list of the whole corpus, which one register can fill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.errors import CannotLoad
from fra.measures.pairs.activity import top
from fra.measures.pairs.designs import SelfChannels
from fra.measures.pairs.layers import PairLayer, PairLayers
from fra.measures.pairs.relabelling import BoundedCells
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Column, Drawn, Sampled, decide, means_of

ABOVE, COACTIVE, RANK = "share above relabelled features", "over co-activation alone", "rank among relabelled features"
_LISTED = 10
"""Channels that a row lists."""


@dataclass(frozen=True)
class SelfShares:
    """Shares of i = j among a document's strongest channels."""

    own: Float[np.ndarray, "n_documents n_heads"]
    relabelled: Float[np.ndarray, "n_documents n_heads"]
    """Key features relabelled in the coupling alone, by a draw of its own for every document."""
    coactive: Float[np.ndarray, " n_documents"]
    """Among the pairs of largest sum a_i a_j, whatever the head."""
    listed: tuple[list[list[int]], ...]
    """Of every head, the strongest channels of the selection documents: for the reader."""


def share(places: Int[Tensor, " n"], own: int) -> float:
    """Of linear places among `own` features, how many are on the diagonal."""
    return float((places // own == places % own).double().mean())


def self_shares(layer: PairLayer, design: SelfChannels) -> SelfShares:
    """Of every measured document and head. Raises CannotLoad where channels cannot be ranked."""
    if layer.no_one_coupling is not None:
        raise CannotLoad(layer.no_one_coupling)
    selection, on, heads = layer.selection, layer.on, range(layer.n_heads)
    couplings = [selection.couplings(head) for head in heads]
    own, relabelled = (np.zeros((len(on.texts), len(heads))) for _ in range(2))
    coactive = np.zeros(len(on.texts))
    for d in range(len(on.texts)):
        m = on.meetings(d)
        label = selection.relabelled(layer.rng("self", f"labels of document {d}"), design.bin_size)[m.own]
        products = m.products.abs()
        coactive[d] = share(top(products, design.strongest), len(m.own))
        for head, (U, V) in enumerate(couplings):
            q = U[m.own]
            for table, keys in ((own, m.own), (relabelled, label)):
                strongest = top(products * (q @ V[keys].T).abs(), design.strongest)
                table[d, head] = share(strongest, len(m.own))
    often = torch.where(selection.tables[2] >= layer.design.together_in, selection.tables[0].abs(), 0.0)
    listed = tuple(layer.ids(top(often * (U @ V.T).abs(), _LISTED)) for U, V in couplings)
    return SelfShares(own, relabelled, coactive, listed)


class SelfRelabellings:
    """A head's mean share over some measured documents, with key features relabelled once for all of them."""

    def __init__(self, layer: PairLayer, head: int, design: SelfChannels) -> None:
        self._layer, self._head, self._design = layer, head, design
        U, V = layer.selection.couplings(head)
        met = [layer.on.meetings(d) for d in layer.some(design.ranked)]
        documents = [(m.own, m.products.abs()) for m in met]
        self._cells = BoundedCells(documents, (U @ V.T).abs(), layer.selection.bins(design.bin_size))

    def share(self, label: Int[Tensor, " live"]) -> float:
        """Under one relabelling."""
        strongest = self._cells.strongest(label, self._design.strongest)
        return float(np.mean([float((own[:, 0] == own[:, 1]).double().mean()) for own in strongest]))

    def draw(self, k: int) -> float:
        """The k-th."""
        rng = self._layer.rng("self", f"head {self._head}", f"draw {k}")
        return self.share(self._layer.selection.relabelled(rng, self._design.bin_size))


@torch.no_grad()
def self_channels(claim: Claim, layers: PairLayers) -> dict[str, Evidence]:
    """Evidence for every head of a layer that can be measured."""
    design = claim.designed(SelfChannels)
    measured, found = layers.each(claim, lambda layer: self_shares(layer, design))
    if not measured:
        return found
    heads = {f"L{layer}H{h}": (shares, h) for layer, shares in measured.items() for h in range(layers.n_heads)}

    def sampled(name: str, differences: Mapping[str, np.ndarray]) -> Sampled:
        samples = {
            h: means_of(claim, layers.target.name, h, name, values, None, layers.of(h).sources)
            for h, values in differences.items()
        }
        return Sampled(name=name, samples=samples, bounded=(-1.0, 1.0))

    @lru_cache(maxsize=1)
    def relabellings(name: str) -> SelfRelabellings:
        return SelfRelabellings(layers.of(name), heads[name][1], design)

    means = {name: float(shares.own[:, h].mean()) for name, (shares, h) in heads.items()}
    ranked = {h: float(s.own[layers.of(h).some(design.ranked), k].mean()) for h, (s, k) in heads.items()}
    columns: list[Column] = [
        sampled(ABOVE, {name: shares.own[:, h] - shares.relabelled[:, h] for name, (shares, h) in heads.items()}),
        sampled(COACTIVE, {name: shares.own[:, h] - shares.coactive for name, (shares, h) in heads.items()}),
        Drawn(observed={RANK: ranked}, draw=lambda name, k: {RANK: relabellings(name).draw(k)}),
    ]

    def detail(name: str) -> dict[str, Any]:
        shares, h = heads[name]
        return layers.picture(name, shares.listed[h][0]) | {
            f"share of self channels among a document's {design.strongest}": means[name],
            "with relabelled features": float(shares.relabelled[:, h].mean()),
            "draws of the control": len(shares.relabelled),
            "by co-activation alone": float(shares.coactive.mean()),
            "strongest of the selection documents (query feature, key feature)": shares.listed[h],
        }

    return found | decide(claim, columns, {h: Beside(candidates=("pairs",), detail=detail(h)) for h in heads})
