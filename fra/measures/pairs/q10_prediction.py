"""Do couplings foretell attention? G_ij against where the head looks when the channel (i,j) is taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats as sps
from torch import Tensor

from fra.errors import CannotLoad
from fra.measures.pairs.activity import FLOOR, Activity
from fra.verdicts.jackknife import Jackknifed, jackknifed
from fra.verdicts.stats import seed_of

PAIRS = 1_000
DRAWS = 999
_GROUP = 10


@dataclass(frozen=True)
class Prediction:
    """One head: how its couplings order the attention of its live pairs."""

    correlation: Jackknifed
    """Spearman over the pairs of G_ij with log( sum A^{-ij} a_i a_j / sum a_i a_j / n_keys )."""
    matched: list[float]
    """The same with G permuted among pairs matched in co-activation, frequency and magnitude."""
    spread: Jackknifed
    """Interquartile range of the log ratio, in nats."""


@dataclass(frozen=True)
class _Joint:
    """Positions at which both features of a pair are live, s <= t and attended, the first position left out."""

    pairs: Int[Tensor, "n 2"]
    pair: Int[Tensor, " m"]
    source: Int[Tensor, " m"]
    row_q: Int[Tensor, " m"]
    """Index into the flattened [batch * pos]."""
    row_k: Int[Tensor, " m"]
    product: Float[Tensor, " m"]
    """a_i(t) a_j(s)."""
    group: Int[Tensor, " m"]
    """One number for each (pair, row)."""
    activity: Float[np.ndarray, "n 3"]
    """What matched pairs share: co-activation count, product of frequencies, mean product while live."""


def predictions(activity: Activity, heads: Sequence[int], seed_parts: Sequence[str]) -> list[Prediction]:
    """`Prediction` of each head, on 1 000 pairs drawn evenly from those jointly live in 20 documents; the same pairs
    for all heads. Raises CannotLoad where there are fewer than 100.
    """
    joint = joint_terms(activity, seed_parts)
    return [prediction_of(activity, joint, head, seed_parts) for head in heads]


def joint_terms(activity: Activity, seed_parts: Sequence[str]) -> _Joint:
    """Where pairs of live features meet, over all documents and by source: what every head of the layer shares."""
    n = len(activity.live)
    tables = activity.tables
    eligible = torch.nonzero((tables.documents.sum(0) >= 2 * FLOOR).flatten())[:, 0]
    if (why := activity.too_few()) is not None:
        raise CannotLoad(why)
    rng = np.random.default_rng(seed_of(*seed_parts, "pairs"))
    drawn = np.sort(rng.choice(len(eligible), min(PAIRS, len(eligible)), replace=False))
    chosen = eligible[torch.from_numpy(drawn).to(eligible.device)]
    i, j = chosen // n, chosen % n
    mask, pos = activity.arm.frozen.mask, activity.arm.codes.shape[1]
    place = torch.full((n,), -1, device=chosen.device)
    parts = []
    for d, source in enumerate(activity.source.tolist()):
        own, dense = activity.document(d)
        place.fill_(-1)
        place[own] = torch.arange(len(own), device=chosen.device)
        both = torch.nonzero((place[i] >= 0) & (place[j] >= 0))[:, 0]
        q, k = dense.T[place[i[both]]], dense.T[place[j[both]]]
        of_q, t = torch.nonzero(q, as_tuple=True)
        of_k, s = torch.nonzero(k, as_tuple=True)
        per_pair = torch.bincount(of_k, minlength=len(both))
        start = per_pair.cumsum(0) - per_pair
        repeats = per_pair[of_q]
        left = torch.repeat_interleave(torch.arange(len(of_q), device=q.device), repeats)
        right = start[of_q[left]] + torch.arange(len(left), device=q.device) - (repeats.cumsum(0) - repeats)[left]
        kept = mask[t[left], s[right]]
        left, right = left[kept], right[kept]
        column, row = of_q[left], t[left]
        product = q[column, row] * k[column, s[right]]
        parts.append((both[column], torch.full_like(column, source), d * pos + row, d * pos + s[right], product))
    pair, source_of, row_q, row_k, product = (torch.cat(part) for part in zip(*parts, strict=True))
    _, group = torch.unique(pair * (pos * len(activity.lengths)) + row_q, return_inverse=True)
    count = tables.count.sum(0).flatten()[chosen]
    together = tables.products.sum(0).flatten()[chosen] / count
    frequency = torch.bincount(activity.arm.codes.feature, minlength=len(activity.arm.codes.decoder))[activity.live]
    shared = torch.stack([count, (frequency[i] * frequency[j]).to(count), together], 1)
    pairs = torch.stack([activity.live[i], activity.live[j]], 1)
    return _Joint(pairs, pair, source_of, row_q, row_k, product, group, np.asarray(shared.cpu().double()))


def prediction_of(activity: Activity, joint: _Joint, head: int, seed_parts: Sequence[str]) -> Prediction:
    """One head's rank correlation with its nulls, and the spread of where it looks."""
    frozen = activity.arm.frozen
    pos, n_sources, n = activity.arm.codes.shape[1], len(activity.names), len(joint.pairs)
    F = joint.product * _coupling(activity, joint, head)
    at = joint.row_q * pos + joint.row_k % pos
    A = frozen.pattern[:, head].flatten()[at].double()
    if frozen.softcap is None:
        less = -F.double()
    else:
        S = frozen.scores(head).flatten()[at]
        less = (frozen.cap(S - F) - frozen.cap(S)).double()
    change = A * torch.expm1(less)
    total = change.new_zeros(int(joint.group.max()) + 1).index_add_(0, joint.group, change)
    without = (A + change) / (1 + total)[joint.group]
    uniform = 1.0 / frozen.mask.sum(-1)[joint.row_q % pos].double()
    cell = joint.source * n + joint.pair
    looked, even, weighted = (
        np.asarray(change.new_zeros(n_sources * n).index_add_(0, cell, part).view(n_sources, n).cpu())
        for part in (without * joint.product, uniform * joint.product, uniform * F.double())
    )
    G = weighted.sum(0) / even.sum(0)  # G_ij itself where it does not turn with the distance
    total_looked, total_even = looked.sum(0), even.sum(0)
    ratio = np.log(total_looked / total_even)
    without_source = [
        np.log(np.maximum(total_looked - looked[k], 1e-300) / np.maximum(total_even - even[k], 1e-300))
        for k in range(n_sources)
    ]
    rng = np.random.default_rng(seed_of(*seed_parts, f"head {head}", "matched"))
    null = _matched_null(G, ratio, _groups(joint.activity), rng)
    correlation = jackknifed(_spearman(G, ratio), [_spearman(G, other) for other in without_source])
    return Prediction(correlation, null, jackknifed(sps.iqr(ratio), [sps.iqr(other) for other in without_source]))


