"""B03, B04, B07: two arms of a study of dictionaries, compared by the loss that they recover at equal L0.

Text and training vary both: the arms' difference has sources of text and training runs as crossed samples
(`fra.measures.block_diagonal.crossed`). What separates two arms less than it separates two runs of one arm is no
difference between arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from fra.errors import FraError
from fra.measures.block_diagonal.crossed import Crossed, over_runs
from fra.measures.block_diagonal.designs import ComparedArms
from fra.measures.block_diagonal.frontier import NO_STUDY, Frontier, Point
from fra.statistics import stats
from fra.statistics.rules import RULES
from fra.statistics.stats import by_source
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import WHOLE, Beside, Sampled, decide

RECOVERS = "the control arm recovers"
"""Name of the gate: the share of the loss that the densest dictionary of the control arm must recover, in every run."""


def at(points: Sequence[Point], l0: float) -> Float[np.ndarray, " n_documents"]:
    """Each document's loss at an L0 between the points', linear in log L0. Raises FraError outside them."""
    totals = np.log([point.total for point in points])
    rounding = 1e-9
    if not totals[0] - rounding <= np.log(l0) <= totals[-1] + rounding:
        raise FraError(f"L0 {l0:g} lies outside the arm's {np.exp(totals[0]):g} to {np.exp(totals[-1]):g}.")
    losses = np.stack([point.loss for point in points])
    return np.array([np.interp(np.log(l0), totals, losses[:, d]) for d in range(losses.shape[1])])


def shared_l0(
    a: Sequence[Sequence[Point]], b: Sequence[Sequence[Point]], design: ComparedArms, b_over_a: float = 1.0
) -> Float[np.ndarray, " n_grid"] | None:
    """L0 values L, geometrically spaced, such that arm a has L and arm b has L * b_over_a in every run; None where
    they share too narrow a range.
    """
    low = max(*(points[0].total for points in a), *(points[0].total / b_over_a for points in b))
    high = min(*(points[-1].total for points in a), *(points[-1].total / b_over_a for points in b))
    return np.geomspace(low, high, design.grid) if high > design.least_ratio * low else None


def runs_of(frontier: Frontier, a: str, b: str) -> list[int]:
    """The training runs in which both arms have two dictionaries or more."""
    entries = frontier.target.spec.study
    number = {run: [sum((e.arm, e.run) == (arm, run) for e in entries) for arm in (a, b)] for run in _runs(entries)}
    return [run for run, found in number.items() if min(found) >= 2]  # a line needs two points


def _runs(entries: Sequence[Any]) -> list[int]:
    return sorted({entry.run for entry in entries})


def compare(
    claim: Claim,
    frontier: Frontier | None,
    a: str,
    b: str,
    *,
    control: str,
    b_over_a: float = 1.0,
    further: Sequence[str] = (),
) -> Evidence:
    """How much more of the loss arm `a` recovers at L0 = L than arm `b` at L * b_over_a, averaged over their shared
    range and over training runs, against the claim's bar.

    control: the arm whose densest point must recover the gate's share (`claim.gates[RECOVERS]`). further: arms that are
    shown beside.
    """

    def evidence(**what: Any) -> Evidence:
        return Evidence(claim=claim, head=None, **what)

    if frontier is None:
        return evidence(cannot=NO_STUDY)
    design, entries = claim.designed(ComparedArms), frontier.target.spec.study
    for arm in (a, b):
        if sum((entry.arm, entry.run) == (arm, 0) for entry in entries) < 2:
            missing = f"the study of {frontier.target.name!r} has fewer than two dictionaries of the arm {arm!r}"
            return evidence(cannot=missing)
    n = len(set(frontier.sources))
    gaps = by_source(frontier.gap, frontier.sources)
    if frontier.gap.sum() < design.least_gap * frontier.n_tokens or (gaps <= 0).any():
        per_token = frontier.gap.sum() / frontier.n_tokens
        reason = f"the hook at zero costs {per_token:.3f} nats a token, too little to ask what share is recovered"
        return evidence(undecided=reason, n=n)
    runs = runs_of(frontier, a, b)
    shown = [row for arm in (a, b, *further) for run in _runs(entries) for row in _rows(claim, frontier, arm, run)]
    detail: dict[str, Any] = {"frontier": shown}
    best = min(1 - (frontier.points(control, r)[-1].loss - frontier.clean).sum() / frontier.gap.sum() for r in runs)
    if not best >= claim.gates[RECOVERS]:
        reason = f"the densest dictionary of {control!r} recovers {best:.0%} of the loss, where a comparison needs "
        return evidence(undecided=f"{reason}{claim.gates[RECOVERS]:.0%}", n=n, detail=detail)
    of_a, of_b = ([frontier.points(arm, run) for run in runs] for arm in (a, b))
    grid = shared_l0(of_a, of_b, design, b_over_a)
    if grid is None:
        return evidence(undecided=f"the arms {a!r} and {b!r} have no range of L0 in common", n=n, detail=detail)
    gains = [
        np.mean([at(denser, l0 * b_over_a) - at(own, l0) for l0 in grid], axis=0)
        for own, denser in zip(of_a, of_b, strict=True)
    ]
    seed = stats.seed_of(claim.digest, frontier.target.name)
    sample = over_runs([(gain, frontier.gap) for gain in gains], frontier.sources, seed=seed, n_boot=RULES.resamples)
    detail |= described(sample, claim.level) | {
        "compared at L0": grid,
        "in nats a token": float(np.mean(gains, axis=0).sum() / frontier.n_tokens),
    }
    beside = Beside(n=n, candidates=(f"{a} over {b}",), undecided=too_few_runs(len(runs), design.runs), detail=detail)
    return decide(claim, [Sampled(name=claim.condition, samples={WHOLE: sample})], {WHOLE: beside}, q_over=())[WHOLE]


def too_few_runs(n: int, needed: int) -> str | None:
    """Why nothing is said of arms, where they have too few training runs."""
    number = "one training run" if n == 1 else f"{n} training runs"
    return None if n >= needed else f"{number} an arm, where {needed} are needed to tell arms from runs"


def described(sample: Crossed, level: float) -> dict[str, Any]:
    """For the reader: what each training run gave, and what the interval would be if sources alone varied."""
    ends = [float(np.ravel(end)[0]) for end in (sample.sources.lower(level, False), sample.sources.upper(level, False))]
    return {
        "training runs": sample.n_runs,
        "by run": sample.by_run,
        "standard error, of runs alone": sample.run_error,
        "interval, if sources alone varied": ends,
    }


def _rows(claim: Claim, frontier: Frontier, arm: str, run: int) -> list[dict[str, Any]]:
    """The points of an arm for the reader: what each recovers, with the interval over documents."""
    rows = []
    for point in frontier.points(arm, run):
        lost = point.loss - frontier.clean
        seed = stats.seed_of(claim.digest, frontier.target.name, arm, str(run))
        means = frontier.means(lost, seed, claim.designed(ComparedArms).described)
        rows.append(
            {
                "arm": arm,
                "run": run,
                "d_sae": point.d_sae,
                "weights": point.weights,
                "L0": point.total,
                "L0 by head": point.l0,
                "loss recovered": 1 - float(means.estimate[0]),
                "low": 1 - float(means.upper(claim.level, simultaneous=False)[0]),
                "high": 1 - float(means.lower(claim.level, simultaneous=False)[0]),
                "explained variance by head": point.explained,
            }
        )
    return rows


def exchange_rates(claim: Claim, frontier: Frontier, dense: str, block: str) -> list[Mapping[str, float] | None]:
    """`exchange_rate` in every training run."""
    design = claim.designed(ComparedArms)
    both = [[frontier.points(arm, run) for arm in (dense, block)] for run in runs_of(frontier, dense, block)]
    return [exchange_rate(a, b, design, frontier.n_heads) for a, b in both]


def exchange_rate(
    dense: Sequence[Point], block: Sequence[Point], design: ComparedArms, n_heads: int
) -> Mapping[str, float] | None:
    """How many times the L0 of the dense arm the block-diagonal one needs to recover as much: rho, and its logarithm
    to base n_heads (0: totals compare, 1: L0 per head compares). Mean over the shared range of loss; None without one.
    """

    def curve(points: Sequence[Point]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        loss = np.array([point.loss.sum() for point in points])
        order = np.argsort(loss)
        return loss[order], np.log([points[k].total for k in order])

    (loss_a, l0_a), (loss_b, l0_b) = curve(dense), curve(block)
    low, high = max(loss_a[0], loss_b[0]), min(loss_a[-1], loss_b[-1])
    if not high > low:
        return None
    grid = np.linspace(low, high, design.grid)
    log_rho = float(np.mean(np.interp(grid, loss_b, l0_b) - np.interp(grid, loss_a, l0_a)))
    return {"rho": float(np.exp(log_rho)), "log rho / log n_heads": log_rho / float(np.log(n_heads))}
