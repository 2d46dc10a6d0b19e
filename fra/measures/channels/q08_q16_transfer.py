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
from fra.induction.best_effect import MIN_LIVE_DOCUMENTS
from fra.induction.channels import Arms, Effects, HeadOnArms, measure_arms, on_device, shifted_keys
from fra.induction.cih import Screen
from fra.induction.examples import Shown, first_example
from fra.induction.outside import outside
from fra.induction.search import SET_SIZE, Search
from fra.measures.channels.details import CONTRAST, OVER_LAGS
from fra.report.pictures import BEST
from fra.stimuli import repeated
from fra.stimuli.sets import LONGEST_CONTEXT, mean_prediction
from fra.stimuli.variants import ARMS, VariantSets, disjoint_halves, token_matches, variant_forms, variant_repeat
from fra.targets.target import has_dictionary
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence, parse_head
from fra.verdicts.decide import Beside, Given, Power, Sampled, decide, means_of, ranked

if TYPE_CHECKING:
    from fra.targets.target import Target

DISCOVERY, MEASURED = 60, 60
"""Documents that channels are chosen on, and documents (of each arm) that they are measured on."""
LAGS = tuple(range(2, 26))
"""Other stripes of the control: 24, so that the least p is 0.04."""
SETS = f"the {SET_SIZE} strongest channels"
UNSEEN, VARIANTS = "effect on unseen tokens", "effect on variants"


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
    single: Effects | None = None
    """Of each channel by itself, on the last arm."""
    lags: Float[np.ndarray, " n_lags"] = field(default_factory=lambda: np.zeros(0))
    """Nats a row, on the last arm, of the sets that the same search finds at other lags."""
    shown: Shown | None = None
    """The first channel that is live on the stripe of the arm that is shown."""

    def mean(self, arm: str) -> float:
        """Nats a stripe row of the set on one arm."""
        return float(self.together[arm].sum() / self.rows.sum())


@torch.no_grad()
def move_layer(
    search: Search,
    arms: Mapping[str, Arms],
    heads: Sequence[int],
    *,
    single: bool,
    lags: Sequence[int],
    show: str | None = None,
) -> dict[str, Transferred]:
    """The channels of chosen heads of one layer, found by `search`, on every arm.

    show: the arm that a reader sees; the last one where it is None.
    """
    stripes = search.stripes((0, *lags))
    last = list(arms)[-1]
    shifted = {lag: shifted_keys(arms[last].batch, lag) for lag in lags}

    def one(head: int) -> Transferred:
        pairs, _ = stripes[0].strongest(search.arm, head, SET_SIZE)
        on = {name: HeadOnArms(own, head) for name, own in arms.items()}
        rows = np.bincount(arms[last].batch.row_doc.cpu().numpy(), minlength=len(arms[last].batch)).astype(float)
        at_lags = []
        for lag, (keys, used) in shifted.items():
            there, _ = stripes[lag].strongest(search.arm, head, SET_SIZE)
            keep = used.cpu().numpy()
            nats = on[last].on_stripe(keys).removed_together(there).nats[:, 0]
            at_lags.append(float((nats * keep).sum() / max((rows * keep).sum(), 1.0)))
        return Transferred(
            pairs.cpu().numpy(),
            {name: own.removed_together(pairs).nats[:, 0] for name, own in on.items()},
            {name: own.by_document(own.contrast) for name, own in on.items()},
            rows,
            arms[last].batch.sources,
            on[last].channels(pairs) if single else None,
            np.array(at_lags),
            first_example(arms[show or last], head, pairs),
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
    progress: Callable[[str], None],
    name: str,
    single: bool,
    lags: Sequence[int],
    show: str,
) -> dict[str, Transferred]:
    found: dict[str, Transferred] = {}
    for layer in range(target.n_layers):
        heads = tihs(target, screened, layer)
        if not heads or not has_dictionary(target, layer):
            continue
        progress(f"{name}: layer {layer}")
        hook, sae = target.dictionary_for(layer)
        arm = measure_arm(target.model, sae, discovery.tokens, layer, hook)
        search = Search(on_device(discovery, arm.frozen.x.device), arm)
        measured = {key: measure_arms(target.model, sae, batch, layer, hook) for key, batch in arms.items()}
        found |= move_layer(search, measured, heads, single=single, lags=lags, show=show)
    return found


def _pool(target: Target) -> Int[np.ndarray, " n"]:
    special = [int(i) for i in target.tokenizer.all_special_ids]
    return repeated.token_pool(mean_prediction(target.model, target), special)


def _context(target: Target) -> int:
    return min(int(target.model.cfg.n_ctx), LONGEST_CONTEXT)


