"""How features of a head-output dictionary divide among heads (D04)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.attribution.examples import FEATURE, feature_example
from fra.attribution.head_outputs import Live
from fra.dictionaries.hooks import layer_of
from fra.dictionaries.texts import text_of
from fra.measures.head_outputs.corpus import HeadFirings, HeadOutputCorpus, corpus, shuffled
from fra.measures.head_outputs.designs import Alive, Dominance, HeadOutputDocuments
from fra.statistics import stats
from fra.targets.target import head_output_hooks
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Number
from fra.verdicts.pooled import (
    NO_HEAD_OUTPUT_DICTIONARY,
    ByDictionary,
    by_dictionary,
    clustered_or_number,
    differences,
    evidence,
)

if TYPE_CHECKING:
    from fra.targets.target import Target

_ENTRIES_AT_ONCE = 8192

Progress = Callable[[str], None]
Ratio = tuple[np.ndarray, np.ndarray]
"""Sums and counts by document."""
OVER = "over shuffled blocks"
SPREAD = "spread features"


@dataclass(frozen=True)
class Division:
    """How features divide among heads, chosen on discovery documents."""

    alive: Int[Tensor, " n_alive"]
    share: Float[Tensor, "n_alive n_heads"]
    """Of the sum of squared DFA over firings (Kissane et al. 2024 call it the fraction of variance explained)."""
    weight: Float[Tensor, " n_alive"]
    """1 / a feature's sum of squares: with it, features count alike."""
    count: Int[Tensor, " n_alive"]
    """Firings."""

    @property
    def top(self) -> Int[Tensor, " n_alive"]:
        """The head with the largest share."""
        return self.share.argmax(1)


def divide(discovery: HeadFirings, least: Alive) -> Division:
    """Shares of the heads in every feature that fires often enough."""
    count = discovery.count()
    alive = torch.nonzero(count >= least.firings)[:, 0]
    squares = discovery.summed_squares()[alive]
    total = squares.sum(1).clamp(min=torch.finfo(squares.dtype).tiny)
    return Division(alive, squares / total[:, None], 1 / total, count[alive])


def top_share(measured: HeadFirings, division: Division) -> Ratio:
    """By document: squares of each feature's top head, and of all heads, features weighted alike."""
    squares = measured.squares()[:, division.alive] * division.weight[:, None]
    own = squares.gather(2, division.top[None, :, None].expand(len(squares), -1, 1))
    return _numpy(own.sum((1, 2))), _numpy(squares.sum((1, 2)))


def agreement(measured: HeadFirings, division: Division, design: Dominance) -> tuple[Ratio, int]:
    """By document: firings of spread features at which the strongest source of the top head and that of the second hold
    the same token (not the first position, which every head may fall back on), and all their firings, each weighted by
    how seldom its feature fires on discovery documents. And how many such features there are.
    """
    ordered, heads = division.share.sort(dim=1, descending=True)
    if heads.shape[1] < 2:  # a second head is what is asked for
        return (np.zeros(len(measured.documents)), np.zeros(len(measured.documents))), 0
    spread = (ordered[:, 0] < design.spread_below) & (ordered[:, 1] >= design.second_at_least)
    place = torch.full((measured.outputs.encoder.d_sae,), -1, device=heads.device)
    place[division.alive[spread]] = torch.nonzero(spread)[:, 0]
    at = measured.live.where(place[measured.live.feature] >= 0)
    column = place[at.feature]
    tokens = measured.documents.tokens.to(heads.device)
    held = [tokens[at.doc, strongest_source(measured, at, heads[column, rank])] for rank in (0, 1)]
    weight = 1.0 / division.count[column].to(measured.outputs.z)
    same = weight * (held[0] == held[1])
    return (_by_document(measured, at, same), _by_document(measured, at, weight)), int(spread.sum())


