"""Are features of different heads the same, and are those of one head alike? Asked of block-diagonal dictionaries.

Partners and directions are chosen on documents of selection and measured on those of other sources; the first position
of every document is left out. Controls are the same search in shuffled sequences, drawn anew for every training run:
their scatter is part of the scatter between runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.measures.block_diagonal.b03_b04_b07_compare import described, too_few_runs
from fra.measures.block_diagonal.crossed import over_runs
from fra.measures.block_diagonal.designs import ComparedArms, FeatureLikeness
from fra.measures.block_diagonal.frontier import NO_STUDY, Frontier, encode, head_of
from fra.statistics import stats
from fra.statistics.rules import RULES
from fra.statistics.stats import by_source
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import WHOLE, Beside, Sampled, decide

_SHOWN_AT_ONCE = 10  # pairs, for the reader
OVER_SHUFFLED = "Jaccard over shuffled"
COVERING = "Jaccard of one dense feature with the set"


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

    def rolls(self, seed: int, n: int) -> list[int]:
        """At most n shifts of the document order that pair no two documents of one source."""
        names = np.asarray(self.sources)
        apart = [r for r in range(1, len(names)) if (names != np.roll(names, r)).all()]
        return [int(r) for r in np.random.default_rng(seed).permutation(apart)[:n]]

    def alive(self, least: int) -> Bool[Tensor, " d_sae"]:
        """Features that are live at `least` positions or more."""
        found: Tensor = self.live.sum((0, 1)) >= least
        return found


@torch.no_grad()
def activations(frontier: Frontier, sae: Any) -> tuple[Activations, Activations]:
    """The dictionary's activations on the documents of selection and on the measured ones."""

    def on(outputs: Sequence[Tensor], sources: Sequence[str]) -> Activations:
        acts = [encode(sae, z).cpu() for z in outputs]
        padded = torch.nn.utils.rnn.pad_sequence(acts, batch_first=True)
        lengths = torch.tensor([len(a) for a in acts])
        return Activations(padded, torch.arange(padded.shape[1]) < lengths[:, None], sources)

    selection, measured = frontier.outputs
    return on(selection, frontier.selection_sources), on(measured, frontier.sources)


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


def shuffled(
    sel: Activations,
    meas: Activations,
    signal: tuple[Tensor, Tensor],
    feature: tuple[Tensor, Tensor],
    allowed: Tensor,
    seed: int,
    n: int,
) -> list[Matches]:
    """What the same search finds where sequences are shuffled: n times, or as often as documents of different sources
    can be paired. Selection and measured documents are each shuffled among themselves.
    """
    rolls = zip(sel.rolls(stats.seed_of(str(seed), "selection"), n), meas.rolls(seed, n), strict=False)
    return [
        match(_shifted(signal[0], feature[0], sel.valid, r), _shifted(signal[1], feature[1], meas.valid, q), allowed)
        for r, q in rolls
    ]


@dataclass(frozen=True)
class Searched:
    """One training run: how signals and their best partners fire together, and the same in shuffled sequences."""

    m: Matches
    null: Sequence[Matches]
    sources: Sequence[str]
    features: Mapping[str, Any] = field(default_factory=dict)
    """For the reader."""

    @property
    def shuffled(self) -> Float[np.ndarray, " n"]:
        """Mean over the shuffles of each signal's measured Jaccard."""
        found: np.ndarray = np.mean([each.jaccard for each in self.null], axis=0)
        return found

    def plain(self) -> tuple[Float[np.ndarray, " docs"], Float[np.ndarray, " docs"]]:
        """Sums and counts by document, whose ratio is the mean Jaccard of the signals."""
        return (self.m.both * self.m.weight).sum(1), (self.m.either * self.m.weight).sum(1)

    def excess(self) -> tuple[Float[np.ndarray, " docs"], Float[np.ndarray, " docs"]]:
        """The same, less the mean over the shuffles; the residuals of these, which sum to zero, are in the sums, so
        that documents vary in the difference as they do in both of its parts.
        """
        sums, counts = self.plain()
        weight = self.m.either.sum(0) * self.m.weight
        for each in self.null:
            own, either = each.jaccard, each.either.sum(0)
            residual = (each.both - own * each.either) / np.maximum(either, 1)
            sums = sums - ((own * self.m.either * self.m.weight) + residual * weight).sum(1) / len(self.null)
        return sums, counts


