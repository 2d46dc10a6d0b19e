"""Are features of different heads the same, and are those of one head alike? Asked of block-diagonal dictionaries.

Partners and directions are chosen on documents of selection and measured on others; the first position of every
document is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.measures.block_diagonal.frontier import NO_STUDY, Frontier, encode, head_of
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import WHOLE, Beside, Sampled, decide
from fra.verdicts.stats import by_source

ALIVE = 20
"""Positions of the selection at which a feature must be live."""
SHUFFLES = 20
LIKE = 0.3
"""Jaccard from which features of several heads make one set (`covering_evidence`)."""
_LEAST_SETS = 10
OVER_SHUFFLED = "Jaccard over shuffled"


@dataclass(frozen=True)
class Activations:
    """Activations of one dictionary on documents, padded to the longest."""

    acts: Float[Tensor, "docs pos d_sae"]
    valid: Bool[Tensor, "docs pos"]
    sources: Sequence[str]

    @property
    def live(self) -> Float[Tensor, "docs pos d_sae"]:
        """One where a feature is live."""
        return (self.acts > 0).float()

    def rolls(self, seed: int) -> list[int]:
        """Shifts of the document order that pair no two documents of one source (any shift where there is none)."""
        n = len(self.sources)
        names = np.asarray(self.sources)
        apart = [r for r in range(1, n) if (names != np.roll(names, r)).all()] or list(range(1, n))
        return [int(r) for r in np.random.default_rng(seed).permutation(apart)[:SHUFFLES]]


@torch.no_grad()
def activations(frontier: Frontier, sae: Any) -> tuple[Activations, Activations]:
    """The dictionary's activations on the documents of selection and on the measured ones."""

    def on(documents: Sequence[Tensor], sources: Sequence[str]) -> Activations:
        acts = [encode(sae, z[1:]).cpu() for z in frontier.head_outputs(documents)]
        padded = torch.nn.utils.rnn.pad_sequence(acts, batch_first=True)
        lengths = torch.tensor([len(a) for a in acts])
        return Activations(padded, torch.arange(padded.shape[1]) < lengths[:, None], sources)

    return on(frontier.selection, frontier.selection_sources), on(frontier.measured, frontier.sources)


def jaccard(a: Float[Tensor, "docs pos n"], b: Float[Tensor, "docs pos m"]) -> Float[Tensor, "n m"]:
    """|both| / |either| over all positions, for every pair."""
    x, y = a.flatten(0, 1), b.flatten(0, 1)
    both = x.T @ y
    return both / (x.sum(0)[:, None] + y.sum(0) - both).clamp(min=1)


@dataclass(frozen=True)
class Matches:
    """Each signal's best partner on the selection, and how they fire together in the measured documents."""

    partner: Int[Tensor, " n"]
    chosen: Float[Tensor, " n"]
    """Jaccard on the selection, which the choice has inflated."""
    both: Float[np.ndarray, "docs n"]
    either: Float[np.ndarray, "docs n"]
    weight: Float[np.ndarray, " n"]
    """1 / positions where either fires on the selection: every signal counts about the same."""

    @property
    def jaccard(self) -> Float[np.ndarray, " n"]:
        """Measured Jaccard of every signal with its partner."""
        found: np.ndarray = self.both.sum(0) / np.maximum(self.either.sum(0), 1)
        return found


def match(selection: tuple[Tensor, Tensor], measured: tuple[Tensor, Tensor], allowed: Bool[Tensor, "n m"]) -> Matches:
    """Best partners of signals [docs, pos, n] among features [docs, pos, m], of those allowed."""
    scores = jaccard(*selection).masked_fill(~allowed, -1.0)
    chosen, partner = scores.max(dim=1)
    signal, other = measured[0], measured[1][..., partner]
    both = (signal * other).sum(1).double()
    either = torch.maximum(signal, other).sum(1).double()
    used = torch.maximum(selection[0], selection[1][..., partner]).sum((0, 1)).double()
    return Matches(partner, chosen, both.numpy(), either.numpy(), (1 / used.clamp(min=1)).numpy())


