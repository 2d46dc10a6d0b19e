"""How few channels hold the mass of a head, and whether the strongest are about the first position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.coded import Arm
from fra.core.frozen import FrozenLayer, freeze
from fra.core.frozen import Side as CoreSide
from fra.core.reductions import refuse_beyond_memory
from fra.core.threads import each
from fra.dictionaries.codes import Codes, codes, neuronpedia
from fra.dictionaries.texts import text_of
from fra.measures.scores.designs import Concentration, StrongestChannels
from fra.measures.scores.layer import ATOMS, FEATURES, TOKENS, CarriedLayer
from fra.measures.scores.masses import (
    concentration,
    couplings,
    document,
    live_channels,
    mass_blocks,
    masses,
    numbered,
    spread,
)
from fra.report.pictures import ON_NATURAL
from fra.report.pictures import STRONGEST as SHOWN
from fra.search.examples import example_on_text
from fra.stimuli.padding import Texts
from fra.stimuli.sources import spread as spread_over
from fra.verdicts.samples import ByDocument, mean_of


@torch.no_grad()
def sparsity(layer: CarriedLayer, design: Concentration) -> dict[str, ByDocument]:
    """Q03 at every head of a layer: share of the live channels that carry most of the mass, participation ratio over
    live channels, and both against random atoms (drawn for every document anew) and the token dictionary (log ratios).
    """
    frozen, texts = layer.frozen, layer.sets.measured
    chosen = spread_over(texts.sources, min(design.documents, len(texts)))
    names, heads = (FEATURES, ATOMS, TOKENS), list(layer.heads)
    given = {name: layer.codes(name) for name in (FEATURES, TOKENS)}
    layer.in_atoms(0)  # makes those of all documents, by all threads

    def measure(number: int) -> dict[str, np.ndarray]:
        """[head, 2] shares (of channels that carry the mass, participation) and [head, 3] numbers, by dictionary."""
        length, found = texts.lengths[number], {}
        for name in names:
            if name == ATOMS:
                doc, decoder = numbered(layer.in_atoms(number), number, length), layer.atoms(number)
            else:
                doc, decoder = document(given[name], number, length), given[name].decoder
            rows = [concentration(mass_blocks(frozen, decoder, doc, head), design.share) for head in heads]
            live = live_channels(frozen, doc)
            found[name] = np.array([(few, ratio, live) for few, ratio in rows], dtype=np.float64)
        return found

    by_document = each(measure, chosen, frozen.x.device)
    found = {}
    for place, head in enumerate(heads):
        few, ratio, live = (
            {name: np.array([own[name][place, column] for own in by_document]) for name in names} for column in range(3)
        )
        share = {name: few[name] / live[name] for name in names}
        part = {name: ratio[name] / live[name] for name in names}
        values = {"share of live channels": share[FEATURES], "participation ratio": part[FEATURES]}
        with np.errstate(divide="ignore", invalid="ignore"):
            for name in (ATOMS, TOKENS):
                values[f"share against {name}"] = np.log(share[FEATURES] / share[name])
                values[f"participation against {name}"] = np.log(part[FEATURES] / part[name])
        detail: dict[str, Any] = {
            name: {
                f"channels for {design.share:.0%} of the mass": float(few[name].mean()),
                "live channels": float(live[name].mean()),
                "share": float(share[name].mean()),
                "participation ratio": float(part[name].mean()),
            }
            for name in names
        }
        detail["draws of random atoms, one a document"] = len(chosen)
        sources = [texts.sources[number] for number in chosen]
        found[f"L{layer.layer}H{head}"] = ByDocument(*mean_of(values), sources, detail=detail)
    return found


def strongest_channels(
    frozen: FrozenLayer, given: Codes, lengths: Mapping[int, int], head: int, n: int
) -> Int[Tensor, "n 2"]:
    """The n strongest channels by mass over some documents (lengths by number), ids of query and key feature, strongest
    first.
    """
    every = torch.unique(given.feature)
    refuse_beyond_memory(len(every) ** 2, 4, "channels", "use a smaller dictionary")
    table = given.value.new_zeros(len(every), len(every))
    for number, length in lengths.items():
        doc = document(given, number, length)
        at = torch.searchsorted(every, doc.live)
        table[at[:, None], at] += masses(frozen, given.decoder, doc, head)
    best = table.flatten().topk(min(n, table.numel())).indices
    return torch.stack((every[best // len(every)], every[best % len(every)]), dim=1)


@dataclass(frozen=True)
class FirstKey:
    """By document, mass of some channels, its part at the first key, and how much of that is positive: attention drawn
    to the first key. Half of all mass is positive.
    """

    mass: Float[np.ndarray, " n_docs"]
    at_first: Float[np.ndarray, " n_docs"]
    drawn_to_first: Float[np.ndarray, " n_docs"]


def first_key(
    frozen: FrozenLayer, given: Codes, lengths: Sequence[int], head: int, pairs: Int[Tensor, "n 2"]
) -> FirstKey:
    """By document, sums of A |F~| over channels, rows and keys, of it at key 0, and of A F~ at key 0 where positive.

    F = w_i(t) a_j(s) without rotary positions: the key's part is shared by the channels of one key feature, and only
    where that is live does it matter.
    """
    docs, pos = given.shape
    ends = torch.tensor(lengths, device=given.row.device)
    attention = frozen.pattern[:, head].masked_fill(~frozen.mask, 0.0)

    def columns(side: CoreSide, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dense [docs, n, pos] coefficients of features, and slot and value of each entry; none on padding."""
        which, entry = given.index.of(ids)
        row = given.row[entry]
        kept = row % pos < ends[row // pos]
        which, entry, row = which[kept], entry[kept], row[kept]
        value = given.value[entry] * frozen.gain(side, head, row)
        out = value.new_zeros(docs * len(ids), pos)
        slot = row // pos * len(ids) + which
        out[slot, row % pos] = value
        return out.view(docs, len(ids), pos), torch.stack((slot, row)), value

    (queries, of_query), (keys, of_key) = (torch.unique(ids, return_inverse=True) for ids in pairs.T)
    (q, _, _), (k, (slot, row), value) = columns("query", queries), columns("key", keys)
    (U, _), (_, V) = (couplings(frozen, given.decoder, head, ids) for ids in pairs.T)
    if frozen.rotary is None:
        weight = q[:, of_query] * (U * V).sum(-1, keepdim=True)
        mean = k @ attention.mT
        around = spread(mean.flatten(0, 1), slot, value, attention[row // pos, :, row % pos]).view_as(mean)
        mass = (weight.abs() * around[:, of_key]).sum((1, 2))
        first = weight * (attention[:, None, :, 0] * (k[..., :1] - mean))[:, of_key]
        at_first, drawn = first.abs().sum((1, 2)), first.clamp(min=0).sum((1, 2))
    else:
        where, sums = torch.arange(pos, device=q.device), []
        for q_doc, k_doc, own in zip(q[:, of_query], k[:, of_key], attention, strict=True):
            turned = [
                frozen.rotary.rotate(part[..., None] * vector[:, None, :], where)
                for part, vector in ((q_doc, U), (k_doc, V))
            ]
            weighed = (turned[0] @ turned[1].mT).mul_(own)
            apart = weighed - weighed.sum(-1, keepdim=True) * own  # A F~, which sums to zero along a row
            first = apart[..., 0]
            sums.append(torch.stack((apart.abs().sum(), first.abs().sum(), first.clamp(min=0).sum())))
        mass, at_first, drawn = torch.stack(sums, dim=1)
    return FirstKey(*(np.asarray(part.double().cpu()) for part in (mass, at_first, drawn)))


@torch.no_grad()
def content(layer: CarriedLayer, design: StrongestChannels, gate: float) -> dict[str, ByDocument]:
    """Q15 at every head of a layer: the share of the mass of its strongest channels (of selection documents) that is
    off the first key, with BOS and with the documents run without it.

    gate: heads that attend to BOS by less, on average over rows, have no sink to speak of and are undecided.
    """
    frozen, given, texts, selection = layer.frozen, layer.codes(FEATURES), layer.sets.measured, layer.sets.selection
    chosen_on, chosen_codes = layer.selection
    some = {n: selection.lengths[n] for n in spread_over(selection.sources, min(design.selected_on, len(selection)))}
    bare = Texts(texts.tokens[:, 1:], tuple(n - 1 for n in texts.lengths), texts.sources)
    without = freeze(layer.model, bare.tokens, layer.layer, layer.hook_name)
    without_codes = codes(layer.sae, without.x)

    def measure(head: int) -> ByDocument:
        pairs = strongest_channels(chosen_on, chosen_codes, some, head, design.channels)
        own = first_key(frozen, given, texts.lengths, head, pairs)
        other = first_key(without, without_codes, bare.lengths, head, pairs)
        counts = {
            "mass off BOS": own.mass,
            "drawn off BOS": own.mass / 2,
            "mass off the first token, BOS removed": other.mass,
        }
        sums = {
            "mass off BOS": own.mass - own.at_first,
            "drawn off BOS": own.mass / 2 - own.drawn_to_first,
            "mass off the first token, BOS removed": other.mass - other.at_first,
        }
        by_row = frozen.pattern[:, head, :, 0].cpu()
        to_first = float(np.mean([float(rows[1:n].mean()) for rows, n in zip(by_row, texts.lengths, strict=True)]))
        drawn = other.drawn_to_first.sum() / max(float(other.mass.sum()) / 2, 1e-30)
        detail: dict[str, Any] = {
            "the head's own attention to BOS": to_first,
            "drawn off the first token, BOS removed": float(1 - drawn),
            "strongest channels": [f"{a} -> {b}" for a, b in pairs.tolist()],
        }
        i, j = pairs[0].tolist()
        shown = example_on_text(Arm(frozen, given), head, (i, j), texts.tokens, texts.lengths)
        if shown is not None:
            detail = {SHOWN: shown.picture(ON_NATURAL, text_of(layer.model.tokenizer), neuronpedia(layer.sae))} | detail
        undecided = None
        if not to_first >= gate:
            undecided = f"the head gives BOS {to_first:.3f} of its attention, where {gate} is a sink: there is none"
        return ByDocument(sums, counts, texts.sources, undecided, detail)

    heads = list(layer.heads)
    measured = each(measure, heads, frozen.x.device)
    return {f"L{layer.layer}H{head}": found for head, found in zip(heads, measured, strict=True)}
