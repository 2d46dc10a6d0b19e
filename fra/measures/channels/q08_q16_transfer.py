"""Channels found on some documents, measured on others that share no token with them or say it in other tokens (Q16,
Q08).

Set effects here are per stripe row, whether or not a member of the set is live on it: a channel that is not live on
other tokens does nothing there, which is what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int

from fra.core.coded import measure_arm
from fra.core.threads import each
from fra.errors import FraError
from fra.induction.cih import Screen
from fra.induction.outside import outside
from fra.measures.channels.transfer_designs import ChannelSet, UnseenTokens, VariantRepeat
from fra.report.pictures import BEST
from fra.search.channels import Arms, Effects, HeadOnArms, measure_arms, on_device, shifted_keys
from fra.search.examples import Shown, first_example
from fra.search.search import Search
from fra.statistics import stats
from fra.stimuli import repeated
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.sets import mean_prediction
from fra.stimuli.variants import ARMS, VariantSets, disjoint_halves, token_matches, variant_forms, variant_repeat
from fra.targets.target import has_dictionary
from fra.verdicts.claim import Claim, Evidence, parse_head
from fra.verdicts.decide import Beside, Given, Sampled, decide, means_of

if TYPE_CHECKING:
    from fra.targets.target import Target

SETS = "the strongest channels together"
VARIANTS, CONTRAST = "effect on variants", "head contrast"
OVER_NEIGHBOURS, OVER_UNRELATED = "over equal-cosine neighbours", "over an unrelated copy"
UNSEEN, KEPT, OVER_LAGS = "effect on unseen tokens", "share kept", "over other lags"


@dataclass(frozen=True)
class Transferred:
    """What the channels of one head do on each arm, by document."""

    pairs: Int[np.ndarray, "n 2"]
    together: Mapping[str, Float[np.ndarray, " n_documents"]]
    """Nats of the set, summed over all stripe rows."""
    contrast: Mapping[str, Float[np.ndarray, " n_documents"]]
    """The head's own stripe contrast, summed over all stripe rows."""
    rows: Float[np.ndarray, " n_documents"]
    sources: tuple[str, ...]
    single: Effects
    """Of each channel by itself, on the arm that is measured."""
    at_lags: Mapping[int, Int[np.ndarray, "_n 2"]] = field(default_factory=dict)
    """What the same search finds on other stripes."""
    lags: Float[np.ndarray, " n_lags"] = field(default_factory=lambda: np.zeros(0))
    """Nats a row of those sets, on the arm that is measured."""
    shown: Shown | None = None
    """The first channel that is live on the stripe of that arm."""

    def mean(self, arm: str) -> float:
        """Nats a stripe row of the set on one arm."""
        return float(self.together[arm].sum() / self.rows.sum())


@torch.no_grad()
def move_layer(
    search: Search,
    arms: Mapping[str, Arms],
    heads: Sequence[int],
    channels: ChannelSet,
    *,
    measured: str,
    lags: Sequence[int] = (),
) -> dict[str, Transferred]:
    """The channels of chosen heads of one layer, found by `search`, on every arm.

    measured: the arm on which channels are measured one by one and sets of other stripes are, and which a reader sees.
    """
    stripes = search.stripes((0, *lags), channels.floor)
    batch = arms[measured].batch
    shifted = {lag: shifted_keys(batch, lag) for lag in lags}
    rows = np.bincount(batch.row_doc.cpu().numpy(), minlength=len(batch)).astype(float)

    def one(head: int) -> Transferred:
        pairs, _ = stripes[0].strongest(search.arm, head, channels.size)
        on = {name: HeadOnArms(own, head) for name, own in arms.items()}
        elsewhere, nats_there = {}, []
        for lag, (keys, used) in shifted.items():
            there, _ = stripes[lag].strongest(search.arm, head, channels.size)
            keep = used.cpu().numpy()
            nats = on[measured].on_stripe(keys).removed_together(there).nats[:, 0]
            nats_there.append(float((nats * keep).sum() / (rows * keep).sum()) if keep.any() else np.nan)
            elsewhere[lag] = there.cpu().numpy()
        return Transferred(
            pairs.cpu().numpy(),
            {name: own.removed_together(pairs).nats[:, 0] for name, own in on.items()},
            {name: own.by_document(own.contrast) for name, own in on.items()},
            rows,
            batch.sources,
            on[measured].channels(pairs),
            elsewhere,
            np.array(nats_there),
            first_example(arms[measured], head, pairs),
        )

    layer, device = search.arm.frozen.layer, search.arm.frozen.x.device
    return {f"L{layer}H{h}": moved for h, moved in zip(heads, each(one, heads, device), strict=True)}


