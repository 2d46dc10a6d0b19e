"""What the model does when channels are taken out of a head inside a forward pass: logits, loss and the whole output,
on the rows where a passage is repeated and on those where nothing can be copied yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra._census.census import census
from fra.core.coded import measure_arm
from fra.errors import FraError
from fra.induction import cih
from fra.interventions import attach
from fra.interventions.downstream import Head
from fra.interventions.heads import freeze_scales
from fra.measures.channels.q07_q17_matched import Pool, RandomSets, displaced
from fra.measures.channels.q07_q17_reading import COPIES, LOGIT, SECOND, BatchPart, Reader
from fra.measures.channels.transfer_designs import ChannelSet, MatchedSets, Removal
from fra.search.channels import on_device
from fra.search.search import Search
from fra.stimuli import sets as document_sets
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch
from fra.stimuli.sources import spread
from fra.verdicts.claim import parse_head

if TYPE_CHECKING:
    from fra.targets.target import Target

_DOCUMENTS_AT_ONCE = 10

CIH = "CIH set"
FROZEN, ON_STRIPE, OFF_STRIPE = (f"{CIH}, {where}" for where in ("scales frozen", "on the stripe", "off the stripe"))
SUM, ZERO, MEAN = "top set by plain sum", "zero ablation", "mean ablation"
MEAN_FROZEN, EQUAL = "mean ablation, scales frozen", "mean ablation at equal suppression"


class Plan(NamedTuple):
    """All that is designed of a removal."""

    channels: ChannelSet = ChannelSet()
    removal: Removal = Removal()
    matched: MatchedSets = MatchedSets()


@dataclass(frozen=True)
class ChosenSets:
    """Sets of channels of one head, found on the discovery documents."""

    ranked: Int[Tensor, "n 2"]
    """Strongest of the search first."""
    size: int
    by_sum: Int[Tensor, "m 2"]
    """The strongest by the plain sum of F_ij over all positions."""

    @property
    def cih(self) -> Int[Tensor, "size 2"]:
        """The CIH set."""
        return self.ranked[: self.size]


@dataclass(frozen=True)
class Tuned:
    """What was found of one head on confirmation documents."""

    mean: Float[Tensor, " d_head"]
    """Its mean output."""
    equal: float
    """Share of the way to its mean at which ablation lowers the copied token's logit as much as the set's removal."""
    random: RandomSets | None
    """Random live sets that move as much attention there; None where too few can be matched."""


@dataclass(frozen=True)
class OnRanked:
    """What the removal of one set does on the ranked documents."""

    pairs: Int[np.ndarray, "n 2"]
    effects: Float[np.ndarray, " measures"]
    """A row of the second copies."""
    displaced: Float[np.ndarray, " copies"]
    """Attention that moves, a row of either copy."""
    scale: float = 1.0
    """How many times over the set was taken out."""


@dataclass(frozen=True)
class HeadRemoval:
    """What was measured for one head."""

    outcomes: Mapping[str, Float[np.ndarray, "n_documents copies measures"]]
    """By what was done (the names above, and "N channels"): sums over the rows of each copy; axes COPIES, MEASURES."""
    rows: Float[np.ndarray, " n_documents"]
    """Rows of either copy."""
    sources: tuple[str, ...]
    ranked: OnRanked
    """Of the CIH set."""
    random: Callable[[int], OnRanked | None] | None
    """The same of the random live set of that number, None for one that could not be matched; None where there is no
    such null.
    """
    suppression: float
    """`Tuned.equal`."""
    size: int
    """Channels of the CIH set."""

    def per_row(self, name: str) -> Float[np.ndarray, "copies measures"]:
        """What was done by that name, a row."""
        found: np.ndarray = self.outcomes[name].sum(0) / self.rows.sum()
        return found


def removals(
    target: Target,
    screened: cih.Screen,
    heads: Sequence[str],
    plan: Plan,
    documents: RepeatedSets,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, HeadRemoval]:
    """Removal of the CIH sets of these heads, sets of other sizes and controls, on documents that chose none of them.

    Channels come from discovery documents; random sets are matched on confirmation documents, where the mean output and
    the equal suppression are found, too; all is measured on documents for sets.
    """
    sets = document_sets.documents(target, screened.stimulus, documents)
    by_layer: dict[int, list[int]] = {}
    for name in heads:
        layer, head = parse_head(name)
        by_layer.setdefault(layer, []).append(head)
    found: dict[str, HeadRemoval] = {}
    for layer, own in by_layer.items():
        progress(f"{screened.stimulus}: layer {layer}, channels of {len(own)} heads")
        chosen = choose(target, screened, sets["discovery"], layer, own, plan)
        tuned = tune(target, sets["confirmation"], layer, chosen, plan, (target.name, screened.stimulus))
        progress(f"{screened.stimulus}: layer {layer}, removals from {len(own)} heads")
        found |= measure(target, sets["sets"], layer, chosen, tuned, plan)
    return found


@torch.no_grad()
def choose(
    target: Target, screened: cih.Screen, discovery: Batch, layer: int, heads: Sequence[int], plan: Plan
) -> dict[int, ChosenSets]:
    """The sets of these heads. Raises FraError where the screen's channels are not those of these documents."""
    design, size = plan.removal, plan.channels.size
    most = max(size, *design.sizes)
    hook, sae = target.dictionary_for(layer)
    arm = measure_arm(target.model, sae, discovery.tokens, layer, hook)
    stripe = Search(on_device(discovery, arm.frozen.x.device), arm).stripes((0,), plan.channels.floor)[0]
    documents = [discovery.documents()[d] for d in spread(discovery.sources, design.summed)]
    sums = census(target.model, sae, documents, layer, heads, "sum").channels(n=size)
    found = {}
    for head in heads:
        ranked = stripe.strongest(arm, head, most)[0].cpu()
        own = torch.from_numpy(screened.heads[f"L{layer}H{head}"].pairs)
        again = torch.isin(_linear(own), _linear(ranked[: 2 * len(own)]))
        if int(again.sum()) < design.again * len(own):  # sums on a GPU may differ in their last bits, and so ranks
            raise FraError(f"the screen of L{layer}H{head} is of other documents or another dictionary than these.")
        ranked = torch.cat([own, ranked[~torch.isin(_linear(ranked), _linear(own))]])[:most]
        rows = sums[sums["head"] == head][["q_feature", "k_feature"]]
        found[head] = ChosenSets(ranked, size, torch.from_numpy(rows.to_numpy().astype(np.int64)))
    return found


