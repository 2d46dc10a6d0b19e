"""Evidence for the claims about CIH channels and sets: screens turned into conditions for the judge.

What is dear comes last and is measured only for heads that can still pass or be refuted: dictionaries of random atoms
and other lags for heads that meet every sampled condition at the level before any correction, scrambles as
`fra.statistics.nulls` draws them, planted channels for heads that would be refuted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike

from fra.induction.cih import Screen, families
from fra.induction.outside import outside, status_detail
from fra.measures.channels.details import (
    ATTENTION,
    CONTRAST,
    COVERAGE,
    EFFECT,
    OVER_HEADS,
    OVER_LAGS,
    OVER_PAIRS,
    OVER_SCRAMBLES,
    channel_detail,
    live_candidates,
    set_detail,
)
from fra.search.best_effect import mean_effect
from fra.search.channels import Effects
from fra.search.designs import ChannelSearch, Plantings
from fra.search.power import ChannelBars, count_found
from fra.search.screen import HeadScreen, LayerScreen
from fra.statistics import stats
from fra.verdicts.among import Among
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Column, Drawn, Given, Planted, Sampled, decide, means_of

GATE = "feature-feature share"
"""The set claim's gate: the share of the stripe's contrast that the feature-feature block must carry."""
SET, SHARE, OVER_ATOMS = "set effect", "share of contrast", "over random atoms"


@torch.no_grad()
def set_evidence(claim: Claim, screened: Screen) -> dict[str, Evidence]:
    """Q04: the CIH set of every TIH against its bars, random atoms and its own scrambles; other heads with the reason
    why they are not tested.

    Random atoms are a number that can deny: the effect with the own features less the largest of
    `ChannelNulls.dictionaries` dictionaries of random atoms. A rank at the corrected level would take hundreds of
    dictionaries at some seconds each; that the own one is the first of 21 has a chance of 1/21 where features are like
    any directions, for one head, and stands beside ranks that are corrected.
    """
    screened.held_to(claim)
    heads = families(screened)["TIH"]
    found = outside(claim, screened)
    if not heads:
        return found
    size = claim.designed(ChannelSearch).candidates
    screens = {h: screened.heads[h] for h in heads}

    def means(
        seed: str, sums: Callable[[HeadScreen], np.ndarray], rows: Callable[[HeadScreen], np.ndarray]
    ) -> dict[str, stats.ClusterMeans]:
        return {
            h: means_of(claim, screened.target, h, seed, sums(s), rows(s), s.set_sources) for h, s in screens.items()
        }

    def own(s: HeadScreen) -> Effects:
        return s.set_effects[size]

    effect = means(SET, lambda s: own(s).nats[:, 0], lambda s: own(s).rows[:, 0])
    share = means(SHARE, lambda s: own(s).attention[:, 0] - claim.bars[SHARE] * s.contrast, lambda s: s.set_rows)
    shares = {
        h: (own(s).attention.sum() / s.set_rows.sum(), s.contrast.sum() / s.set_rows.sum()) for h, s in screens.items()
    }
    sampled = (Sampled(name=SET, samples=effect), Sampled(name=SHARE, samples=share, shares=shares))
    gates = {h: _gate(claim, screened, h) for h in heads}
    standing = [h for h in _standing(claim, sampled, heads) if gates[h] is None]
    atoms = {h: screened.layer_of(h).over_atoms[screens[h].head] for h in standing}
    over = {h: atoms[h][0] - max(atoms[h][1]) if h in atoms else np.nan for h in heads}
    columns: list[Column] = [
        *sampled,
        Given(OVER_ATOMS, over),
        Drawn(
            observed={OVER_SCRAMBLES: {h: _of_layer(screened, h, LayerScreen.own_set) for h in standing}},
            draw=lambda h, k: {OVER_SCRAMBLES: screened.layer_of(h).scrambled_set(screens[h].head, k)},
        ),
    ]
    rows = {}
    for h, s in screens.items():
        detail = set_detail(screened, h, _carried(s), effect[h], claim.level / len(heads))
        if h in atoms:
            detail["the set with own features, on fewer documents (nats)"] = atoms[h][0]
            detail["the same with dictionaries of random atoms (nats)"] = atoms[h][1]
        rows[h] = Beside(
            candidates=(f"the {size} strongest channels",),
            undecided=gates[h],
            detail=detail | channel_detail(screened, h, {}, claim.level),
        )
    return found | decide(claim, columns, rows)


def _carried(s: HeadScreen) -> float:
    """Share of the head's stripe contrast that the feature-feature block carries."""
    total = sum(s.blocks.values())
    return s.blocks["ff"] / total if total > 0 else float("nan")


