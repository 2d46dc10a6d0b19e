"""How many heads carry expressed CIH channels and how many are token induction heads, by tests that err equally often.

Both tests of a head compare one number with what scrambles of this very head give: the head's stripe contrast, and the
margin by which its best channel clears the bars of an expressed channel. A head is positive where its number is above
zero and above every one of its scrambles', so that both tests call the same share of scrambles positive; only then may
the two counts be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from fra.errors import FraError
from fra.induction.cih import Screen
from fra.induction.designs import TokenInduction
from fra.measures.channels.designs import HeadExcess
from fra.measures.channels.details import best_channel
from fra.report.pictures import BEST
from fra.search.channels import Effects, HeadOnArms
from fra.search.designs import ChannelSearch, Plantings
from fra.search.power import ChannelBars, plantings
from fra.search.screen import LayerScreen
from fra.statistics import stats
from fra.statistics.rules import RULES
from fra.statistics.stats import Floats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import WHOLE, Beside, Column, Planted, Sampled, decide, ranked

EXCESS, BY_BARS, OVER_SCRAMBLES = "excess of heads", "excess by the bars", "over scrambled heads"


@dataclass(frozen=True)
class ExcessNumbers:
    """What the two tests look at, of one head."""

    effects: Effects
    """Of the first candidates, by document: the confirmation documents on which scrambles are ranked."""
    contrast: Float[np.ndarray, " n_documents"]
    """Sum of the head's stripe contrast over the rows of each of them."""
    scrambled_margin: Float[np.ndarray, " n_scrambles"]
    scrambled_contrast: Float[np.ndarray, " n_scrambles"]


@dataclass(frozen=True)
class HeadCounts:
    """The two counts, and what they are under the null and over resampled sources."""

    heads: tuple[str, ...]
    margin: Float[np.ndarray, " n_heads"]
    """The best channel's smallest ratio to a bar of an expressed channel (1: it reaches all of them)."""
    contrast: Float[np.ndarray, " n_heads"]
    margin_threshold: Float[np.ndarray, " n_heads"]
    contrast_threshold: Float[np.ndarray, " n_heads"]
    null: Float[np.ndarray, " n_draws"]
    """Excess with a scramble in the place of every head."""
    resampled: Float[np.ndarray, " n_resamples"]
    """Excess over resampled sources."""
    by_bars: int
    """Heads with a channel that reaches every bar of an expressed one, less heads with a contrast of a TIH."""
    resampled_by_bars: Float[np.ndarray, " n_resamples"]

    @property
    def carrying(self) -> list[str]:
        """Heads whose channels exceed those of their scrambles."""
        return [h for h, a, b in zip(self.heads, self.margin, self.margin_threshold, strict=True) if a > b]

    @property
    def inducing(self) -> list[str]:
        """Heads whose contrast exceeds that of their scrambles."""
        return [h for h, a, b in zip(self.heads, self.contrast, self.contrast_threshold, strict=True) if a > b]

    @property
    def excess(self) -> int:
        """Heads that carry channels less induction heads."""
        return len(self.carrying) - len(self.inducing)

    def needed(self, level: float) -> int:
        """The smallest excess that scrambles reach with a chance of at most `level`."""
        k = int(self.null.max(initial=0)) + 1
        while k > 1 and stats.rank_p(k - 1, self.null) <= level:
            k -= 1
        return k


