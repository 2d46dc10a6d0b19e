"""How many heads carry expressed CIH channels and how many are token induction heads, by tests that err equally often.

Both tests of a head compare one number with what scrambled heads of the layer give: the head's stripe contrast, and the
margin by which its best channel clears the bars of an expressed channel. Their thresholds are the same quantile, so
that both call the same share of scrambled heads positive; only then may the two counts be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from fra.core.coded import Arm, measure_arm
from fra.core.threads import each
from fra.induction.best_effect import MIN_LIVE_DOCUMENTS
from fra.induction.channels import Arms, Effects, HeadOnArms, measure_arms, on_device
from fra.induction.cih import Screen
from fra.induction.nulls import random_rotation, scramble, scrambled_arms, stretch_to_match
from fra.induction.screen import PLANTED_AT_LEAST
from fra.induction.search import Search, Stripe
from fra.induction.status import TIH_AT_LEAST
from fra.measures.channels.details import best_channel
from fra.report.pictures import BEST
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch
from fra.stimuli.sets import documents
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.decide import WHOLE, Beside, Given, decide

if TYPE_CHECKING:
    from fra.targets.target import Target

CANDIDATES = 20
"""First channels of the search, of heads and scrambles alike; fifty for every scramble would take minutes."""
SCRAMBLES = 10
FALSE_POSITIVES = 0.05
"""Share of scrambled heads that either test calls positive."""
DRAWS = 9_999
_RESAMPLES = 1_999


@dataclass(frozen=True)
class ExcessNumbers:
    """What the two tests look at, of one head."""

    effects: Effects
    """Of the first candidates, by confirmation document."""
    contrast: Float[np.ndarray, " n_documents"]
    """Sum of the head's stripe contrast over the rows of each confirmation document."""
    scrambled_margin: Float[np.ndarray, " n_scrambles"]
    scrambled_contrast: Float[np.ndarray, " n_scrambles"]


@dataclass(frozen=True)
class HeadCounts:
    """The two counts, and what they are under the null and over resampled documents."""

    heads: tuple[str, ...]
    margin: Float[np.ndarray, " n_heads"]
    """The best channel's smallest ratio to a bar of an expressed channel (1: it reaches all of them)."""
    contrast: Float[np.ndarray, " n_heads"]
    margin_threshold: Float[np.ndarray, " n_heads"]
    contrast_threshold: Float[np.ndarray, " n_heads"]
    null: Float[np.ndarray, " n_draws"]
    """Excess with a scramble in the place of every head."""
    resampled: Float[np.ndarray, " n_resamples"]
    """Excess over resampled confirmation documents."""
    by_bars: int
    """Heads with a channel that reaches every bar of an expressed one, less heads with a contrast of a TIH."""
    resampled_by_bars: Float[np.ndarray, " n_resamples"]

    @property
    def carrying(self) -> list[str]:
        """Heads whose channels exceed those of scrambled heads."""
        return [h for h, a, b in zip(self.heads, self.margin, self.margin_threshold, strict=True) if a > b]

    @property
    def inducing(self) -> list[str]:
        """Heads whose contrast exceeds that of scrambled heads."""
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


def margins(effects: Effects, n_rows: float, bars: Mapping[str, float], weight: np.ndarray | None = None) -> np.ndarray:
    """[n_resamples] the best channel's smallest ratio to a bar of an expressed channel; -inf where none is live enough.

    `weight` [n_resamples, n_documents]: how often each document counts; once each where None. A channel below the
    coverage bar does not count.
    """
    w = np.ones((1, len(effects.rows))) if weight is None else weight
    rows = np.maximum(w @ effects.rows, 1e-12)
    ratios = [
        (w @ part) / rows / bar
        for part, bar in (
            (effects.nats, bars["effect"]),
            (effects.contrast, bars["head contrast"]),
            (effects.attention, bars["attention"]),
        )
    ]
    enough = ((effects.rows > 0).sum(0) >= MIN_LIVE_DOCUMENTS) & (effects.covered.sum(0) >= bars["coverage"] * n_rows)
    least = np.where(enough, np.minimum.reduce(ratios), -np.inf)
    return np.asarray(least.max(1, initial=-np.inf))


