"""How features of a head-output dictionary divide among heads (D04), and what decoder norms say of it (D06)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from fra.architectures.known import architecture_of
from fra.attribution.examples import FEATURE, feature_example
from fra.attribution.head_outputs import Live
from fra.dictionaries.encoder import head_output_layer
from fra.dictionaries.hooks import layer_of
from fra.measures.head_outputs.corpus import MIN_FIRINGS, CorpusFirings, corpus
from fra.targets.target import head_output_hooks, text_of
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Number
from fra.verdicts.pooled import (
    NO_HEAD_OUTPUT_DICTIONARY,
    ByDictionary,
    by_dictionary,
    clustered,
    clustered_or_number,
    differences,
    evidence,
)

if TYPE_CHECKING:
    from fra.targets.target import Target

SPREAD_BELOW, SECOND_AT_LEAST = 0.5, 0.2
"""A feature is spread where its top head has less than half of the squares and its second at least a fifth."""
MIN_SPREAD = 20
_ENTRIES_AT_ONCE = 8192

Progress = Callable[[str], None]
Ratio = tuple[np.ndarray, np.ndarray]
"""Sums and counts by document."""


@dataclass(frozen=True)
class Division:
    """How features divide among heads, chosen on discovery documents."""

    alive: Int[Tensor, " n_alive"]
    share: Float[Tensor, "n_alive n_heads"]
    """Of the sum of squared DFA over firings (Kissane et al. 2024 call it the fraction of variance explained)."""
    weight: Float[Tensor, " n_alive"]
    """1 / a feature's sum of squares: with it, features count alike."""

    @property
    def top(self) -> Int[Tensor, " n_alive"]:
        """The head with the largest share."""
        return self.share.argmax(1)


def divide(firings: CorpusFirings, alive: Int[Tensor, " n_alive"]) -> Division:
    """Shares of the heads on discovery documents."""
    squares = firings.squares(firings.corpus.discovery)[:, alive].sum(0)
    total = squares.sum(1).clamp(min=torch.finfo(squares.dtype).tiny)
    return Division(alive, squares / total[:, None], 1 / total)


def alive_features(firings: CorpusFirings) -> Int[Tensor, " n_alive"]:
    """Features that fire at least MIN_FIRINGS times on discovery documents."""
    return torch.nonzero(firings.count(firings.corpus.discovery) >= MIN_FIRINGS)[:, 0]


def top_share(firings: CorpusFirings, division: Division) -> Ratio:
    """By measured document: squares of each feature's top head, and of all heads, features weighted alike."""
    squares = firings.squares(firings.corpus.measured)[:, division.alive] * division.weight[:, None]
    own = squares.gather(2, division.top[None, :, None].expand(len(squares), -1, 1))
    return _numpy(own.sum((1, 2))), _numpy(squares.sum((1, 2)))


def agreement(firings: CorpusFirings, division: Division) -> tuple[Ratio, int]:
    """By measured document: firings of spread features at which the strongest source of the top head and that of the
    second hold the same token (not the first position, which every head may fall back on), and all their firings,
    features weighted alike. And how many such features there are.
    """
    ordered, heads = division.share.sort(dim=1, descending=True)
    spread = (ordered[:, 0] < SPREAD_BELOW) & (ordered[:, 1] >= SECOND_AT_LEAST)
    place = torch.full((firings.outputs.encoder.d_sae,), -1, device=heads.device)
    place[division.alive[spread]] = torch.nonzero(spread)[:, 0]
    at = firings.half(firings.corpus.measured)
    at = at.where(place[at.feature] >= 0)
    column = place[at.feature]
    tokens = firings.corpus.tokens.to(heads.device)
    held = [tokens[at.doc, strongest_source(firings, at, heads[column, rank])] for rank in (0, 1)]
    weight = 1.0 / torch.bincount(at.feature, minlength=firings.outputs.encoder.d_sae)[at.feature]
    weight = weight.to(firings.outputs.z)
    same = weight * (held[0] == held[1])
    return (_by_document(firings, at, same), _by_document(firings, at, weight)), int(spread.sum())