def strongest_source(firings: HeadFirings, at: Live, head: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Key position of the largest contribution through one head, the first position left out."""
    o, found = firings.outputs, []
    every = torch.arange(o.pattern.shape[-1], device=head.device)
    for start in range(0, len(at.doc), _ENTRIES_AT_ONCE):
        some = slice(start, start + _ENTRIES_AT_ONCE)
        part = Live(at.doc[some], at.pos[some], at.feature[some], at.value[some])
        barred = (every > part.pos[:, None]) | (every == 0)
        found.append(o.sources(part, head[some]).masked_fill(barred, -torch.inf).argmax(1))
    return torch.cat(found) if found else head


def _by_document(firings: HeadFirings, at: Live, values: Float[Tensor, " n"]) -> np.ndarray:
    total = torch.zeros(len(firings.documents), dtype=torch.float64, device=values.device)
    return np.asarray(total.index_add_(0, at.doc, values.double()).cpu())


def _numpy(values: Tensor) -> np.ndarray:
    return np.asarray(values.double().cpu())


@dataclass(frozen=True)
class Divided:
    """A dictionary's features on measured documents: its own, or under shuffled blocks."""

    share: Ratio
    agree: Ratio
    alive: int
    spread: float
    """Spread features; under shuffled blocks their mean over the draws."""


def _measure(measured: HeadFirings, division: Division, design: Dominance) -> Divided:
    agree, n = agreement(measured, division, design)
    return Divided(top_share(measured, division), agree, len(division.alive), float(n))


def groups(sources: Sequence[str], draws: int, seed: int) -> list[list[int]]:
    """Documents by draw of the control: sources dealt to the draws in random order, all documents of one source to one
    draw; as many draws as there are sources, at most.
    """
    names = np.random.default_rng(seed).permutation(sorted(set(sources)))
    draw = {str(name): k % draws for k, name in enumerate(names)}
    dealt = [[n for n, source in enumerate(sources) if draw[source] == k] for k in range(draws)]
    return [own for own in dealt if own]


def under_shuffles(
    discovery: HeadFirings,
    measured: HeadFirings,
    dealt: Sequence[Sequence[int]],
    least: Alive,
    design: Dominance,
    seeds: Any,
) -> Divided:
    """The control: one draw of shuffled blocks for each part of the measured documents, with living features, their top
    heads and the spread ones among them chosen anew on discovery documents.
    """
    n = len(measured.documents)
    share, agree = (np.zeros(n), np.zeros(n)), (np.zeros(n), np.zeros(n))
    alive, spread = [], []
    for number, some in enumerate(dealt):
        encoder = shuffled(discovery.outputs.encoder, stats.seed_of(*seeds, "shuffled blocks", str(number)))
        division = divide(discovery.under(encoder), least)
        own = _measure(measured.part(some).under(encoder), division, design)
        for whole, part in ((share, own.share), (agree, own.agree)):
            whole[0][list(some)], whole[1][list(some)] = part
        alive.append(own.alive)
        spread.append(own.spread)
    return Divided(share, agree, round(float(np.mean(alive))), float(np.mean(spread)))


@torch.no_grad()
def dominance_evidence(
    dominated: Claim, spread: Claim, target: Target, progress: Progress = lambda _: None
) -> dict[str, Evidence]:
    """D04 and D04.spread, by claim id: one row each for every dictionary of head outputs."""
    hooks = head_output_hooks(target)
    if not hooks:
        return {
            claim.id: Evidence(claim=claim, head=None, cannot=NO_HEAD_OUTPUT_DICTIONARY)
            for claim in (dominated, spread)
        }
    documents: HeadOutputCorpus = corpus(target, dominated.designed(HeadOutputDocuments))
    least, design, sources = dominated.designed(Alive), dominated.designed(Dominance), documents.measured.sources
    dealt = groups(sources, design.shuffles, stats.seed_of(dominated.digest, target.name, "dealt to draws"))
    of_draw = {n: f"draw {k}" for k, some in enumerate(dealt) for n in some}
    draws = [of_draw[n] for n in range(len(sources))]
    shares: dict[str, stats.ClusterMeans | Number] = {}
    over: dict[str, stats.ClusterMeans | Number] = {}
    agree: dict[str, stats.ClusterMeans | Number] = {}
    numbers: dict[str, dict[str, Any]] = {}
    pictures: dict[str, dict[str, Any]] = {dominated.id: {}, spread.id: {}}
    fewest = math.inf
    for hook in hooks:
        progress(f"D04: {hook}")
        before, measured = documents.observe(target, hook)
        division = divide(before, least)
        own = _measure(measured, division, design)
        control = under_shuffles(before, measured, dealt, least, design, (dominated.digest, target.name, hook))
        shares[hook] = clustered_or_number(*own.share, sources, (dominated.digest, target.name, hook, "share"))
        over[hook] = differences(own.share, control.share, draws, (dominated.digest, target.name, hook, "over"))
        agree[hook] = differences(own.agree, control.agree, draws, (spread.digest, target.name, hook))
        fewest = min(fewest, own.spread)
        for claim, most in ((dominated, 1), (spread, 2)):
            if (shown := _picture(target, measured, division, hook, most)) is not None:
                pictures[claim.id][hook] = shown
        numbers[hook] = _numbers(target, division, own, control)
    shown_draws = f"{len(dealt)}, each on its own part of the sources: a cluster"
    found = {}
    for claim, columns in ((dominated, {dominated.condition: shares, OVER: over}), (spread, {spread.condition: agree})):
        measured_by = [ByDictionary(name, means) for name, means in columns.items()]
        detail: dict[str, Any] = {f"{FEATURE}, by dictionary": pictures[claim.id]} if pictures[claim.id] else {}
        detail |= {
            "by dictionary": by_dictionary(measured_by, claim.level),
            "numbers": numbers,
            "draws of the control": shown_draws,
        }
        if claim is spread and fewest < claim.gates[SPREAD]:
            why = f"{fewest:g} features are spread over several heads, where {claim.gates[SPREAD]:g} are needed"
            found[claim.id] = Evidence(claim=claim, head=None, undecided=why, detail=detail)
        else:
            found[claim.id] = evidence(claim, measured_by, detail)
    return found


def _numbers(target: Target, division: Division, own: Divided, control: Divided) -> dict[str, Any]:
    """What stands beside the conditions of one dictionary."""
    top = division.share.max(1).values
    return {
        "features alive": own.alive,
        "features alive under the shuffle": control.alive,
        "quartiles of the top head's share": [float(x) for x in np.quantile(_numpy(top), (0.25, 0.5, 0.75))],
        "top head's share under the shuffle": _share(control.share),
        "features by their top head": torch.bincount(division.top, minlength=target.n_heads).tolist(),
        "spread features": own.spread,
        "spread features under the shuffle": control.spread,
        "agreement": [_share(ratio) for ratio in (own.agree, control.agree)],
    }


def _share(ratio: Ratio) -> float:
    """Of all documents together; NaN where there is nothing to take a share of."""
    part, whole = (float(side.sum()) for side in ratio)
    return part / whole if whole else float("nan")


def _picture(target: Target, firings: HeadFirings, division: Division, hook: str, rank: int) -> dict[str, Any] | None:
    """The feature whose head of this rank has the largest share, where it fires most on measured documents, with its
    sources through its heads as far as this rank; None where the layer has not so many heads, or nothing fires.
    """
    at = firings.live
    shares, heads = division.share.sort(dim=1, descending=True)
    fires = torch.isin(division.alive, at.feature)
    if heads.shape[1] < rank or not bool(fires.any()):
        return None
    best = int(shares[:, rank - 1].masked_fill(~fires, -1.0).argmax())
    layer = layer_of(hook)
    through = {f"L{layer}H{h}": h for h in heads[best, :rank].tolist()}
    feature, text = int(division.alive[best]), text_of(target.tokenizer)
    tokens = firings.documents.tokens
    found = feature_example(firings.outputs, target.dictionaries[hook], tokens, feature, text, through, at)
    return None if found is None else dict(found)