@torch.no_grad()
def measure(
    target: Target,
    screened: Screen,
    bars: Mapping[str, float],
    *,
    design: RepeatedSets | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, ExcessNumbers], float]:
    """Both numbers of every screened head and of its scrambles, and the number of confirmation rows."""
    stimulus = screened.stimulus
    sets = documents(target, stimulus, design or RepeatedSets())
    found: dict[str, ExcessNumbers] = {}
    for layer in sorted({s.layer for s in screened.heads.values()}):
        heads = [s.head for s in screened.heads.values() if s.layer == layer]
        hook_name, sae = target.dictionary_for(layer)
        progress(f"Q06: layer {layer}, scrambles of {len(heads)} heads")
        discovery = measure_arm(target.model, sae, sets["discovery"].tokens, layer, hook_name)
        confirmation = measure_arms(target.model, sae, sets["confirmation"], layer, hook_name)
        found |= layer_numbers(discovery, confirmation, screened, layer, heads, bars, sets["discovery"])
    return found, float(len(sets["confirmation"].row_doc))


def layer_numbers(
    discovery: Arm,
    confirmation: Arms,
    screened: Screen,
    layer: int,
    heads: Sequence[int],
    bars: Mapping[str, float],
    discovery_batch: Batch,
) -> dict[str, ExcessNumbers]:
    """The numbers of chosen heads of one layer."""
    batch = on_device(discovery_batch, discovery.frozen.x.device)
    stripe = Search(batch, discovery).stripes((0,))[0]
    n_rows = float(len(confirmation.batch.row_doc))

    def one(head: int) -> ExcessNumbers:
        seed = stats.seed_of(screened.target, screened.stimulus, "excess", f"L{layer}H{head}")
        generator = torch.Generator().manual_seed(seed % 2**63)
        own, effects = _measured(stripe, discovery, confirmation, head)
        margin, contrast = [], []
        for _ in range(SCRAMBLES):
            W_k = discovery.frozen.W_k
            rotation = random_rotation(W_k.shape[-1], generator, W_k)
            stretch = stretch_to_match(confirmation.repeated.frozen, head, rotation)
            arm = Arm(scramble(discovery.frozen, head, rotation, stretch), discovery.codes)
            turned = scrambled_arms(confirmation, head, rotation, stretch)
            there, its = _measured(stripe, arm, turned, head)
            margin.append(margins(its, n_rows, bars)[0])
            contrast.append(float(there.sum()) / n_rows)
        return ExcessNumbers(effects, own, np.array(margin), np.array(contrast))

    return {f"L{layer}H{h}": n for h, n in zip(heads, each(one, heads, discovery.frozen.x.device), strict=True)}


def _measured(stripe: Stripe, discovery: Arm, confirmation: Arms, head: int) -> tuple[np.ndarray, Effects]:
    """The head's contrast by document, and its first candidates' effects."""
    on = HeadOnArms(confirmation, head)
    pairs, _ = stripe.strongest(discovery, head, CANDIDATES)
    return on.by_document(on.contrast), on.channels(pairs)


def count(
    numbers: Mapping[str, ExcessNumbers], n_rows: float, periods: np.ndarray, bars: Mapping[str, float], seed: int
) -> HeadCounts:
    """The two counts by thresholds calibrated on the scrambles of each layer.

    The null draws one scramble for each head, the same for both tests; resampled documents are the same for all heads.
    periods: rows of each confirmation document.
    """
    heads = tuple(numbers)
    rng = np.random.default_rng(seed)
    layers = np.array([name.split("H")[0] for name in heads])
    null_margin = np.array([numbers[h].scrambled_margin for h in heads])
    null_contrast = np.array([numbers[h].scrambled_contrast for h in heads])

    def thresholds(null: np.ndarray) -> np.ndarray:
        return np.array(
            [np.quantile(null[layers == own].ravel(), 1 - FALSE_POSITIVES, method="higher") for own in layers]
        )

    at_margin, at_contrast = thresholds(null_margin), thresholds(null_contrast)
    each_head = np.arange(len(heads))[:, None]
    drawn = rng.integers(0, null_margin.shape[1], (len(heads), DRAWS))
    beyond_margin = null_margin[each_head, drawn] > at_margin[:, None]
    beyond_contrast = null_contrast[each_head, drawn] > at_contrast[:, None]
    null = beyond_margin.sum(0).astype(float) - beyond_contrast.sum(0)
    n_documents = len(periods)
    weight = rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=_RESAMPLES).astype(float)
    resampled, by_bars = np.zeros(_RESAMPLES), np.zeros(_RESAMPLES)
    for k, h in enumerate(heads):
        margin = margins(numbers[h].effects, n_rows, bars, weight)
        contrast = (weight @ numbers[h].contrast) / (weight @ periods)
        resampled += (margin > at_margin[k]).astype(float) - (contrast > at_contrast[k])
        by_bars += (margin >= 1).astype(float) - (contrast >= TIH_AT_LEAST)
    margin = np.array([margins(numbers[h].effects, n_rows, bars)[0] for h in heads])
    contrast = np.array([numbers[h].contrast.sum() / n_rows for h in heads])
    own_bars = int((margin >= 1).sum()) - int((contrast >= TIH_AT_LEAST).sum())
    return HeadCounts(heads, margin, contrast, at_margin, at_contrast, null, resampled, own_bars, by_bars)


