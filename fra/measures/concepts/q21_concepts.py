"""Q21: every head's channels of conceptual induction on natural text, against the same search at other lags, on random
atoms, on scrambled heads and on layer-0 heads.

Nulls that cost a search each are drawn only for heads that pass what comes before: documents and layer-0 heads, then
other lags, then random atoms, then scrambles, one after another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from fra.dictionaries.codes import neuronpedia
from fra.dictionaries.texts import text_of
from fra.induction.outside import BEST_EFFECT, CONTROL
from fra.measures.concepts.designs import Concepts, ConceptTexts
from fra.measures.concepts.q21_layers import ConceptLayers, LayerConcepts, best
from fra.measures.concepts.q21_planting import CONTRAST, EFFECT, PlantedChannels, plant_concepts, planted_and_found
from fra.measures.concepts.q21_search import ConceptEffects, example_of
from fra.report.pictures import BEST, ON_NATURAL, ChannelPicture
from fra.statistics.nulls import sequential
from fra.statistics.rules import RULES
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Column, Drawn, Given, Planted, Sampled, decide, means_of
from fra.verdicts.samples import NO_INPUT_DICTIONARY
from fra.verdicts.standing import standing

LAGS, SCRAMBLES, ATOMS, LAYER_0 = "over other lags", "over scrambled heads", "over random atoms", "over layer-0 heads"
_LISTED = 5
"""Channels that a row lists, and tokens that a channel lists."""


@dataclass(frozen=True)
class HeadConcepts:
    """What was found for one head: channels that are live in enough documents."""

    pairs: Int[np.ndarray, "n 2"]
    effects: ConceptEffects

    @classmethod
    def of(cls, own: LayerConcepts, head: int) -> HeadConcepts:
        """The candidates of the search, on the confirmation documents."""
        pairs, _ = own.candidates(head)
        e = own.on(head).channels(pairs)
        live = np.flatnonzero(e.documents >= e.least)
        kept = ConceptEffects(e.nats[:, live], e.contrast[:, live], e.weight[:, live], e.documents[live], e.least)
        return cls(pairs.numpy()[live], kept)


def tokens_of(own: LayerConcepts, pair: Sequence[int], decode: Callable[[int], str]) -> dict[str, Any]:
    """What stands where a channel's features are live, confirmation documents."""
    codes, tokens = own.confirmation.codes, own.text.tokens.flatten()
    row: dict[str, Any] = {}
    for name, feature in zip(("query", "key"), pair, strict=True):
        at = codes.row[codes.feature == feature]
        ids, times = torch.unique(tokens[at[own.text.valid.flatten()[at]]], return_counts=True)
        order = times.argsort(descending=True, stable=True)[:_LISTED].tolist()
        row[f"{name} tokens"] = [f"{decode(int(ids[k]))!r} x{int(times[k])}" for k in order]
        shares = times.double() / times.sum().clamp(min=1)
        row[f"{name} breadth"] = float(1 / shares.square().sum()) if len(ids) else 0.0
    return row


