"""Channels through a crosscoder: are they those of the layer's own dictionary (C02), and do they stand in features that
only this model has (C03)?

A feature is exclusive to a model where its relative decoder norm there is above a bound: of its decoder norms over all
slots, that one's share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from fra.dictionaries.crosscoder import Placed
from fra.dictionaries.hooks import attention_input_layer
from fra.induction.cih import Screen
from fra.induction.outside import outside
from fra.measures.channels.q08_q16_transfer import tihs
from fra.measures.channels.q20_seeds import AcrossSeeds, across, nats_of, seen_through
from fra.measures.channels.transfer_designs import ChannelSet, Exclusive
from fra.search.channels import Arms, HeadOnArms, evenly, few_documents
from fra.search.search import Search
from fra.statistics import stats
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch
from fra.stimuli.sets import documents
from fra.targets.target import has_dictionary
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Column, Drawn, Sampled, decide, means_of

if TYPE_CHECKING:
    from fra.targets.target import Target

BOTH, NAMES = "set of either", ("the dictionary", "the crosscoder")
NO_CROSSCODER = "the target has no crosscoder at this layer's attention input beside a dictionary there"
SHARE, SET, OVER_LATE, OVER_MATCHED = "share", "set effect", "over late checkpoints", "over matched features"


def by_layer(target: Target, other: str | None = None) -> dict[int, Placed]:
    """By layer the first crosscoder at its attention input; with `other`, the first that reads a model of this name."""
    found: dict[int, Placed] = {}
    for placed in target.crosscoders.values():
        if other is None or other in placed.models:
            found.setdefault(attention_input_layer(placed.hook), placed)
    return found


def _documents(target: Target, screened: Screen, claim: Claim) -> tuple[Batch, Batch]:
    """Those on which channels are found, and as many as the claim says of those on which they are measured."""
    sets = documents(target, screened.stimulus, claim.designed(RepeatedSets))
    measured = sets["confirmation"]
    return sets["discovery"], few_documents(measured, evenly(len(measured), claim.n, measured.periods.device))


@torch.no_grad()
def measure_both(
    target: Target, screened: Screen, claim: Claim, progress: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, AcrossSeeds], str | None]:
    """C02: every TIH of a layer with a dictionary and a crosscoder at one hook; and why there is none, where so."""
    placed = {
        layer: one
        for layer, one in by_layer(target).items()
        if has_dictionary(target, layer) and target.hook_for(layer) == one.hook
    }
    if not placed:
        return {}, NO_CROSSCODER
    discovery, measured = _documents(target, screened, claim)
    found: dict[str, AcrossSeeds] = {}
    for layer, one in placed.items():
        if heads := tihs(target, screened, layer):
            progress(f"C02: layer {layer}")
            both = (target.dictionary_for(layer)[1], one)
            searches, arms = seen_through(target, both, discovery, measured, layer, one.hook)
            seed_parts = (screened.target, screened.stimulus, one.hook, "crosscoder")
            found |= across(searches, arms, heads, claim.designed(ChannelSet), seed_parts)
    return found, None if found else "no head of the layers with a crosscoder is a TIH"


@dataclass(frozen=True)
class InExclusive:
    """One head's set through a crosscoder, and the part of it that stands in exclusive features. Nats of each document,
    summed over its rows.
    """

    pairs: Int[np.ndarray, "n 2"]
    exclusive: Bool[np.ndarray, " n"]
    """Channels of which either feature is exclusive to this model."""
    together: Float[np.ndarray, " n_documents"]
    part: Float[np.ndarray, " n_documents"]
    """Of the exclusive channels removed together."""
    features: tuple[int, int]
    """Exclusive among the live ones, and all live ones."""
    draw: Callable[[int], float]
    """Nats a row of the part, had other features been exclusive: as many, of like decoder norm and activity."""
    rows: Float[np.ndarray, " n_documents"]
    sources: tuple[str, ...]


@torch.no_grad()
def measure_exclusive(
    target: Target, screened: Screen, claim: Claim, progress: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, tuple[InExclusive, InExclusive]], str | None]:
    """C03: of every TIH of a layer that two crosscoders read, the one beside an earlier checkpoint and the one beside a
    late one; and why there is none, where so.
    """
    design = claim.designed(Exclusive)
    before, late = by_layer(target, design.earlier), by_layer(target, design.late)
    if not set(before) & set(late):
        return {}, (
            "the target has no two crosscoders at one attention input, one beside a checkpoint before induction forms "
            f"(a model named {design.earlier!r}) and one beside a late one ({design.late!r})"
        )
    discovery, measured = _documents(target, screened, claim)
    found = {}
    for layer in sorted(set(before) & set(late)):
        if not (heads := tihs(target, screened, layer)):
            continue
        progress(f"C03: layer {layer}")
        both = (before[layer], late[layer])
        searches, arms = seen_through(target, both, discovery, measured, layer, both[0].hook)
        channels, seed_parts = claim.designed(ChannelSet), (screened.target, screened.stimulus, both[0].hook)
        for head in heads:
            parts = [
                in_exclusive(search, arm, placed, head, channels, design, (*seed_parts, str(head)))
                for search, arm, placed in zip(searches, arms, both, strict=True)
            ]
            found[f"L{layer}H{head}"] = (parts[0], parts[1])
    return found, None if found else "no head of the layers with crosscoders is a TIH"


@torch.no_grad()
def in_exclusive(
    search: Search,
    arms: Arms,
    placed: Placed,
    head: int,
    channels: ChannelSet,
    design: Exclusive,
    seed_parts: tuple[str, ...],
) -> InExclusive:
    """One head through one crosscoder; channels are found on the documents of `search`, measured on `arms`."""
    stripe = search.stripes((0,), channels.floor)[0]
    pairs = stripe.strongest(search.arm, head, channels.size)[0].cpu().numpy()
    crosscoder = placed.crosscoder
    is_exclusive = (crosscoder.share_of(placed.at) > design.bound).cpu().numpy()
    norm = crosscoder.W_dec[:, placed.at].norm(dim=-1).cpu().numpy()
    count = np.bincount(search.arm.codes.feature.cpu().numpy(), minlength=crosscoder.d_sae)
    cells = matched_cells(norm, count, design.cells)
    on = HeadOnArms(arms, head)
    rows = np.bincount(arms.batch.row_doc.cpu().numpy(), minlength=len(arms.batch)).astype(float)

    def part(exclusive: np.ndarray) -> np.ndarray:
        own = pairs[exclusive[pairs].any(1)]
        return nats_of(on, own) if len(own) else np.zeros(len(rows))

    def draw(number: int) -> float:
        rng = np.random.default_rng(stats.seed_of(*seed_parts, "exclusive", str(number)))
        return float(part(relabelled(is_exclusive, cells, rng)).sum() / rows.sum())

    live = count > 0
    return InExclusive(
        pairs,
        is_exclusive[pairs].any(1),
        nats_of(on, pairs),
        part(is_exclusive),
        (int((is_exclusive & live).sum()), int(live.sum())),
        torch.no_grad()(draw),
        rows,
        arms.batch.sources,
    )


def matched_cells(
    norm: Float[np.ndarray, " d_sae"], count: Int[np.ndarray, " d_sae"], n: int
) -> list[Int[np.ndarray, " _m"]]:
    """Live features in n * n cells of like decoder norm and like activity: by norm first, then within each by count."""
    live = np.flatnonzero(count > 0)
    by_norm = np.array_split(live[np.argsort(norm[live], kind="stable")], n)
    return [cell for some in by_norm for cell in np.array_split(some[np.argsort(count[some], kind="stable")], n)]


def relabelled(
    exclusive: Bool[np.ndarray, " d_sae"], cells: list[Int[np.ndarray, " _m"]], rng: np.random.Generator
) -> Bool[np.ndarray, " d_sae"]:
    """As many exclusive features in every cell, others of them."""
    drawn = np.zeros_like(exclusive)
    for cell in cells:
        drawn[cell] = rng.permutation(exclusive[cell])
    return drawn


def exclusive_evidence(
    claim: Claim, screened: Screen, found: Mapping[str, tuple[InExclusive, InExclusive]], cannot: str | None
) -> dict[str, Evidence]:
    """C03: of every TIH of a layer with both crosscoders."""
    reason = cannot or "the target has no two crosscoders at this layer's attention input"
    evidence = outside(claim, screened) | {
        name: Evidence(claim=claim, head=name, cannot=reason)
        for name, status in screened.status.items()
        if status.status == "TIH" and name not in found and name not in screened.controls
    }
    if not found:
        return evidence

    def means(h: str, name: str, values: np.ndarray) -> stats.ClusterMeans:
        return means_of(claim, screened.target, h, name, values, found[h][0].rows, found[h][0].sources)

    share, whole, over, shares = {}, {}, {}, {}
    for h, (own, late) in found.items():
        share[h] = means(h, SHARE, own.part - claim.bar_of(SHARE) * own.together)
        shares[h] = (float(own.part.sum() / own.rows.sum()), float(own.together.sum() / own.rows.sum()))
        whole[h] = means(h, SET, own.together)
        over[h] = means(h, OVER_LATE, own.part - late.part)
    columns: list[Column] = [
        Sampled(name=SHARE, samples=share, shares=shares),
        Sampled(name=SET, samples=whole),
        Sampled(name=OVER_LATE, samples=over),
        Drawn(
            observed={OVER_MATCHED: {h: part for h, (part, _) in shares.items()}},
            draw=lambda h, k: {OVER_MATCHED: found[h][0].draw(k)},
        ),
    ]
    rows = {
        h: Beside(candidates=("channels in exclusive features",), detail=_detail(*both)) for h, both in found.items()
    }
    return evidence | decide(claim, columns, rows, q_over=())


def _detail(own: InExclusive, late: InExclusive) -> dict[str, Any]:
    """Both crosscoders side by side."""

    def of(one: InExclusive) -> dict[str, Any]:
        return {
            "exclusive features, of those live": list(one.features),
            "channels in them, of the set": [int(one.exclusive.sum()), len(one.pairs)],
            "set (nats a row)": float(one.together.sum() / one.rows.sum()),
            "its part in exclusive features (nats a row)": float(one.part.sum() / one.rows.sum()),
        }

    return {"beside the earlier checkpoint": of(own), "beside the late checkpoint": of(late)}
