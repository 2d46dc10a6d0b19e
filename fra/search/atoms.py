"""The set of a head with random directions for features: what any dictionary of that size and L0 would give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from fra.core.coded import Arm
from fra.core.threads import each
from fra.errors import FraError
from fra.search.channels import Arms, HeadOnArms, few_documents
from fra.search.designs import ChannelNulls, ChannelSearch
from fra.search.nulls import draw_atoms, random_atoms
from fra.search.search import Search, Stripe
from fra.statistics.stats import seed_of
from fra.stimuli.repeated import Batch


def set_effect(on: HeadOnArms, pairs: Int[Tensor, "n 2"]) -> float:
    """Mean effect (nats) of these channels removed together, over rows where a member's i is live; 0 where none is."""
    removed = on.removed_together(pairs)
    return float(removed.nats.sum() / max(removed.rows.sum(), 1.0))


def set_effects_of_atoms(
    batch: Batch,
    chosen_on: Int[Tensor, " m"],
    discovery: Arm,
    sets: Arms,
    heads: Sequence[int],
    design: ChannelSearch,
    nulls: ChannelNulls,
    seed_parts: Sequence[str],
) -> dict[int, tuple[float, list[float]]]:
    """By head: the set effect with the dictionary's own features, and with each of `nulls.dictionaries` dictionaries of
    random atoms.

    Every dictionary has its own search on the discovery documents `chosen_on` of `batch`, of which `discovery` is the
    arm, and is measured on `sets`: own features and random ones are treated alike, so that under "the features are
    like any directions" each is as likely as the others to have the largest effect. Random atoms live more rarely than
    features: where fewer than a set's pairs are live in the floor's number of documents, the floor is halved, which
    favours them.
    """
    few, decoder = few_documents(batch, chosen_on), discovery.codes.decoder
    share = len(few) / len(batch)

    def effects(arm: Arm, on: Arms) -> list[float]:
        stripe = _stripe(few, arm, max(1, round(design.floor * share)), design.candidates)
        return [set_effect(HeadOnArms(on, h), stripe.strongest(arm, h, design.candidates)[0]) for h in heads]

    def one(k: int) -> list[float]:
        generator = torch.Generator().manual_seed(seed_of(*seed_parts, "atoms", str(k)) % 2**63)
        atoms = draw_atoms(len(decoder), generator, decoder)
        there = 1 + 2 * sets.batch.periods
        sides = (random_atoms(arm, atoms, there) for arm in (sets.repeated, sets.control))
        return effects(random_atoms(discovery, atoms, 1 + 2 * few.periods), Arms(sets.batch, *sides))

    own, drawn = effects(discovery, sets), each(one, range(nulls.dictionaries), decoder.device)
    return {head: (own[n], [each_one[n] for each_one in drawn]) for n, head in enumerate(heads)}


def _stripe(batch: Batch, arm: Arm, floor: int, n: int) -> Stripe:
    """The induction stripe with n pairs at least, its floor halved as often as needed.

    Raises FraError where there are none: a control without anything live measures nothing.
    """
    search = Search(batch, arm)
    floors = (floor // 2**halved for halved in range(floor.bit_length()))
    found = (search.stripes((0,), lower)[0] for lower in floors)
    stripe = next((stripe for stripe in found if len(stripe.pairs) >= n), None)
    if stripe is None:
        raise FraError(
            f"fewer than {n} pairs of random atoms are live on the stripe of layer {arm.frozen.layer}: a control "
            "without anything live measures nothing"
        )
    return stripe
