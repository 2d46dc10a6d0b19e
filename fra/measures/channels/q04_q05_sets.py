"""Evidence for the claims about CIH channels and sets: screens turned into conditions for the judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from fra.induction.best_effect import mean_effect
from fra.induction.cih import Screen, families
from fra.induction.screen import PLANTED_AT_LEAST, HeadScreen
from fra.induction.search import SET_SIZE
from fra.measures.channels.details import channel_detail, live_candidates, set_detail, status_detail
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.conditions import cluster_means, exact, false_discovery, rank_condition, two_sided

GATE = "gate: feature-feature share"
"""Name of the set claim's gate among its bars: the share of the stripe's contrast that the feature-feature block
must carry.
"""


def outside(claim: Claim, screened: Screen, family: str) -> dict[str, Evidence]:
    """Why each head that is not in the family stands outside it. A head that the target lists as a TIH and that is
    none leaves the claim undecided there.
    """
    found = {}
    for name, status in screened.status.items():
        detail = {"status": status_detail(status)}
        if name in screened.known_tih and status.status != "TIH":
            reason = f"the target lists this head as a TIH, but it is {status.status} on {screened.stimulus}"
            found[name] = Evidence(claim=claim, head=name, undecided=reason, detail=detail)
        elif name in screened.controls and status.status in ("TIH", family):
            reason = "a layer-0 head, whose keys cannot know their predecessors: a control, in no family"
            best = {"best channel effect (nats)": screened.controls[name]}
            found[name] = Evidence(claim=claim, head=name, cannot=reason, detail=detail | best)
        elif name not in screened.heads and status.status == family:
            reason = "the target has no dictionary at this layer's attention input"
            found[name] = Evidence(claim=claim, head=name, cannot=reason, detail=detail)
        else:
            what = {"TIH": "a TIH", "undecided": "neither clearly a TIH nor clearly none"}.get(
                status.status, status.status
            )
            found[name] = Evidence(claim=claim, head=name, cannot=f"not in the family: {what}", detail=detail)
    return found


def set_evidence(claim: Claim, screened: Screen) -> dict[str, Evidence]:
    """Q04: the CIH set of every TIH against its bars, random atoms and scrambles; other heads with the reason why
    they are not tested.
    """
    heads = families(screened)["TIH"]
    found = outside(claim, screened, "TIH")
    if not heads:
        return found
    size, level = SET_SIZE, claim.level

    def means(
        name: str, sums: Callable[[HeadScreen], np.ndarray], counts: Callable[[HeadScreen], np.ndarray]
    ) -> dict[str, stats.ClusterMeans]:
        return {
            h: cluster_means(
                sums(screened.heads[h]),
                counts(screened.heads[h]),
                screened.heads[h].set_sources,
                stats.seed_of(claim.digest, screened.target, h, name),
            )
            for h in heads
        }

    n_atoms = len(screened.heads[heads[0]].atom_effects)
    refutable = 2 + n_atoms
    every: dict[str, Callable[[HeadScreen], np.ndarray]] = {
        "set effect": lambda s: s.set_effects[size].nats[:, 0],
        "share of contrast": lambda s: (
            s.set_effects[size].attention[:, 0] - claim.bars["share of contrast"] * s.contrast
        ),
    }
    effect = means("set effect", every["set effect"], lambda s: s.set_effects[size].rows[:, 0])
    share = means("share of contrast", every["share of contrast"], lambda s: s.set_rows)
    columns = [
        two_sided("set effect", claim.bar, effect, level, refutable, False),
        _shifted(
            two_sided("share of contrast", 0.0, share, level, refutable, False),
            claim.bars["share of contrast"],
            screened,
            size,
        ),
    ]
    for seed in range(n_atoms):
        over = means(f"atoms {seed}", partial(_over_atoms, seed), lambda s: s.set_rows)
        columns.append(
            two_sided(
                f"over random atoms {seed + 1}",
                claim.bars[f"over random atoms {seed + 1}"],
                over,
                level,
                refutable,
                False,
            )
        )
    q = false_discovery(heads, effect, claim.bar)
    channels, smallest, _ = _channel_conditions(claim_bars(claim), level, screened, heads, claim.digest)
    for h in heads:
        s = screened.heads[h]
        own = float(effect[h].estimate[0])
        p = stats.rank_p(own, s.scramble_sets)
        conditions = (*(column[h][0] for column in columns), rank_condition("over scrambled heads", p, level))
        total = sum(s.blocks.values())
        carried = s.blocks["ff"] / total if total > 0 else float("nan")
        undecided = None
        if not carried >= claim.bars[GATE]:
            undecided = (
                f"the feature-feature block carries {carried:.0%} of the head's stripe contrast on "
                f"{screened.stimulus}; {claim.bars[GATE]:.0%} is needed before its channels can answer for the head"
            )
        power = float(stats.power_above(effect[h], 0.0, claim.bar, level / len(heads), simultaneous=False)[0])
        found[h] = Evidence(
            claim=claim,
            head=h,
            candidates={f"the {size} strongest channels": conditions},
            n=len(s.set_rows),
            power=power,
            q=q[h],
            undecided=undecided,
            detail=set_detail(screened, h, carried, effect[h], level / len(heads))
            | channel_detail(screened, h, channels[h], level, smallest.get(h)),
        )
    return found


def _over_atoms(seed: int, s: HeadScreen) -> np.ndarray:
    return np.asarray(s.set_effects[SET_SIZE].nats[:, 0] - s.atom_effects[seed].nats[:, 0])


def _shifted(
    columns: dict[str, list[Condition]], bar: float, screened: Screen, size: int
) -> dict[str, list[Condition]]:
    """The linear form dA - bar * contrast > 0 said again as a share of the contrast (bounds over the head's mean
    contrast).
    """
    out = {}
    for h, (c,) in columns.items():
        s = screened.heads[h]
        mean = s.contrast.sum() / s.set_rows.sum()
        share = s.set_effects[size].attention.sum() / s.contrast.sum()
        ends = [share + (end - c.effect) / mean if mean > 0 else float("nan") for end in (c.low, c.high)]
        out[h] = [Condition(c.name, float(share), float(ends[0]), float(ends[1]), bar, p=c.p, p_refute=c.p_refute)]
    return out


def claim_bars(claim: Claim) -> Mapping[str, float]:
    """Bars of a CIH channel, as a claim registers them."""
    return {
        name: claim.bars[name] for name in ("effect", "head contrast", "attention", "coverage") if name in claim.bars
    }


def channel_evidence(claim: Claim, screened: Screen, family: str = "not a TIH") -> dict[str, Evidence]:
    """Q05: an expressed channel among the candidates of every head of a family; one and the same candidate must pass
    everything.

    Other heads stand with the reason why they are not tested.
    """
    heads = families(screened)[family]
    found = outside(claim, screened, family)
    if not heads:
        return found
    conditions, smallest, effects = _channel_conditions(claim_bars(claim), claim.level, screened, heads, claim.digest)
    q = false_discovery(heads, effects, claim_bars(claim)["effect"], True)
    for h in heads:
        s = screened.heads[h]
        power = s.planted_found / s.planted if s.planted >= PLANTED_AT_LEAST else float("nan")
        found[h] = Evidence(
            claim=claim,
            head=h,
            candidates=conditions[h],
            n=len(s.effects.rows),
            power=power,
            q=q[h],
            detail=channel_detail(screened, h, conditions[h], claim.level, smallest.get(h))
            | {"status": status_detail(screened.status[h])},
        )
    return found


def _channel_conditions(
    bars: Mapping[str, float], level: float, screened: Screen, heads: Sequence[str], digest: str
) -> tuple[dict[str, dict[str, tuple[Condition, ...]]], dict[str, float], dict[str, stats.ClusterMeans]]:
    """All conditions of an expressed CIH channel for every measured candidate of every head; for each head the smallest
    effect (nats; the median over its candidates) that the design tells from zero with power 0.8; and the effects of
    the heads that were measured.
    """
    keep = {h: live_candidates(screened.heads[h]) for h in heads}
    measured = [h for h in heads if len(keep[h])]

    detectable: dict[str, float] = {}
    effects: dict[str, stats.ClusterMeans] = {}

    def column(name: str, part: str, bar: float) -> dict[str, list[Condition]]:
        means = {}
        for h in measured:
            s = screened.heads[h]
            sums, rows = getattr(s.effects, part)[:, keep[h]], s.effects.rows[:, keep[h]]
            means[h] = cluster_means(sums, rows, s.sources, stats.seed_of(digest, screened.target, h, name))
        if name == "effect":
            effects.update(means)
            for h, m in means.items():
                smallest = stats.detectable(m, level / len(heads))
                detectable[h] = (
                    float(np.median(smallest[np.isfinite(smallest)])) if np.isfinite(smallest).any() else np.nan
                )
        return two_sided(name, bar, means, level, 3, True)

    effect = column("effect", "nats", bars["effect"])
    contrast = column("head contrast", "contrast", bars["head contrast"])
    attention = column("attention", "attention", bars["attention"])
    found: dict[str, dict[str, tuple[Condition, ...]]] = {h: {} for h in heads}
    for h in measured:
        s = screened.heads[h]
        E = mean_effect(s.effects)
        for n, c in enumerate(keep[h]):
            covered = s.effects.covered[:, c].sum() / s.n_rows
            found[h][f"{s.pairs[c, 0]} -> {s.pairs[c, 1]}"] = (
                effect[h][n],
                rank_condition("over other lags", float(s.p_lag[c]), level),
                rank_condition("coupling among matched pairs", float(s.p_coupling[c]), level),
                exact("coupling over other heads", float(s.above_heads[c]), 0.0),
                rank_condition("over scrambled heads", stats.rank_p(float(E[c]), s.scramble_best), level),
                contrast[h][n],
                attention[h][n],
                exact("coverage", float(covered), bars["coverage"]),
            )
    return found, detectable, effects
