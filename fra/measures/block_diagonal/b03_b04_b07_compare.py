"""B03, B04, B07: two arms of a study of dictionaries, compared by the loss that they recover at equal L0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from fra.errors import FraError
from fra.measures.block_diagonal.frontier import NO_STUDY, Frontier, Point
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import WHOLE, Beside, Sampled, decide
from fra.verdicts.stats import by_source

_GRID = 5  # sparsities at which two arms are compared


LEAST_GAP = 0.05
"""Nats a token that putting the hook to zero must cost, before a share of it says anything."""


DENSE = "gate: dense recovers"
"""Name of the gate: the share of the loss that the densest dictionary of the control arm must recover."""


def at(points: Sequence[Point], l0: float) -> Float[np.ndarray, " n_documents"]:
    """Each document's loss at an L0 between the points', linear in log L0. Raises FraError outside them."""
    totals = np.log([point.total for point in points])
    if not totals[0] - 1e-9 <= np.log(l0) <= totals[-1] + 1e-9:
        raise FraError(f"L0 {l0:g} lies outside the arm's {np.exp(totals[0]):g} to {np.exp(totals[-1]):g}.")
    losses = np.stack([point.loss for point in points])
    return np.array([np.interp(np.log(l0), totals, losses[:, d]) for d in range(losses.shape[1])])


def shared_l0(a: Sequence[Point], b: Sequence[Point], b_over_a: float = 1.0) -> Float[np.ndarray, " n_grid"] | None:
    """L0 values L, geometrically spaced, such that arm a has L and arm b has L * b_over_a; None where they share less
    than a factor of 1.1.
    """
    low = max(a[0].total, b[0].total / b_over_a)
    high = min(a[-1].total, b[-1].total / b_over_a)
    return np.geomspace(low, high, _GRID) if high > 1.1 * low else None


def compare(
    claim: Claim,
    frontier: Frontier | None,
    a: str,
    b: str,
    *,
    control: str,
    b_over_a: float = 1.0,
    effect_of_interest: float | None = None,
    further: Sequence[str] = (),
) -> Evidence:
    """How much more of the loss arm `a` recovers at L0 = L than arm `b` at L * b_over_a, averaged over their shared
    range, against the claim's bar.

    control: the arm whose densest point must recover the gate's share (`claim.bars[DENSE]`).
    effect_of_interest: power is the chance to find the claim true if this were the effect; None where that is not at
    issue. further: arms that are shown beside.
    """

    def evidence(**what: Any) -> Evidence:
        return Evidence(claim=claim, head=None, **what)

    if frontier is None:
        return evidence(cannot=NO_STUDY)
    target = frontier.target
    for arm in (a, b):
        if sum(entry.arm == arm for entry in target.spec.study) < 2:
            return evidence(cannot=f"the study of {target.name!r} has fewer than two dictionaries of the arm {arm!r}")
    n = len(frontier.measured)
    gaps = by_source(frontier.gap, frontier.sources)
    if frontier.gap.sum() < LEAST_GAP * frontier.n_tokens or (gaps <= 0).any():
        per_token = frontier.gap.sum() / frontier.n_tokens
        reason = f"the hook at zero costs {per_token:.3f} nats a token, too little to ask what share is recovered"
        return evidence(undecided=reason, n=n)
    detail = {"frontier": [row for arm in (a, b, *further) for row in _rows(claim, frontier, arm)]}
    best = 1 - (frontier.points(control)[-1].loss - frontier.clean).sum() / frontier.gap.sum()
    if not best >= claim.bars[DENSE]:
        reason = f"the densest dictionary of {control!r} recovers {best:.0%} of the loss, where a comparison needs "
        return evidence(undecided=f"{reason}{claim.bars[DENSE]:.0%}", n=n, detail=detail)
    grid = shared_l0(frontier.points(a), frontier.points(b), b_over_a)
    if grid is None:
        return evidence(undecided=f"the arms {a!r} and {b!r} have no range of L0 in common", n=n, detail=detail)
    gain = np.mean([at(frontier.points(b), l0 * b_over_a) - at(frontier.points(a), l0) for l0 in grid], axis=0)
    means = frontier.means(gain, stats.seed_of(claim.digest, target.name))
    power = None
    if effect_of_interest is not None:
        power = float(stats.power_above(means, claim.bar, effect_of_interest, claim.level, simultaneous=False)[0])
    shown = {"compared at L0": grid, "in nats a token": float(gain.sum() / frontier.n_tokens)}
    columns = [Sampled(name="loss recovered", samples={WHOLE: means})]
    beside = Beside(n=n, candidates=(f"{a} over {b}",), power=power, detail=shown | detail)
    return decide(claim, columns, {WHOLE: beside}, q_over=())[WHOLE]


def _rows(claim: Claim, frontier: Frontier, arm: str) -> list[dict[str, Any]]:
    """The points of an arm for the reader: what each recovers, with the interval over documents."""
    rows = []
    for point in frontier.points(arm):
        lost = point.loss - frontier.clean
        means = frontier.means(lost, stats.seed_of(claim.digest, frontier.target.name, arm))
        rows.append(
            {
                "arm": arm,
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


def exchange_rate(frontier: Frontier, dense: str, block: str) -> Mapping[str, float] | None:
    """How many times the L0 of the dense arm the block-diagonal one needs to recover as much: rho, and its logarithm
    to base n_heads (0: totals compare, 1: L0 per head compares). Mean over the shared range of loss; None without one.
    """
    a, b = frontier.points(dense), frontier.points(block)

    def curve(points: Sequence[Point]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        loss = np.array([point.loss.sum() for point in points])
        order = np.argsort(loss)
        return loss[order], np.log([points[k].total for k in order])

    (loss_a, l0_a), (loss_b, l0_b) = curve(a), curve(b)
    low, high = max(loss_a[0], loss_b[0]), min(loss_a[-1], loss_b[-1])
    if not high > low:
        return None
    grid = np.linspace(low, high, _GRID)
    log_rho = float(np.mean(np.interp(grid, loss_b, l0_b) - np.interp(grid, loss_a, l0_a)))
    return {"rho": float(np.exp(log_rho)), "log rho / log n_heads": log_rho / float(np.log(frontier.n_heads))}