def unseen_tokens(target: Target, screened: Screen, progress: Callable[[str], None]) -> dict[str, Transferred]:
    """Q16: the TIHs' channels, found over one half of the vocabulary, on documents over either half ("seen",
    "unseen").
    """
    seed_parts = (target.name, "repeated_random", "halves")
    halves = disjoint_halves(DISCOVERY, MEASURED, _pool(target), _context(target), target.bos, seed_parts)
    arms = {"seen": halves[1], "unseen": halves[2]}
    return _move(target, screened, halves[0], arms, progress, "Q16", True, LAGS, "unseen")


def variants(
    target: Target, screened: Screen, progress: Callable[[str], None]
) -> tuple[dict[str, Transferred], VariantSets]:
    """Q08: the TIHs' channels, found on plain repeats of words that have variants, on the four arms.

    Raises CannotLoad where the vocabulary has too few such words.
    """
    W_E = target.model.W_E.detach().double().cpu().numpy()
    forms = variant_forms(target.tokenizer, _pool(target), W_E)
    seed_parts = (target.name, "variant_repeat")
    sets = variant_repeat(DISCOVERY, MEASURED, forms, _context(target), target.bos, seed_parts)
    matched = {name: token_matches(batch) for name, batch in sets.arms.items()}
    if matched["variant"] > matched["unrelated"]:
        raise FraError(f"variant_repeat is broken: {matched['variant']:.1%} of its rows repeat a token of the prompt")
    return _move(target, screened, sets.discovery, sets.arms, progress, "Q08", False, (), "variant"), sets


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
    bar, level = claim.bars["share kept"], claim.level / len(moved)
    kept = _means(claim, screened, moved, "share kept", lambda m: m.together["unseen"] - bar * m.together["seen"])
    single: dict[str, stats.ClusterMeans] = {}
    rows, lags = {}, {}
    for h, m in moved.items():
        assert m.single is not None
        live = np.flatnonzero((m.single.rows > 0).sum(0) >= MIN_LIVE_DOCUMENTS)
        if len(live):
            nats, n = m.single.nats[:, live], m.single.rows[:, live]
            single[h] = means_of(claim, screened.target, h, "unseen", nats, n, m.sources)
        lags[h] = stats.rank_p(m.mean("unseen"), m.lags)
        rows[h] = Beside(
            n=len(m.rows),
            candidates=[f"{i} -> {j}" for i, j in m.pairs[live]] or (SETS,),
            power=float(stats.power_above(kept[h], 0.0, bar * max(m.mean("seen"), 0.0), level, False)[0]),
        )
    columns: list[Sampled | Given] = [
        Sampled(name=UNSEEN, samples=single, simultaneous=True),
        Sampled(
            name="share kept", samples=kept, shares={h: (m.mean("unseen"), m.mean("seen")) for h, m in moved.items()}
        ),
        ranked(claim, OVER_LAGS, lags),
    ]
    for h, own in decide(claim, columns, rows, q_over=()).items():
        m = moved[h]
        detail = {
            "set, seen tokens (nats a row)": m.mean("seen"),
            "set, unseen tokens (nats a row)": m.mean("unseen"),
            "channels live on unseen tokens": f"{single[h].n_cand if h in single else 0} of {len(m.pairs)}",
            "channels above the bar on unseen tokens": sum(c.holds(claim.level) for c, *_ in own.candidates.values()),
            "largest set at other lags (nats a row)": float(m.lags.max()),
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
        "over equal-cosine neighbours": lambda m: m.together["variant"] - m.together["neighbour"],
        "over an unrelated copy": lambda m: m.together["variant"] - m.together["unrelated"],
    }
    columns = [
        Sampled(name=name, samples=_means(claim, screened, moved, name, values)) for name, values in asked.items()
    ]
    rows = {h: Beside(n=len(m.rows), candidates=(SETS,)) for h, m in moved.items()}
    matches = {name: token_matches(batch) for name, batch in sets.arms.items()}
    for h, own in decide(claim, columns, rows, power=Power("headline")).items():
        m, holds = moved[h], {c.name: c.holds(claim.level) for c in own.candidates[SETS]}
        detail: dict[str, Any] = {
            "set (nats a row)": {name: m.mean(name) for name in ARMS},
            "head's contrast": {name: float(m.contrast[name].sum() / m.rows.sum()) for name in ARMS},
            "share of the same-token effect": m.mean("variant") / m.mean("same") if m.mean("same") > 0 else None,
            "surface-robust (without the controls)": holds[VARIANTS] and holds[CONTRAST],
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
