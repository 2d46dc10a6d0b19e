"""Channel masses of a head on one document: all of them, in blocks, and how few hold most.

The mass of a channel on a document is `sum A(t,s) |F~(t,s)|` with `F~(t,s) = F(t,s) - sum_u A(t,u) F(t,u)`, the gauge
that softmax does not see; A is the head's own pattern, F its term before softcap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.blocks import Side, by_slot, reduce_blocks, segments
from fra.core.frozen import FrozenLayer
from fra.dictionaries.codes import Codes
from fra.measures.scores.layer import DocumentEntries, entries

_BLOCK_CELLS = 1 << 18


@dataclass(frozen=True)
class LiveDocument:
    """What the masses of every head need of one document in one dictionary."""

    number: int
    length: int
    entries: DocumentEntries
    live: Int[Tensor, " live"]
    """Ids of the features that are live in the document, ascending."""
    slot: Int[Tensor, " n"]
    """Place of each entry's feature among them."""


def document(given: Codes, number: int, length: int) -> LiveDocument:
    """One document's entries, its live features numbered."""
    return numbered(entries(given, number, length), number, length)


def numbered(own: DocumentEntries, number: int, length: int) -> LiveDocument:
    """Entries of one document with its live features numbered."""
    live, slot = torch.unique(own.feature, return_inverse=True)
    return LiveDocument(number, length, own, live, slot)


def dense(doc: LiveDocument, value: Float[Tensor, " n"]) -> Float[Tensor, "live pos"]:
    """Values of entries as one row a live feature."""
    out = value.new_zeros(len(doc.live), doc.length)
    out[doc.slot, doc.entries.pos] = value
    return out


def coefficients(frozen: FrozenLayer, doc: LiveDocument, side: Any, head: int) -> Float[Tensor, " n"]:
    """What multiplies the coupling of two directions, for each entry."""
    rows = doc.entries.pos + doc.number * frozen.x.shape[1]
    return doc.entries.value * frozen.gain(side, head, rows)


def pattern(frozen: FrozenLayer, doc: LiveDocument, head: int) -> Float[Tensor, "pos pos"]:
    """The head's own pattern on the document, exactly zero where masked."""
    n = doc.length
    return frozen.pattern[doc.number, head, :n, :n].masked_fill(~frozen.mask[:n, :n], 0.0)


def spread(
    mean: Float[Tensor, "slots pos"],
    slot: Int[Tensor, " n"],
    value: Float[Tensor, " n"],
    at_key: Float[Tensor, "n pos"],
) -> Float[Tensor, "slots pos"]:
    """For each feature (of each document: a slot) and row: `sum_s A |a_s - mean|`, from the mean `sum_s A a_s`, the
    values of its entries, and the attention of every row to where these stand.

    Deviations cancel under A, so that twice the positive ones are all of them; only keys where the feature is live, and
    the rest of A where the mean is negative, can be positive.
    """
    positive = (value[:, None] - mean[slot]).clamp_(min=0).mul_(at_key)
    out = torch.zeros_like(mean).index_add_(0, slot, positive)
    if bool((mean < 0).any()):
        share = torch.zeros_like(mean).index_add_(0, slot, at_key)
        out += (1 - share).clamp_(min=0) * (-mean).clamp_(min=0)
    return 2 * out