def _linear(pairs: Int[Tensor, "n 2"]) -> Int[Tensor, " n"]:
    """One number a pair."""
    return pairs[:, 0] * 2**31 + pairs[:, 1]


def _shortest(periods: Int[Tensor, " batch"], among: Sequence[int], n: int) -> list[int]:
    """The n documents of the shortest periods; of equals the first."""
    return sorted(among, key=lambda d: int(periods[d]))[:n]


@torch.no_grad()
def tune(
    target: Target,
    confirmation: Batch,
    layer: int,
    chosen: Mapping[int, ChosenSets],
    plan: Plan,
    seed_parts: Sequence[str],
) -> dict[int, Tuned]:
    """What the heads' controls need to know of them, from the shortest confirmation documents."""
    some = _shortest(confirmation.periods, range(len(confirmation)), plan.removal.tuned)
    part = BatchPart(target, confirmation, some, layer)
    reader = Reader(part, (COPIES[SECOND],))
    documents = [tokens[: 2 * int(p) + 1].cpu() for tokens, p in zip(part.tokens, part.periods, strict=True)]
    _, sae = target.dictionary_for(layer)
    masses = census(target.model, sae, documents, layer, list(chosen), "mass").channels(n=plan.matched.pool)
    rows, found = part.copies.any(0), {}
    for head, own in chosen.items():
        on, taken = part.scene.head(head), part.share(head, own.cih)
        mean = part.mean_output(on)
        equal = _suppression(on, reader, taken, mean, plan.removal.steps)
        random = RandomSets(
            on,
            partial(part.share, head),
            Pool(masses[masses["head"] == head], own.cih.numpy()),
            float(displaced(on, taken, rows).sum()),
            rows,
            plan.matched,
            (*seed_parts, f"L{layer}H{head}"),
        )
        found[head] = Tuned(mean, equal, random if random.matchable() else None)
    return found


