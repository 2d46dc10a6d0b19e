"""What the model does when channels are taken out of a head inside a forward pass: logits, loss and the whole output,
on the rows where a passage is repeated and on those where nothing can be copied yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra._census.census import census
from fra.core.coded import measure_arm
from fra.errors import FraError
from fra.induction import cih
from fra.induction.channels import on_device
from fra.induction.screen import SET_SIZES
from fra.induction.search import SET_SIZE, Search
from fra.interventions import attach, scores
from fra.interventions.downstream import Downstream, Head, Scene
from fra.interventions.heads import freeze_scales
from fra.measures.channels.q07_q17_matched import Pool, displaced, matched_sets
from fra.stimuli import sets as document_sets
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch
from fra.verdicts.claim import parse_head
from fra.verdicts.stats import seed_of

if TYPE_CHECKING:
    from fra.targets.target import Target

MEASURES = ("logit", "loss", "KL")
"""Fall of the next token's logit (less the mean of all logits, which softmax ignores); rise of its loss, nats; KL of
the output from what it was, nats.
"""
LOGIT, LOSS, KL = map(MEASURES.index, ("logit", "loss", "KL"))
COPIES = ("second copy", "first copy")
SECOND, FIRST = map(COPIES.index, ("second copy", "first copy"))
DOCUMENTS = 32
RANK_DOCUMENTS = 10
"""The shortest of the confirmation documents: a pass costs a quarter there, and random sets need hundreds."""
DRAWS = 199
SUM_DOCUMENTS = 24
POOL = 20_000
SUPPRESSION_STEPS = 10
_CHUNKS = 4

CIH = f"{SET_SIZE} channels"
FROZEN, ON_STRIPE, OFF_STRIPE = (f"{CIH}, {where}" for where in ("scales frozen", "on the stripe", "off the stripe"))
SUM, ZERO, MEAN = f"{SET_SIZE} channels by plain sum", "zero ablation", "mean ablation"
MEAN_FROZEN, EQUAL = "mean ablation, scales frozen", "mean ablation at equal suppression"


@dataclass(frozen=True)
class HeadRemoval:
    """What was measured for one head."""

    outcomes: Mapping[str, Float[np.ndarray, "n_documents copies measures"]]
    """By what was done (the names above, and "N channels"): sums over the rows of each copy; axes COPIES, MEASURES."""
    rows: Float[np.ndarray, " n_documents"]
    """Rows of either copy."""
    sources: tuple[str, ...]
    observed: Float[np.ndarray, " measures"]
    """Of the CIH set on the second copies of the rank documents, a row."""
    draws: Float[np.ndarray, "n_draws measures"]
    """The same of random live sets that move as much attention."""
    scales: Float[np.ndarray, " n_draws"]
    displaced: Float[np.ndarray, " copies"]
    """Attention that the CIH set moves, a row, in either copy of the rank documents."""
    draws_displaced: Float[np.ndarray, "n_draws copies"]
    suppression: float
    """Share of the way to its mean at which the head's ablation lowers the copied token's logit as much as the set."""


class BatchPart:
    """Some documents of a batch at one layer."""

    def __init__(self, target: Target, batch: Batch, documents: Sequence[int], layer: int) -> None:
        index = torch.tensor(documents)
        device = next(target.model.parameters()).device
        periods = batch.periods[index]
        self.tokens = batch.tokens[index, : 2 * int(periods.max()) + 1].to(device)
        self.periods: Int[Tensor, " batch"] = periods.to(device)
        _, sae = target.dictionary_for(layer)
        self.scene = Scene(target.model, sae, self.tokens, layer)
        at = torch.arange(self.tokens.shape[1], device=device)
        self.copies: Bool[Tensor, "copies batch pos"] = torch.stack(
            [
                (at > self.periods[:, None]) & (at <= 2 * self.periods[:, None]),
                (at > 0) & (at <= self.periods[:, None]),
            ]
        )
        """Which positions belong to which of COPIES: neither BOS nor padding does."""
        back = at[:, None] - at
        self.stripe: Bool[Tensor, "batch pos pos"] = (back == self.periods[:, None, None] - 1) & self.copies[SECOND][
            ..., None
        ]
        """Entries (t, s*)."""

    def share(self, head: int, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "batch pos pos"]:
        """What these channels add to the head's scores."""
        arm = self.scene.arm
        return scores.channel_share(pairs.to(arm.frozen.x.device))(arm, head)

    def mean_output(self, head: Head) -> Float[Tensor, " d_head"]:
        """The head's mean output over all positions but BOS and padding."""
        return head.z[self.copies.any(0)].mean(0)


