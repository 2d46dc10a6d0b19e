"""Q11: whether the list of a head's top channels comes up again in other documents.

The list is chosen on the selection documents. Of every measured document, whose source is in no selection document, the
channels of the list that are live in it are held against as many of the document's own strongest: one Jaccard index a
source. (Overlaps of the lists of two halves of the documents grow to 1 with their number, whatever the head.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.errors import CannotLoad
from fra.measures.pairs.activity import OnText, PairSelection, top
from fra.measures.pairs.designs import Stability
from fra.measures.pairs.layers import MEASURED, SELECTION, PairLayer, PairLayers
from fra.measures.pairs.relabelling import BoundedCells
from fra.search.nulls import draw_atoms, random_atoms
from fra.statistics.stats import seed_of
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Column, Drawn, Sampled, decide, means_of
from fra.verdicts.standing import standing

JACCARD, LOOSE, ATOMS, RANK = (
    "Jaccard of the list",
    "over no minimum",
    "over random atoms",
    "rank among relabelled features",
)
_LISTED = 10
"""Channels that a row lists."""


class Lists:
    """Every head's list, by places among a selection's features, and what may be on it."""

    def __init__(self, selection: PairSelection, heads: Sequence[int], least: int, n: int) -> None:
        """least: selection documents in which a pair must be jointly live."""
        self.selection, self.couplings = selection, [selection.couplings(head) for head in heads]
        products, count, documents = selection.tables
        self.may: Bool[Tensor, "live live"] = documents >= least
        mean = torch.where(self.may, (products / count.clamp(min=1)).abs(), -torch.inf)
        self.pairs: list[Int[Tensor, "n 2"]] = []
        """Of each head, strongest first."""
        for U, V in self.couplings:
            value = mean * (U @ V.T).abs()
            best = top(value.nan_to_num(nan=-torch.inf), n)  # a coupling of nought times -inf
            best = best[value.flatten()[best] > -torch.inf]
            self.pairs.append(torch.stack([best // len(selection.live), best % len(selection.live)], 1))


def jaccard(a: set[int], b: set[int]) -> float:
    """Of two sets, not both empty."""
    return len(a & b) / len(a | b)


def listed_in(pairs: Int[Tensor, "n 2"], own: Int[Tensor, " own"], mean: Float[Tensor, "own own"], n: int) -> Tensor:
    """[m, 2] of the pairs, given by places among n features, those that meet in a document, by places in it.

    own: places of the document's features. mean: their mean products, 0 where they never meet.
    """
    on = torch.full((n,), -1, device=own.device)
    on[own] = torch.arange(len(own), device=own.device)
    at = on[pairs]
    at = at[(at >= 0).all(1)]
    met: Tensor = at[mean[at[:, 0], at[:, 1]] != 0]
    return met


def jaccards(on: OnText, lists: Sequence[Lists]) -> list[Float[np.ndarray, "n_documents n_heads"]]:
    """Of every document of `on` with every head's list, for each of several kinds of lists that are of one selection:
    the Jaccard index of the list's channels that meet in the document with as many of the document's strongest by mean
    |F| while live; NaN where none of the list meets.
    """
    n_heads = len(lists[0].couplings)
    found = [np.full((len(on.texts), n_heads), np.nan) for _ in lists]
    for d in range(len(on.texts)):
        m = on.meetings(d)
        mean = m.mean.abs()
        may = [kind.may[m.own][:, m.own] for kind in lists]
        for head, (U, V) in enumerate(lists[0].couplings):
            value = mean * (U[m.own] @ V[m.own].T).abs()
            for table, kind, allowed in zip(found, lists, may, strict=True):
                at = listed_in(kind.pairs[head], m.own, mean, len(U))
                if len(at):
                    strongest = top(value * allowed, len(at))
                    table[d, head] = jaccard(set((at[:, 0] * len(m.own) + at[:, 1]).tolist()), set(strongest.tolist()))
    return found


@dataclass(frozen=True)
class ListsAgain:
    """How lists come up again in the measured documents; NaN where none of a list meets."""

    own: Float[np.ndarray, "n_documents n_heads"]
    loose: Float[np.ndarray, "n_documents n_heads"]
    """The same where a feature or a pair may be chosen that is live in a single document."""
    lists: Lists


def lists_again(layer: PairLayer, design: Stability) -> ListsAgain:
    """Of every head. Raises CannotLoad where channels cannot be ranked."""
    if layer.no_one_coupling is not None:
        raise CannotLoad(layer.no_one_coupling)
    if isinstance(layer.every, str):
        raise CannotLoad(f"a control of stability: {layer.every}")
    kinds = [
        Lists(layer.every, range(layer.n_heads), least, design.strongest) for least in (layer.design.together_in, 1)
    ]
    own, loose = jaccards(layer.seen(layer.every), kinds)
    return ListsAgain(own, loose, kinds[0])


def parts_of(layer: PairLayer, n: int) -> Int[np.ndarray, " n_documents"]:
    """The dictionary of random atoms of every measured document: sources are dealt out evenly."""
    names, source = np.unique(np.asarray(layer.sources), return_inverse=True)
    return np.asarray((layer.rng("stability", "parts").permutation(len(names)) % n)[source])


def of_dictionary(layer: PairLayer, design: Stability, k: int, heads: Sequence[int], which: np.ndarray) -> np.ndarray:
    """[n_documents, n_heads] Jaccard indices of chosen measured documents with the k-th dictionary of random atoms for
    features, its lists chosen in the same way; NaN elsewhere, and everywhere where too few pairs are jointly live.
    """
    decoder = layer.arms[MEASURED].codes.decoder
    generator = torch.Generator().manual_seed(seed_of(*layer.seed_parts, "stability", f"atoms {k}"))
    atoms = draw_atoms(len(decoder), generator, decoder)
    ends = {name: torch.tensor(layer.texts[name].lengths, device=decoder.device) for name in layer.arms}
    ends[MEASURED] = ends[MEASURED] * torch.from_numpy(which).to(decoder.device)
    arms = {name: random_atoms(arm, atoms, ends[name]) for name, arm in layer.arms.items()}
    # pairs that are jointly live in so many documents are of features that are live in as many
    selection = PairSelection.of(arms[SELECTION], layer.texts[SELECTION], layer.design, layer.design.together_in)
    if selection.too_few is not None:
        return np.full((len(which), len(heads)), np.nan)
    lists = Lists(selection, heads, layer.design.together_in, design.strongest)
    (found,) = jaccards(OnText(arms[MEASURED], layer.texts[MEASURED], selection.live), [lists])
    return found


def of_random_atoms(layer: PairLayer, design: Stability, heads: Sequence[int]) -> Float[np.ndarray, "n_documents n"]:
    """Of some heads in every measured document, each with the dictionary of its part: the scatter of dictionaries is
    part of the spread over sources.
    """
    parts = parts_of(layer, design.dictionaries)
    found = np.full((len(parts), len(heads)), np.nan)
    for k in range(design.dictionaries):
        which = parts == k
        found[which] = of_dictionary(layer, design, k, heads, which)[which]
    return found


class ListRelabellings:
    """A head's mean Jaccard index over some measured documents, whose key features are relabelled."""

    def __init__(self, layer: PairLayer, head: int, design: Stability, lists: Lists) -> None:
        self._layer, self._head, self._design, self._pairs = layer, head, design, lists.pairs[head]
        self._selection, on = lists.selection, layer.seen(lists.selection)
        self._met = [(m.own, m.mean.abs()) for m in (on.meetings(d) for d in layer.some(design.ranked))]
        U, V = lists.couplings[head]
        self._cells = BoundedCells(self._met, (U @ V.T).abs() * lists.may, self._selection.bins(design.bin_size))

    def jaccard(self, label: Int[Tensor, " live"]) -> float:
        """Under one relabelling: a document's key feature j is taken for label[j]."""
        n, found = len(label), []
        pairs = torch.stack([self._pairs[:, 0], label.argsort()[self._pairs[:, 1]]], 1)
        strongest = self._cells.strongest(label, self._design.strongest)
        for (own, mean), best in zip(self._met, strongest, strict=True):
            at = listed_in(pairs, own, mean, n)
            if len(at):
                listed, several = own[at[:, 0]] * n + own[at[:, 1]], best[: len(at), 0] * n + best[: len(at), 1]
                found.append(jaccard(set(listed.tolist()), set(several.tolist())))
        return float(np.mean(found)) if found else float("nan")

    def draw(self, k: int) -> float:
        """The k-th."""
        rng = self._layer.rng("stability", f"head {self._head}", f"draw {k}")
        return self.jaccard(self._selection.relabelled(rng, self._design.bin_size))