def _missing(claim: Claim, frontier: Frontier | None, arms: Sequence[str]) -> Evidence | None:
    """The evidence that says what the study lacks."""
    if frontier is None:
        return Evidence(claim=claim, head=None, cannot=NO_STUDY)
    for arm in arms:
        if not any((entry.arm, entry.run) == (arm, 0) for entry in frontier.target.spec.study):
            missing = f"the study of {frontier.target.name!r} has no dictionary of the arm {arm!r}"
            return Evidence(claim=claim, head=None, cannot=missing)
    return None


def _middle(frontier: Frontier, arm: str, run: int) -> Any:
    saes = frontier.target.study(arm, run)
    return saes[len(saes) // 2]


def _decided(
    claim: Claim, frontier: Frontier, runs: Sequence[Searched], columns: Mapping[str, str], candidate: str
) -> Evidence:
    """Evidence from every training run: `columns` says which of a run's numbers (`Searched`) a condition is."""
    design, level, sources = claim.designed(FeatureLikeness), claim.level, runs[0].sources
    name = frontier.target.name
    samples = {
        condition: over_runs(
            [getattr(run, what)() for run in runs],
            sources,
            seed=stats.seed_of(claim.digest, name, condition),
            n_boot=RULES.resamples,
        )
        for condition, what in columns.items()
    }
    few = min(len(run.null) for run in runs)
    undecided = too_few_runs(len(runs), claim.designed(ComparedArms).runs)
    if few < design.shuffles:
        undecided = f"documents of different sources can be paired in {few} ways, {design.shuffles} are needed"
    seed = stats.seed_of(claim.digest, name, "described")
    first = runs[0]
    detail = {
        "mean Jaccard by run": [float(run.m.jaccard.mean()) for run in runs],
        "the same in shuffled sequences": float(first.shuffled.mean()),
        "share with a match": _share_interval(first.m, sources, design.match, level, seed),
        "the same share in shuffled sequences": float((first.shuffled >= design.match).mean()),
        "draws of the control": few,
        **described(samples[claim.condition], level),
        **first.features,
    }
    beside = Beside(n=len(set(sources)), candidates=(candidate,), undecided=undecided, detail=detail)
    sampled = [Sampled(name=condition, samples={WHOLE: own}) for condition, own in samples.items()]
    return decide(claim, sampled, {WHOLE: beside}, q_over=())[WHOLE]


def redundancy_evidence(claim: Claim, frontier: Frontier | None, arm: str = "block-width") -> Evidence:
    """B05: how well a feature's best match in another head fires with it, above shuffled sequences."""
    if (lacking := _missing(claim, frontier, [arm])) is not None:
        return lacking
    assert frontier is not None
    runs = []
    for run in frontier.target.runs(arm):
        found = redundancy(claim, frontier, _middle(frontier, arm, run), run)
        if found is None:
            n = len(set(frontier.sources))
            return Evidence(claim=claim, head=None, undecided="fewer than two heads have a live feature", n=n)
        runs.append(found)
    return _decided(claim, frontier, runs, {claim.condition: "excess"}, "best match in another head")


def redundancy(claim: Claim, frontier: Frontier, sae: Any, run: int) -> Searched | None:
    """The search of one training run's dictionary; None where fewer than two heads have a live feature."""
    design = claim.designed(FeatureLikeness)
    sel, meas = activations(frontier, sae)
    alive, owner = sel.alive(design.alive), head_of(sae, frontier.n_heads).cpu()
    allowed = (owner[alive][:, None] != owner) & alive
    if int(alive.sum()) < 2 or not bool(allowed.any(1).all()):  # a match needs two
        return None
    signal, feature = (sel.live[..., alive], meas.live[..., alive]), (sel.live, meas.live)
    m = match((signal[0], feature[0]), (signal[1], feature[1]), allowed)
    seed = stats.seed_of(claim.digest, frontier.target.name, "shuffle", str(run))
    null = shuffled(sel, meas, signal, feature, allowed, seed, design.shuffles)
    strongest = np.argsort(-m.jaccard, kind="stable")[:_SHOWN_AT_ONCE]
    ids, heads = alive.nonzero()[:, 0], owner[alive]
    features = {
        "features": {"alive": int(alive.sum()), "of": len(alive)},
        "by head": {f"H{h}": float(m.jaccard[(heads == h).numpy()].mean()) for h in sorted(set(heads.tolist()))},
        "strongest pairs": [
            {"feature": int(ids[k]), "match": int(m.partner[k]), "jaccard": float(m.jaccard[k])} for k in strongest
        ],
    }
    return Searched(m, null, meas.sources, features)


def covering_evidence(
    claim: Claim, frontier: Frontier | None, arm: str = "block-width", dense: str = "dense"
) -> Evidence:
    """B05.dense: whether one feature of the dense dictionary fires where a set of like features of several heads
    does.
    """
    if (lacking := _missing(claim, frontier, [arm, dense])) is not None:
        return lacking
    assert frontier is not None
    design, runs = claim.designed(FeatureLikeness), []
    for run in sorted({*frontier.target.runs(arm)} & {*frontier.target.runs(dense)}):
        sae = _middle(frontier, arm, run)
        sel, meas = activations(frontier, sae)
        sets = like_sets(sel, head_of(sae, frontier.n_heads).cpu(), design)
        if len(sets) < design.least_sets:
            reason = f"{len(sets)} sets of features of several heads fire together ({design.like} or more), "
            n = len(set(frontier.sources))
            return Evidence(claim=claim, head=None, undecided=f"{reason}{design.least_sets} are needed", n=n)
        dense_sel, dense_meas = activations(frontier, _middle(frontier, dense, run))
        first, second = (torch.stack([f.live[..., list(s)].amax(-1) for s in sets], -1) for f in (sel, meas))
        allowed = dense_sel.alive(design.alive).expand(len(sets), -1)
        feature = (dense_sel.live, dense_meas.live)
        m = match((first, feature[0]), (second, feature[1]), allowed)
        seed = stats.seed_of(claim.digest, frontier.target.name, "shuffle", str(run))
        null = shuffled(sel, meas, (first, second), feature, allowed, seed, design.shuffles)
        features = {"sets": len(sets), "heads in a set": float(np.mean([len(s) for s in sets]))}
        runs.append(Searched(m, null, meas.sources, features))
    return _decided(claim, frontier, runs, {claim.condition: "plain", OVER_SHUFFLED: "excess"}, "best dense feature")


def like_sets(sel: Activations, owner: Int[Tensor, " d_sae"], design: FeatureLikeness) -> list[tuple[int, ...]]:
    """Each live feature with its best match in every other head where that is `design.like` or more; sets of one left
    out.
    """
    alive = sel.alive(design.alive).nonzero()[:, 0]
    scores, heads = jaccard(sel.live[..., alive], sel.live[..., alive]), owner[alive]
    found = set()
    for k in range(len(alive)):
        members = [int(alive[k])]
        for head in sorted(set(heads.tolist())):
            if head != heads[k]:
                best = scores[k].masked_fill(heads != head, -1.0).argmax()
                if scores[k, best] >= design.like:
                    members.append(int(alive[best]))
        if len(members) > 1:
            found.add(tuple(sorted(members)))
    return sorted(found)


def _share_interval(m: Matches, sources: Sequence[str], least: float, level: float, seed: int) -> dict[str, float]:
    """Share of signals whose Jaccard reaches `least`, with a percentile interval over sources: a description."""
    both, either = by_source(m.both, sources), by_source(m.either, sources)
    w = np.random.default_rng(seed).multinomial(len(both), np.full(len(both), 1 / len(both)), size=RULES.resamples)
    drawn = (w @ both >= least * np.maximum(w @ either, 1)).mean(1)
    low, high = np.quantile(drawn, [level, 1 - level])
    return {"estimate": float((m.jaccard >= least).mean()), "low": float(low), "high": float(high)}