def _suppression(on: Head, reader: Reader, taken: Tensor, mean: Tensor, steps: int) -> float:
    """How far towards its mean the head's output must go to lower the copied token's logit as much as it falls where
    `taken` is out of the scores: between steps by a straight line; 1 where the whole way does less, 0 where it does
    not fall.
    """
    wanted = float(reader.read(on.without(taken))[:, 0, LOGIT].sum())
    if wanted <= 0:
        return 0.0
    before = 0.0
    for step in range(1, steps + 1):
        after = float(reader.read(on.by(step / steps * (mean - on.z)))[:, 0, LOGIT].sum())
        if after >= wanted:
            return (step - 1 + (wanted - before) / (after - before)) / steps
        before = after
    return 1.0


@torch.no_grad()
def measure(
    target: Target,
    batch: Batch,
    layer: int,
    chosen: Mapping[int, ChosenSets],
    tuned: Mapping[int, Tuned],
    plan: Plan,
) -> dict[str, HeadRemoval]:
    """Everything about the heads of one layer whose sets are `chosen`, on the documents of a batch."""
    used = _shortest(batch.periods, spread(batch.sources, plan.removal.measured), len(batch))
    outcomes: dict[int, dict[str, list[np.ndarray]]] = {head: {} for head in chosen}
    rows: list[np.ndarray] = []
    for start in range(0, len(used), _DOCUMENTS_AT_ONCE):  # of like length, so that little is padding
        part = BatchPart(target, batch, used[start : start + _DOCUMENTS_AT_ONCE], layer)
        both = Reader(part)
        rows.append(both.rows[:, SECOND])
        for head, own in chosen.items():
            for name, changes in _everything(target, part, head, own, tuned[head], plan.removal):
                outcomes[head].setdefault(name, []).append(both.read(*changes))
    shortest = BatchPart(target, batch, used[: plan.removal.ranked], layer)
    reader = Reader(shortest, (COPIES[SECOND],))
    found = {}
    for head, own in chosen.items():
        remove, random = partial(_on_ranked, shortest, reader, head), tuned[head].random
        found[f"L{layer}H{head}"] = HeadRemoval(
            {name: np.concatenate(parts) for name, parts in outcomes[head].items()},
            np.concatenate(rows),
            tuple(batch.sources[d] for d in used),
            remove(own.cih),
            None if random is None else partial(_random, random, remove),
            tuned[head].equal,
            own.size,
        )
    return found


def _random(sets: RandomSets, remove: Callable[[Tensor, float], OnRanked], number: int) -> OnRanked | None:
    one = sets.draw(number)
    return None if one is None else remove(torch.from_numpy(one.pairs), one.scale)


@torch.no_grad()
def _on_ranked(part: BatchPart, reader: Reader, head: int, pairs: Int[Tensor, "n 2"], scale: float = 1.0) -> OnRanked:
    """A set taken out so many times over, on the documents of a part."""
    own, taken = part.scene.head(head), scale * part.share(head, pairs)
    by_row = displaced(own, taken, part.copies.any(0))
    return OnRanked(
        pairs.numpy(),
        np.asarray(reader.read(own.without(taken))[:, 0].sum(0) / reader.rows.sum()),
        np.array([float(by_row[copy].mean()) for copy in part.copies]),
        scale,
    )


def _everything(
    target: Target, part: BatchPart, head: int, chosen: ChosenSets, tuned: Tuned, design: Removal
) -> Iterator[tuple[str, tuple[attach.Intervention, ...]]]:
    """What is done to one head, by name."""
    own = part.scene.head(head)
    taken = part.share(head, chosen.cih)
    frozen = freeze_scales(target.model, part.tokens, layer=part.scene.arm.frozen.layer)
    to_mean = tuned.mean - own.z
    yield CIH, (own.without(taken),)
    for size in design.sizes:
        yield f"{size} channels", (own.without(part.share(head, chosen.ranked[:size])),)
    yield FROZEN, (frozen, own.without(taken))
    yield ON_STRIPE, (own.without(taken * part.stripe),)
    yield OFF_STRIPE, (own.without(taken * ~part.stripe),)
    yield SUM, (own.without(part.share(head, chosen.by_sum)),)
    yield ZERO, (own.by(-own.z),)
    yield MEAN, (own.by(to_mean),)
    yield MEAN_FROZEN, (frozen, own.by(to_mean))
    yield EQUAL, (own.by(tuned.equal * to_mean),)