def tihs(target: Target, screened: Screen, layer: int) -> list[int]:
    """TIHs of a layer; heads that are controls (layer 0 on repeated_random) are in no family, whatever their status."""
    names = {head: f"L{layer}H{head}" for head in range(target.n_heads)}
    return [h for h, name in names.items() if screened.status[name].status == "TIH" and name not in screened.controls]


def _move(
    target: Target,
    screened: Screen,
    discovery: repeated.Batch,
    arms: Mapping[str, repeated.Batch],
    channels: ChannelSet,
    progress: Callable[[str], None],
    *,
    measured: str,
    lags: Sequence[int] = (),
) -> dict[str, Transferred]:
    found: dict[str, Transferred] = {}
    for layer in range(target.n_layers):
        heads = tihs(target, screened, layer)
        if not heads or not has_dictionary(target, layer):
            continue
        progress(f"channels of layer {layer} on {', '.join(arms)}")
        hook, sae = target.dictionary_for(layer)
        arm = measure_arm(target.model, sae, discovery.tokens, layer, hook)
        search = Search(on_device(discovery, arm.frozen.x.device), arm)
        by_arm = {key: measure_arms(target.model, sae, batch, layer, hook) for key, batch in arms.items()}
        found |= move_layer(search, by_arm, heads, channels, measured=measured, lags=lags)
    return found


def pool_of(target: Target) -> Int[np.ndarray, " n"]:
    """The tokens that random passages are made of."""
    special = [int(i) for i in target.tokenizer.all_special_ids]
    return repeated.token_pool(mean_prediction(target.model, target), special)


def unseen_tokens(
    target: Target, screened: Screen, claim: Claim, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Transferred]:
    """Q16: the TIHs' channels, found over one half of the vocabulary, on documents over either half ("seen",
    "unseen").
    """
    design, context = claim.designed(UnseenTokens), _context(target, claim)
    seed_parts = (target.name, "repeated_random", "halves")
    discovery, seen, unseen = disjoint_halves(
        design.discovery, design.measured, pool_of(target), context, target.bos, seed_parts
    )
    arms, channels = {"seen": seen, "unseen": unseen}, claim.designed(ChannelSet)
    return _move(target, screened, discovery, arms, channels, progress, measured="unseen", lags=design.lags)


def variants(
    target: Target, screened: Screen, claim: Claim, progress: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Transferred], VariantSets]:
    """Q08: the TIHs' channels, found on plain repeats of words that have variants, on the four arms.

    Raises CannotLoad where the vocabulary has too few such words.
    """
    design = claim.designed(VariantRepeat)
    forms = variant_forms(
        target.tokenizer,
        pool_of(target),
        target.model.W_E.detach().double().cpu().numpy(),
        shortest=design.shortest_word,
        within=design.cosine_within,
        choices=design.choices,
        fewest=design.fewest_words,
    )
    seed_parts = (target.name, "variant_repeat")
    sets = variant_repeat(design.discovery, design.measured, forms, _context(target, claim), target.bos, seed_parts)
    matched = {name: token_matches(batch) for name, batch in sets.arms.items()}
    if matched["variant"] > matched["unrelated"]:
        raise FraError(f"variant_repeat is broken: {matched['variant']:.1%} of its rows repeat a token of the prompt")
    channels = claim.designed(ChannelSet)
    return _move(target, screened, sets.discovery, sets.arms, channels, progress, measured="variant"), sets


def _context(target: Target, claim: Claim) -> int:
    return min(int(target.model.cfg.n_ctx), claim.designed(RepeatedSets).longest)


def _means(
    claim: Claim,
    screened: Screen,
    moved: Mapping[str, Transferred],
    name: str,
    values: Callable[[Transferred], np.ndarray],
) -> dict[str, stats.ClusterMeans]:
    """The mean over stripe rows of something summed by document."""
    return {h: means_of(claim, screened.target, h, name, values(m), m.rows, m.sources) for h, m in moved.items()}


