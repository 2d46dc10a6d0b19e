"""Channels of conceptual induction planted in a head (Q21): what the whole decision must be able to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fra.measures.concepts.q21_layers import LayerConcepts
from fra.measures.concepts.q21_search import ConceptEffects
from fra.statistics.rules import RULES
from fra.statistics.stats import clopper_pearson, seed_of
from fra.verdicts.claim import Claim
from fra.verdicts.decide import Planted

EFFECT, CONTRAST = "effect", "head contrast"


@dataclass(frozen=True)
class PlantedChannels:
    """Some channels that were raised to where they must be seen."""

    effects: ConceptEffects
    chosen: Bool[np.ndarray, " n"]
    """Whether the search hands them on."""

    @property
    def means(self) -> Float[np.ndarray, " n"]:
        """Their effects in nats."""
        return self.effects.mean()


def plant_concepts(own: LayerConcepts, head: int, claim: Claim) -> Iterator[PlantedChannels]:
    """Channels of a head with their coupling raised, by bisection, until effect and head contrast lie as far beyond
    their bars as is worth seeing; pairs that `Concepts.largest_raise` does not lift there are passed over. As many
    together as a head has candidates.
    """
    design, stripe, on = own.design, own.stripe, own.on(head)
    goals = {name: claim.bar_of(name) + (claim.worth_of(name) or 0.0) for name in (EFFECT, CONTRAST)}
    values = own.candidates(head)[1]
    cut = float(values[-1]) if len(values) >= design.candidates else -np.inf
    able = np.argwhere(stripe.position_part > 0)
    rng = np.random.default_rng(seed_of(*own.seed_parts, "plant concepts", f"head {head}"))
    drawn = able[rng.permutation(len(able))[: design.tried]]
    for start in range(0, len(drawn), design.candidates):
        some = drawn[start : start + design.candidates]
        pairs = torch.from_numpy(np.stack([stripe.queries[some[:, 0]], stripe.search.key_features[some[:, 1]]], axis=1))
        grid = on.grid(pairs, 1)
        coupling = grid.couplings()
        without = grid.odds(-coupling)
        largest = on.arm.largest("query", head)[pairs[:, 0]] * on.arm.largest("key", head)[pairs[:, 1]]
        most = design.largest_raise / largest.clamp(min=1e-9)

        def effects(raise_: Tensor) -> ConceptEffects:
            odds = grid.odds(raise_[:, None])  # noqa: B023  called within the turn
            return grid.effects(odds - without, odds)  # noqa: B023

        def meets(raise_: Tensor) -> Tensor:
            e = effects(raise_)
            return torch.from_numpy((e.mean() >= goals[EFFECT]) & (e.mean("contrast") >= goals[CONTRAST]))

        lifted = torch.nonzero(meets(most))[:, 0]
        if not len(lifted):
            continue
        low, high = torch.zeros_like(most), most.clone()
        for _ in range(design.steps):
            middle = (low * high).sqrt() if bool((low > 0).all()) else (low + high) / 2
            up = meets(middle)
            low, high = torch.where(up, low, middle), torch.where(up, middle, high)
        final = effects(high)
        M = stripe.position_part[some[:, 0], some[:, 1]] * (coupling.mean(1) + high).numpy()
        kept = lifted.numpy()
        sums = final.nats[:, kept], final.contrast[:, kept], final.weight[:, kept]
        yield PlantedChannels(ConceptEffects(*sums, final.documents[kept], final.least), (cut <= M)[kept])


def planted_and_found(
    batches: Iterator[PlantedChannels], passes: Callable[[PlantedChannels], Bool[np.ndarray, " n"]], n: int
) -> Planted:
    """Of n planted channels those that are handed on and pass. Planting ends where so many are missed that the others
    could not show RULES.power any more.
    """
    found = tried = 0
    for batch in batches:
        seen = batch.chosen & (passes(batch) if batch.chosen.any() else False)
        for one in seen[: n - tried].tolist():
            tried, found = tried + 1, found + int(one)
        hopeless = clopper_pearson(n - (tried - found), n, RULES.power_level)[0] < RULES.power
        if tried >= n or hopeless:
            break
    return Planted(found, tried)
