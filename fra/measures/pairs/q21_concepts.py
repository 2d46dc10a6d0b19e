"""Q21: every head's channels of conceptual induction on natural text, against the same search at other lags, on random
atoms and on scrambled heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.coded import Arm, measure_arm
from fra.core.threads import each
from fra.dictionaries.codes import neuronpedia
from fra.errors import CannotLoad
from fra.induction.nulls import draw_atoms, random_atoms, random_rotation, scramble, stretch_to_match
from fra.induction.outside import BEST_EFFECT, CONTROL
from fra.induction.screen import PLANTED_AT_LEAST
from fra.measures.pairs.q21_planting import plant_concepts
from fra.measures.pairs.q21_search import (
    FLOOR_DOCUMENTS,
    ConceptEffects,
    ConceptSearch,
    ConceptStripe,
    HeadOnText,
    MarkedTexts,
    example_of,
    texts,
)
from fra.report.pictures import BEST, ON_NATURAL, ChannelPicture
from fra.stimuli import sets
from fra.stimuli.sets import LONGEST_CONTEXT
from fra.targets.target import has_dictionary, text_of
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.decide import Beside, Given, Sampled, decide, means_of, ranked
from fra.verdicts.samples import NO_INPUT_DICTIONARY

if TYPE_CHECKING:
    from fra.targets.target import Target

DOCUMENTS = 100
"""Of discovery and of confirmation, where the target has so many texts."""
LAGS = tuple(range(2, 22))
"""Other stripes: a longer lag leaves few keys in documents of 128 tokens; 20 make the least p 0.048."""
SCRAMBLES = 10
"""A head, pooled by layer."""
NEAR = 4
"""Positions in a run of the finer matching that stands beside."""


@dataclass(frozen=True)
class HeadConcepts:
    """What was found for one head."""

    pairs: Int[np.ndarray, "n 2"]
    effects: ConceptEffects
    lag_best: Float[np.ndarray, " n_lags"]
    scramble_best: Float[np.ndarray, " n_scrambles"]
    """Pooled over the layer's heads."""
    atoms_best: float
    planted: int
    planted_found: int
    nearer: ConceptEffects
    """Of the same pairs, positions of keys matched in runs of NEAR: beside the verdict, not part of it."""


@dataclass(frozen=True)
class Concepts:
    """Every head's, and the layer-0 heads' best effect, a control: a key there cannot know what stands before it."""

    target: str
    heads: Mapping[str, HeadConcepts]
    controls: Mapping[str, float]
    controls_nearer: Mapping[str, float]
    """The mean effect of each control's best channel, positions matched in runs of NEAR; NaN where it has none."""
    sources: tuple[str, ...]
    token_lists: Mapping[str, list[dict[str, Any]]]
    pictures: Mapping[str, ChannelPicture] = dataclasses.field(default_factory=dict)
    """Of the heads' best channels, as the report draws them."""


def best(effects: ConceptEffects) -> float:
    """The largest mean effect; -inf where no channel is live enough."""
    return float(effects.mean().max(initial=-np.inf))


def plain_mean(effects: ConceptEffects) -> Float[np.ndarray, " n"]:
    """Mean effects whatever the number of documents; NaN where no key has a match."""
    weight = effects.weight.sum(0)
    return np.where(weight > 0, effects.nats.sum(0) / np.maximum(weight, 1e-12), np.nan)


def control(on: HeadOnText, pairs: Int[Tensor, "n 2"]) -> tuple[float, float]:
    """The best mean effect among some channels of a head that can have none; and the same channel's with positions
    matched in runs of NEAR, NaN where no key has such a match.
    """
    if not len(pairs):
        return -np.inf, np.nan
    effects = on.channels(pairs, contrast=False)
    strongest = pairs[int(effects.mean().argmax())][None]
    return best(effects), float(plain_mean(on.channels(strongest, contrast=False, run=NEAR))[0])


