"""Channel masses of a head: how few channels hold them, and whether the strongest are about the first position.

The mass of a channel on a document is `sum A(t,s) |F~(t,s)|` with `F~(t,s) = F(t,s) - sum_u A(t,u) F(t,u)`, the gauge
that softmax does not see; A is the head's own pattern, F its term before softcap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.blocks import Side, reduce_blocks
from fra.core.coded import Arm
from fra.core.frozen import FrozenLayer, freeze
from fra.core.reductions import refuse_beyond_memory
from fra.core.threads import each
from fra.dictionaries.codes import Codes, codes, neuronpedia
from fra.induction.examples import example_on_text
from fra.measures.scores.layer import ATOMS, FEATURES, TOKENS, CarriedLayer, DocumentEntries, entries
from fra.report.pictures import ON_NATURAL
from fra.report.pictures import STRONGEST as SHOWN
from fra.stimuli.padding import Texts
from fra.targets.target import text_of
from fra.verdicts.samples import ByDocument, mean_of

SHARE = 0.9
"""Of the mass: what "carries" means in a count of channels."""
STRONGEST = 50
"""Channels of a head, chosen on selection documents (the size of a CIH set)."""
SELECTED_ON = 12


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
    own = entries(given, number, length)
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
    values: Float[Tensor, "live pos"],
    doc: LiveDocument,
    value: Float[Tensor, " n"],
    attention: Float[Tensor, "pos pos"],
) -> tuple[Float[Tensor, "live pos"], Float[Tensor, "live pos"]]:
    """For each feature and row: `sum_s A |a_s - mean|` and the mean `sum_s A a_s`.

    Deviations cancel under A, so that twice the positive ones are all of them; only keys where the feature is live, and
    the rest of A where the mean is negative, can be positive.
    """
    mean = values @ attention.mT
    at_key = attention.mT.contiguous()[doc.entries.pos]
    positive = (value[:, None] - mean[doc.slot]).clamp_(min=0).mul_(at_key)
    out = torch.zeros_like(mean).index_add_(0, doc.slot, positive)
    if bool((mean < 0).any()):
        share = torch.zeros_like(mean).index_add_(0, doc.slot, at_key)
        out += (1 - share).clamp_(min=0) * (-mean).clamp_(min=0)
    return 2 * out, mean


def couplings(frozen: FrozenLayer, decoder: Tensor, head: int, ids: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """U, V with G_ij = U_i . V_j before rotation, of chosen features, the score's scale included."""
    directions = decoder[ids]
    return frozen.scale * directions @ frozen.W_q[head], directions @ frozen.W_k[head]


