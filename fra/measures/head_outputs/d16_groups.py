"""Whether a head has groups of features that fire together (D16): a surrogate, activation Jaccard, that says nothing of
what the features mean and is never to be called monosemanticity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.attribution.examples import FEATURE, feature_example
from fra.dictionaries.hooks import is_head_output, layer_of
from fra.dictionaries.texts import text_of
from fra.measures.head_outputs.corpus import HeadFirings, corpus
from fra.measures.head_outputs.d04_heads import Division, divide
from fra.measures.head_outputs.designs import Alive, GroupLikeness, HeadOutputDocuments
from fra.statistics import stats
from fra.statistics.bounds import difference
from fra.targets.target import head_output_hooks
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Sampled, decide
from fra.verdicts.pooled import NO_HEAD_OUTPUT_DICTIONARY

if TYPE_CHECKING:
    from fra.targets.target import Target

FEATURES = "features of the head"
"""The gate: features whose top head it is, and as many of other heads for every control."""


@dataclass(frozen=True)
class ChosenGroups:
    """What discovery documents say of one dictionary's features."""

    division: Division
    jaccard: Float[np.ndarray, "n_alive n_alive"]
    """Positions where both of two features fire over those where either does; -1 on the diagonal."""
    rate: Float[np.ndarray, " n_alive"]
    """Log of the number of firings."""


def fires(firings: HeadFirings, alive: Int[Tensor, " n_alive"]) -> Float[Tensor, "docs pos n_alive"]:
    """One where a feature fires."""
    at, o = firings.live, firings.outputs
    column = torch.full((o.encoder.d_sae,), -1, device=o.z.device)
    column[alive] = torch.arange(len(alive), device=o.z.device)
    kept = column[at.feature] >= 0
    live = torch.zeros(len(firings.documents), o.z.shape[1], len(alive), device=o.z.device)
    live[at.doc[kept], at.pos[kept], column[at.feature[kept]]] = 1
    return live


def choose(discovery: HeadFirings, least: Alive) -> ChosenGroups:
    """All that is chosen from, by discovery documents alone."""
    division = divide(discovery, least)
    flat = fires(discovery, division.alive).flatten(0, 1)
    both = flat.T @ flat
    count = both.diagonal()
    jaccard = both / (count[:, None] + count - both).clamp(min=1)
    jaccard.fill_diagonal_(-1)
    rate = division.count.double().log().cpu().numpy()
    return ChosenGroups(division, jaccard.double().cpu().numpy(), rate)


def own_features(division: Division, head: int, most: int) -> Int[np.ndarray, " n"]:
    """Columns of the features whose top head this is, those with its largest shares, ascending."""
    share = division.share[:, head].masked_fill(division.top != head, -1.0)
    best = share.topk(min(most, len(share)))
    return np.sort(best.indices[best.values > 0].cpu().numpy())


def alike_in_rate(chosen: ChosenGroups, own: Int[np.ndarray, " n"], head: int, most: int) -> list[list[int]]:
    """For each of a head's features so many of other top heads, at most, that fire about as often, the nearest first
    (Jaccard grows with density).
    """
    others = np.flatnonzero(chosen.division.top.cpu().numpy() != head)
    apart = np.abs(chosen.rate[others] - chosen.rate[own][:, None])
    ordered: list[list[int]] = others[np.argsort(apart, axis=1, kind="stable")[:, :most]].tolist()
    return ordered


def random_heads(near: Sequence[Sequence[int]], nearest: int, rng: np.random.Generator) -> Int[np.ndarray, " n_drawn"]:
    """A group in which each of a head's features is replaced by one of another head, drawn among the nearest so many
    that are left; smaller where the others have not enough. near: `alike_in_rate`.
    """
    found: dict[int, None] = {}
    for k, u in zip(rng.permutation(len(near)).tolist(), rng.random(len(near)).tolist(), strict=True):
        left = list(islice((f for f in near[k] if f not in found), nearest))
        if left:
            found[left[int(u * len(left))]] = None
    return np.asarray(list(found), dtype=np.int64)


def likest_pairs(chosen: ChosenGroups, features: Int[np.ndarray, " n"], most: int) -> Int[np.ndarray, "n_pairs 2"]:
    """The pairs of these features with the largest Jaccard on discovery documents."""
    first, second = np.triu_indices(len(features), 1)
    order = np.argsort(-chosen.jaccard[features[first], features[second]], kind="stable")[:most]
    return np.stack([features[first[order]], features[second[order]]], axis=1)


def together(
    live: Float[Tensor, "docs pos n_alive"], pairs: Int[np.ndarray, "n_pairs 2"]
) -> tuple[Float[np.ndarray, " docs"], Float[np.ndarray, " docs"]]:
    """By document: positions where both features of a pair fire, and where either does, summed over the pairs."""
    first, second = (live[:, :, torch.as_tensor(pairs[:, k], device=live.device)] for k in (0, 1))
    both = (first * second).sum((1, 2)).double()
    either = (first + second).sum((1, 2)).double() - both
    return np.asarray(both.cpu()), np.asarray(either.cpu())


