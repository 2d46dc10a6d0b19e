"""The layers of a target on the documents of Q09, Q10 and Q11."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fra.core.coded import Arm, measure_arm
from fra.dictionaries.codes import neuronpedia
from fra.dictionaries.texts import text_of
from fra.errors import CannotLoad
from fra.measures.pairs.activity import OnText, PairSelection
from fra.measures.pairs.designs import PairTexts
from fra.report.pictures import ON_NATURAL, STRONGEST
from fra.search.examples import example_on_text
from fra.statistics.stats import seed_of
from fra.stimuli.padding import Texts
from fra.stimuli.sources import disjoint
from fra.targets.target import has_dictionary
from fra.verdicts.claim import Claim, Evidence

if TYPE_CHECKING:
    from fra.targets.target import Target

SETS = MEASURED, SELECTION = "measured", "selection"
_KEPT_AT_ONCE = 3


def pair_texts(target: Target, design: PairTexts) -> dict[str, Texts]:
    """Documents of both sets, BOS first where the target has one, cut to the context. No source is in both; each set
    has as many sources as there are.

    Raises CannotLoad where the target has too few texts for a pair to be jointly live in enough of either set.
    """
    documents = target.documents()
    if len(documents) < 2 * design.together_in:
        raise CannotLoad(f"{target.name!r} has {len(documents)} documents where {2 * design.together_in} are needed")
    sizes = {MEASURED: design.measured, SELECTION: design.selection}
    if len({d.source for d in documents}) < len(SETS):
        raise CannotLoad("all documents are of one source: there are no others to choose lists on")
    chosen = disjoint([d.source for d in documents], sizes, SETS, (target.name, "natural", "pairs"))

    def texts(numbers: Sequence[int]) -> Texts:
        own = [documents[k] for k in numbers]
        return Texts.of([target.tokens(d.text, design.longest) for d in own], [d.source for d in own])

    return {name: texts(numbers) for name, numbers in chosen.items()}


class PairLayer:
    """One layer on both sets. Everything that is chosen comes from `selection`; everything that is measured, of what
    was chosen, from `measured`.
    """

    def __init__(
        self, arms: Mapping[str, Arm], texts: Mapping[str, Texts], design: PairTexts, seed: Sequence[str]
    ) -> None:
        """Raises CannotLoad where there is nothing to choose from."""
        self.arms, self.texts, self.design, self.seed_parts = arms, texts, design, tuple(seed)
        chosen = arms[SELECTION], texts[SELECTION], design
        try:
            self.every: PairSelection | str = PairSelection.of(*chosen, 1)
            """Of features that are live anywhere, or why there is no table of so many."""
            self.selection = self.every.restricted(design.live_in)
        except CannotLoad as lacking:
            self.every, self.selection = str(lacking), PairSelection.of(*chosen, design.live_in)
        if (why := self.selection.too_few) is not None:
            raise CannotLoad(why)
        self.on = self.seen(self.selection)

    def seen(self, selection: PairSelection) -> OnText:
        """The measured documents, of the features of a selection."""
        return OnText(self.arms[MEASURED], self.texts[MEASURED], selection.live)

    @property
    def n_heads(self) -> int:
        """Heads of the layer."""
        return self.arms[MEASURED].frozen.n_heads

    @property
    def sources(self) -> tuple[str, ...]:
        """Of the measured documents."""
        return self.texts[MEASURED].sources

    def some(self, n: int) -> list[int]:
        """Numbers of n of the measured documents, or of all, evenly over them."""
        every = len(self.texts[MEASURED])
        return [k * every // min(n, every) for k in range(min(n, every))]

    @property
    def no_one_coupling(self) -> str | None:
        """Why the layer's channels cannot be ranked by activity times coupling, in a sentence; None where they can."""
        if self.arms[MEASURED].frozen.rotary is not None:
            return "couplings turn with the distance (rotary positions): a pair has no one coupling to rank by"
        return None

    def rng(self, *parts: str) -> np.random.Generator:
        """Random numbers for one purpose at this layer."""
        return np.random.default_rng(seed_of(*self.seed_parts, *parts))

    def ids(self, places: Tensor) -> list[list[int]]:
        """Features (query, key) of pairs that are given by their linear places."""
        n = len(self.selection.live)
        pairs: list[list[int]] = self.selection.live[torch.stack([places // n, places % n], 1)].tolist()
        return pairs


class PairLayers:
    """Every layer that has a dictionary, measured when it is asked for; a few are kept."""

    def __init__(self, target: Target, design: PairTexts, progress: Callable[[str], None] = lambda _: None) -> None:
        self.target, self.design, self._progress = target, design, progress
        self.n_heads = int(target.n_heads)
        self._texts = pair_texts(target, design)
        self._kept: OrderedDict[int, PairLayer | str] = OrderedDict()

    def __iter__(self) -> Iterator[int]:
        return iter([layer for layer in range(self.target.n_layers) if has_dictionary(self.target, layer)])

    @torch.no_grad()
    def __getitem__(self, layer: int) -> PairLayer | str:
        """The layer, or why there is nothing to choose from, in a sentence."""
        if layer not in self._kept:
            self._progress(f"pairs of features on natural text: layer {layer}")
            hook, sae = self.target.dictionary_for(layer)
            arms = {
                name: measure_arm(self.target.model, sae, texts.tokens, layer, hook)
                for name, texts in self._texts.items()
            }
            try:
                made: PairLayer | str = PairLayer(
                    arms, self._texts, self.design, (self.target.name, "pairs", f"layer {layer}")
                )
            except CannotLoad as lacking:
                made = str(lacking)
            self._kept[layer] = made
            while len(self._kept) > _KEPT_AT_ONCE:
                self._kept.popitem(last=False)
        return self._kept[layer]

    def of(self, head: str) -> PairLayer:
        """The layer of a head that was measured."""
        layer = self[int(head[1:].split("H")[0])]
        assert isinstance(layer, PairLayer)
        return layer

    def picture(self, head: str, pair: Sequence[int]) -> dict[str, Any]:
        """A channel on a measured document, as the report draws it; nothing where it is live in none."""
        layer, number = self.of(head), int(head.split("H")[1])
        texts = layer.texts[MEASURED]
        shown = example_on_text(layer.arms[MEASURED], number, (pair[0], pair[1]), texts.tokens, texts.lengths)
        if shown is None:
            return {}
        page = neuronpedia(self.target.dictionary_for(layer.arms[MEASURED].frozen.layer)[1])
        return {STRONGEST: shown.picture(ON_NATURAL, text_of(self.target.tokenizer), page)}

    def each(self, claim: Claim, of: Callable[[PairLayer], Any]) -> tuple[dict[int, Any], dict[str, Evidence]]:
        """What `of` gives for every layer, and evidence for the heads of those that cannot be measured: `of` raises
        CannotLoad there.
        """
        measured, cannot = {}, {}
        for number in self:
            layer = self[number]
            try:
                if isinstance(layer, str):
                    raise CannotLoad(layer)
                measured[number] = of(layer)
            except CannotLoad as lacking:
                for head in range(self.n_heads):
                    name = f"L{number}H{head}"
                    cannot[name] = Evidence(claim=claim, head=name, cannot=str(lacking))
        return measured, cannot