def masses(frozen: FrozenLayer, decoder: Tensor, doc: LiveDocument, head: int) -> Float[Tensor, "q_live k_live"]:
    """Mass of every channel of the document's live features.

    Without rotary positions `|G_ij| sum_t |a_i(t)| sum_s A(t,s) |a_j(s) - sum_u A(t,u) a_j(u)|`; with them from all
    terms, in blocks.
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
        return reduce_blocks(q_side, k_side, ("mass",), attention)["mass"]
    table = (U @ V.mT).abs_()
    around, _ = spread(dense(doc, k), doc, k, attention)
    return table.mul_(dense(doc, q).abs_() @ around.mT)


def live_channels(frozen: FrozenLayer, doc: LiveDocument) -> int:
    """Channels both of whose features are live at some position pair that may attend."""
    marks = dense(doc, torch.ones_like(doc.entries.value))
    mask = frozen.mask[: doc.length, : doc.length].to(marks)
    return int(((marks @ mask) @ marks.mT > 0).sum())


def fewest(mass: Float[Tensor, "*shape"], share: float) -> int:
    """The least number of entries that together hold `share` of the total of all (none is negative).

    Exact up to rounding, without sorting all: non-negative floats are ordered as their bits are, so that the leading 16
    bits make a histogram, and only one bin of it is sorted.
    """
    flat = mass.flatten().float()
    bins = flat.view(torch.int32) >> 16
    count = torch.bincount(bins, minlength=1 << 15)
    total = torch.bincount(bins, weights=flat.double(), minlength=1 << 15)
    above = total.flip(0).cumsum(0).flip(0)  # held by a bin and those above it
    need = share * float(above[0])
    if need <= 0:
        return 0
    edge = int((above >= need).nonzero()[-1])
    rest = need - float(above[edge] - total[edge])
    inside = flat[bins == edge].double().sort(descending=True).values.cumsum(0)
    within = int(torch.searchsorted(inside, rest)) + 1
    return int(count[edge + 1 :].sum()) + min(within, len(inside))


def concentration(mass: Float[Tensor, "q k"]) -> tuple[int, float]:
    """(channels for SHARE of the mass, participation ratio (sum m)^2 / sum m^2); NaN where there is no mass."""
    squares = float(mass.square().sum())
    ratio = float(mass.sum()) ** 2 / squares if squares > 0 else float("nan")
    return fewest(mass, SHARE), ratio


@torch.no_grad()
def sparsity(layer: CarriedLayer, step: int) -> dict[str, ByDocument]:
    """Q03 at every head of a layer, on every `step`-th measured document: share of the live channels that
    carry SHARE of the mass, participation ratio over live channels, and both against random atoms and the token
    dictionary (log ratios).
    """
    frozen, texts = layer.frozen, layer.sets.measured.every(step)
    names = (FEATURES, ATOMS, TOKENS)
    docs = {
        name: [document(layer.codes(name), n * step, length) for n, length in enumerate(texts.lengths)]
        for name in names
    }
    live = {name: np.array([live_channels(frozen, doc) for doc in docs[name]], dtype=np.float64) for name in names}

    def measure(head: int) -> ByDocument:
        few, ratio = {}, {}
        for name in names:
            decoder = layer.codes(name).decoder
            found = np.array([concentration(masses(frozen, decoder, doc, head)) for doc in docs[name]])
            few[name], ratio[name] = found[:, 0], found[:, 1]
        share = {name: few[name] / live[name] for name in names}
        part = {name: ratio[name] / live[name] for name in names}
        values = {"share of live channels": share[FEATURES], "participation ratio": part[FEATURES]}
        with np.errstate(divide="ignore", invalid="ignore"):
            for name in (ATOMS, TOKENS):
                values[f"share against {name}"] = np.log(share[FEATURES] / share[name])
                values[f"participation against {name}"] = np.log(part[FEATURES] / part[name])
        detail = {
            name: {
                f"channels for {SHARE:.0%} of the mass": float(few[name].mean()),
                "live channels": float(live[name].mean()),
                "share": float(share[name].mean()),
                "participation ratio": float(ratio[name].mean()),
            }
            for name in names
        }
        return ByDocument(*mean_of(values), texts.sources, detail=detail)

    heads = list(layer.heads)
    measured = each(measure, heads, frozen.x.device)
    return {f"L{layer.layer}H{head}": found for head, found in zip(heads, measured, strict=True)}


def strongest_channels(frozen: FrozenLayer, given: Codes, texts: Texts, head: int) -> Int[Tensor, "n 2"]:
    """The STRONGEST channels by mass over the documents, ids of query and key feature, strongest first."""
    every = torch.unique(given.feature)
    refuse_beyond_memory(len(every) ** 2, 4, "channels", "use a smaller dictionary")
    table = given.value.new_zeros(len(every), len(every))
    for number, length in enumerate(texts.lengths):
        doc = document(given, number, length)
        at = torch.searchsorted(every, doc.live)
        table[at[:, None], at] += masses(frozen, given.decoder, doc, head)
    best = table.flatten().topk(min(STRONGEST, table.numel())).indices
    return torch.stack((every[best // len(every)], every[best % len(every)]), dim=1)


@dataclass(frozen=True)
class FirstKey:
    """Mass of some channels on one document, its part at the first key, and how much of that is positive: attention
    drawn to the first key. Half of all mass is positive.
    """

    mass: float
    at_first: float
    drawn_to_first: float


def first_key(frozen: FrozenLayer, given: Codes, doc: LiveDocument, head: int, pairs: Int[Tensor, "n 2"]) -> FirstKey:
    """Sums of A |F~| over channels, rows and keys, of it at key 0, and of A F~ at key 0 where positive."""
    attention = pattern(frozen, doc, head)
    q, k = (dense(doc, coefficients(frozen, doc, side, head)) for side in ("query", "key"))
    at = torch.searchsorted(doc.live, pairs).clamp(max=len(doc.live) - 1)
    both = (doc.live[at] == pairs).all(1)
    i, j = at[both].T
    (U, _), (_, V) = (couplings(frozen, given.decoder, head, doc.live[feature]) for feature in (i, j))
    if frozen.rotary is None:
        # F = w_i(t) a_j(s): the key's part is shared by the channels of one key feature.
        weight = q[i] * (U * V).sum(-1, keepdim=True)
        keys, of = torch.unique(j, return_inverse=True)
        mean = k[keys] @ attention.mT
        around = (k[keys][:, None, :] - mean[:, :, None]).mul_(attention)
        mass = weight.abs() * around.abs().sum(-1)[of]
        first = weight * around[..., 0][of]
    else:
        where = torch.arange(doc.length, device=q.device)
        turned = [
            frozen.rotary.rotate(part[..., None] * vector[:, None, :], where) for part, vector in ((q[i], U), (k[j], V))
        ]
        weighed = (turned[0] @ turned[1].mT).mul_(attention)
        around = weighed - weighed.sum(-1, keepdim=True) * attention  # A F~, which sums to zero along a row
        mass, first = around.abs().sum(-1), around[..., 0]
    return FirstKey(float(mass.sum()), float(first.abs().sum()), float(first.clamp(min=0).sum()))


@torch.no_grad()
def content(layer: CarriedLayer, step: int, gate: float) -> dict[str, ByDocument]:
    """Q15 at every head of a layer, on every `step`-th measured document: the share of the mass of its strongest
    channels that is off the first key, with BOS and with the documents run without it.

    gate: heads that attend to BOS by less, on average over rows, have no sink to speak of and are undecided.
    """
    frozen, given, texts = layer.frozen, layer.codes(FEATURES), layer.sets.measured.every(step)
    on, selection = layer.sets.measured, layer.sets.selection.first(SELECTED_ON)
    chosen_on = freeze(layer.model, selection.tokens, layer.layer, layer.hook_name)
    chosen_codes = codes(layer.sae, chosen_on.x)
    bare = Texts(texts.tokens[:, 1:], tuple(n - 1 for n in texts.lengths), texts.sources)
    without = freeze(layer.model, bare.tokens, layer.layer, layer.hook_name)
    without_codes = codes(layer.sae, without.x)
    arms: Mapping[str, tuple[FrozenLayer, Codes, list[LiveDocument]]] = {
        "BOS": (frozen, given, [document(given, n * step, length) for n, length in enumerate(texts.lengths)]),
        "no BOS": (
            without,
            without_codes,
            [document(without_codes, n, length) for n, length in enumerate(bare.lengths)],
        ),
    }

    def measure(head: int) -> ByDocument:
        pairs = strongest_channels(chosen_on, chosen_codes, selection, head)
        rows = {
            arm: [first_key(place, own, doc, head, pairs) for doc in docs] for arm, (place, own, docs) in arms.items()
        }

        def column(arm: str, name: str) -> np.ndarray:
            return np.array([getattr(row, name) for row in rows[arm]])

        mass, bare_mass = column("BOS", "mass"), column("no BOS", "mass")
        counts = {
            "mass off BOS": mass,
            "drawn off BOS": mass / 2,
            "mass off the first token, BOS removed": bare_mass,
        }
        sums = {
            "mass off BOS": mass - column("BOS", "at_first"),
            "drawn off BOS": mass / 2 - column("BOS", "drawn_to_first"),
            "mass off the first token, BOS removed": bare_mass - column("no BOS", "at_first"),
        }
        to_first = float(np.mean([float(pattern(frozen, doc, head)[1:, 0].mean()) for doc in arms["BOS"][2]]))
        drawn = column("no BOS", "drawn_to_first").sum() / max(float(bare_mass.sum()) / 2, 1e-30)
        detail: dict[str, Any] = {
            "the head's own attention to BOS": to_first,
            "drawn off the first token, BOS removed": float(1 - drawn),
            "strongest channels": [f"{a} -> {b}" for a, b in pairs[:10].tolist()],
        }
        i, j = pairs[0].tolist()
        shown = example_on_text(Arm(frozen, given), head, (i, j), on.tokens, on.lengths)
        if shown is not None:
            detail = {SHOWN: shown.picture(ON_NATURAL, text_of(layer.model.tokenizer), neuronpedia(layer.sae))} | detail
        undecided = None
        if not to_first >= gate:
            undecided = f"the head gives BOS {to_first:.3f} of its attention, where {gate} is a sink: there is none"
        return ByDocument(sums, counts, texts.sources, undecided, detail)

    heads = list(layer.heads)
    measured = each(measure, heads, frozen.x.device)
    return {f"L{layer.layer}H{head}": found for head, found in zip(heads, measured, strict=True)}
