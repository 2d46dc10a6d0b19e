"""How much of a head's scores the features of a dictionary carry, all of them or the strongest of each position.

Yardstick: R2 over causal entries after centring every row over its keys, since softmax ignores what is constant along
a row (and a constant would score on anything that is not centred). Scores are those before softcap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.core.frozen import FrozenLayer, Side
from fra.core.threads import each
from fra.dictionaries.codes import Codes, decoded
from fra.measures.scores.designs import Truncation
from fra.measures.scores.layer import ATOMS, FEATURES, SHUFFLED, TOKENS, CarriedLayer
from fra.verdicts.samples import ByDocument


@dataclass(frozen=True)
class Fit:
    """Sums over the entries of each document: of the squared centred scores, of their product with what is fitted to
    them, and of the square of that.
    """

    total: Float[np.ndarray, " n_docs"]
    cross: Float[np.ndarray, " n_docs"]
    square: Float[np.ndarray, " n_docs"]

    @property
    def explained(self) -> Float[np.ndarray, " n_docs"]:
        """total less squared error: over `total`, R2."""
        return np.asarray(2 * self.cross - self.square)

    @property
    def explained_at_best(self) -> Float[np.ndarray, " n_docs"]:
        """The same under the best slope of each document: what a control is given, and a claim is not."""
        return np.asarray(np.divide(self.cross**2, self.square, out=np.zeros_like(self.square), where=self.square > 0))

    def r2(self, *, best: bool = False) -> float:
        """R2 over all documents."""
        return float((self.explained_at_best if best else self.explained).sum() / self.total.sum())


def carried_part(given: Codes, keep: Bool[Tensor, " n"] | None = None) -> Float[Tensor, "docs pos d_model"]:
    """What the features (only entries that are kept) bring to x; no bias, no error."""
    row, feature, value = given.row, given.feature, given.value
    if keep is not None:
        row, feature, value = row[keep], feature[keep], value[keep]
    docs, pos = given.shape
    return decoded(row, feature, value, given.decoder, docs * pos).view_as(given.bias)


def rank_within_position(given: Codes, strength: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Rank of each entry among those of its position, 0 the strongest."""
    by_strength = strength.argsort(descending=True, stable=True)
    order = by_strength[given.row[by_strength].argsort(stable=True)]
    first = torch.searchsorted(given.row, given.row)  # entries are sorted by row
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank - first


def strongest(given: Codes) -> Int[Tensor, " n"]:
    """Rank of each entry by the length of what it adds to x."""
    return rank_within_position(given, given.value.abs() * given.decoder.norm(dim=-1)[given.feature])


def part_scores(frozen: FrozenLayer, head: int, part: Float[Tensor, "docs pos d_model"]) -> Float[Tensor, "docs q k"]:
    """Scores of a head if only this part of x stood at query and key: no bias of the head or of the norm."""
    docs, pos, _ = part.shape
    rows = torch.arange(docs * pos, device=part.device)
    sides: list[Side] = ["query", "key"]
    q, k = (
        frozen.place(side, head, part.flatten(0, 1) @ frozen.weights(side, head)[0], rows).view(docs, pos, -1)
        for side in sides
    )
    return frozen.scale * q @ k.mT


def real_entries(frozen: FrozenLayer, lengths: Sequence[int]) -> Bool[Tensor, "docs q k"]:
    """Where a real row may attend."""
    pos = torch.arange(frozen.x.shape[1], device=frozen.x.device)
    return frozen.mask & (pos < torch.tensor(lengths, device=pos.device)[:, None])[:, :, None]


def centred(scores: Float[Tensor, "docs q k"], real: Bool[Tensor, "docs q k"]) -> Float[Tensor, "docs q k"]:
    """Scores less the mean of their row over real keys; zero elsewhere."""
    kept = scores.masked_fill(~real, 0.0)
    mean = kept.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
    return (kept - mean).masked_fill_(~real, 0.0)


def fits(
    frozen: FrozenLayer,
    head: int,
    parts: Mapping[str, Float[Tensor, "docs pos d_model"]],
    real: Bool[Tensor, "docs q k"],
) -> dict[str, Fit]:
    """How the scores of each part fit the head's own (pre-softcap), by document."""

    def sums(a: Tensor, b: Tensor) -> np.ndarray:
        return np.asarray(torch.linalg.vecdot(a.flatten(1), b.flatten(1)).double().cpu())

    truth = centred(frozen.scores(head), real)
    total = sums(truth, truth)
    found = {}
    for name, part in parts.items():
        own = centred(part_scores(frozen, head, part), real)
        found[name] = Fit(total, sums(truth, own), sums(own, own))
    return found