def _gate(claim: Claim, screened: Screen, h: str) -> str | None:
    """Why features cannot answer for the head; None where they can."""
    carried = _carried(screened.heads[h])
    if carried >= claim.gates[GATE]:
        return None
    return (
        f"the feature-feature block carries {carried:.0%} of the head's stripe contrast on {screened.stimulus}; "
        f"{claim.gates[GATE]:.0%} is needed before its channels can answer for the head"
    )


def _of_layer(screened: Screen, h: str, measure: Callable[[LayerScreen, int], float]) -> float:
    return measure(screened.layer_of(h), screened.heads[h].head)


def _standing(claim: Claim, sampled: Sequence[Sampled], heads: Sequence[str]) -> list[str]:
    """Heads of which some candidate meets every sampled condition at the level, before any correction over heads."""
    found = []
    for h in heads:
        tests = []
        for column in sampled:
            sample = column.samples.get(h)
            if isinstance(sample, stats.ClusterMeans):
                bar = 0.0 if column.shares is not None else claim.bar_of(column.name)
                own = sample if column.chosen is None else Among(sample, column.chosen[h])
                tests.append(own.p_above(bar, column.simultaneous) <= claim.level)
        if len(tests) == len(sampled) and bool(np.logical_and.reduce(tests).any()):
            found.append(h)
    return found


@torch.no_grad()
def channel_evidence(claim: Claim, screened: Screen, family: str = "not a TIH") -> dict[str, Evidence]:
    """Q05: an expressed channel among the candidates of every head of a family; one and the same candidate must pass
    everything. Power is that of this very decision (`fra.search.power.count_found`).

    Other heads stand with the reason why they are not tested.
    """
    screened.held_to(claim)
    heads = families(screened)[family]
    found = outside(claim, screened, family)
    if not heads:
        return found
    keep = {h: live for h in heads if len(live := _live(claim, screened.heads[h]))}
    bars = ChannelBars(*(claim.bar_of(name) for name in (EFFECT, ATTENTION, CONTRAST, COVERAGE, OVER_PAIRS)))
    chosen = {h: _chosen(claim, screened.heads[h], bars)[live] for h, live in keep.items()}
    sampled = tuple(_sampled(claim, screened, keep, chosen, name, part) for name, part in _PARTS.items())
    standing = _standing(claim, sampled, list(keep))
    columns: list[Column] = [*sampled, *_given(claim, screened, keep, standing)]
    # by the rule that its scrambles are held to: what few of these documents have live has no effect there
    least = claim.designed(ChannelSearch).least_documents
    observed = {h: mean_effect(screened.heads[h].ranked, least)[live] for h, live in keep.items()}
    columns.append(
        Drawn(
            observed={OVER_SCRAMBLES: observed},
            draw=lambda h, k: {OVER_SCRAMBLES: screened.layer_of(h).scrambled_best(screened.heads[h].head, k)},
        )
    )
    missed: dict[str, dict[str, int]] = {}

    def planted(h: str) -> Planted:
        seen, missed[h] = count_found(
            screened.layer_of(h),
            screened.heads[h].head,
            bars,
            claim.designed(Plantings),
            {part: column.samples[h] for part, column in zip(_PARTS.values(), sampled, strict=True)},  # type: ignore[misc]
            int(chosen[h].sum()),
            len(keep),
            claim.level,
        )
        return seen

    rows = {h: Beside(n=_sources(screened.heads[h]), candidates=_names(claim, screened.heads[h])) for h in heads}
    smallest = {h: detectable(sampled[0], h, claim.level / len(heads)) for h in keep}
    for h, own in decide(claim, columns, rows, planted=planted).items():
        detail = channel_detail(screened, h, own.candidates, claim.level, smallest.get(h)) | dict(own.detail)
        if h in chosen:
            detail["candidates that stand on discovery documents"] = int(chosen[h].sum())
        if missed.get(h):
            detail["planted and missed, by what missed them first"] = missed[h]
        found[h] = replace(own, detail=detail | {"status": status_detail(screened.status[h])})
    return found


