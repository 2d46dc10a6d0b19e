"""Conceptual Induction Heads: screens of a target's heads for CIH channels and sets, and the evidence that claims
judge.

Definitions are those of CLAIMS: a CIH channel is one candidate that has an effect above the bar, beats the same search
at other lags, is the head's doing (coupling), and beats scrambled heads; it is *expressed* where the head's own
attention shows it. The CIH set of a head is its 50 discovery channels removed together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from fra.core.coded import Arm, measure_arm
from fra.core.threads import ahead, each
from fra.dictionaries.codes import neuronpedia
from fra.induction.best_effect import best_effect
from fra.induction.channels import Arms, HeadOnArms, measure_arms, on_device
from fra.induction.screen import HeadScreen, LayerScreen, screen_head
from fra.induction.status import HeadStatus, head_status
from fra.stimuli import repeated
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.sets import documents
from fra.targets.target import has_dictionary

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


def screen(
    target: Target,
    stimulus: str,
    *,
    design: RepeatedSets | None = None,
    families: Sequence[str] = ("TIH", "not a TIH"),
    progress: Callable[[str], None] = lambda _: None,
) -> Screen:
    """Status of every head, and the whole screen of those whose status is among `families`, layer by layer.

    Layer-0 heads are negative controls on repeated_random (a key there cannot know its predecessor): they are screened
    and join no family. Layers without a dictionary are left out.
    """
    design = design or RepeatedSets()
    sets = documents(target, stimulus, design)
    model = target.model
    progress(f"{stimulus}: status of {model.cfg.n_layers * model.cfg.n_heads} heads")
    status = head_status(model, sets["status"], target=target.name, stimulus=stimulus)
    wanted = {
        layer: heads
        for layer in range(model.cfg.n_layers)
        if (heads := [h for h in range(model.cfg.n_heads) if status[f"L{layer}H{h}"].status in families])
        and has_dictionary(target, layer)
    }

    def measured(layer: int) -> tuple[Arm, Arms, Arms]:
        hook_name, sae = target.dictionary_for(layer)
        discovery = measure_arm(model, sae, sets["discovery"].tokens, layer, hook_name)
        confirmation = measure_arms(model, sae, sets["confirmation"], layer, hook_name)
        return discovery, confirmation, measure_arms(model, sae, sets["sets"], layer, hook_name)

    found: dict[str, HeadScreen] = {}
    controls: dict[str, float] = {}
    progress(f"{stimulus}: documents through the model and the dictionaries")
    for layer, (discovery, confirmation, for_sets) in ahead(measured, wanted):
        batch = on_device(sets["discovery"], discovery.frozen.x.device)
        seed_parts = (target.name, stimulus, str(layer))
        if layer == 0 and stimulus == "repeated_random":
            controls = control_effects(batch, discovery, confirmation, wanted[layer], seed_parts=seed_parts)
            continue
        found |= screen_layer(
            batch,
            discovery,
            confirmation,
            for_sets,
            wanted[layer],
            seed_parts=seed_parts,
            progress=progress,
            tih=[h for h in wanted[layer] if status[f"L{layer}H{h}"].status == "TIH"],
        )
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
    )


@torch.no_grad()
def screen_layer(
    batch: repeated.Batch,
    discovery: Arm,
    confirmation: Arms,
    sets: Arms,
    heads: Sequence[int],
    *,
    seed_parts: Sequence[str],
    tih: Collection[int],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, HeadScreen]:
    """Screens of chosen heads of one layer; scrambles are pooled over them. `tih`: which of them are TIHs."""
    layer = LayerScreen(batch, discovery, confirmation, sets, seed_parts=seed_parts, progress=progress)
    number = discovery.frozen.layer
    progress(f"layer {number}: scrambles of {len(heads)} heads")
    device = discovery.frozen.x.device
    nulls = each(lambda head: layer.null_scrambles(head, bool(tih)), heads, device)
    null = tuple(np.concatenate([np.asarray(own[part]) for own in nulls]) for part in (0, 1))
    atoms = layer.atoms() if tih else ()
    progress(f"layer {number}: screen of {len(heads)} heads")
    screens = each(lambda head: screen_head(layer, head, (null[0], null[1]), atoms, head in tih), heads, device)
    return {f"L{number}H{head}": found for head, found in zip(heads, screens, strict=True)}


@torch.no_grad()
def control_effects(
    batch: repeated.Batch, discovery: Arm, confirmation: Arms, heads: Sequence[int], *, seed_parts: Sequence[str]
) -> dict[str, float]:
    """The best channel effect of the search on heads that are controls: search and measurement, no nulls."""
    layer = LayerScreen(batch, discovery, confirmation, confirmation, seed_parts=seed_parts, shifts=())

    def best(head: int) -> float:
        pairs, _ = layer.candidates(head)
        return best_effect(HeadOnArms(confirmation, head), pairs)

    found = each(best, heads, discovery.frozen.x.device)
    return {f"L{discovery.frozen.layer}H{head}": value for head, value in zip(heads, found, strict=True)}


def families(screened: Screen) -> dict[str, list[str]]:
    """Screened heads by status."""
    found: dict[str, list[str]] = {"TIH": [], "not a TIH": []}
    for name in screened.heads:
        found.setdefault(screened.status[name].status, []).append(name)
    return found
