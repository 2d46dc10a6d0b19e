"""Conceptual Induction Heads: screens of a target's heads for CIH channels and sets, and the evidence that claims judge.

Definitions are those of CLAIMS: a CIH channel is one candidate that has an effect above the bar, beats the same search at other lags, is the head's
doing (coupling), and beats scrambled heads; it is *expressed* where the head's own attention shows it. The CIH set of a head is its 50 discovery
channels removed together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra import stats, stimuli
from fra._channels import Arms, Effects, measure_arm, measure_arms, on_device
from fra._heads import Model
from fra._screen import MIN_LIVE_DOCUMENTS, HeadScreen, LayerScreen, mean_effect, screen_head
from fra._search import SET_SIZE
from fra.claim import Claim, Condition, Evidence
from fra.errors import FraError
from fra.induction import HeadStatus, by_source, head_status

if TYPE_CHECKING:
    from fra.targets import Target

STIMULI = ("repeated_random", "repeated_natural")
LONGEST_CONTEXT = 128
GATE = "gate: feature-feature share"
"""Name of the set claim's gate among its bars: the share of the stripe's contrast that the feature-feature block must carry."""


@dataclass(frozen=True)
class Design:
    """How many documents each set gets. Natural text is what there is: its sets get these shares of it."""

    status: int = 60
    discovery: int = 160
    confirmation: int = 120
    sets: int = 80

    def sizes(self) -> tuple[int, ...]:
        """In the order of stimuli.SETS."""
        return self.status, self.discovery, self.confirmation, self.sets


@dataclass(frozen=True)
class Screen:
    """Every head's status, and the screens of the heads that belong to a family."""

    target: str
    stimulus: str
    status: Mapping[str, HeadStatus]
    heads: Mapping[str, HeadScreen]
    n_documents: Mapping[str, int]
    token_text: Callable[[int], str]


def documents(target: Target, stimulus: str, design: Design) -> dict[str, stimuli.Batch]:
    """The four disjoint sets of one stimulus family, seeded from (target, stimulus).

    Raises FraError for an unknown stimulus, too little text, or too short a context.
    """
    model = target.model
    context = min(int(model.cfg.n_ctx), LONGEST_CONTEXT)
    seed_parts = (target.name, stimulus)
    if stimulus == "repeated_random":
        pool = stimuli.token_pool(mean_prediction(model, target), _special_ids(target))
        made = stimuli.repeated_random(sum(design.sizes()), pool, context, target.bos, seed_parts)
    elif stimulus == "repeated_natural":
        texts = [(doc.source, np.asarray(target.encode(doc.text), dtype=np.int64)) for doc in target.documents()]
        made = stimuli.repeated_natural(texts, context, target.bos, seed_parts)
    else:
        raise FraError(f"there is no stimulus {stimulus!r} with a repeat: use {' or '.join(STIMULI)}")
    parts = stimuli.split(len(made), design.sizes(), (*seed_parts, "split"))
    return {name: stimuli.collate([made[n] for n in part]) for name, part in zip(stimuli.SETS, parts, strict=True)}


def _special_ids(target: Target) -> list[int]:
    return [int(i) for i in target.tokenizer.all_special_ids]