class CountDraws:
    """A count with its values over resampled sources: percentile tests. `fra.verdicts.decide.Sample` of one candidate.

    A count moves in steps, and resamples may lie beyond it on one side altogether: the count itself is then the bound.
    """

    n_cand = 1

    def __init__(self, estimate: float, resamples: Floats, n_docs: int) -> None:
        self.estimate, self.n_docs = float(estimate), n_docs
        self._low = np.sort(np.minimum(resamples, estimate))
        self._high = np.sort(np.maximum(resamples, estimate))

    def p_above(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "count <= bar"."""
        return np.array([(1 + (self._low <= bar).sum()) / (1 + self._low.size)])

    def p_below(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "count >= bar"."""
        return np.array([(1 + (self._high >= bar).sum()) / (1 + self._high.size)])

    def lower(self, level: float, simultaneous: bool = False) -> Floats:
        """[1] lower bound: above a bar exactly where `p_above` is at most the level."""
        reach = self._reach(level)
        return np.array([self._low[reach] if reach >= 0 else -np.inf])

    def upper(self, level: float, simultaneous: bool = False) -> Floats:
        """[1] upper bound: below a bar exactly where `p_below` is at most the level."""
        reach = self._reach(level)
        return np.array([self._high[::-1][reach] if reach >= 0 else np.inf])

    def power(self, worth: float, level: float, above: bool = True, simultaneous: bool = False) -> Floats:
        """[1] nothing is known of it: channels are planted instead."""
        return np.full(1, np.nan)

    def _reach(self, level: float) -> int:
        """How many resamples may lie on the bar's side, at most; -1: no p is that small."""
        p_of = np.arange(1, self._low.size + 1) / (1 + self._low.size)
        return int(np.searchsorted(p_of, level, side="right")) - 1


def margins(
    effects: Effects, n_rows: float, design: HeadExcess, least: int, weight: np.ndarray | None = None
) -> np.ndarray:
    """[n_resamples] the best channel's smallest ratio to a bar of an expressed channel; -inf where none is live enough.

    `weight` [n_resamples, n_documents]: how often each document counts; once each where None. A channel that is live in
    fewer than `least` documents or below the coverage bar does not count.
    """
    w = np.ones((1, len(effects.rows))) if weight is None else weight
    rows = np.maximum(w @ effects.rows, 1e-12)
    ratios = [
        (w @ part) / rows / bar
        for part, bar in (
            (effects.nats, design.effect),
            (effects.contrast, design.contrast),
            (effects.attention, design.attention),
        )
    ]
    enough = ((effects.rows > 0).sum(0) >= least) & (effects.covered.sum(0) > design.coverage * n_rows)
    return np.asarray(np.where(enough, np.minimum.reduce(ratios), -np.inf).max(1, initial=-np.inf))


@torch.no_grad()
def head_numbers(layer: LayerScreen, head: int, design: HeadExcess) -> ExcessNumbers:
    """Both numbers of one head and of its scrambles."""
    few = layer.few_confirmation
    n_rows = float(len(few.batch.row_doc))
    on = HeadOnArms(few, head)
    effects = on.channels(layer.candidates(head, design.candidates)[0])
    margin, contrast = [], []
    for k in range(design.scrambles):
        there, pairs = layer.scrambled(head, k, "channels", design.candidates)
        margin.append(margins(there.channels(pairs), n_rows, design, layer.design.least_documents)[0])
        contrast.append(float(there.contrast.sum()) / n_rows)
    return ExcessNumbers(effects, on.by_document(on.contrast), np.array(margin), np.array(contrast))


def count(
    numbers: Mapping[str, ExcessNumbers],
    periods: np.ndarray,
    sources: np.ndarray,
    design: HeadExcess,
    least: int,
    tih_at_least: float,
    seed: int,
) -> HeadCounts:
    """The two counts.

    The null draws one scramble for each head, the same for both tests, and holds it against the head's others;
    resampled sources are the same for all heads. periods: rows of each document; sources: their numbers.
    """
    heads, n_rows = tuple(numbers), float(periods.sum())
    rng = np.random.default_rng(seed)
    null_margin, null_contrast = (
        np.array([getattr(numbers[h], name) for h in heads]) for name in ("scrambled_margin", "scrambled_contrast")
    )
    at_margin, at_contrast = (np.maximum(null.max(1), 0.0) for null in (null_margin, null_contrast))
    drawn = rng.integers(0, null_margin.shape[1], (len(heads), RULES.draws))
    beyond = [np.take_along_axis(_beyond_others(null), drawn, axis=1) for null in (null_margin, null_contrast)]
    null = beyond[0].sum(0).astype(float) - beyond[1].sum(0)
    n = int(sources.max()) + 1
    weight = rng.multinomial(n, np.full(n, 1 / n), size=RULES.resamples).astype(float)[:, sources]
    resampled, by_bars = np.zeros(len(weight)), np.zeros(len(weight))
    for k, h in enumerate(heads):
        margin = margins(numbers[h].effects, n_rows, design, least, weight)
        contrast = (weight @ numbers[h].contrast) / (weight @ periods)
        resampled += (margin > at_margin[k]).astype(float) - (contrast > at_contrast[k])
        by_bars += (margin >= 1).astype(float) - (contrast >= tih_at_least)
    margin = np.array([margins(numbers[h].effects, n_rows, design, least)[0] for h in heads])
    contrast = np.array([numbers[h].contrast.sum() / n_rows for h in heads])
    own_bars = int((margin >= 1).sum()) - int((contrast >= tih_at_least).sum())
    return HeadCounts(heads, margin, contrast, at_margin, at_contrast, null, resampled, own_bars, by_bars)


def _beyond_others(null: Float[np.ndarray, "n_heads n"]) -> np.ndarray:
    """Whether each scramble is above zero and above every other one of its head."""
    ordered = np.sort(null, axis=1)
    other = np.where(null == ordered[:, -1:], ordered[:, -2:-1], ordered[:, -1:])
    return np.asarray((null > other) & (null > 0))


@torch.no_grad()
def excess_evidence(claim: Claim, screened: Screen, progress: Callable[[str], None] = lambda _: None) -> Evidence:
    """Q06: one row for the family."""
    screened.held_to(claim)
    if not screened.heads:
        return Evidence(claim=claim, head=None, cannot="no head could be screened: a dictionary at its input is needed")
    if screened.layers is None:
        raise FraError("this screen is kept without its layers: no scrambles can be drawn from it")
    design = claim.designed(HeadExcess)
    numbers: dict[str, ExcessNumbers] = {}
    for number in sorted({s.layer for s in screened.heads.values()}):
        names = [h for h, s in screened.heads.items() if s.layer == number]
        progress(f"Q06: layer {number}, scrambles of {len(names)} heads")
        layer = screened.layers(number)
        # one after the other: a layer keeps what the scrambles of one head share
        numbers |= {h: head_numbers(layer, screened.heads[h].head, design) for h in names}
    batch = screened.layers(next(iter(screened.heads.values())).layer).few_confirmation.batch
    periods = np.asarray(batch.periods.cpu(), dtype=float)
    sources = np.unique(np.asarray(batch.sources), return_inverse=True)[1]
    least, tih = claim.designed(ChannelSearch).least_documents, claim.designed(TokenInduction).tih_at_least
    seed = stats.seed_of(claim.digest, screened.target, "family")
    found = count(numbers, periods, sources, design, least, tih, seed)
    return judged(claim, screened, found, int(sources.max()) + 1, lambda: _planted(claim, screened, found))


def _planted(claim: Claim, screened: Screen, found: HeadCounts) -> Planted:
    """Families in which every head that is neither kind has a channel at the bars, and in how many of them the count
    passes: the scrambles' excess is reached, and the count by the bars is above zero.

    In each such head channels are planted; one that ranks among the search's candidates counts by the bars, and where
    it clears them by more than the head's scrambles do, by the calibrated test. A family takes one at random of each
    head; a head in which none can be planted adds nothing.
    """
    design = claim.designed(HeadExcess)
    bars = ChannelBars(design.effect, design.attention, design.contrast, design.coverage)
    how = replace(claim.designed(Plantings), planted=design.planted)
    already = {*found.carrying, *found.inducing}
    seen: list[tuple[Floats, Floats]] = []
    for k, h in enumerate(found.heads):
        if h in already:
            continue
        layer = screened.layer_of(h)
        head = screened.heads[h].head
        _, values = layer.candidates(head, design.candidates)
        cut = float(values[-1]) if len(values) >= design.candidates else -np.inf
        on, few = HeadOnArms(layer.confirmation, head), layer.ranked_on.cpu().numpy()
        by_bars, calibrated = [], []
        for raised in plantings(layer, on, bars, how, "plant for the excess"):
            rows = max(float(raised.rows[few].sum()), 1.0)
            means = [float(raised.sums[name][few].sum()) / rows for name in ("nats", "attention", "contrast")]
            margin = min(m / bar for m, bar in zip(means, (bars.nats, bars.attention, bars.contrast), strict=True))
            by_bars.append(float(raised.value >= cut))
            calibrated.append(float(raised.value >= cut and margin > found.margin_threshold[k]))
        if by_bars:
            seen.append((np.array(by_bars), np.array(calibrated)))
    rng = np.random.default_rng(stats.seed_of(claim.digest, screened.target, "planted families"))
    passed = 0
    needed = found.needed(claim.level)
    for _ in range(RULES.plantings):
        at = [int(rng.integers(len(own))) for own, _ in seen]
        more_by_bars = sum(own[n] for n, (own, _) in zip(at, seen, strict=True))
        more = sum(own[n] for n, (_, own) in zip(at, seen, strict=True))
        passed += int(found.excess + more >= needed and found.by_bars + more_by_bars > 0)
    return Planted(passed, RULES.plantings)


def judged(
    claim: Claim, screened: Screen, found: HeadCounts, n: int, planted: Callable[[], Planted] | None = None
) -> Evidence:
    """The evidence that the counts give; n: sources."""
    needed = found.needed(claim.level)
    others = len(found.heads) - len(found.inducing)
    undecided = None
    if needed > others:
        undecided = (
            f"an excess of {needed} heads is needed to tell it from scrambles, and only {others} of "
            f"{len(found.heads)} heads are no induction heads"
        )
    columns: list[Column] = [
        Sampled(name=EXCESS, samples={WHOLE: CountDraws(float(found.excess), found.resampled, n)}),
        Sampled(name=BY_BARS, samples={WHOLE: CountDraws(float(found.by_bars), found.resampled_by_bars, n)}),
        ranked(claim, OVER_SCRAMBLES, {WHOLE: float(found.excess)}, {WHOLE: found.null}),
    ]
    table = [
        {
            "head": h,
            "status": screened.status[h].status,
            "best channel, share of the bars": float(found.margin[k]) if np.isfinite(found.margin[k]) else None,
            "the same, largest of its scrambles or 0": float(found.margin_threshold[k]),
            "contrast": float(found.contrast[k]),
            "contrast, largest of its scrambles or 0": float(found.contrast_threshold[k]),
        }
        for k, h in enumerate(found.heads)
    ]
    detail: dict[str, Any] = {
        "heads": len(found.heads),
        "excess needed": needed,
        "heads that carry channels": found.carrying,
        "heads that are induction heads by the calibrated test": found.inducing,
        "heads one by one": table,
    }
    shown = {h: own[BEST] for h in found.carrying if (own := best_channel(screened, h))}
    if shown:
        detail["best channels of the heads that carry some"] = shown
    beside = Beside(n=n, candidates=("count of heads",), undecided=undecided, detail=detail)
    asked = None if planted is None else (lambda _: planted())
    return decide(claim, columns, {WHOLE: beside}, planted=asked, q_over=())[WHOLE]
