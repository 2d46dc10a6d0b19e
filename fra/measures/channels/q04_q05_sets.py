"""Evidence for the claims about CIH channels and sets: screens turned into conditions for the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from fra.induction.best_effect import mean_effect
from fra.induction.channels import Effects
from fra.induction.cih import Screen, families
from fra.induction.outside import outside, status_detail
from fra.induction.screen import PLANTED_AT_LEAST, HeadScreen
from fra.induction.search import SET_SIZE
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
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.conditions import exact
from fra.verdicts.decide import Beside, Given, Power, Sampled, corrected, decide, means_of, ranked

GATE = "gate: feature-feature share"
"""Name of the set claim's gate among its bars: the share of the stripe's contrast that the feature-feature block
must carry.
"""
SHARE = "share of contrast"


def set_evidence(claim: Claim, screened: Screen) -> dict[str, Evidence]:
    """Q04: the CIH set of every TIH against its bars, random atoms and scrambles; other heads with the reason why
    they are not tested.
    """
    heads = families(screened)["TIH"]
    found = outside(claim, screened)
    if not heads:
        return found
    screens = {h: screened.heads[h] for h in heads}

    def means(
        seed: str,
        sums: Callable[[HeadScreen], np.ndarray],
        rows: Callable[[HeadScreen], np.ndarray] = lambda s: s.set_rows,
    ) -> dict[str, stats.ClusterMeans]:
        return {
            h: means_of(claim, screened.target, h, seed, sums(s), rows(s), s.set_sources) for h, s in screens.items()
        }

    effect = means("set effect", lambda s: _set(s).nats[:, 0], lambda s: _set(s).rows[:, 0])
    share = means(SHARE, lambda s: _set(s).attention[:, 0] - claim.bars[SHARE] * s.contrast)
    shares = {
        h: (_set(s).attention.sum() / s.set_rows.sum(), s.contrast.sum() / s.set_rows.sum()) for h, s in screens.items()
    }
    scrambles = {h: stats.rank_p(float(m.estimate[0]), screens[h].scramble_sets) for h, m in effect.items()}
    columns: list[Sampled | Given] = [
        Sampled(name="set effect", samples=effect),
        Sampled(name=SHARE, samples=share, shares=shares),
        *(
            Sampled(name=f"over random atoms {n + 1}", samples=means(f"atoms {n}", partial(_over_atoms, n)))
            for n in range(len(screens[heads[0]].atom_effects))
        ),
        ranked(claim, OVER_SCRAMBLES, scrambles),
    ]
    level, rows = claim.level / len(heads), {}
    of_channels = channel_columns(claim, screened, heads)
    channels, smallest = corrected(claim, of_channels).conditions, detectable(of_channels[0], level)
    for h, s in screens.items():
        total = sum(s.blocks.values())
        carried = s.blocks["ff"] / total if total > 0 else float("nan")
        undecided = None
        if not carried >= claim.bars[GATE]:
            undecided = (
                f"the feature-feature block carries {carried:.0%} of the head's stripe contrast on "
                f"{screened.stimulus}; {claim.bars[GATE]:.0%} is needed before its channels can answer for the head"
            )
        own = dict(zip(candidates(s), channels.get(h, ()), strict=True))
        rows[h] = Beside(
            n=len(s.set_rows),
            candidates=(f"the {SET_SIZE} strongest channels",),
            undecided=undecided,
            detail=set_detail(screened, h, carried, effect[h], level)
            | channel_detail(screened, h, own, claim.level, smallest.get(h)),
        )
    return found | decide(claim, columns, rows, power=Power("headline"))


def _set(s: HeadScreen) -> Effects:
    return s.set_effects[SET_SIZE]


def _over_atoms(seed: int, s: HeadScreen) -> np.ndarray:
    return np.asarray(_set(s).nats[:, 0] - s.atom_effects[seed].nats[:, 0])


def channel_evidence(claim: Claim, screened: Screen, family: str = "not a TIH") -> dict[str, Evidence]:
    """Q05: an expressed channel among the candidates of every head of a family; one and the same candidate must pass
    everything.

    Other heads stand with the reason why they are not tested.
    """
    heads = families(screened)[family]
    found = outside(claim, screened, family)
    if not heads:
        return found
    rows = {}
    for h in heads:
        s = screened.heads[h]
        power = s.planted_found / s.planted if s.planted >= PLANTED_AT_LEAST else float("nan")
        rows[h] = Beside(n=len(s.effects.rows), candidates=candidates(s), power=power)
    columns = channel_columns(claim, screened, heads)
    smallest = detectable(columns[0], claim.level / len(heads))
    for h, own in decide(claim, columns, rows).items():
        detail = channel_detail(screened, h, own.candidates, claim.level, smallest.get(h))
        found[h] = replace(own, detail=detail | {"status": status_detail(screened.status[h])})
    return found


def candidates(s: HeadScreen) -> list[str]:
    """Names of the channels that are measured."""
    return [f"{i} -> {j}" for i, j in s.pairs[live_candidates(s)]]


def channel_columns(
    claim: Claim, screened: Screen, heads: Sequence[str]
) -> tuple[Sampled, *tuple[Sampled | Given, ...]]:
    """All conditions of an expressed CIH channel, for every measured candidate of every head that has some."""
    keep = {h: live for h in heads if len(live := live_candidates(screened.heads[h]))}

    def sampled(name: str, part: str) -> Sampled:
        means = {}
        for h, live in keep.items():
            s = screened.heads[h]
            sums, rows = getattr(s.effects, part)[:, live], s.effects.rows[:, live]
            means[h] = means_of(claim, screened.target, h, name, sums, rows, s.sources)
        return Sampled(name=name, samples=means, bar=claim.bars[name], simultaneous=True)

    def given(name: str, condition: Callable[[HeadScreen, int], Condition]) -> Given:
        return Given(name, {h: [condition(screened.heads[h], c) for c in live] for h, live in keep.items()})

    screens = {h: screened.heads[h] for h in keep}
    scrambled = {
        h: [stats.rank_p(E, s.scramble_best) for E in mean_effect(s.effects)[keep[h]]] for h, s in screens.items()
    }
    return (
        sampled(EFFECT, "nats"),
        ranked(claim, OVER_LAGS, {h: s.p_lag[keep[h]] for h, s in screens.items()}),
        ranked(claim, OVER_PAIRS, {h: s.p_coupling[keep[h]] for h, s in screens.items()}),
        given(OVER_HEADS, lambda s, c: exact(OVER_HEADS, float(s.above_heads[c]), 0.0)),
        ranked(claim, OVER_SCRAMBLES, scrambled),
        sampled(CONTRAST, "contrast"),
        sampled(ATTENTION, "attention"),
        given(COVERAGE, lambda s, c: exact(COVERAGE, s.effects.covered[:, c].sum() / s.n_rows, claim.bars[COVERAGE])),
    )


def detectable(effects: Sampled, level: float) -> dict[str, float]:
    """For each head the smallest effect (nats; the median over its candidates) that the design tells from zero with
    power 0.8; NaN where no candidate can be tested.
    """
    smallest = {h: stats.detectable(m, level) for h, m in effects.samples.items() if isinstance(m, stats.ClusterMeans)}
    return {h: float(np.median(d[np.isfinite(d)])) if np.isfinite(d).any() else np.nan for h, d in smallest.items()}