@torch.no_grad()
def mean_prediction(model: Model, target: Target, n: int = 32) -> Float[np.ndarray, " d_vocab"]:
    """The model's mean next-token distribution on some of its target's documents: a smooth estimate of token frequency."""
    total: Tensor | None = None
    for doc in target.documents()[:: max(1, len(target.documents()) // n)]:
        ids = target.encode(doc.text)[: min(int(model.cfg.n_ctx), LONGEST_CONTEXT) - 1]
        start = [] if target.bos is None else [target.bos]
        tokens = torch.tensor([start + ids], device=next(model.parameters()).device)
        part = model(tokens)[0].float().softmax(-1).sum(0)
        total = part if total is None else total + part
    assert total is not None
    return np.asarray(total.cpu().double())


def screen(
    target: Target, stimulus: str, *, design: Design | None = None, families: Sequence[str] = ("TIH", "not a TIH"),
    progress: Callable[[str], None] = lambda _: None,
) -> Screen:  # fmt: skip
    """Status of every head, and the whole screen of those whose status is among `families`, layer by layer.

    Layer-0 heads are negative controls on repeated_random (a key there cannot know its predecessor): they are screened and join no family.
    Layers without a dictionary are left out.
    """
    design = design or Design()
    sets = documents(target, stimulus, design)
    model = target.model
    progress(f"{stimulus}: status of {model.cfg.n_layers * model.cfg.n_heads} heads")
    status = head_status(model, sets["status"], target=target.name, stimulus=stimulus)
    found: dict[str, HeadScreen] = {}
    for layer in range(model.cfg.n_layers):
        wanted = [h for h in range(model.cfg.n_heads) if status[f"L{layer}H{h}"].status in families]
        if not wanted or not has_dictionary(target, layer):
            continue
        hook_name, sae = target.dictionary_for(layer)
        progress(f"{stimulus}: layer {layer}, documents through the model and the dictionary")
        discovery = measure_arm(model, sae, sets["discovery"].tokens, layer, hook_name)
        batch = on_device(sets["discovery"], discovery.frozen.x.device)
        arms = [measure_arms(model, sae, sets[name], layer, hook_name) for name in ("confirmation", "sets")]
        found |= screen_layer(
            batch, discovery, arms[0], arms[1], wanted, seed_parts=(target.name, stimulus, str(layer)), progress=progress,
            with_atoms=any(status[f"L{layer}H{h}"].status == "TIH" for h in wanted),
        )  # fmt: skip
    return Screen(
        target.name, stimulus, status, found, {name: len(batch) for name, batch in sets.items()},
        lambda token: str(target.tokenizer.decode([token])),
    )  # fmt: skip


def has_dictionary(target: Target, layer: int) -> bool:
    """Whether the target has a dictionary at the layer's attention input."""
    try:
        target.hook_for(layer)
    except FraError:
        return False
    return True


@torch.no_grad()
def screen_layer(
    batch: stimuli.Batch, discovery: Any, confirmation: Arms, sets: Arms, heads: Sequence[int], *, seed_parts: Sequence[str],
    with_atoms: bool, progress: Callable[[str], None] = lambda _: None,
) -> dict[str, HeadScreen]:  # fmt: skip
    """Screens of chosen heads of one layer; scrambles are pooled over all of them."""
    layer = LayerScreen(batch, discovery, confirmation, sets, seed_parts=seed_parts, progress=progress)
    number = discovery.frozen.layer
    progress(f"layer {number}: scrambles of {len(heads)} heads")
    nulls = _each(layer.null_scrambles, heads)
    null = tuple(np.concatenate([np.asarray(own[part]) for own in nulls]) for part in (0, 1))
    atoms = layer.atoms() if with_atoms else ()
    progress(f"layer {number}: screen of {len(heads)} heads")
    screens = _each(lambda head: screen_head(layer, head, (null[0], null[1]), atoms), heads)
    return {f"L{number}H{head}": found for head, found in zip(heads, screens, strict=True)}


def _each(work: Callable[[int], Any], heads: Sequence[int]) -> list[Any]:
    """`work` of every head, in order, one thread for each that torch was given: a head's tensors are too small to share one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(torch.no_grad()(work), heads))
    finally:
        torch.set_num_threads(threads)


def families(screened: Screen) -> dict[str, list[str]]:
    """Screened heads by status. Layer-0 heads belong to neither family on repeated_random; there they are 'controls'."""
    found: dict[str, list[str]] = {"TIH": [], "not a TIH": [], "controls": []}
    for name, head in screened.heads.items():
        control = head.layer == 0 and screened.stimulus == "repeated_random"
        found.setdefault("controls" if control else screened.status[name].status, []).append(name)
    return found


def cluster_means(sums: np.ndarray, counts: np.ndarray, sources: Sequence[str], seed: int) -> stats.ClusterMeans:
    """Ratio means with the sources of the documents as clusters."""
    return stats.ClusterMeans(by_source(sums, sources), by_source(counts, sources), seed=seed)


def _two_sided(
    name: str, bar: float, means: Mapping[str, stats.ClusterMeans], level: float, share: int, simultaneous: bool
) -> dict[str, list[Condition]]:
    """One condition for every candidate of every head.

    "effect <= bar" is Holm-adjusted across heads over the best candidate of each head (max-T within the head). "effect >= bar" is Bonferroni-adjusted over
    the heads and over the `share` conditions any one of which may refute a candidate. Bounds are at the level at which the head was tested.
    """
    heads = list(means)
    above = {h: means[h].p_above(bar, simultaneous) for h in heads}
    level_above = stats.holm_levels([float(above[h].min()) for h in heads], level)
    tests = share * len(heads)
    found: dict[str, list[Condition]] = {}
    for k, h in enumerate(heads):
        m = means[h]
        lower, upper = m.lower(level_above[k], simultaneous), m.upper(level / tests, simultaneous)
        below = m.p_below(bar, simultaneous)
        found[h] = [
            Condition(
                name, float(m.estimate[c]), float(lower[c]), float(upper[c]), bar,
                p=float(min(1.0, above[h][c] * level / level_above[k])), p_refute=float(min(1.0, below[c] * tests)),
            )
            for c in range(m.n_cand)
        ]  # fmt: skip
    return found


def _ranked(name: str, p: float, level: float) -> Condition:
    """A condition that is a rank among nulls: 1 - p above 1 - level. It can be missed; it refutes nothing."""
    return Condition(name, 1 - p, 1 - p, 1.0, 1 - level, p=p, p_refute=1.0)


def _exact(name: str, value: float, bar: float) -> Condition:
    """A condition on a number that is not estimated from the documents."""
    return Condition(name, value, value, value, bar)


def set_evidence(claim: Claim, screened: Screen) -> dict[str, Evidence]:
    """Q04: the CIH set of every TIH against its bars, random atoms and scrambles."""
    heads = families(screened)["TIH"]
    if not heads:
        return {}
    size, level = SET_SIZE, claim.level

    def means(name: str, sums: Callable[[HeadScreen], np.ndarray], counts: Callable[[HeadScreen], np.ndarray]) -> dict[str, stats.ClusterMeans]:
        return {
            h: cluster_means(sums(screened.heads[h]), counts(screened.heads[h]), screened.heads[h].set_sources,
                             stats.seed_of(claim.digest, screened.target, h, name))
            for h in heads
        }  # fmt: skip

    n_atoms = len(screened.heads[heads[0]].atom_effects)
    refutable = 2 + n_atoms
    every: dict[str, Callable[[HeadScreen], np.ndarray]] = {
        "set effect": lambda s: s.set_effects[size].nats[:, 0],
        "share of contrast": lambda s: s.set_effects[size].attention[:, 0] - claim.bars["share of contrast"] * s.contrast,
    }
    effect = means("set effect", every["set effect"], lambda s: s.set_effects[size].rows[:, 0])
    share = means("share of contrast", every["share of contrast"], lambda s: s.set_rows)
    columns = [
        _two_sided("set effect", claim.bar, effect, level, refutable, False),
        _shifted(_two_sided("share of contrast", 0.0, share, level, refutable, False), claim.bars["share of contrast"], screened, size),
    ]
    for seed in range(n_atoms):
        over = means(f"atoms {seed}", lambda s, k=seed: s.set_effects[size].nats[:, 0] - s.atom_effects[k].nats[:, 0], lambda s: s.set_rows)  # type: ignore[misc]
        columns.append(_two_sided(f"over random atoms {seed + 1}", claim.bars[f"over random atoms {seed + 1}"], over, level, refutable, False))
    q = stats.benjamini_hochberg([columns[0][h][0].p or 1.0 for h in heads])
    channels = _channel_conditions(claim_bars(claim), level, screened, heads, claim.digest)
    found = {}
    for k, h in enumerate(heads):
        s = screened.heads[h]
        own = float(effect[h].estimate[0])
        p = stats.rank_p(own, s.scramble_sets)
        conditions = (*(column[h][0] for column in columns), _ranked("over scrambled heads", p, level))
        total = sum(s.blocks.values())
        carried = s.blocks["ff"] / total if total > 0 else float("nan")
        undecided = None
        if not carried >= claim.bars[GATE]:
            undecided = (
                f"the feature-feature block carries {carried:.0%} of the head's stripe contrast on {screened.stimulus}, and "
                f"{claim.bars[GATE]:.0%} is needed before its channels can answer for the head"
            )
        power = float(stats.power_above(effect[h], 0.0, claim.bar, level / len(heads), simultaneous=False)[0])
        found[h] = Evidence(
            claim=claim, head=h, candidates={f"the {size} strongest channels": conditions}, n=len(s.set_rows), power=power, q=float(q[k]),
            undecided=undecided, detail=_set_detail(screened, h, carried, effect[h], level / len(heads)) | _channel_detail(screened, h, channels[h], level),
        )  # fmt: skip
    return found


def _shifted(columns: dict[str, list[Condition]], bar: float, screened: Screen, size: int) -> dict[str, list[Condition]]:
    """The linear form dA - bar * contrast > 0 said again as a share of the contrast (bounds over the head's mean contrast)."""
    out = {}
    for h, (c,) in columns.items():
        s = screened.heads[h]
        mean = s.contrast.sum() / s.set_rows.sum()
        share = s.set_effects[size].attention.sum() / s.contrast.sum()
        ends = [share + (end - c.effect) / mean if mean > 0 else float("nan") for end in (c.low, c.high)]
        out[h] = [Condition(c.name, float(share), float(ends[0]), float(ends[1]), bar, p=c.p, p_refute=c.p_refute)]
    return out


def claim_bars(claim: Claim) -> Mapping[str, float]:
    """Bars of a CIH channel, as a claim registers them."""
    return {name: claim.bars[name] for name in ("effect", "head contrast", "attention", "coverage") if name in claim.bars}


def channel_evidence(claim: Claim, screened: Screen, family: str = "not a TIH") -> dict[str, Evidence]:
    """Q05: an expressed channel among the candidates of every head of a family; one and the same candidate must pass everything."""
    heads = families(screened)[family]
    if not heads:
        return {}
    conditions = _channel_conditions(claim_bars(claim), claim.level, screened, heads, claim.digest)
    least = [min((c[0].p if c[0].p is not None else 1.0 for c in conditions[h].values()), default=1.0) for h in heads]
    q = stats.benjamini_hochberg(least)
    found = {}
    for k, h in enumerate(heads):
        s = screened.heads[h]
        power = s.planted_found / s.planted if s.planted else 0.0
        found[h] = Evidence(
            claim=claim, head=h, candidates=conditions[h], n=len(s.effects.rows), power=power, q=float(q[k]),
            detail=_channel_detail(screened, h, conditions[h], claim.level) | {"status": _status_detail(screened.status[h])},
        )  # fmt: skip
    return found


def _live(s: HeadScreen) -> Int[np.ndarray, " m"]:
    """Candidates live in enough documents to be measured at all."""
    return np.flatnonzero((s.effects.rows > 0).sum(0) >= MIN_LIVE_DOCUMENTS)


def _channel_conditions(
    bars: Mapping[str, float], level: float, screened: Screen, heads: Sequence[str], digest: str
) -> dict[str, dict[str, tuple[Condition, ...]]]:
    """All conditions of an expressed CIH channel for every measured candidate of every head."""
    keep = {h: _live(screened.heads[h]) for h in heads}
    measured = [h for h in heads if len(keep[h])]

    def column(name: str, part: str, bar: float) -> dict[str, list[Condition]]:
        means = {}
        for h in measured:
            s = screened.heads[h]
            sums, rows = getattr(s.effects, part)[:, keep[h]], s.effects.rows[:, keep[h]]
            means[h] = cluster_means(sums, rows, s.sources, stats.seed_of(digest, screened.target, h, name))
        return _two_sided(name, bar, means, level, 3, True)

    effect = column("effect", "nats", bars["effect"])
    contrast = column("head contrast", "contrast", bars["head contrast"])
    attention = column("attention", "attention", bars["attention"])
    found: dict[str, dict[str, tuple[Condition, ...]]] = {h: {} for h in heads}
    for h in measured:
        s = screened.heads[h]
        E = mean_effect(s.effects)
        for n, c in enumerate(keep[h]):
            covered = s.effects.covered[:, c].sum() / s.n_rows
            found[h][f"{s.pairs[c, 0]} -> {s.pairs[c, 1]}"] = (
                effect[h][n],
                _ranked("over other lags", float(s.p_lag[c]), level),
                _ranked("coupling among matched pairs", float(s.p_coupling[c]), level),
                _exact("coupling over other heads", float(s.above_heads[c]), 0.0),
                _ranked("over scrambled heads", stats.rank_p(float(E[c]), s.scramble_best), level),
                contrast[h][n],
                attention[h][n],
                _exact("coverage", float(covered), bars["coverage"]),
            )
    return found


LATENT = 5
"""The first five conditions make a channel latent; all of them make it expressed."""


def _channel_detail(screened: Screen, h: str, conditions: Mapping[str, tuple[Condition, ...]], level: float, top: int = 5) -> dict[str, Any]:
    """The best channels of a head as a reader should see them, with how many are latent and expressed."""
    s = screened.heads[h]
    rows = []
    order = sorted(zip(_live(s), conditions.items(), strict=True), key=lambda item: -item[1][1][0].effect)
    for c, (name, own) in order:
        about = s.tokens[c]
        latent = all(x.holds(level) for x in own[:LATENT])
        survives = bool(s.without_heaviest[c] > own[0].bar)
        rows.append({
            "channel": name, "effect (nats)": own[0].effect, "low": own[0].low, "high": own[0].high, "attention": own[6].effect,
            "coverage": own[7].effect, "live-pair share": about["live_pair_share"], "breadth": about["breadth"], "coupling": float(s.coupling[c]),
            "coupling rank": float(s.p_coupling[c]), "p other lags": float(s.p_lag[c]), "p scrambles": own[4].p, "head contrast": own[5].effect,
            "latent": latent, "expressed": latent and all(x.holds(level) for x in own[LATENT:]),
            "conceptual": about["breadth"] >= 3 and survives,
            "query tokens": [f"{screened.token_text(t)!r} x{n}" for t, n in about["query"]],
            "key tokens": [f"{screened.token_text(t)!r} x{n}" for t, n in about["key"]],
        })  # fmt: skip
    detail: dict[str, Any] = {
        "channels screened": len(s.pairs), "channels measured": len(rows), "latent": sum(r["latent"] for r in rows),
        "expressed": sum(r["expressed"] for r in rows), "best channels": rows[:top],
        "planted channels found": f"{s.planted_found} of {s.planted}",
        "best effect at other lags": _spread(s.lag_best), "best effect of scrambled heads": _spread(s.scramble_best),
    }  # fmt: skip
    if s.marginals is not None:
        detail["all channels of the best channel's query feature"], detail["all channels of its key feature"] = map(_mean, s.marginals)
    return detail


def _mean(effects: Effects) -> float:
    return float(effects.nats.sum() / max(effects.rows.sum(), 1.0))


def _spread(values: np.ndarray) -> dict[str, float | None]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return {"median": None, "95th percentile": None, "largest": None}
    return {"median": float(np.median(finite)), "95th percentile": float(np.quantile(finite, 0.95)), "largest": float(finite.max())}


def _status_detail(status: HeadStatus) -> dict[str, Any]:
    return {"status": status.status, "contrast": status.contrast, "low": status.lower, "high": status.upper} | {
        f"attention: {name}": value for name, value in status.stripes.items()
    }


_BLOCK_NAMES = {"f": "feature", "b": "bias", "e": "error"}


def _set_detail(screened: Screen, h: str, carried: float, effect: stats.ClusterMeans, level: float) -> dict[str, Any]:
    s = screened.heads[h]
    contrast = float(s.contrast.sum() / s.set_rows.sum())
    return {
        "status": _status_detail(screened.status[h]),
        "feature-feature share of the stripe contrast": carried,
        "stripe contrast by block (nats)": {f"{_BLOCK_NAMES[k[0]]} x {_BLOCK_NAMES[k[1]]}": v for k, v in s.blocks.items()},
        "sets removed together": [
            {
                "channels": n, "effect (nats)": _mean(e), "attention": float(e.attention.sum() / max(e.rows.sum(), 1.0)),
                "share of contrast": float(e.attention.sum() / s.contrast.sum()) if contrast > 0 else None,
                "coverage": float(e.covered.sum() / s.set_rows.sum()),
            }
            for n, e in s.set_effects.items()
        ],
        "the same set with random atoms (nats)": [_mean(e) for e in s.atom_effects],
        "the same set of scrambled heads (nats)": _spread(s.scramble_sets),
        "smallest detectable effect (nats)": float(stats.detectable(effect, level, simultaneous=False)[0]),
    }  # fmt: skip