def _coupling(activity: Activity, joint: _Joint, head: int) -> Float[Tensor, " m"]:
    """G_ij of each joint position, QK-norm's gains and rotation included."""
    frozen = activity.arm.frozen
    U, V = activity.arm.couplings(head)
    i, j = joint.pairs.T
    if frozen.rotary is None:
        coupling = (U[i] * V[j]).sum(-1)[joint.pair]
    else:
        pos = activity.arm.codes.shape[1]
        parts = []
        for some in torch.split(torch.arange(len(joint.pair), device=U.device), 1 << 17):
            own = joint.pair[some]
            q = frozen.rotary.rotate(U[i[own]], joint.row_q[some] % pos)
            parts.append((q * frozen.rotary.rotate(V[j[own]], joint.row_k[some] % pos)).sum(-1))
        coupling = torch.cat(parts)
    gains = frozen.gain("query", head, joint.row_q, scaled=False) * frozen.gain("key", head, joint.row_k, scaled=False)
    return coupling * gains


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(sps.rankdata(a), sps.rankdata(b))[0, 1])


def _groups(activity: Float[np.ndarray, "n 3"]) -> Int[np.ndarray, " n"]:
    """Groups of about ten pairs that are alike in each of the three: fifths by the first, fourths of these by the
    second, and so on.
    """
    parts = [np.arange(len(activity))]
    for column, cuts in enumerate((5, 4, max(1, len(activity) // (20 * _GROUP)))):
        parts = [
            piece
            for part in parts
            for piece in np.array_split(part[np.argsort(activity[part, column], kind="stable")], cuts)
        ]
    group = np.empty(len(activity), dtype=np.int64)
    for number, part in enumerate(parts):
        group[part] = number
    return group


def _matched_null(
    G: np.ndarray, ratio: np.ndarray, group: Int[np.ndarray, " n"], rng: np.random.Generator
) -> list[float]:
    """Spearman with G permuted within groups, `DRAWS` times."""
    order = np.argsort(group, kind="stable")
    drawn = np.argsort(group[order] + rng.random((DRAWS, len(G))), axis=1)  # the same groups, shuffled within
    ranks, others = sps.rankdata(G)[order][drawn], sps.rankdata(ratio)[order]
    ranks, others = ranks - ranks.mean(1, keepdims=True), others - others.mean()
    size = np.sqrt((ranks**2).sum(1) * (others**2).sum())
    return [float(value) for value in ranks @ others / size]