@torch.no_grad()
def carrying(layer: CarriedLayer) -> dict[str, ByDocument]:
    """Q02 at every head of a layer: R2 of the feature-feature block, and its lead over random atoms and a shuffled
    decoder, each under its own best slope. Both are drawn for every document anew, so that the scatter over draws is
    part of the spread over documents.
    """
    frozen, texts = layer.frozen, layer.sets.measured
    parts = {name: carried_part(layer.codes(name)) for name in (FEATURES, SHUFFLED, TOKENS)}
    parts[ATOMS] = layer.carried_by_atoms
    real = real_entries(frozen, texts.lengths)
    off_first = real.clone()
    off_first[:, :, 0] = False

    def measure(head: int) -> ByDocument:
        found = fits(frozen, head, parts, real)
        own = found[FEATURES]
        sums = {"R2": own.explained}
        for control in (ATOMS, SHUFFLED):
            sums[f"over {control}"] = own.explained - found[control].explained_at_best
        without = fits(frozen, head, {FEATURES: parts[FEATURES]}, off_first)[FEATURES]
        detail = {
            "R2 without the first key": without.r2(),
            "R2 with its best slope": own.r2(best=True),
            **{f"R2 of {name} (best slope)": found[name].r2(best=True) for name in (ATOMS, SHUFFLED, TOKENS)},
            "draws of random atoms and of the shuffle, one a document": len(texts),
            "live features a position": layer.mean_l0,
        }
        return ByDocument(sums, dict.fromkeys(sums, own.total), texts.sources, detail=detail)

    heads = list(layer.heads)
    return dict(zip(_names(layer), each(measure, heads, frozen.x.device), strict=True))


@torch.no_grad()
def truncation(layer: CarriedLayer, design: Truncation, gate: float) -> dict[str, ByDocument]:
    """Q14 at every head of a layer: R2 lost when only the k strongest features of each position are kept, k a share of
    the dictionary's mean L0 on selection documents, and the lead over k of them at random under their best slope. Which
    are kept at random is drawn for every document anew.

    gate: heads whose scores all features together explain less well are undecided.
    """
    frozen, texts, own = layer.frozen, layer.sets.measured, layer.codes(FEATURES)
    kept_number = max(1, round(design.kept * layer.mean_l0))
    rank = strongest(own)
    curve = sorted({*(k for k in design.curve if k < layer.mean_l0), kept_number})
    parts = {
        "all": carried_part(own),
        "random": carried_part(own, rank_within_position(own, chances(layer)) < kept_number),
    }
    parts |= {str(k): carried_part(own, rank < k) for k in curve}
    real = real_entries(frozen, texts.lengths)

    def measure(head: int) -> ByDocument:
        found = fits(frozen, head, parts, real)
        kept, every = found[str(kept_number)], found["all"]
        sums = {
            "loss of R2": every.explained - kept.explained,
            "over random k": kept.explained - found["random"].explained_at_best,
        }
        detail = {
            "k": kept_number,
            "R2 of all features": every.r2(),
            "R2(k)": {k: found[str(k)].r2() for k in curve},
            "R2 of random k": found["random"].r2(),
            "draws of random k, one a document": len(texts),
        }
        undecided = None
        if not every.r2() >= gate:
            undecided = f"all features together explain {every.r2():.2f} of the scores, where {gate} is needed"
        return ByDocument(sums, dict.fromkeys(sums, every.total), texts.sources, undecided, detail)

    return dict(zip(_names(layer), each(measure, list(layer.heads), frozen.x.device), strict=True))


def chances(layer: CarriedLayer) -> Float[Tensor, " n"]:
    """A random number for every entry of the features' codes, from a draw of its own for each document."""
    own = layer.codes(FEATURES)
    docs, pos = own.shape
    counts = torch.bincount(own.row // pos, minlength=docs).tolist()
    drawn = [torch.rand(n, generator=layer.generator("truncation", str(doc))) for doc, n in enumerate(counts)]
    return torch.cat(drawn).to(own.value)


def _names(layer: CarriedLayer) -> list[str]:
    return [f"L{layer.layer}H{head}" for head in layer.heads]