def _shifted(a: Tensor, b: Tensor, valid: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Signals of each document beside features of another one, where both have the position."""
    on = valid.roll(r, 0)[..., None].to(a.dtype)
    return a * on, b.roll(r, 0) * valid[..., None].to(b.dtype)


def shuffled_jaccard(
    sel: Activations,
    meas: Activations,
    signal: tuple[Tensor, Tensor],
    feature: tuple[Tensor, Tensor],
    allowed: Tensor,
    seed: int,
) -> Float[np.ndarray, " n"]:
    """What the same search finds where sequences are shuffled: the mean over shifts of the measured Jaccard."""
    found = [
        match(_shifted(signal[0], feature[0], sel.valid, r), _shifted(signal[1], feature[1], meas.valid, r), allowed)
        for r in sel.rolls(seed)
    ]
    mean: np.ndarray = np.mean([m.jaccard for m in found], axis=0)
    return mean


def _start(claim: Claim, frontier: Frontier | None, arms: Sequence[str]) -> Evidence | list[Any]:
    """The middle dictionary of each arm, or the evidence that says what is missing."""
    if frontier is None:
        return Evidence(claim=claim, head=None, cannot=NO_STUDY)
    found = []
    for arm in arms:
        saes = frontier.target.study(arm)
        if not saes:
            missing = f"the study of {frontier.target.name!r} has no dictionary of the arm {arm!r}"
            return Evidence(claim=claim, head=None, cannot=missing)
        found.append(saes[len(saes) // 2])
    return found


def _means(m: Matches, less: Float[np.ndarray, " n"] | float, meas: Activations, seed: int) -> stats.ClusterMeans:
    """Mean Jaccard of the signals less what is given for each, as a ratio mean over documents."""
    sums = ((m.both - less * m.either) * m.weight).sum(1)
    return stats.ClusterMeans(
        by_source(sums, meas.sources), by_source((m.either * m.weight).sum(1), meas.sources), seed=seed
    )


def redundancy_evidence(claim: Claim, frontier: Frontier | None, arm: str = "block-width") -> Evidence:
    """B05: how well a feature's best match in another head fires with it, above shuffled sequences."""
    started = _start(claim, frontier, [arm])
    if isinstance(started, Evidence):
        return started
    assert frontier is not None
    sae, name = started[0], frontier.target.name
    sel, meas = activations(frontier, sae)
    alive = sel.live.sum((0, 1)) >= ALIVE
    owner = head_of(sae, frontier.n_heads).cpu()
    allowed = (owner[alive][:, None] != owner) & alive
    if int(alive.sum()) < 2 or not bool(allowed.any(1).all()):
        return Evidence(
            claim=claim, head=None, undecided="fewer than two heads have a live feature", n=len(meas.sources)
        )
    signal, feature = (sel.live[..., alive], meas.live[..., alive]), (sel.live, meas.live)
    m = match((signal[0], feature[0]), (signal[1], feature[1]), allowed)
    null = shuffled_jaccard(sel, meas, signal, feature, allowed, stats.seed_of(claim.digest, name, "shuffle"))
    seed = stats.seed_of(claim.digest, name)
    excess, plain = _means(m, null, meas, seed), _means(m, 0.0, meas, seed)
    power = float(stats.power_above(excess, claim.bar, 2 * claim.bar, claim.level, simultaneous=False)[0])
    strongest = np.argsort(-m.jaccard, kind="stable")[:10]
    ids = alive.nonzero()[:, 0]
    detail = {
        "features": {"alive": int(alive.sum()), "of": len(alive)},
        "mean Jaccard with the best match": _interval(plain, claim.level),
        "the same in shuffled sequences": float(null.mean()),
        "share of features with a match of 0.5 or more": _share_interval(m, meas, 0.5, claim.level, seed),
        "the same share in shuffled sequences": float((null >= 0.5).mean()),
        "by head": {
            f"H{h}": float(m.jaccard[(owner[alive] == h).numpy()].mean()) for h in sorted(set(owner[alive].tolist()))
        },
        "strongest pairs": [
            {"feature": int(ids[k]), "match": int(m.partner[k]), "jaccard": float(m.jaccard[k])} for k in strongest
        ],
    }
    columns = [Sampled(name=OVER_SHUFFLED, samples={WHOLE: excess})]
    beside = Beside(n=len(meas.sources), candidates=("best match in another head",), power=power, detail=detail)
    return decide(claim, columns, {WHOLE: beside}, q_over=())[WHOLE]


def covering_evidence(
    claim: Claim, frontier: Frontier | None, arm: str = "block-width", dense: str = "dense"
) -> Evidence:
    """B05.dense: whether one feature of the dense dictionary fires where a set of like features of several heads
    does.
    """
    started = _start(claim, frontier, [arm, dense])
    if isinstance(started, Evidence):
        return started
    assert frontier is not None
    name = frontier.target.name
    sel, meas = activations(frontier, started[0])
    dense_sel, dense_meas = activations(frontier, started[1])
    sets = like_sets(sel, head_of(started[0], frontier.n_heads).cpu())
    n = len(meas.sources)
    if len(sets) < _LEAST_SETS:
        reason = (
            f"{len(sets)} sets of features of several heads fire together ({LIKE} or more), {_LEAST_SETS} are needed"
        )
        return Evidence(claim=claim, head=None, undecided=reason, n=n)
    signal = tuple(torch.stack([f.live[..., list(s)].amax(-1) for s in sets], -1) for f in (sel, meas))
    alive = dense_sel.live.sum((0, 1)) >= ALIVE
    allowed = alive.expand(len(sets), -1)
    pair = (signal[0], signal[1])
    feature = (dense_sel.live, dense_meas.live)
    m = match((pair[0], feature[0]), (pair[1], feature[1]), allowed)
    null = shuffled_jaccard(sel, meas, pair, feature, allowed, stats.seed_of(claim.digest, name, "shuffle"))
    seed = stats.seed_of(claim.digest, name)
    plain, excess = _means(m, 0.0, meas, seed), _means(m, null, meas, seed)
    columns = [
        Sampled(name="Jaccard of one dense feature with the set", samples={WHOLE: plain}),
        Sampled(name=OVER_SHUFFLED, samples={WHOLE: excess}),
    ]
    power = float(stats.power_above(plain, claim.bar, claim.bar + 0.1, claim.level, simultaneous=False)[0])
    detail = {
        "sets": len(sets),
        "heads in a set": float(np.mean([len(s) for s in sets])),
        "share of sets covered at 0.5 or more": _share_interval(m, meas, 0.5, claim.level, seed),
        "mean Jaccard in shuffled sequences": float(null.mean()),
    }
    beside = Beside(n=n, candidates=("best dense feature",), power=power, detail=detail)
    # By Holm over its one row: each condition refutes at the full level, as registered.
    return decide(claim, columns, {WHOLE: beside}, refuting="holm", q_over=())[WHOLE]


def like_sets(sel: Activations, owner: Int[Tensor, " d_sae"]) -> list[tuple[int, ...]]:
    """Each live feature with its best match in every other head where that reaches `LIKE`; sets of one left out."""
    alive = (sel.live.sum((0, 1)) >= ALIVE).nonzero()[:, 0]
    scores, heads = jaccard(sel.live[..., alive], sel.live[..., alive]), owner[alive]
    found = set()
    for k in range(len(alive)):
        members = [int(alive[k])]
        for head in sorted(set(heads.tolist())):
            if head != heads[k]:
                best = scores[k].masked_fill(heads != head, -1.0).argmax()
                if scores[k, best] >= LIKE:
                    members.append(int(alive[best]))
        if len(members) > 1:
            found.add(tuple(sorted(members)))
    return sorted(found)


def _interval(means: stats.ClusterMeans, level: float) -> dict[str, float]:
    return {
        "estimate": float(means.estimate[0]),
        "low": float(means.lower(level, simultaneous=False)[0]),
        "high": float(means.upper(level, simultaneous=False)[0]),
    }


def _share_interval(m: Matches, meas: Activations, least: float, level: float, seed: int) -> dict[str, float]:
    """Share of signals whose Jaccard reaches `least`, with a percentile interval over sources: a description."""
    both, either = by_source(m.both, meas.sources), by_source(m.either, meas.sources)
    w = np.random.default_rng(seed).multinomial(len(both), np.full(len(both), 1 / len(both)), size=1_999)
    drawn = (w @ both >= least * np.maximum(w @ either, 1)).mean(1)
    low, high = np.quantile(drawn, [level, 1 - level])
    return {"estimate": float((m.jaccard >= least).mean()), "low": float(low), "high": float(high)}