def _on_cpu(arm: Arm) -> Arm:
    def moved(part: Any) -> Any:
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        return type(part)(**{k: v.cpu() if isinstance(v, Tensor) else v for k, v in fields.items()})

    frozen = moved(arm.frozen)
    if frozen.rotary is not None:
        frozen = dataclasses.replace(frozen, rotary=moved(frozen.rotary))
    return Arm(frozen, moved(arm.codes))


@torch.no_grad()
def measure(target: Target, progress: Callable[[str], None] = lambda _: None) -> Concepts:
    """Search, effect and nulls of every head of a layer with a dictionary.

    Raises CannotLoad where the target has too few texts.
    """
    documents = target.documents()
    n = min(2 * DOCUMENTS, len(documents))
    if n < 2 * FLOOR_DOCUMENTS:
        raise CannotLoad(f"{target.name!r} has {n} documents; {2 * FLOOR_DOCUMENTS} are needed")
    length = min(int(target.model.cfg.n_ctx), LONGEST_CONTEXT)
    start = [] if target.bos is None else [target.bos]
    encoded = [(d.source, (start + target.encode(d.text))[:length]) for d in documents]
    seed_parts = (target.name, "natural", "concepts")

    def drawn(name: str, part: Int[np.ndarray, " m"]) -> MarkedTexts:
        order = np.random.default_rng(stats.seed_of(*seed_parts, name)).permutation(part)[: n // 2]
        return texts([encoded[k][1] for k in order], [encoded[k][0] for k in order], bool(start))

    discovery, confirmation = map(drawn, ("discovery", "confirmation"), sets.split(len(encoded), (1, 1), seed_parts))
    found: dict[str, HeadConcepts] = {}
    controls: dict[str, float] = {}
    controls_nearer: dict[str, float] = {}
    tokens: dict[str, list[dict[str, Any]]] = {}
    pictures: dict[str, ChannelPicture] = {}
    for layer in range(target.n_layers):
        if not has_dictionary(target, layer):
            continue
        progress(f"Q21: layer {layer}")
        hook, sae = target.dictionary_for(layer)
        arms = [_on_cpu(measure_arm(target.model, sae, t.tokens, layer, hook)) for t in (discovery, confirmation)]
        own = LayerConcepts(ConceptSearch(discovery, arms[0]), confirmation, arms[1], (target.name, str(layer)))
        if layer == 0:
            stripe = own.search.stripe(1)
            for head in range(target.n_heads):
                pairs, _ = stripe.strongest(arms[0], head)
                name, on = f"L0H{head}", HeadOnText(confirmation, arms[1], head)
                controls[name], controls_nearer[name] = control(on, pairs)
            continue
        here = own.heads(range(target.n_heads))
        found |= here
        for head, (name, concepts) in enumerate(here.items()):
            tokens[name] = own.live_tokens(concepts.pairs, target)
            E = concepts.effects.mean()
            if not np.isfinite(E).any():
                continue
            best_pair = concepts.pairs[int(E.argmax())].tolist()
            if (shown := example_of(confirmation, arms[1], head, best_pair)) is not None:
                pictures[name] = shown.picture(ON_NATURAL, text_of(target.tokenizer), neuronpedia(sae))
    return Concepts(target.name, found, controls, controls_nearer, confirmation.sources, tokens, pictures)


class LayerConcepts:
    """The screen of one layer."""

    def __init__(self, search: ConceptSearch, text: Any, confirmation: Arm, seed_parts: Sequence[str]) -> None:
        self.search, self.text, self.confirmation = search, text, confirmation
        self.seed_parts = tuple(seed_parts)

    def heads(self, heads: Sequence[int]) -> dict[str, HeadConcepts]:
        """The screen of chosen heads; scrambles are pooled over them."""
        stripe, device = self.search.stripe(1), torch.device("cpu")
        on = [HeadOnText(self.text, self.confirmation, head) for head in heads]
        chosen = [stripe.strongest(self.search.arm, head) for head in heads]
        effects = [h.channels(pairs) for h, (pairs, _) in zip(on, chosen, strict=True)]
        lags: list[list[float]] = []
        for lag in LAGS:
            other = self.search.stripe(lag)

            def at_lag(k: int, other: ConceptStripe = other, lag: int = lag) -> float:
                return best(on[k].channels(other.strongest(self.search.arm, heads[k])[0], lag, contrast=False))

            lags.append(each(at_lag, range(len(heads)), device))
        scrambled = np.array(each(lambda head: self.scrambles(stripe, head), heads, device)).ravel()
        atoms = self.atoms(heads)
        number = self.search.arm.frozen.layer
        return {
            f"L{number}H{head}": HeadConcepts(
                chosen[k][0].numpy(),
                effects[k],
                np.array([row[k] for row in lags]),
                scrambled,
                atoms[k],
                *plant_concepts(on[k], stripe, chosen[k][1], self.seed_parts),
                on[k].channels(chosen[k][0], run=NEAR),
            )
            for k, head in enumerate(heads)
        }

    def scrambles(self, stripe: ConceptStripe, head: int) -> list[float]:
        """Best effect of the whole search on scrambles of the head."""
        generator = torch.Generator().manual_seed(stats.seed_of(*self.seed_parts, "concepts", str(head)) % 2**63)
        found = []
        for _ in range(SCRAMBLES):
            W_k = self.confirmation.frozen.W_k
            rotation = random_rotation(W_k.shape[-1], generator, W_k)
            stretch = stretch_to_match(self.confirmation.frozen, head, rotation)
            arm, there = (
                Arm(scramble(a.frozen, head, rotation, stretch), a.codes) for a in (self.search.arm, self.confirmation)
            )
            pairs, _ = stripe.strongest(arm, head)
            found.append(best(HeadOnText(self.text, there, head).channels(pairs, contrast=False)))
        return found

    def atoms(self, heads: Sequence[int]) -> list[float]:
        """Best effect of the whole search with random atoms for features, of every head."""
        decoder = self.search.arm.codes.decoder
        generator = torch.Generator().manual_seed(stats.seed_of(*self.seed_parts, "concept atoms") % 2**63)
        drawn = draw_atoms(len(decoder), generator, decoder)
        arms = [random_atoms(arm, drawn) for arm in (self.search.arm, self.confirmation)]
        stripe = ConceptSearch(self.search.text, arms[0]).stripe(1)

        def one(head: int) -> float:
            pairs, _ = stripe.strongest(arms[0], head)
            return best(HeadOnText(self.text, arms[1], head).channels(pairs, contrast=False))

        return each(one, heads, torch.device("cpu"))

    def live_tokens(self, pairs: Int[np.ndarray, "n 2"], target: Any, top: int = 5) -> list[dict[str, Any]]:
        """What stands where each channel's features are live, confirmation documents."""
        codes, rows = self.confirmation.codes, []
        tokens = self.text.tokens.flatten()
        for i, j in pairs.tolist():
            row: dict[str, Any] = {}
            for name, feature in (("query", i), ("key", j)):
                at = codes.row[codes.feature == feature]
                ids, times = torch.unique(tokens[at[self.text.valid.flatten()[at]]], return_counts=True)
                order = times.argsort(descending=True, stable=True)[:top].tolist()
                row[f"{name} tokens"] = [f"{target.tokenizer.decode([int(ids[k])])!r} x{int(times[k])}" for k in order]
                shares = times.double() / times.sum().clamp(min=1)
                row[f"{name} breadth"] = float(1 / shares.square().sum()) if len(ids) else 0.0
            rows.append(row)
        return rows


NEARER = f"effect, key positions matched in runs of {NEAR} (nats)"


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _over_control(claim: Claim, name: str, lead: float) -> Condition:
    """A lead over what a control reaches, which denies and never refutes; NaN where there is none to exceed."""
    low, high = (lead, lead) if np.isfinite(lead) else (-np.inf, np.inf)
    return Condition(name, lead, low, high, claim.bars[name], p_refute=1.0)


def concept_evidence(claim: Claim, target: Any, found: Concepts) -> dict[str, Evidence]:
    """Q21: of every head, one channel that passes everything."""
    evidence = {}
    for name in target.heads:
        if name in found.controls:
            near = found.controls_nearer.get(name, float("nan"))
            detail = {BEST_EFFECT: found.controls[name], NEARER: _number(near)}
            evidence[name] = Evidence(claim=claim, head=name, outside=CONTROL, detail=detail)
        elif name not in found.heads:
            evidence[name] = Evidence(claim=claim, head=name, cannot=NO_INPUT_DICTIONARY)
    # keys of layer 0 cannot know what stands before them: what is found there is not conceptual induction; and without
    # a dictionary there, there is nothing to exceed: not measured, and so not supported
    control = max((v for v in found.controls.values() if np.isfinite(v)), default=0.0 if found.controls else np.nan)
    live = {h: np.flatnonzero(c.effects.documents >= FLOOR_DOCUMENTS) for h, c in found.heads.items()}
    E = {h: found.heads[h].effects.mean()[own] for h, own in live.items() if len(own)}

    def sampled(name: str, part: str, bar: float) -> Sampled:
        means = {}
        for h in E:
            e = found.heads[h].effects
            sums, weight = getattr(e, part)[:, live[h]], e.weight[:, live[h]]
            means[h] = means_of(claim, found.target, h, name, sums, weight, found.sources)
        return Sampled(name=name, samples=means, bar=bar, simultaneous=True)

    ranks = {
        "over other lags": {h: [stats.rank_p(e, found.heads[h].lag_best) for e in own] for h, own in E.items()},
        "over scrambled heads": {
            h: [stats.rank_p(e, found.heads[h].scramble_best) for e in own] for h, own in E.items()
        },
    }
    atoms = {h: a if np.isfinite(a := found.heads[h].atoms_best) else 0.0 for h in E}
    columns: list[Sampled | Given] = [
        sampled("effect", "nats", claim.bar),
        sampled("head contrast", "contrast", claim.bars["head contrast"]),
        *(ranked(claim, name, by_head) for name, by_head in ranks.items()),
        *(
            Given(name, {h: [_over_control(claim, name, float(e - others[h])) for e in own] for h, own in E.items()})
            for name, others in (("over random atoms", atoms), ("over layer-0 heads", dict.fromkeys(E, control)))
        ),
    ]
    rows = {
        h: Beside(
            n=len(own.effects.weight),
            candidates=[f"{i} -> {j}" for i, j in own.pairs[live[h]]],
            power=own.planted_found / own.planted if own.planted >= PLANTED_AT_LEAST else float("nan"),
        )
        for h, own in found.heads.items()
    }
    for h, judged in decide(claim, columns, rows).items():
        own, nearer = found.heads[h], plain_mean(found.heads[h].nearer)
        channels = [
            {
                "channel": pair,
                "effect (nats)": float(E[h][n]),
                "head contrast (nats)": next(x.effect for x in conditions if x.name == "head contrast"),
                NEARER: _number(nearer[c]),
                "documents with such keys": int(own.nearer.documents[c]),
                "passes": all(x.holds(claim.level) for x in conditions),
                **{f"p, {name}": by_head[h][n] for name, by_head in ranks.items()},
                **found.token_lists[h][c],
            }
            for n, (c, (pair, conditions)) in enumerate(zip(live[h], judged.candidates.items(), strict=True))
        ]
        channels.sort(key=lambda row: -row["effect (nats)"])
        finite = own.lag_best[np.isfinite(own.lag_best)]
        evidence[h] = dataclasses.replace(
            judged,
            detail=({BEST: found.pictures[h]} if h in found.pictures else {})
            | {
                "best channels": channels[:5],
                "channels that pass": sum(row["passes"] for row in channels),
                "planted channels found": f"{own.planted_found} of {own.planted}",
                "largest effect at other lags": float(finite.max()) if len(finite) else None,
                "largest effect of scrambled heads": float(own.scramble_best.max()),
                "largest effect of random atoms": own.atoms_best if np.isfinite(own.atoms_best) else None,
            },
        )
    return evidence