def unseen_evidence(claim: Claim, screened: Screen, moved: Mapping[str, Transferred]) -> dict[str, Evidence]:
    """Q16: of every TIH, a channel that works on unseen tokens, in a set that keeps its effect there."""
    found = outside(claim, screened)
    if not moved:
        return found
    bar = claim.bars[KEPT]
    single: dict[str, stats.ClusterMeans] = {}
    rows = {}
    for h, m in moved.items():
        live = np.flatnonzero((m.single.rows > 0).sum(0) >= claim.designed(UnseenTokens).live_documents)
        if len(live):
            nats, n = m.single.nats[:, live], m.single.rows[:, live]
            single[h] = means_of(claim, screened.target, h, UNSEEN, nats, n, m.sources)
        rows[h] = Beside(candidates=[f"{i} -> {j}" for i, j in m.pairs[live]] or (SETS,))
    columns: list[Sampled | Given] = [
        Sampled(name=UNSEEN, samples=single, simultaneous=True),
        Sampled(
            name=KEPT,
            samples=_means(claim, screened, moved, KEPT, lambda m: m.together["unseen"] - bar * m.together["seen"]),
            shares={h: (m.mean("unseen"), m.mean("seen")) for h, m in moved.items()},
        ),
        Given(OVER_LAGS, {h: m.mean("unseen") - float(m.lags.max()) for h, m in moved.items()}),
    ]
    for h, own in decide(claim, columns, rows, q_over=()).items():
        m = moved[h]
        detail = {
            "set, seen tokens (nats a row)": m.mean("seen"),
            "set, unseen tokens (nats a row)": m.mean("unseen"),
            "channels live on unseen tokens": f"{single[h].n_cand if h in single else 0} of {len(m.pairs)}",
            "channels above the bar on unseen tokens": sum(c.holds(claim.level) for c, *_ in own.candidates.values()),
            "sets of other lags (nats a row)": {"lags": len(m.lags), "largest": float(m.lags.max())},
        }
        on = "repeated_random: a document of the unseen half of the vocabulary"
        found[h] = replace(own, detail=_shown(screened, h, m, on) | detail)
    return found


def variant_evidence(
    claim: Claim, screened: Screen, moved: Mapping[str, Transferred], sets: VariantSets | None
) -> dict[str, Evidence]:
    """Q08: of every TIH, its set on surface variants, and against equal-cosine neighbours and an unrelated copy."""
    found = outside(claim, screened)
    if not moved or sets is None:
        return found
    asked: dict[str, Callable[[Transferred], np.ndarray]] = {
        VARIANTS: lambda m: m.together["variant"],
        CONTRAST: lambda m: m.contrast["variant"],
        OVER_NEIGHBOURS: lambda m: m.together["variant"] - m.together["neighbour"],
        OVER_UNRELATED: lambda m: m.together["variant"] - m.together["unrelated"],
    }
    columns = [
        Sampled(name=name, samples=_means(claim, screened, moved, name, values)) for name, values in asked.items()
    ]
    rows = {h: Beside(candidates=(SETS,)) for h in moved}
    matches = {name: token_matches(batch) for name, batch in sets.arms.items()}
    for h, own in decide(claim, columns, rows).items():
        m, holds = moved[h], {c.name: c.holds(claim.level) for c in own.candidates[SETS]}
        detail: dict[str, Any] = {
            "set (nats a row)": {name: m.mean(name) for name in ARMS},
            "head's contrast": {name: float(m.contrast[name].sum() / m.rows.sum()) for name in ARMS},
            "share of the same-token effect": m.mean("variant") / m.mean("same") if m.mean("same") > 0 else None,
            "surface-robust (without the controls)": holds[VARIANTS] and holds[CONTRAST],
            "draws of the controls": f"{len(m.rows)}: neighbours and unrelated copies anew for each document",
            "rows whose token stands in the first copy": matches,
            "mean difference of embedding cosine, neighbour and variant": sets.mean_gap,
        }
        on = "variant_repeat: the second copy in other surface forms"
        found[h] = replace(own, detail=_shown(screened, h, m, on) | detail)
    return found


def _shown(screened: Screen, h: str, moved: Transferred, on: str) -> dict[str, Any]:
    if moved.shown is None:
        return {}
    page = screened.pages.get(parse_head(h)[0])
    return {BEST: moved.shown.picture(on, screened.token_text, page)}