def couplings(frozen: FrozenLayer, decoder: Tensor, head: int, ids: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """U, V with G_ij = U_i . V_j before rotation, of chosen features, the score's scale included."""
    directions = decoder[ids]
    return frozen.scale * directions @ frozen.W_q[head], directions @ frozen.W_k[head]


def mass_blocks(
    frozen: FrozenLayer, decoder: Tensor, doc: LiveDocument, head: int
) -> Iterator[Float[Tensor, "_some k_live"]]:
    """Mass of every channel of the document's live features, some query features after others: a block at a time stays
    in a core's cache.

    Without rotary positions `|G_ij| sum_t |a_i(t)| sum_s A(t,s) |a_j(s) - sum_u A(t,u) a_j(u)|`; with them from all
    terms, in one block.
    """
    U, V = couplings(frozen, decoder, head, doc.live)
    attention = pattern(frozen, doc, head)
    q, k = (coefficients(frozen, doc, side, head) for side in ("query", "key"))
    if frozen.rotary is not None:
        where = doc.entries.pos
        q_side, k_side = (
            Side(where, doc.slot, frozen.rotary.rotate(value[:, None] * vector[doc.slot], where), doc.length)
            for value, vector in ((q, U), (k, V))
        )
        yield reduce_blocks(q_side, k_side, ("mass",), attention)["mass"]
        return
    at_key = attention.mT.contiguous()[doc.entries.pos]
    around = spread(dense(doc, k) @ attention.mT, doc.slot, k, at_key).mT.contiguous()
    order, bounds = by_slot(doc.slot, len(doc.live))
    pos, size = doc.entries.pos[order], q.abs()[order]
    step = max(1, _BLOCK_CELLS // max(1, len(doc.live)))
    for start in range(0, len(doc.live), step):
        some = bounds[start : start + step + 1]
        own = slice(int(some[0]), int(some[-1]))
        # sum_t |a_i(t)| around_j(t): a feature is live at a few positions only.
        block = segments(around, pos[own], some - some[0], size[own])
        yield block.mul_((U[start : start + step] @ V.mT).abs_())


def masses(frozen: FrozenLayer, decoder: Tensor, doc: LiveDocument, head: int) -> Float[Tensor, "q_live k_live"]:
    """All blocks of `mass_blocks`."""
    return torch.cat(list(mass_blocks(frozen, decoder, doc, head)))


def live_channels(frozen: FrozenLayer, doc: LiveDocument) -> int:
    """Channels both of whose features are live at some position pair that may attend."""
    mask = frozen.mask[: doc.length, : doc.length]
    if bool((mask == torch.ones_like(mask).tril()).all()):  # no window: the first of the keys before the last query
        index, pos, size = doc.slot, doc.entries.pos, len(doc.live)
        first = torch.full((size,), doc.length, device=pos.device).scatter_reduce_(0, index, pos, "amin")
        last = torch.zeros(size, dtype=torch.long, device=pos.device).scatter_reduce_(0, index, pos, "amax")
        return int(torch.searchsorted(first.sort().values, last, right=True).sum())
    marks = dense(doc, torch.ones_like(doc.entries.value))
    return int(((marks @ mask.to(marks)) @ marks.mT > 0).sum())


def fewest(mass: Iterable[Float[Tensor, "..."]], share: float) -> float:
    """The least number of entries that together hold `share` of the total of all (none is negative), given in blocks.

    Entries are rounded to bfloat16 (8 significant bits, by at most 0.4 %, up or down), of which there are few enough to
    count each: nothing is sorted.
    """
    every = torch.zeros(1 << 15, dtype=torch.long)
    for block in mass:
        rounded = block.flatten().bfloat16().view(torch.int16)
        every = every.to(rounded.device) + torch.bincount(rounded, minlength=len(every))
    count = every.double()
    value = torch.arange(len(count), dtype=torch.int16, device=count.device).view(torch.bfloat16).double()
    held = torch.where(count > 0, count * value, 0.0).flip(0).cumsum(0).flip(0)  # by a value and those above it
    need = share * float(held[0])
    if not need > 0:
        return 0.0
    edge = int((held >= need).nonzero()[-1])
    above = int(count[edge + 1 :].sum())
    return above + (need - float(held[edge + 1 :][:1].sum())) / float(value[edge])


def concentration(mass: Iterable[Float[Tensor, "..."]], share: float) -> tuple[float, float]:
    """(channels for `share` of the mass, participation ratio (sum m)^2 / sum m^2); NaN where there is no mass."""
    total = squares = 0.0

    def summed() -> Iterator[Tensor]:
        nonlocal total, squares
        for block in mass:
            flat = block.flatten()
            total, squares = total + float(flat.sum()), squares + float(torch.dot(flat, flat))
            yield flat

    few = fewest(summed(), share)
    return few, total**2 / squares if squares > 0 else float("nan")