def excess_evidence(
    claim: Claim, target: Target, screened: Screen, progress: Callable[[str], None] = lambda _: None
) -> Evidence:
    """Q06: one row for the family. `claim.bars` holds the bars of an expressed channel."""
    if not screened.heads:
        return Evidence(claim=claim, head=None, cannot="no head could be screened: a dictionary at its input is needed")
    numbers, n_rows = measure(target, screened, claim.bars, progress=progress)
    periods = np.bincount(
        documents(target, screened.stimulus, RepeatedSets())["confirmation"].row_doc.numpy(),
        minlength=screened.n_documents["confirmation"],
    ).astype(float)
    found = count(numbers, n_rows, periods, claim.bars, stats.seed_of(claim.digest, target.name, "family"))
    return judged(claim, screened, found, len(periods))


def judged(claim: Claim, screened: Screen, found: HeadCounts, n: int) -> Evidence:
    """The evidence that the counts give."""
    needed = found.needed(claim.level)
    others = len(found.heads) - len(found.inducing)
    undecided = None
    if needed > others:
        undecided = (
            f"an excess of {needed} heads is needed to tell it from scrambles, and only {others} of "
            f"{len(found.heads)} heads are no induction heads"
        )

    def bounds(draws: np.ndarray) -> tuple[float, float]:
        low, high = np.quantile(draws, [claim.level, 1 - claim.level])
        return float(low), float(high)

    def share(at: np.ndarray) -> float:
        return float((1 + at.sum()) / (1 + len(at)))

    rows = [
        ("excess of heads", found.excess, found.resampled, stats.rank_p(found.excess, found.null)),
        ("excess by the bars", found.by_bars, found.resampled_by_bars, share(found.resampled_by_bars <= 0)),
    ]
    columns = [
        Given(
            name,
            {
                WHOLE: [
                    Condition(
                        name,
                        effect,
                        min(bounds(draws)[0], effect),
                        max(bounds(draws)[1], effect),
                        claim.bars.get(name, claim.bar),
                        p=p,
                        p_refute=share(draws > 0) if effect <= 0 else 1.0,
                    )
                ]
            },
        )
        for name, effect, draws, p in rows
    ]
    screens = [s for s in screened.heads.values() if s.planted >= PLANTED_AT_LEAST]
    planted = sum(s.planted for s in screens)
    # known only where channels could be planted in most of the heads that would have to make the excess
    known = 2 * len(screens) >= others and planted > 0
    power = sum(s.planted_found for s in screens) / planted if known else float("nan")
    table = [
        {
            "head": h,
            "status": screened.status[h].status,
            "best channel, share of the bars": float(found.margin[k]) if np.isfinite(found.margin[k]) else None,
            "the same, 95 % of scrambled heads": float(found.margin_threshold[k])
            if np.isfinite(found.margin_threshold[k])
            else None,
            "contrast": float(found.contrast[k]),
            "contrast, 95 % of scrambled heads": float(found.contrast_threshold[k]),
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
    beside = Beside(n=n, candidates=("count of heads",), power=power, undecided=undecided, detail=detail)
    return decide(claim, columns, {WHOLE: beside}, q_over=())[WHOLE]