class ConceptScreen:
    """All heads of a target, and their nulls where they are asked for. Layer-0 heads are a control: a key there cannot
    know what stands before it.
    """

    def __init__(self, claim: Claim, layers: ConceptLayers) -> None:
        self.claim, self.layers, self.design = claim, layers, layers.design
        self.controls: dict[str, float] = {}
        self.heads: dict[str, HeadConcepts] = {}
        for number in layers:
            own = layers[number]
            for head in range(layers.target.n_heads):
                name = f"L{number}H{head}"
                if number == 0:
                    self.controls[name] = best(own.on(head).channels(own.candidates(head)[0], contrast=False))
                else:
                    self.heads[name] = HeadConcepts.of(own, head)
        self.E = {h: own.effects.mean() for h, own in self.heads.items() if len(own.pairs)}
        # without a dictionary at layer 0 there is nothing to exceed: not measured, and so not supported
        finite = [v for v in self.controls.values() if np.isfinite(v)]
        self.control = max(finite, default=0.0 if self.controls else np.nan)
        self.scramble = lru_cache(maxsize=None)(self._scramble)
        self.lags: dict[str, float] = {}
        self.atoms: dict[str, float] = {}

    def at(self, name: str) -> tuple[LayerConcepts, int]:
        """A head's layer and its number there."""
        layer, head = name[1:].split("H")
        return self.layers[int(layer)], int(head)

    def _scramble(self, name: str, k: int) -> float:
        own, head = self.at(name)
        return own.scrambled(head, k)

    def _by_layer(self, names: Sequence[str]) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name in names:
            found.setdefault(int(name[1:].split("H")[0]), []).append(name)
        return found

    def need_lags(self, names: Sequence[str]) -> None:
        """Fills `lags` for these heads: the largest effect at any other lag."""
        for number, own in self._by_layer([h for h in names if h not in self.lags]).items():
            found = self.layers[number].other_lags([self.at(h)[1] for h in own])
            self.lags |= {h: _known(values) for h, values in zip(own, found.T, strict=True)}

    def need_atoms(self, names: Sequence[str]) -> None:
        """Fills `atoms` for these heads: the largest effect of any dictionary of random atoms."""
        for number, own in self._by_layer([h for h in names if h not in self.atoms]).items():
            heads = [self.at(h)[1] for h in own]
            found = [self.layers[number].atoms(heads, k) for k in range(self.design.dictionaries)]
            self.atoms |= {h: _known(np.array(values)) for h, values in zip(own, zip(*found, strict=True), strict=True)}

    def sampled(self, name: str, part: str) -> Sampled:
        """What documents decide."""
        samples = {}
        for h in self.E:
            e = self.heads[h].effects
            sources = self.layers.texts["confirmation"].sources
            samples[h] = means_of(self.claim, self.layers.target.name, h, name, getattr(e, part), e.weight, sources)
        return Sampled(name=name, samples=samples, simultaneous=True)

    def columns(self) -> list[Column]:
        """All conditions; lags and random atoms of heads that stand when their turn comes, not measured elsewhere."""
        columns: list[Column] = [
            self.sampled(EFFECT, "nats"),
            self.sampled(CONTRAST, "contrast"),
            Given(LAYER_0, {h: E - self.control for h, E in self.E.items()}),
        ]
        for name, need, numbers in (
            (LAGS, self.need_lags, self.lags),
            (ATOMS, self.need_atoms, self.atoms),
        ):
            if columns and self.E:
                need(standing(self.claim, columns))
            columns.append(Given(name, {h: E - numbers.get(h, np.nan) for h, E in self.E.items()}))
        columns.append(
            Drawn(observed={SCRAMBLES: self.E}, draw=lambda h, k: {SCRAMBLES: self.scramble(h, k)}),
        )
        return columns

    def planted(self, name: str) -> Planted:
        """Channels planted in a head that would be refuted, and those that go through every condition."""
        own, head = self.at(name)
        return planted_and_found(
            plant_concepts(own, head, self.claim), lambda batch: self.passes(name, batch), self.design.plantings
        )

    def passes(self, name: str, batch: PlantedChannels) -> Bool[np.ndarray, " n"]:
        """Which planted channels meet every condition at the level that Holm begins with, the cheap ones first."""
        claim, level = self.claim, self.claim.level / max(1, len(self.E))
        e, E = batch.effects, batch.means
        sources = self.layers.texts["confirmation"].sources
        left = batch.chosen & (self.control < E)
        for condition, part in ((EFFECT, "nats"), (CONTRAST, "contrast")):
            if not left.any():
                return left
            means = means_of(
                claim, self.layers.target.name, name, f"planted {condition}", getattr(e, part), e.weight, sources
            )
            left &= means.p_above(claim.bar_of(condition), simultaneous=True) <= level
        for need, numbers in ((self.need_lags, self.lags), (self.need_atoms, self.atoms)):
            if not left.any():
                return left
            need([name])
            left &= numbers[name] < E
        if left.any():
            ranks = sequential(
                {SCRAMBLES: E}, lambda k: {SCRAMBLES: self.scramble(name, k)}, left, claim.level, RULES.draws
            )
            left &= ranks[SCRAMBLES].p <= level
        return left


