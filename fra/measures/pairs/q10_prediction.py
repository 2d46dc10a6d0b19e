"""Q10: do couplings foretell attention? G_ij against where the head looks when the channel (i,j) is taken away.

Pairs are chosen, and matched with each other, on the selection documents; where the head looks is measured on documents
of other sources. The estimate without each source leaves out, beside its documents, an equal part of the drawn pairs:
the jackknife's spread then holds the draw of the pairs too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats as sps
from torch import Tensor

from fra.measures.pairs.designs import PairPredictions
from fra.measures.pairs.layers import PairLayer, PairLayers
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Column, Drawn, Sampled, decide, means_of

SPEARMAN, RANK, SPREAD = "Spearman", "rank among matched pairs", "spread of the log ratio"
_DRAWS_AT_ONCE = 100


@dataclass(frozen=True)
class Jackknife:
    """A statistic of all sources, and without each of them."""

    estimate: float
    left_out: Float[np.ndarray, " n_sources"]

    @property
    def pseudo_values(self) -> Float[np.ndarray, " n_sources"]:
        """G theta - (G - 1) theta_(k): their mean is the jackknife's estimate, less biased than theta, and their spread
        over the sources is theta's (Tukey 1958; Efron and Tibshirani 1993, ch. 11). Tested as one number a source, with
        the guard against skew that such a mean has.
        """
        n = len(self.left_out)
        return n * self.estimate - (n - 1) * self.left_out


@dataclass(frozen=True)
class Prediction:
    """One head: how its couplings order the attention of its live pairs."""

    correlation: Jackknife
    """Spearman over the pairs of G_ij with log( sum A^{-ij} a_i a_j / sum a_i a_j / n_keys )."""
    spread: Jackknife
    """Interquartile range of the log ratio, in nats."""
    draw: Callable[[int], float]
    """The k-th Spearman with G permuted among pairs that are alike in co-activation, frequency and magnitude."""


@dataclass(frozen=True)
class Joint:
    """Positions of measured documents at which both features of a pair are live, s <= t and attended, the first
    position left out.
    """

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
    matched: Int[np.ndarray, " n"]
    """Pairs of one group may change places: chosen on the selection documents."""
    part: Int[np.ndarray, " n"]
    """The source with which a pair is left out."""
    sources: tuple[str, ...]


def chosen_pairs(layer: PairLayer, design: PairPredictions) -> tuple[Int[Tensor, " n"], Int[np.ndarray, " n"]]:
    """Linear places of the pairs, and the group of each, from the selection documents alone."""
    selection, n = layer.selection, len(layer.selection.live)
    products, count, documents = selection.tables
    eligible = torch.nonzero((documents >= layer.design.together_in).flatten())[:, 0]
    drawn = np.sort(layer.rng("pairs").choice(len(eligible), min(design.pairs, len(eligible)), replace=False))
    chosen = eligible[torch.from_numpy(drawn).to(eligible.device)]
    together = count.flatten()[chosen]
    often = selection.frequency[chosen // n] * selection.frequency[chosen % n]
    shared = torch.stack([together, often.to(together), products.flatten()[chosen] / together], 1)
    return chosen, groups(np.asarray(shared.cpu().double()), design.group)


def joint_terms(layer: PairLayer, design: PairPredictions) -> Joint:
    """Where the chosen pairs meet in the measured documents: what every head of the layer shares."""
    chosen, matched = chosen_pairs(layer, design)
    on, n = layer.on, len(layer.selection.live)
    names, source = np.unique(np.asarray(layer.sources), return_inverse=True)
    i, j = chosen // n, chosen % n
    mask, pos = on.arm.frozen.mask, on.arm.codes.shape[1]
    place = torch.full((n,), -1, device=chosen.device)
    parts = []
    seen = torch.zeros(len(chosen), dtype=torch.long, device=chosen.device)
    for d in range(len(on.texts)):
        own, dense = on.document(d)
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
        seen[torch.unique(both[column])] += 1
        at = torch.full_like(column, int(source[d]))
        parts.append((both[column], at, d * pos + row, d * pos + s[right], product))
    pair, source_of, row_q, row_k, product = (torch.cat(part) for part in zip(*parts, strict=True))
    often = torch.nonzero(seen >= design.live_in)[:, 0]
    kept = torch.isin(pair, often)
    pair, source_of, row_q, row_k, product = (x[kept] for x in (pair, source_of, row_q, row_k, product))
    pair = torch.searchsorted(often, pair)
    _, group = torch.unique(pair * (pos * len(on.texts)) + row_q, return_inverse=True)
    pairs = torch.stack([layer.selection.live[i], layer.selection.live[j]], 1)[often]
    part = layer.rng("pairs left out").permutation(len(often)) % len(names)
    return Joint(
        pairs, pair, source_of, row_q, row_k, product, group, matched[often.cpu().numpy()], part, tuple(names.tolist())
    )


def prediction_of(layer: PairLayer, joint: Joint, head: int) -> Prediction:
    """One head's rank correlation with its null, and the spread of where it looks."""
    frozen, pos = layer.on.arm.frozen, layer.on.arm.codes.shape[1]
    n_sources, n = len(joint.sources), len(joint.pairs)
    F = joint.product * _coupling(layer, joint, head)
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
    correlations, spreads = np.zeros(n_sources), np.zeros(n_sources)
    for k in range(n_sources):
        rest = joint.part != k
        other = np.log((total_looked - looked[k])[rest] / (total_even - even[k])[rest])
        correlations[k], spreads[k] = spearman(G[rest], other), sps.iqr(other)
    return Prediction(
        Jackknife(spearman(G, ratio), correlations),
        Jackknife(float(sps.iqr(ratio)), spreads),
        Permutations(G, ratio, joint.matched, layer, head).draw,
    )


