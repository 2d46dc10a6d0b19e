"""Q21's documents and layers: the search on the sources with the most documents, every number on other sources."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.coded import Arm, measure_arm
from fra.core.threads import each
from fra.errors import CannotLoad
from fra.measures.concepts.designs import Concepts, ConceptTexts
from fra.measures.concepts.q21_search import (
    ConceptEffects,
    ConceptSearch,
    ConceptStripe,
    HeadOnText,
    MarkedTexts,
    texts,
)
from fra.search.nulls import draw_atoms, random_atoms, random_rotation, scramble, stretch_to_match
from fra.statistics.stats import seed_of
from fra.stimuli.sources import disjoint, spread
from fra.targets.target import has_dictionary

if TYPE_CHECKING:
    from fra.targets.target import Target

_KEPT_AT_ONCE = 3


def best(effects: ConceptEffects) -> float:
    """The largest mean effect; -inf where no channel is live enough."""
    return float(effects.mean().max(initial=-np.inf))


def _on_cpu(arm: Arm) -> Arm:
    def moved(part: Any) -> Any:
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        return type(part)(**{k: v.cpu() if isinstance(v, Tensor) else v for k, v in fields.items()})

    frozen = moved(arm.frozen)
    if frozen.rotary is not None:
        frozen = dataclasses.replace(frozen, rotary=moved(frozen.rotary))
    return Arm(frozen, moved(arm.codes))


def concept_texts(target: Target, design: ConceptTexts, least: int) -> dict[str, MarkedTexts]:
    """Discovery and confirmation documents, no source in both. Sources of several documents are for discovery and
    single ones for confirmation where each kind has `least` documents at least; else sources are drawn.

    Raises CannotLoad where the target has too few texts.
    """
    documents = target.documents()
    if len(documents) < 2 * least:
        raise CannotLoad(f"{target.name!r} has {len(documents)} documents; {2 * least} are needed")
    parts = split([d.source for d in documents], design, least, (target.name, "natural", "concepts"))
    return {
        name: texts(
            [target.tokens(documents[k].text, design.longest).tolist() for k in numbers],
            [documents[k].source for k in numbers],
            target.bos is not None,
        )
        for name, numbers in parts.items()
    }


def split(sources: Sequence[str], design: ConceptTexts, least: int, seed_parts: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the documents of both sets, as `concept_texts` says."""
    times = Counter(sources)
    kinds = [[k for k, source in enumerate(sources) if (times[source] > 1) == several] for several in (True, False)]
    sizes = {"discovery": design.discovery, "confirmation": design.confirmation}
    if min(map(len, kinds)) < least:
        return disjoint(sources, sizes, ("confirmation",), seed_parts)
    rng = np.random.default_rng(seed_of(*seed_parts))
    found = {}
    for (name, size), kind in zip(sizes.items(), kinds, strict=True):
        order = [kind[k] for k in rng.permutation(len(kind))]
        found[name] = sorted(order[k] for k in spread([sources[k] for k in order], size))
    return found