_PARTS = {EFFECT: "nats", CONTRAST: "contrast", ATTENTION: "attention"}
"""Conditions that samples of documents decide, with their part of `Effects`."""


def _live(claim: Claim, s: HeadScreen) -> np.ndarray:
    return live_candidates(s, claim.designed(ChannelSearch).least_documents)


def _names(claim: Claim, s: HeadScreen) -> list[str]:
    """Names of the channels that are measured."""
    return [f"{i} -> {j}" for i, j in s.pairs[_live(claim, s)]]


def _sources(s: HeadScreen) -> int:
    return len(set(s.sources))


def _chosen(claim: Claim, s: HeadScreen, bars: ChannelBars) -> np.ndarray:
    """[n] the candidates that may make the head pass: those that reach a share of their bars on discovery documents."""
    if s.discovered is None:
        return np.ones(len(s.pairs), dtype=bool)
    return bars.stand(s.discovered, claim.designed(ChannelSearch).stands)


def _sampled(
    claim: Claim, screened: Screen, keep: dict[str, np.ndarray], chosen: dict[str, np.ndarray], name: str, part: str
) -> Sampled:
    means = {}
    for h, live in keep.items():
        s = screened.heads[h]
        sums, rows = getattr(s.effects, part)[:, live], s.effects.rows[:, live]
        means[h] = means_of(claim, screened.target, h, name, sums, rows, s.sources)
    return Sampled(name=name, samples=means, simultaneous=True, chosen=chosen)


def _given(claim: Claim, screened: Screen, keep: dict[str, np.ndarray], standing: Sequence[str]) -> list[Given]:
    """What is not estimated, for every measured candidate: other lags only of heads that stand; where the search finds
    nothing that is live or helps at any of them, the effect itself.
    """
    least = claim.designed(ChannelSearch).least_documents

    def lags(h: str, live: np.ndarray) -> ArrayLike:
        if h not in standing:
            return np.full(len(live), np.nan)
        best = screened.layer_of(h).best_at_lags(screened.heads[h].head, at_least=0.0)
        return np.asarray(mean_effect(screened.heads[h].effects, least)[live] - best)

    by_head: dict[str, Callable[[HeadScreen, np.ndarray], ArrayLike]] = {
        OVER_PAIRS: lambda s, live: s.coupling_rank[live],
        OVER_HEADS: lambda s, live: s.above_heads[live],
        COVERAGE: lambda s, live: s.effects.covered[:, live].sum(0) / s.n_rows,
    }
    columns = [
        Given(name, {h: of(screened.heads[h], live) for h, live in keep.items()}) for name, of in by_head.items()
    ]
    return [*columns, Given(OVER_LAGS, {h: lags(h, live) for h, live in keep.items()})]


def detectable(effects: Sampled, h: str, level: float) -> float:
    """The smallest effect (nats; the median over a head's candidates) that the design tells from zero with the power
    that refutations need; NaN where no candidate can be tested.
    """
    sample = effects.samples[h]
    each = stats.detectable(sample, level) if isinstance(sample, stats.ClusterMeans) else np.array([np.nan])
    return float(np.median(each[np.isfinite(each)])) if np.isfinite(each).any() else np.nan