@dataclass(frozen=True)
class Group:
    """A head's likest pairs and controls on measured documents: (both, either) by document."""

    own: tuple[np.ndarray, np.ndarray]
    drawn: tuple[np.ndarray, np.ndarray]
    """Of random heads' features, draws of its own for each source."""
    pairs: Int[np.ndarray, "n_pairs 2"]


def group_of(
    chosen: ChosenGroups,
    live: Float[Tensor, "docs pos n_alive"],
    sources: Sequence[str],
    head: int,
    least: float,
    design: GroupLikeness,
    seeds: Sequence[str],
) -> Group | None:
    """One head's group; None where it, or the others, have too few features."""
    own = own_features(chosen.division, head, design.features)
    others = int((chosen.division.top != head).sum())
    if len(own) < least or others < len(own):
        return None
    pairs = likest_pairs(chosen, own, design.pairs)
    drawn = np.zeros(len(sources)), np.zeros(len(sources))
    near = alike_in_rate(chosen, own, head, len(own) + design.nearest)
    for source in sorted(set(sources)):
        rng = np.random.default_rng(stats.seed_of(*seeds, "random heads", source))
        controls = [random_heads(near, design.nearest, rng) for _ in range(design.draws)]
        every = np.concatenate([likest_pairs(chosen, control, design.pairs) for control in controls])
        some = [k for k, name in enumerate(sources) if name == source]
        drawn[0][some], drawn[1][some] = together(live[some], every)
    return Group(together(live, pairs), drawn, pairs)


def excess(claim: Claim, target: str, name: str, group: Group, sources: Sequence[str]) -> stats.ClusterMeans:
    """Jaccard of a head's group less that of the controls: two ratio means' difference, linearised, sources as
    clusters.
    """
    own, drawn = ([stats.by_source(part, sources) for part in pair] for pair in (group.own, group.drawn))
    values, ones = difference(*own, *drawn)
    return stats.ClusterMeans(values, ones, seed=stats.seed_of(claim.digest, target, name))


@torch.no_grad()
def group_evidence(
    claim: Claim, target: Target, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Evidence]:
    """D16 for every head of a layer with a dictionary of head outputs; Holm across them."""
    found: dict[str, Evidence] = {}
    samples: dict[str, stats.ClusterMeans] = {}
    detail: dict[str, dict[str, Any]] = {}
    every = head_output_hooks(target)
    # a head is asked once: of what attention writes where its layer has no dictionary of head outputs
    split = {layer_of(hook) for hook in every if is_head_output(hook)}
    hooks = [hook for hook in every if is_head_output(hook) or layer_of(hook) not in split]
    for hook in hooks:
        progress(f"D16: {hook}")
        before, measured = corpus(target, claim.designed(HeadOutputDocuments)).observe(target, hook)
        chosen = choose(before, claim.designed(Alive))
        live = fires(measured, chosen.division.alive)
        for head in range(target.n_heads):
            name, sources = f"L{layer_of(hook)}H{head}", measured.documents.sources
            least, design = claim.gates[FEATURES], claim.designed(GroupLikeness)
            seeds = (claim.digest, target.name, name)
            group = group_of(chosen, live, sources, head, least, design, seeds)
            if group is None:
                why = f"fewer than {least:g} features of the dictionary at {hook!r} have this top head, or others"
                found[name] = Evidence(claim=claim, head=name, undecided=why)
                continue
            samples[name] = excess(claim, target.name, name, group, sources)
            detail[name] = _beside(target, hook, measured, chosen, group, head, name)
            detail[name]["draws of the control"] = f"{design.draws} for each of {len(set(sources))} sources"
    rows = {h: Beside(candidates=("the head's likest pairs",), detail=own) for h, own in detail.items()}
    found |= decide(claim, [Sampled(name=claim.condition, samples=samples)], rows)
    for name in target.heads:
        if name not in found:
            found[name] = Evidence(
                claim=claim, head=name, cannot=NO_HEAD_OUTPUT_DICTIONARY.replace("target", "target's layer")
            )
    return found


def _beside(
    target: Target, hook: str, measured: HeadFirings, chosen: ChosenGroups, group: Group, head: int, name: str
) -> dict[str, Any]:
    """What stands beside a head's number: its likest pair's feature, and how alike directions are (descriptive)."""
    alive = chosen.division.alive
    sae, text = target.dictionaries[hook], text_of(target.tokenizer)
    shown: Mapping[str, Any] | None = feature_example(
        measured.outputs,
        sae,
        measured.documents.tokens,
        int(alive[int(group.pairs[0, 0])]),
        text,
        {name: head},
        measured.live,
    )
    unit = torch.nn.functional.normalize(sae.W_dec.detach()[alive], dim=-1)
    cosine = (unit[torch.as_tensor(group.pairs[:, 0])] * unit[torch.as_tensor(group.pairs[:, 1])]).sum(-1)
    return ({} if shown is None else {FEATURE: shown}) | {
        "pairs": [[int(alive[int(k)]) for k in pair] for pair in group.pairs],
        "Jaccard": float(group.own[0].sum() / max(group.own[1].sum(), 1.0)),
        "Jaccard of random heads' features": float(group.drawn[0].sum() / max(group.drawn[1].sum(), 1.0)),
        "decoder cosine of the pairs": float(cosine.mean()),
    }