class Reader:
    """Reads MEASURES on the rows of a part, against what the model does when nothing is changed."""

    @torch.no_grad()
    def __init__(self, part: BatchPart, copies: Sequence[str] = COPIES) -> None:
        self.down: Downstream = part.scene.down
        self.shape = (len(part.periods), len(copies), len(MEASURES))
        rows = [
            (d, c, t)
            for d, p in enumerate(part.periods.tolist())
            for c, name in enumerate(copies)
            for t in copy_rows(p, name)
        ]
        doc, copy, pos = torch.tensor(rows, device=part.tokens.device).T
        self.doc, self.pos, self.cell = doc, pos, doc * len(copies) + copy
        self.next = part.tokens[doc, pos + 1]
        logits = self.down.logits(doc, pos).float()
        self.clean = logits.log_softmax(-1)
        self.logit = self._own(logits) - logits.mean(-1)

    def _own(self, values: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
        return values.gather(1, self.next[:, None])[:, 0]

    @torch.no_grad()
    def read(self, *changes: attach.Intervention) -> Float[np.ndarray, "n_documents copies measures"]:
        """Sums by document and copy, under these interventions."""
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            logits = self.down.logits(self.doc, self.pos).float()
        after = logits.log_softmax(-1)
        fall = self.logit - (self._own(logits) - logits.mean(-1))
        rise = self._own(self.clean) - self._own(after)
        kl = (self.clean.exp() * (self.clean - after)).sum(-1)
        by_name = {"logit": fall, "loss": rise, "KL": kl}
        values = torch.stack([by_name[name] for name in MEASURES], dim=1).double()
        sums = values.new_zeros(self.shape[0] * self.shape[1], self.shape[2])
        return np.asarray(sums.index_add_(0, self.cell, values).view(self.shape).cpu())


def copy_rows(period: int, copy: str) -> range:
    """Rows of a copy of the passage that have a next token in the same copy: as many in the one as in the other."""
    return range(period + 1, 2 * period) if copy == COPIES[SECOND] else range(1, period)


def removals(
    target: Target,
    screened: cih.Screen,
    heads: Sequence[str],
    *,
    draws: int = DRAWS,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, HeadRemoval]:
    """Removal of the CIH sets of these heads, sets of other sizes and controls, on documents that chose none of them.

    Channels come from the discovery documents; random sets are compared on RANK_DOCUMENTS confirmation documents, where
    the equal suppression is found, too; all else is measured on DOCUMENTS of the sets documents.
    """
    sets = document_sets.documents(target, screened.stimulus, RepeatedSets())
    by_layer: dict[int, list[int]] = {}
    for name in heads:
        layer, head = parse_head(name)
        by_layer.setdefault(layer, []).append(head)
    found: dict[str, HeadRemoval] = {}
    for layer, own in by_layer.items():
        progress(f"{screened.stimulus}: layer {layer}, channels of {len(own)} heads")
        chosen = choose(target, screened, sets["discovery"], layer, own)
        progress(f"{screened.stimulus}: layer {layer}, removals from {len(own)} heads")
        found |= measure(target, sets, layer, chosen, draws=draws, seed_parts=(target.name, screened.stimulus))
    return found


@dataclass(frozen=True)
class Chosen:
    """Sets of channels of one head, found on the discovery documents."""

    ranked: Int[Tensor, "n 2"]
    """Strongest of the search first: the CIH set are the first SET_SIZE."""
    by_sum: Int[Tensor, "m 2"]
    """The strongest by the plain sum of F_ij over all positions."""


@torch.no_grad()
def choose(
    target: Target, screened: cih.Screen, discovery: Batch, layer: int, heads: Sequence[int]
) -> dict[int, Chosen]:
    """The sets of these heads. Raises FraError where the screen's channels are not those of these documents."""
    hook, sae = target.dictionary_for(layer)
    arm = measure_arm(target.model, sae, discovery.tokens, layer, hook)
    stripe = Search(on_device(discovery, arm.frozen.x.device), arm).stripes((0,))[0]
    documents = [discovery.tokens[d, : 2 * int(p) + 1] for d, p in enumerate(discovery.periods)][:SUM_DOCUMENTS]
    sums = census(target.model, sae, documents, layer, heads, "sum").channels(n=SET_SIZE)
    found = {}
    for head in heads:
        ranked = stripe.strongest(arm, head, max(SET_SIZES))[0].cpu()
        own = torch.from_numpy(screened.heads[f"L{layer}H{head}"].pairs)
        again = torch.isin(_linear(own), _linear(ranked[: 2 * len(own)]))
        if 2 * int(again.sum()) < len(own):  # sums on a GPU may differ in their last bits, and so ranks by a little
            raise FraError(f"the screen of L{layer}H{head} is of other documents or another dictionary than these.")
        ranked = torch.cat([own, ranked[~torch.isin(_linear(ranked), _linear(own))]])[: max(SET_SIZES)]
        rows = sums[sums["head"] == head][["q_feature", "k_feature"]]
        found[head] = Chosen(ranked, torch.from_numpy(rows.to_numpy().astype(np.int64)))
    return found


def _linear(pairs: Int[Tensor, "n 2"]) -> Int[Tensor, " n"]:
    """One number a pair."""
    return pairs[:, 0] * 2**31 + pairs[:, 1]


@torch.no_grad()
def measure(
    target: Target,
    sets: Mapping[str, Batch],
    layer: int,
    chosen: Mapping[int, Chosen],
    *,
    draws: int,
    seed_parts: Sequence[str],
) -> dict[str, HeadRemoval]:
    """Everything about the heads of one layer whose sets are `chosen`."""
    confirmation, every = sets["confirmation"], sets["sets"]
    shortest = np.argsort(confirmation.periods.numpy(), kind="stable")[:RANK_DOCUMENTS]
    rank = BatchPart(target, confirmation, [int(d) for d in shortest], layer)
    reader = Reader(rank, (COPIES[SECOND],))
    means = {head: rank.mean_output(rank.scene.head(head)) for head in chosen}
    equal = {head: _suppression(rank, reader, head, own, means[head]) for head, own in chosen.items()}
    n = min(DOCUMENTS, len(every))
    used = sorted((k * len(every) // n for k in range(n)), key=lambda d: int(every.periods[d]))
    outcomes: dict[int, dict[str, list[np.ndarray]]] = {head: {} for head in chosen}
    for documents in np.array_split(used, min(_CHUNKS, n)):  # of like length, so that little is padding
        part = BatchPart(target, every, [int(d) for d in documents], layer)
        both = Reader(part)
        for head, own in chosen.items():
            for name, changes in _everything(target, part, head, own, means[head], equal[head]):
                outcomes[head].setdefault(name, []).append(both.read(*changes))
    rows = np.array([float(every.periods[d] - 1) for d in used])
    sources = tuple(every.sources[d] for d in used)
    found = {}
    for head, own in chosen.items():
        done = {name: np.concatenate(parts) for name, parts in outcomes[head].items()}
        null = _against_random(target, rank, reader, head, own, draws, (*seed_parts, f"L{layer}H{head}"))
        found[f"L{layer}H{head}"] = HeadRemoval(done, rows, sources, *null, equal[head])
    return found


def _everything(
    target: Target, part: BatchPart, head: int, chosen: Chosen, mean: Tensor, equal: float
) -> Iterator[tuple[str, tuple[attach.Intervention, ...]]]:
    """What is done to one head, by name."""
    own = part.scene.head(head)
    taken = part.share(head, chosen.ranked[:SET_SIZE])
    frozen = freeze_scales(target.model, part.tokens, layer=part.scene.arm.frozen.layer)
    to_mean = own.by(mean - own.z)
    for size in SET_SIZES:
        share = taken if size == SET_SIZE else part.share(head, chosen.ranked[:size])
        yield f"{size} channels", (own.without(share),)
    yield FROZEN, (frozen, own.without(taken))
    yield ON_STRIPE, (own.without(taken * part.stripe),)
    yield OFF_STRIPE, (own.without(taken * ~part.stripe),)
    yield SUM, (own.without(part.share(head, chosen.by_sum)),)
    yield ZERO, (own.by(-own.z),)
    yield MEAN, (to_mean,)
    yield MEAN_FROZEN, (frozen, to_mean)
    yield EQUAL, (own.by(equal * (mean - own.z)),)


def _suppression(part: BatchPart, reader: Reader, head: int, chosen: Chosen, mean: Tensor) -> float:
    """How far towards its mean the head's output must go to lower the copied token's logit as much as the removal of
    the CIH set does: between steps by a straight line; 1 where the whole way does less.
    """
    own = part.scene.head(head)
    wanted = float(reader.read(own.without(part.share(head, chosen.ranked[:SET_SIZE])))[:, 0, LOGIT].sum())
    before = 0.0
    for step in range(1, SUPPRESSION_STEPS + 1):
        after = float(reader.read(own.by(step / SUPPRESSION_STEPS * (mean - own.z)))[:, 0, LOGIT].sum())
        if after >= wanted:
            return float(np.clip((step - 1 + (wanted - before) / max(after - before, 1e-12)) / SUPPRESSION_STEPS, 0, 1))
        before = after
    return 1.0


def _against_random(
    target: Target, part: BatchPart, reader: Reader, head: int, chosen: Chosen, draws: int, seed_parts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`observed`, `draws`, `scales`, `displaced` and `draws_displaced` of a HeadRemoval."""
    own, layer = part.scene.head(head), part.scene.arm.frozen.layer
    documents = [tokens[: 2 * int(p) + 1].cpu() for tokens, p in zip(part.tokens, part.periods, strict=True)]
    _, sae = target.dictionary_for(layer)
    masses = census(target.model, sae, documents, layer, [head], "mass").channels(n=POOL)
    pairs = chosen.ranked[:SET_SIZE]
    pool = Pool(masses, pairs.numpy())
    taken, rows = part.share(head, pairs), part.copies.any(0)
    n_rows = float((part.periods - 1).sum())

    def effect(taken: Tensor) -> np.ndarray:
        return np.asarray(reader.read(own.without(taken))[:, 0].sum(0) / n_rows)

    def moved(taken: Tensor) -> np.ndarray:
        by_row = displaced(own, taken, rows)
        return np.array([float(by_row[copy].mean()) for copy in part.copies])

    matched = matched_sets(
        own,
        lambda some: part.share(head, some),
        pool,
        float(displaced(own, taken, rows).sum()),
        rows,
        draws,
        np.random.default_rng(seed_of(*seed_parts, "matched sets")),
    )
    effects = np.array([effect(one.taken) for one in matched]).reshape(len(matched), len(MEASURES))
    elsewhere = np.array([moved(one.taken) for one in matched]).reshape(len(matched), len(COPIES))
    return effect(taken), effects, np.array([one.scale for one in matched]), moved(taken), elsewhere