def _known(values: np.ndarray) -> float:
    """The largest; 0 where no search found a channel that is live enough."""
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else 0.0


@torch.no_grad()
def concept_evidence(
    claim: Claim, target: Any, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Evidence]:
    """Q21: of every head, one channel that passes everything. Raises CannotLoad for too little text."""
    layers = ConceptLayers(target, claim.designed(ConceptTexts), claim.designed(Concepts), progress)
    return screened(ConceptScreen(claim, layers))


@torch.no_grad()
def screened(screen: ConceptScreen) -> dict[str, Evidence]:
    """Evidence for every head of the target."""
    claim, target = screen.claim, screen.layers.target
    evidence = {}
    for name in target.heads:
        if name in screen.controls:
            detail = {BEST_EFFECT: screen.controls[name]}
            evidence[name] = Evidence(claim=claim, head=name, outside=CONTROL, detail=detail)
        elif name not in screen.heads:
            evidence[name] = Evidence(claim=claim, head=name, cannot=NO_INPUT_DICTIONARY)
    if not screen.heads:
        return evidence
    n = len(set(screen.layers.texts["confirmation"].sources))
    rows = {h: Beside(n=n, candidates=[f"{i} -> {j}" for i, j in own.pairs]) for h, own in screen.heads.items()}
    for h, judged in decide(claim, screen.columns(), rows, planted=screen.planted).items():
        evidence[h] = dataclasses.replace(judged, detail=_detail(screen, h, judged))
    return evidence


def _detail(screen: ConceptScreen, h: str, judged: Evidence) -> dict[str, Any]:
    claim, (own, _) = screen.claim, screen.at(h)
    channels: list[dict[str, Any]] = []
    for k, (pair, conditions) in enumerate(judged.candidates.items()):
        row: dict[str, Any] = {
            "channel": pair,
            "effect (nats)": float(screen.E[h][k]),
            "head contrast (nats)": next(x.effect for x in conditions if x.name == CONTRAST),
            "documents with such keys": int(screen.heads[h].effects.documents[k]),
            "passes": all(x.holds(claim.level) for x in conditions),
        }
        channels.append(row | {"place": k})
    channels.sort(key=lambda row: -row["effect (nats)"])
    decode = text_of(screen.layers.target.tokenizer)
    for row in channels[:_LISTED]:
        pair = screen.heads[h].pairs[row["place"]].tolist()
        row |= tokens_of(own, pair, decode)
    picture = _picture(screen, h)
    return (
        ({BEST: picture} if picture is not None else {})
        | {
            "best channels": [{k: v for k, v in row.items() if k != "place"} for row in channels[:_LISTED]],
            "channels that pass": sum(row["passes"] for row in channels),
            "largest effect of layer-0 heads": screen.control,
            "largest effect at other lags": screen.lags.get(h),
            "largest effect of random atoms": screen.atoms.get(h),
        }
        | ({"draws of the control": screen.design.dictionaries} if h in screen.atoms else {})
        | dict(judged.detail)
    )


def _picture(screen: ConceptScreen, h: str) -> ChannelPicture | None:
    if h not in screen.E:
        return None
    own, head = screen.at(h)
    pair = screen.heads[h].pairs[int(screen.E[h].argmax())].tolist()
    shown = example_of(own.text, own.confirmation, head, pair)
    if shown is None:
        return None
    target = screen.layers.target
    page = neuronpedia(target.dictionary_for(own.confirmation.frozen.layer)[1])
    return shown.picture(ON_NATURAL, text_of(target.tokenizer), page)