@torch.no_grad()
def stability(claim: Claim, layers: PairLayers) -> dict[str, Evidence]:
    """Evidence for every head of a layer that can be measured. Random atoms are drawn only for heads that pass the
    other conditions that documents decide.
    """
    design = claim.designed(Stability)
    measured, found = layers.each(claim, lambda layer: lists_again(layer, design))
    if not measured:
        return found
    heads = {f"L{layer}H{h}": (again, h) for layer, again in measured.items() for h in range(layers.n_heads)}

    def sampled(name: str, values: Mapping[str, np.ndarray], reach: float) -> Sampled:
        samples = {}
        for h, own in values.items():
            live = np.isfinite(own)
            sums, counts = np.where(live, own, 0.0), live.astype(float)
            samples[h] = means_of(claim, layers.target.name, h, name, sums, counts, layers.of(h).sources)
        return Sampled(name=name, samples=samples, bounded=(reach, 1.0))

    own = {name: again.own[:, h] for name, (again, h) in heads.items()}
    some = {h: own[h][layers.of(h).some(design.ranked)] for h in heads}
    ranked = {h: float(np.nanmean(values)) if np.isfinite(values).any() else np.nan for h, values in some.items()}
    samples: list[Column] = [
        sampled(JACCARD, own, 0.0),
        sampled(LOOSE, {name: own[name] - again.loose[:, h] for name, (again, h) in heads.items()}, -1.0),
    ]
    left = standing(claim, samples)
    atoms: dict[str, np.ndarray] = {}
    for number in sorted({int(h[1:].split("H")[0]) for h in left}):
        names = [h for h in left if int(h[1:].split("H")[0]) == number]
        found_there = of_random_atoms(layers.of(names[0]), design, [heads[h][1] for h in names])
        atoms |= dict(zip(names, found_there.T, strict=True))

    @lru_cache(maxsize=1)
    def relabellings(name: str) -> ListRelabellings:
        again, h = heads[name]
        return ListRelabellings(layers.of(name), h, design, again.lists)

    columns = [
        *samples,
        sampled(ATOMS, {h: own[h] - values for h, values in atoms.items()}, -1.0),
        Drawn(observed={RANK: ranked}, draw=lambda name, k: {RANK: relabellings(name).draw(k)}),
    ]

    def detail(name: str) -> dict[str, Any]:
        again, h = heads[name]
        listed = again.lists.selection.live[again.lists.pairs[h][:_LISTED]].tolist()
        said = {
            "strongest of the list (query feature, key feature)": listed,
            "Jaccard without a minimum": float(np.nanmean(again.loose[:, h])),
            "Jaccard of random atoms": float(np.nanmean(atoms[name])) if name in atoms else None,
        } | ({"draws of the control": design.dictionaries} if name in atoms else {})
        return (layers.picture(name, listed[0]) if listed else {}) | said

    return found | decide(claim, columns, {h: Beside(candidates=("list",), detail=detail(h)) for h in heads})