def strongest_source(firings: CorpusFirings, at: Live, head: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Key position of the largest contribution through one head, the first position left out."""
    o, found = firings.outputs, []
    every = torch.arange(o.pattern.shape[-1], device=head.device)
    for start in range(0, len(at.doc), _ENTRIES_AT_ONCE):
        some = slice(start, start + _ENTRIES_AT_ONCE)
        part = Live(at.doc[some], at.pos[some], at.feature[some], at.value[some])
        barred = (every > part.pos[:, None]) | (every == 0)
        found.append(o.sources(part, head[some]).masked_fill(barred, -torch.inf).argmax(1))
    return torch.cat(found) if found else head


def _by_document(firings: CorpusFirings, at: Live, values: Float[Tensor, " n"]) -> np.ndarray:
    total = torch.zeros(len(firings.corpus.documents), dtype=torch.float64, device=values.device)
    total.index_add_(0, at.doc, values.double())
    return np.asarray(total.cpu()[torch.as_tensor(firings.corpus.measured)])


def _numpy(values: Tensor) -> np.ndarray:
    return np.asarray(values.double().cpu())


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
    documents = corpus(target, dominated.n)
    shares: dict[str, stats.ClusterMeans | Number] = {}
    over: dict[str, stats.ClusterMeans | Number] = {}
    agree: dict[str, stats.ClusterMeans | Number] = {}
    numbers: dict[str, dict[str, Any]] = {}
    pictures: dict[str, dict[str, Any]] = {dominated.id: {}, spread.id: {}}
    fewest = math.inf
    for hook in hooks:
        progress(f"D04: {hook}")
        own = documents.observe(target, hook)
        control = own.shuffled(stats.seed_of(target.name, hook, "shuffled blocks"))
        divisions = [divide(each, alive_features(each)) for each in (own, control)]
        ratios = [top_share(each, division) for each, division in zip((own, control), divisions, strict=True)]
        agreements = [agreement(each, division) for each, division in zip((own, control), divisions, strict=True)]
        sources = documents.sources
        shares[hook] = clustered_or_number(*ratios[0], sources, (dominated.digest, target.name, hook, "share"))
        over[hook] = differences(ratios[0], ratios[1], sources, (dominated.digest, target.name, hook, "over"))
        agree[hook] = differences(agreements[0][0], agreements[1][0], sources, (spread.digest, target.name, hook))
        fewest = min(fewest, agreements[0][1])
        for claim, most in ((dominated, 1), (spread, 2)):
            if (shown := _picture(target, own, divisions[0], hook, most)) is not None:
                pictures[claim.id][hook] = shown
        top = divisions[0].share.max(1).values
        numbers[hook] = {
            "features alive": len(divisions[0].alive),
            "features alive under the shuffle": len(divisions[1].alive),
            "quartiles of the top head's share": [float(x) for x in np.quantile(_numpy(top), (0.25, 0.5, 0.75))],
            "top head's share under the shuffle": float(ratios[1][0].sum() / ratios[1][1].sum()),
            "features by their top head": torch.bincount(divisions[0].top, minlength=target.n_heads).tolist(),
            "spread features": agreements[0][1],
            "spread features under the shuffle": agreements[1][1],
            "agreement": [float(s.sum() / c.sum()) if c.sum() else float("nan") for (s, c), _ in agreements],
        }
    n_heads = target.n_heads
    first = [
        ByDictionary("top head's share of squares", dominated.bar, shares, null=1 / n_heads),
        ByDictionary("over shuffled blocks", dominated.bars["over shuffled blocks"], over, null=0.0),
    ]
    second = [ByDictionary("agreement over shuffled blocks", spread.bar, agree, null=0.0)]
    n = len(documents.measured)
    found = {}
    for claim, measured in ((dominated, first), (spread, second)):
        shown = {f"{FEATURE}, by dictionary": pictures[claim.id]} if pictures[claim.id] else {}
        detail = shown | {"by dictionary": by_dictionary(measured, claim.level), "numbers": numbers}
        if claim is spread and fewest < MIN_SPREAD:
            why = f"{fewest} features are spread over several heads, where {MIN_SPREAD} are needed"
            found[claim.id] = Evidence(claim=claim, head=None, undecided=why, n=n, detail=detail)
        else:
            found[claim.id] = evidence(claim, measured, n, detail)
    return found


def _picture(target: Target, firings: CorpusFirings, division: Division, hook: str, rank: int) -> dict[str, Any] | None:
    """The feature whose head of this rank has the largest share, where it fires most on measured documents, with its
    sources through its heads as far as this rank; None where the layer has not so many heads, or nothing fires.
    """
    at = firings.half(firings.corpus.measured)
    shares, heads = division.share.sort(dim=1, descending=True)
    fires = torch.isin(division.alive, at.feature)
    if heads.shape[1] < rank or not bool(fires.any()):
        return None
    best = int(shares[:, rank - 1].masked_fill(~fires, -1.0).argmax())
    layer = layer_of(hook)
    through = {f"L{layer}H{h}": h for h in heads[best, :rank].tolist()}
    feature, text = int(division.alive[best]), text_of(target.tokenizer)
    found = feature_example(
        firings.outputs, target.dictionaries[hook], firings.corpus.tokens, feature, text, through, at
    )
    return None if found is None else dict(found)


def decoder_norms(target: Target, hook: str, through_output: bool) -> Float[Tensor, "d_sae n_heads"]:
    """Norm of each feature's decoder block by head, as it is, or after W_O."""
    sae = target.dictionaries[hook]
    W_O = architecture_of(target.model).read_ov(head_output_layer(sae)).W_O.detach()
    blocks = sae.W_dec.detach().to(W_O).view(len(sae.W_dec), *W_O.shape[:2])
    written = torch.einsum("fhd,hdm->fhm", blocks, W_O) if through_output else blocks
    norms: Tensor = written.norm(dim=-1)
    return norms


def rank_correlations(a: Float[Tensor, "*n n_heads"], b: Float[Tensor, "*n n_heads"]) -> Float[Tensor, "*n"]:
    """Spearman's, along the last dimension; equal numbers (of a block-diagonal dictionary all heads but one are at
    zero) share their mean rank. 0 where all are equal.
    """
    ranks = [torch.from_numpy(rankdata(x.cpu().numpy(), axis=-1)).to(a.device, torch.float64) for x in (a, b)]
    centred = [rank - rank.mean(-1, keepdim=True) for rank in ranks]
    spread = centred[0].square().sum(-1) * centred[1].square().sum(-1)
    return (centred[0] * centred[1]).sum(-1) / spread.sqrt().clamp(min=0.25)  # half a rank at least, or zero


@torch.no_grad()
def norm_evidence(claims: tuple[Claim, Claim], target: Target, progress: Progress = lambda _: None) -> dict[str, Any]:
    """D06 without W_O and with it, by claim id: one row each for every dictionary of head outputs."""
    hooks = head_output_hooks(target)
    if not hooks or target.n_heads < 3:
        why = NO_HEAD_OUTPUT_DICTIONARY if not hooks else "ranks need at least three heads"
        return {claim.id: Evidence(claim=claim, head=None, cannot=why) for claim in claims}
    documents = corpus(target, claims[0].n)
    measured: dict[str, list[ByDictionary]] = {}
    names = ("rank correlation", "over permuted heads", "over another feature's decoder")
    means: dict[tuple[str, str], dict[str, stats.ClusterMeans | Number]] = {
        (c.id, name): {} for c in claims for name in names
    }
    for hook in hooks:
        progress(f"D06: {hook}")
        squares = documents.observe(target, hook).squares(documents.measured)
        fires = squares.sum(-1) > 0
        for claim, through_output in zip(claims, (False, True), strict=True):
            norms = decoder_norms(target, hook, through_output).to(squares)
            generator = torch.Generator().manual_seed(stats.seed_of(target.name, hook, "permuted heads"))
            permuted = norms.gather(1, torch.rand(norms.shape, generator=generator).argsort(1).to(norms.device))
            live = torch.nonzero(fires.any(0))[:, 0]
            if len(live) < 2:
                why = f"fewer than two features of the dictionary at {hook!r} fire"
                n = len(documents.measured)
                return {c.id: Evidence(claim=c, head=None, undecided=why, n=n) for c in claims}
            another = norms.clone()
            another[live] = norms[live.roll(1 + int(torch.randint(len(live) - 1, (1,), generator=generator)))]
            own, *controls = (
                _numpy((rank_correlations(squares, each.expand_as(squares)) * fires).sum(1))
                for each in (norms, permuted, another)
            )
            count = _numpy(fires.sum(1))
            for name, sums in zip(names, (own, own - controls[0], own - controls[1]), strict=True):
                key = (claim.id, name)
                means[key][hook] = clustered(sums, count, documents.sources, (claim.digest, target.name, hook, name))
    found: dict[str, Any] = {}
    for claim in claims:
        measured[claim.id] = [
            ByDictionary(name, claim.bars.get(name, claim.bar), means[claim.id, name], null=0.0) for name in names
        ]
        detail = {"by dictionary": by_dictionary(measured[claim.id], claim.level)}
        found[claim.id] = evidence(claim, measured[claim.id], len(documents.measured), detail)
    return found
