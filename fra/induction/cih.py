"""Conceptual Induction Heads: screens of a target's heads for CIH channels and sets, and the evidence that claims
judge.

Definitions are those of CLAIMS: a CIH channel is one candidate that has an effect above the bar, beats the same search
at other lags, is the head's doing (coupling), and beats scrambled heads; it is *expressed* where the head's own
attention shows it. The CIH set of a head is its 50 discovery channels removed together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fra.core.threads import ahead, each
from fra.dictionaries.codes import neuronpedia
from fra.errors import FraError
from fra.induction.designs import TokenInduction
from fra.induction.layers import Layers, lean_arms
from fra.induction.status import HeadStatus, head_status
from fra.search.best_effect import best_effect
from fra.search.channels import Arms, HeadOnArms, measure_arms
from fra.search.designs import ChannelNulls, ChannelSearch
from fra.search.screen import HeadScreen, LayerScreen, screen_head
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.sets import documents
from fra.targets.target import has_dictionary
from fra.verdicts.claim import Claim

if TYPE_CHECKING:
    from fra.targets.target import Target


@dataclass(frozen=True)
class Screen:
    """Every head's status, and the screens of the heads that belong to a family."""

    target: str
    stimulus: str
    status: Mapping[str, HeadStatus]
    heads: Mapping[str, HeadScreen]
    n_documents: Mapping[str, int]
    token_text: Callable[[int], str]
    known_tih: Sequence[str] = ()
    """Heads that the target lists as TIHs; they must agree."""
    controls: Mapping[str, float] = field(default_factory=dict)
    """Layer-0 heads on repeated_random: the best channel effect (nats) that the same search finds there."""
    pages: Mapping[int, str] = field(default_factory=dict)
    """By layer: the address on Neuronpedia below which its dictionary's features have pages, where it has one."""
    layers: Callable[[int], LayerScreen] | None = None
    """The layers on the same documents, from which nulls are drawn."""
    design: tuple[Any, ...] = ()
    """What the screen was measured by."""

    def layer_of(self, head: str) -> LayerScreen:
        """The head's layer. Raises FraError where the screen is kept without its layers."""
        if self.layers is None:
            raise FraError("this screen is kept without its layers: no null can be drawn from it")
        return self.layers(self.heads[head].layer)

    def held_to(self, claim: Claim) -> None:
        """Raises FraError where the claim registers another design than this was measured by."""
        for part in self.design:
            if claim.designed(type(part)) != part:
                raise FraError(f"{claim.id} registers {claim.designed(type(part))}, but {part} was measured")


def screen(
    target: Target,
    stimulus: str,
    *,
    design: RepeatedSets | None = None,
    search: ChannelSearch | None = None,
    nulls: ChannelNulls | None = None,
    tokens: TokenInduction | None = None,
    families: Sequence[str] = ("TIH", "not a TIH"),
    progress: Callable[[str], None] = lambda _: None,
) -> Screen:
    """Status of every head, and the screen of those whose status is among `families`, layer by layer.

    Layer-0 heads are negative controls on repeated_random (a key there cannot know its predecessor): they are searched
    and join no family. Layers without a dictionary are left out.
    """
    design, search, nulls = design or RepeatedSets(), search or ChannelSearch(), nulls or ChannelNulls()
    tokens = tokens or TokenInduction()
    sets = documents(target, stimulus, design)
    model = target.model
    progress(f"{stimulus}: status of {model.cfg.n_layers * model.cfg.n_heads} heads")
    status = head_status(model, sets["status"], target=target.name, stimulus=stimulus, design=tokens)
    wanted = {
        layer: heads
        for layer in range(model.cfg.n_layers)
        if (heads := [h for h in range(model.cfg.n_heads) if status[f"L{layer}H{h}"].status in families])
        and has_dictionary(target, layer)
    }

    def is_control(layer: int) -> bool:
        return layer == 0 and stimulus == "repeated_random"

    @torch.no_grad()
    def measured(layer: int) -> LayerScreen:
        hook_name, sae = target.dictionary_for(layer)
        tih = [h for h in wanted[layer] if status[f"L{layer}H{h}"].status == "TIH" and not is_control(layer)]

        def arms(name: str, *, patterns: bool = False) -> Arms:
            return lean_arms(measure_arms(model, sae, sets[name], layer, hook_name), patterns=patterns)

        chosen_on = arms("discovery")
        return LayerScreen(
            chosen_on.batch,
            chosen_on.repeated,
            arms("confirmation", patterns=True),
            arms("sets") if tih else None,
            control=chosen_on.control,
            seed_parts=(target.name, stimulus, str(layer)),
            tih=tih,
            search=search,
            nulls=nulls,
        )

    layers = Layers(lambda layer: made_lean(measured(layer)))
    found: dict[str, HeadScreen] = {}
    controls: dict[str, float] = {}
    progress(f"{stimulus}: documents through the model and the dictionaries")
    for layer, own in ahead(measured, wanted):
        if is_control(layer):
            controls = control_effects(own, wanted[layer])
            continue
        progress(f"layer {layer}: screen of {len(wanted[layer])} heads")
        found |= screen_layer(own, wanted[layer])
        layers.keep(made_lean(own))
    return Screen(
        target.name,
        stimulus,
        status,
        found,
        {name: len(batch) for name, batch in sets.items()},
        lambda token: str(target.tokenizer.decode([token])),
        target.known_tih,
        controls,
        {layer: page for layer in wanted if (page := neuronpedia(target.dictionary_for(layer)[1])) is not None},
        layers,
        (design, search, nulls, tokens),
    )


def made_lean(layer: LayerScreen) -> LayerScreen:
    """The layer without what only its first screen looks at: the patterns that examples show, and what its heads
    computed once.
    """
    layer.confirmation = lean_arms(layer.confirmation)
    if layer.tih:
        layer.sets = lean_arms(layer.sets)
    return layer


@torch.no_grad()
def screen_layer(layer: LayerScreen, heads: Sequence[int]) -> dict[str, HeadScreen]:
    """Screens of chosen heads of one layer."""
    device = layer.discovery.frozen.x.device
    screens = each(lambda head: screen_head(layer, head, head in layer.tih), heads, device)
    return {f"L{layer.discovery.frozen.layer}H{head}": own for head, own in zip(heads, screens, strict=True)}


@torch.no_grad()
def control_effects(layer: LayerScreen, heads: Collection[int]) -> dict[str, float]:
    """The best channel effect of the search on heads that are controls: search and measurement, no nulls."""

    def best(head: int) -> float:
        on = HeadOnArms(layer.confirmation, head)
        return best_effect(on, layer.candidates(head)[0], least=layer.design.least_documents)

    found = each(best, heads, layer.discovery.frozen.x.device)
    return {f"L{layer.discovery.frozen.layer}H{head}": value for head, value in zip(heads, found, strict=True)}


def families(screened: Screen) -> dict[str, list[str]]:
    """Screened heads by status."""
    found: dict[str, list[str]] = {"TIH": [], "not a TIH": []}
    for name in screened.heads:
        found.setdefault(screened.status[name].status, []).append(name)
    return found