class LayerConcepts:
    """One layer: its search on discovery documents, its effects on confirmation documents, and its nulls."""

    def __init__(
        self, search: ConceptSearch, text: MarkedTexts, confirmation: Arm, seed_parts: Sequence[str], design: Concepts
    ) -> None:
        self.search, self.text, self.confirmation = search, text, confirmation
        self.seed_parts, self.design = tuple(seed_parts), design

    @cached_property
    def stripe(self) -> ConceptStripe:
        """The induction stripe of the discovery documents."""
        return self.search.stripe(1)

    def candidates(self, head: int) -> tuple[Int[Tensor, "m 2"], Float[np.ndarray, " m"]]:
        """What the search hands on, strongest first, and its M: of the discovery documents alone."""
        return self.stripe.strongest(self.search.arm, head)

    def on(self, head: int, arm: Arm | None = None) -> HeadOnText:
        """The head on the confirmation documents."""
        return HeadOnText(self.text, arm or self.confirmation, head, self.design)

    def other_lags(self, heads: Sequence[int]) -> Float[np.ndarray, "n_lags n_heads"]:
        """Best effect of the same search at every other lag."""
        found = []
        for lag in range(self.design.first_lag, self.design.first_lag + self.design.lags):
            stripe = self.search.stripe(lag)

            def at_lag(head: int, stripe: ConceptStripe = stripe, lag: int = lag) -> float:
                return best(self.on(head).channels(stripe.strongest(self.search.arm, head)[0], lag, contrast=False))

            found.append(each(at_lag, heads, torch.device("cpu")))
        return np.array(found)

    def scrambled(self, head: int, k: int) -> float:
        """Best effect of the whole search on the k-th scramble of the head."""
        seed = seed_of(*self.seed_parts, "concepts", f"head {head}", f"scramble {k}")
        W_k = self.confirmation.frozen.W_k
        rotation = random_rotation(W_k.shape[-1], torch.Generator().manual_seed(seed), W_k)
        stretch = stretch_to_match(self.confirmation.frozen, head, rotation)
        arm, there = (
            a.with_weights(scramble(a.frozen, head, rotation, stretch)) for a in (self.search.arm, self.confirmation)
        )
        pairs, _ = self.stripe.strongest(arm, head)
        return best(self.on(head, there).channels(pairs, contrast=False))

    def atoms(self, heads: Sequence[int], k: int) -> list[float]:
        """Best effect of the whole search with the k-th dictionary of random atoms for features, of every head."""
        decoder = self.search.arm.codes.decoder
        generator = torch.Generator().manual_seed(seed_of(*self.seed_parts, "concepts", f"atoms {k}"))
        drawn = draw_atoms(len(decoder), generator, decoder)
        arms = [
            random_atoms(arm, drawn, _ends(text))
            for arm, text in ((self.search.arm, self.search.text), (self.confirmation, self.text))
        ]
        stripe = ConceptSearch(self.search.text, arms[0], self.design).stripe(1)

        def one(head: int) -> float:
            return best(self.on(head, arms[1]).channels(stripe.strongest(arms[0], head)[0], contrast=False))

        return each(one, heads, torch.device("cpu"))


def _ends(text: MarkedTexts) -> Int[Tensor, " batch"]:
    """Length of every document, its first token included: what lies behind is padding."""
    at = torch.arange(1, text.tokens.shape[1] + 1)
    found: Tensor = (text.valid * at).amax(1)
    return found


class ConceptLayers:
    """Every layer that has a dictionary, measured when it is asked for; a few are kept."""

    def __init__(
        self, target: Target, texts_: ConceptTexts, design: Concepts, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        """Raises CannotLoad where the target has too few texts."""
        self.target, self.design, self._progress = target, design, progress
        self.texts = concept_texts(target, texts_, design.live_in)
        self._kept: OrderedDict[int, LayerConcepts] = OrderedDict()

    def __iter__(self) -> Iterator[int]:
        return iter([layer for layer in range(self.target.n_layers) if has_dictionary(self.target, layer)])

    @torch.no_grad()
    def __getitem__(self, layer: int) -> LayerConcepts:
        if layer not in self._kept:
            self._progress(f"Q21: layer {layer}")
            hook, sae = self.target.dictionary_for(layer)
            discovery, confirmation = (
                _on_cpu(measure_arm(self.target.model, sae, self.texts[name].tokens, layer, hook))
                for name in ("discovery", "confirmation")
            )
            search = ConceptSearch(self.texts["discovery"], discovery, self.design)
            self._kept[layer] = LayerConcepts(
                search, self.texts["confirmation"], confirmation, (self.target.name, str(layer)), self.design
            )
            while len(self._kept) > _KEPT_AT_ONCE:
                self._kept.popitem(last=False)
        return self._kept[layer]