def _coupling(layer: PairLayer, joint: Joint, head: int) -> Float[Tensor, " m"]:
    """G_ij of each joint position, QK-norm's gains and rotation included."""
    frozen = layer.on.arm.frozen
    U, V = layer.on.arm.couplings(head)
    i, j = joint.pairs.T
    if frozen.rotary is None:
        coupling = (U[i] * V[j]).sum(-1)[joint.pair]
    else:
        pos = layer.on.arm.codes.shape[1]
        parts = []
        for some in torch.split(torch.arange(len(joint.pair), device=U.device), 1 << 17):
            own = joint.pair[some]
            q = frozen.rotary.rotate(U[i[own]], joint.row_q[some] % pos)
            parts.append((q * frozen.rotary.rotate(V[j[own]], joint.row_k[some] % pos)).sum(-1))
        coupling = torch.cat(parts)
    gains = frozen.gain("query", head, joint.row_q, scaled=False) * frozen.gain("key", head, joint.row_k, scaled=False)
    return coupling * gains


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; 0 where one of them does not vary."""
    ranks = [sps.rankdata(x) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1]) if all(np.ptp(x) > 0 for x in ranks) else 0.0


def groups(shared: Float[np.ndarray, "n 3"], size: int) -> Int[np.ndarray, " n"]:
    """Groups of about so many pairs that are alike in each of the three: fifths by the first, fourths of these by the
    second, and so on.
    """
    fifths, fourths = 5, 4
    parts = [np.arange(len(shared))]
    for column, cuts in enumerate((fifths, fourths, max(1, len(shared) // (fifths * fourths * size)))):
        parts = [
            piece
            for part in parts
            for piece in np.array_split(part[np.argsort(shared[part, column], kind="stable")], cuts)
        ]
    group = np.empty(len(shared), dtype=np.int64)
    for number, part in enumerate(parts):
        group[part] = number
    return group


class Permutations:
    """Spearman with G permuted within groups, draw by draw."""

    def __init__(
        self, G: np.ndarray, ratio: np.ndarray, group: Int[np.ndarray, " n"], layer: PairLayer, head: int
    ) -> None:
        self._order = np.argsort(group, kind="stable")
        self._group = group[self._order]
        self._ranks, others = sps.rankdata(G)[self._order], sps.rankdata(ratio)[self._order]
        self._others = others - others.mean()
        self._layer, self._head = layer, head
        self._block = lru_cache(maxsize=1)(self._drawn)

    def draw(self, k: int) -> float:
        """The k-th."""
        return float(self._block(k // _DRAWS_AT_ONCE)[k % _DRAWS_AT_ONCE])

    def _drawn(self, block: int) -> Float[np.ndarray, " n_draws"]:
        rng = self._layer.rng("matched", f"head {self._head}", f"block {block}")
        # the same groups, shuffled within
        drawn = np.argsort(self._group + rng.random((_DRAWS_AT_ONCE, len(self._ranks))), axis=1)
        ranks = self._ranks[drawn]
        ranks = ranks - ranks.mean(1, keepdims=True)
        size = np.sqrt((ranks**2).sum(1) * (self._others**2).sum())
        return np.asarray(ranks @ self._others / size)


@torch.no_grad()
def prediction(claim: Claim, layers: PairLayers) -> dict[str, Evidence]:
    """Evidence for every head of a layer that can be measured."""
    design = claim.designed(PairPredictions)

    def of(layer: PairLayer) -> list[Prediction]:
        joint = joint_terms(layer, design)
        return [prediction_of(layer, joint, head) for head in range(layer.n_heads)]

    measured, found = layers.each(claim, of)
    heads = {f"L{layer}H{h}": one for layer, own in measured.items() for h, one in enumerate(own)}
    if not heads:
        return found

    def sampled(name: str, of: Callable[[Prediction], Jackknife]) -> Sampled:
        target = layers.target.name
        samples = {h: means_of(claim, target, h, name, of(one).pseudo_values) for h, one in heads.items()}
        return Sampled(name=name, samples=samples)

    columns: list[Column] = [
        sampled(SPEARMAN, lambda one: one.correlation),
        sampled(SPREAD, lambda one: one.spread),
        Drawn(
            observed={RANK: {h: one.correlation.estimate for h, one in heads.items()}},
            draw=lambda h, k: {RANK: heads[h].draw(k)},
        ),
    ]

    def detail(name: str) -> dict[str, Any]:
        null = [heads[name].draw(k) for k in range(_DRAWS_AT_ONCE)]
        return {
            "Spearman of all sources": heads[name].correlation.estimate,
            "G permuted among matched pairs, mean": float(np.mean(null)),
            f"of {_DRAWS_AT_ONCE} permutations, at least as large": int(
                (np.array(null) >= heads[name].correlation.estimate).sum()
            ),
        }

    return found | decide(claim, columns, {h: Beside(candidates=("pairs",), detail=detail(h)) for h in heads})
