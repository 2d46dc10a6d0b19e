"""The power of a head's decision on channels: planted ones go through all that the claim asks of the head's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from fra.search.channels import Effects, HeadOnArms
from fra.search.designs import Plantings
from fra.search.planting import Planting
from fra.search.screen import LayerScreen
from fra.statistics import stats
from fra.statistics.rules import RULES
from fra.statistics.stats import seed_of
from fra.verdicts.decide import Planted

_ROUNDING = 1e-6


@dataclass(frozen=True)
class ChannelBars:
    """The bars of an expressed channel (CLAIMS): nats, attention, the head's contrast on live rows, coverage, the share
    of the head's own matched pairs that its coupling exceeds (NaN: not asked, nor is the other heads' median).
    """

    nats: float
    attention: float
    contrast: float
    coverage: float
    matched: float = float("nan")

    def stand(self, effects: Effects, share: float) -> Bool[np.ndarray, " n"]:
        """Which channels reach this share of the bars of nats, attention and contrast, by their means over rows."""
        rows = np.maximum(effects.rows.sum(0), 1e-12)
        means = ((effects.nats, self.nats), (effects.attention, self.attention), (effects.contrast, self.contrast))
        return np.asarray(np.logical_and.reduce([part.sum(0) / rows >= share * bar for part, bar in means]))


@dataclass(frozen=True)
class Raised:
    """A channel that was planted at the bars."""

    value: float
    """Its M in the search."""
    effect: float
    """Its E on the confirmation documents, nats."""
    ranked: float
    """Its E on those of them on which scrambles are ranked."""
    stands: bool
    """Whether it would be asked, by the discovery documents."""
    sums: Mapping[str, np.ndarray]
    """[n_documents] of nats, attention and contrast."""
    rows: np.ndarray
    """[n_documents] live rows."""


def plantings(
    layer: LayerScreen, on: HeadOnArms, bars: ChannelBars, design: Plantings, seed_part: str
) -> Iterator[Raised]:
    """Channels planted in a head, each at the smallest coupling that meets every bar, on confirmation documents.

    A random eligible pair of the search has its coupling raised in the head's own scores. Passed over are pairs that
    are live in too few documents or rows, whose key feature is about as live everywhere as at the stripe's key, or that
    no coupling lifts to the bars.
    """
    rng = np.random.default_rng(seed_of(*layer.seed_parts, seed_part, str(on.head)))
    stripe, found = layer.stripe, 0
    on_discovery = None if layer.chosen_on is None else HeadOnArms(layer.chosen_on, on.head)

    def stands(pair: Tensor, delta: float) -> bool:
        if on_discovery is None:
            return True
        means = Planting(on_discovery, pair).means(delta)
        asked = (bars.nats, bars.attention, bars.contrast)
        return all(m >= layer.design.stands * bar for m, bar in zip(means, asked, strict=True))

    often = on.live_documents()[stripe.pairs[:, 0]] >= design.live_share * len(on.batch)
    able = torch.nonzero((stripe.selectivity >= design.selectivity) & often)[:, 0].cpu().numpy()
    tried = rng.permutation(able)[: design.tries].tolist()
    for left, number in zip(range(len(tried), 0, -1), tried, strict=True):
        seen = len(tried) - left
        rate = stats.clopper_pearson(found, seen, design.hopeless)[1] if seen else 1.0
        if found == design.planted or found + rate * left < design.planted:
            return  # there are enough, or there will not be enough
        pair = stripe.pairs[number]
        planting = Planting(on, pair)
        if planting.live_documents < layer.design.least_documents:
            continue
        if planting.covered <= bars.coverage * len(on.keys):
            continue
        wanted = (bars.nats, bars.attention, bars.contrast)
        if not planting.can_reach(wanted, design):
            continue
        delta = planting.lowest(wanted, _least_raise(layer, on.head, pair, bars.matched), design)
        if delta is None:
            continue
        found += 1
        which = torch.tensor([number], device=pair.device)
        value = float(stripe.values(layer.discovery, on.head, which, raised=delta)[0])
        parts = dict(zip(("nats", "attention", "contrast"), planting.effects(delta), strict=True))
        rows = planting.by_document(torch.ones(len(planting.rows), device=pair.device))
        sums = {name: planting.by_document(part) for name, part in parts.items()}
        few = layer.ranked_on.cpu().numpy()
        ranked = float(sums["nats"][few].sum() / max(float(rows[few].sum()), 1.0))
        yield Raised(value, float(sums["nats"].sum() / rows.sum()), ranked, stands(pair, delta), sums, rows)


def _least_raise(layer: LayerScreen, head: int, pair: Tensor, matched: float) -> float:
    """The raise with which the pair's coupling exceeds that share of the head's matched pairs, and the other heads'
    median; 0 where it does already or is not asked to.
    """
    if np.isnan(matched):
        return 0.0
    own = float(layer.typical(head, pair[None])[0])
    near = layer.matched_couplings(head, pair[None])[0]
    above = min(int(np.floor(matched * len(near))), len(near) - 1)  # as many smaller ones are one more than the bar
    needed = max(float(near[above]), float(layer.others_median(head, pair[None])[0]))
    return max(0.0, needed - own + _ROUNDING * (1 + abs(needed)))


@dataclass
class Count:
    """Plantings that were tried and that went through, with the most that may be missed."""

    most: int
    missed: int = 0
    tried: int = 0
    by: dict[str, int] = field(default_factory=dict)
    """How many were missed first by each condition."""

    def futile(self) -> bool:
        """Whether the power that a refutation needs can no longer be reached."""
        found = self.most - self.missed
        return stats.clopper_pearson(found, self.most, RULES.power_level)[0] < RULES.power

    def miss(self, why: str, n: int) -> None:
        """n of those tried were missed by this condition."""
        self.missed += n
        if n:
            self.by[why] = self.by.get(why, 0) + n


def count_found(
    layer: LayerScreen,
    head: int,
    bars: ChannelBars,
    design: Plantings,
    samples: Mapping[str, stats.ClusterMeans],
    standing: int,
    n_heads: int,
    level: float,
) -> tuple[Planted, dict[str, int]]:
    """How many channels planted in a head at the bars would make the claim true of it, of how many; and what missed the
    others. What is dear comes last, and nothing more is measured once the power that a refutation needs is out of
    reach: then fewer were tried than were to be.

    Found is a planted channel that

    - ranks among the candidates of the search on the discovery documents, and stands there;
    - has an effect, an attention and a head contrast that are told from zero (what is worth seeing: for a channel at
      the bars the distance from the bar to zero) at level / n_heads, where Holm begins, by Bonferroni over itself and
      the head's own candidates that stand, which is a little stricter than the decision;
    - beats the same search at every other lag;
    - ranks among the best channels of the head's scrambles so that p <= level / n_heads, with as many draws as that
      takes: it exceeds every one of them.

    By construction it has the coverage, exceeds its matched pairs and the other heads in coupling, and, being at the
    bars or above on these very documents, is short of none of them at the level of refutations.

    samples: of the head's own candidates on the confirmation documents, clustered by source: nats, attention, contrast.
    standing: how many of them stand on the discovery documents.
    """
    on = HeadOnArms(layer.confirmation, head)
    _, values = layer.candidates(head)
    cut = float(values[-1]) if len(values) >= layer.design.candidates else -np.inf
    step = level / n_heads
    count = Count(design.planted)
    through: list[Raised] = []
    some: list[Raised] = []
    for raised in plantings(layer, on, bars, design, "plant"):
        count.tried += 1
        if raised.value < cut:
            count.miss("search", 1)
        elif not raised.stands:
            count.miss("discovery documents", 1)
        else:
            some.append(raised)
        if len(some) >= design.at_once:
            through += _seen(some, layer, samples, step / (1 + standing), count)
            some = []
        if count.futile():
            break
    if not count.futile():
        through += _seen(some, layer, samples, step / (1 + standing), count)
    if not count.futile() and count.tried >= design.planted:
        least = min(own.effect for own in through)
        best = layer.best_at_lags(head, at_least=least - _ROUNDING)
        beyond = [own for own in through if own.effect > best]
        count.miss("other lags", len(through) - len(beyond))
        _exceed_scrambles(layer, head, beyond, int(np.ceil(1 / step)) - 1, count)
    return Planted(count.tried - count.missed, count.tried, count.futile()), count.by


def _seen(
    some: list[Raised], layer: LayerScreen, samples: Mapping[str, stats.ClusterMeans], level: float, count: Count
) -> list[Raised]:
    """Those of which each sampled number is told from zero."""
    if not some:
        return []
    sources = layer.confirmation.batch.sources
    counts = stats.by_source(np.stack([own.rows for own in some], axis=1), sources)
    seen = np.ones(len(some), dtype=bool)
    for name, own in samples.items():
        sums = stats.by_source(np.stack([each.sums[name] for each in some], axis=1), sources)
        planted = stats.ClusterMeans(sums, counts, seed=own.seed, n_boot=own.n_boot)
        told = planted.p_above(0.0, simultaneous=False) <= level
        count.miss(name, int((seen & ~told).sum()))
        seen &= told
        if count.futile():
            break
    return [own for own, is_seen in zip(some, seen, strict=True) if is_seen]


def _exceed_scrambles(layer: LayerScreen, head: int, left: list[Raised], draws: int, count: Count) -> None:
    """Counts those as missed that any of the head's scrambles reaches; draws stop once the power is out of reach."""
    for k in range(draws):
        if count.futile() or not left:
            return
        least = min(own.ranked for own in left)
        best = layer.scrambled_best(head, k, at_least=least - _ROUNDING)
        beyond = [own for own in left if own.ranked > best]
        count.miss("scrambled heads", len(left) - len(beyond))
        left = beyond
