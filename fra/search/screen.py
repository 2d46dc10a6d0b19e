"""One screen of a layer's heads for induction channels: search, effects, sets, and the nulls that a head may be held
against, each drawn when it is asked for. Numbers only; claims judge them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor

from fra.core.coded import Arm, pair_couplings
from fra.errors import FraError
from fra.search.atoms import set_effect, set_effects_of_atoms
from fra.search.best_effect import best_effect, mean_effect
from fra.search.channels import Arms, Effects, HeadOnArms, evenly, few_arms, few_of_arm, shifted_keys
from fra.search.designs import ChannelNulls, ChannelSearch
from fra.search.examples import Example, example, live_tokens
from fra.search.nulls import random_rotation, row_spread, scramble, scrambled_arms, stretch_to_match
from fra.search.search import Search, Stripe
from fra.search.stripe_blocks import stripe_blocks
from fra.statistics.stats import seed_of
from fra.stimuli.repeated import Batch


@dataclass(frozen=True)
class HeadScreen:
    """What the screen found for one head. Channels stand in search order, strongest first."""

    layer: int
    head: int
    pairs: Int[np.ndarray, "n 2"]
    search_value: Float[np.ndarray, " n"]
    coupling: Float[np.ndarray, " n"]
    effects: Effects
    """Of each channel on the confirmation documents, by document."""
    ranked: Effects
    """The same on the few of them on which scrambles are ranked."""
    discovered: Effects | None
    """The same on the discovery documents; None where these were measured without their control."""
    sources: tuple[str, ...]
    n_rows: int
    coupling_rank: Float[np.ndarray, " n"]
    """Share of the head's own matched pairs whose coupling is not larger."""
    above_heads: Float[np.ndarray, " n"]
    """Coupling less the median of the same pair over the layer's other heads."""
    set_effects: Mapping[int, Effects]
    """Of the 1, 50, 500, 5 000 first channels of the search removed together, on the sets documents; one column. Of
    TIHs only, as the contrast and the blocks.
    """
    set_sources: tuple[str, ...]
    set_rows: Float[np.ndarray, " n_documents"]
    contrast: Float[np.ndarray, " n_documents"]
    """Sum over the rows of each sets document of the head's attention contrast."""
    blocks: Mapping[str, float]
    """Row-centred stripe score, repeated less control, of each of the nine blocks; they add up to the whole."""
    marginals: tuple[Effects, Effects] | None
    """Removing (i, .) and (., j) of a TIH's best channel, on the confirmation documents."""
    without_heaviest: Float[np.ndarray, " n"]
    """E of each channel over the rows that do not hold the token on which it is live most often."""
    tokens: Sequence[Mapping[str, Any]]
    """For each channel, ids and counts of tokens at live query rows and at live induction keys, and the breadth."""
    example: Example | None
    """The best channel on the shortest confirmation document that has it live on the stripe."""


def _check_disjoint(discovery: Batch, *measured: Batch) -> None:
    """Raises FraError where a document on which channels are chosen is one on which they are measured."""

    def documents(batch: Batch) -> set[bytes]:
        return {row[: 1 + 2 * n].cpu().numpy().tobytes() for row, n in zip(batch.tokens, batch.periods, strict=True)}

    chosen_on = documents(discovery)
    for batch in measured:
        if both := chosen_on & documents(batch):
            raise FraError(
                f"{len(both)} documents serve both to choose channels and to measure them: what is chosen on a "
                "document is strong there by selection; draw disjoint sets"
            )


class LayerScreen:
    """Screens the heads of one layer on one stimulus. What the heads share is computed once, nulls when they are asked
    for: a draw depends on the head and its number alone.
    """

    def __init__(
        self,
        batch: Batch,
        discovery: Arm,
        confirmation: Arms,
        sets: Arms | None,
        *,
        control: Arm | None = None,
        seed_parts: Sequence[str],
        tih: Sequence[int] = (),
        search: ChannelSearch | None = None,
        nulls: ChannelNulls | None = None,
    ) -> None:
        """`sets`: only where the layer has a TIH, whose numbers are `tih`. `control`: of the discovery documents;
        without it no candidate is told to have fallen short there.
        """
        _check_disjoint(batch, confirmation.batch, *(() if sets is None else (sets.batch,)))
        self.discovery, self.confirmation, self._sets = discovery, confirmation, sets
        self.chosen_on = None if control is None else Arms(batch, discovery, control)
        self.seed_parts, self.tih = tuple(seed_parts), tuple(tih)
        self.design, self.nulls = search or ChannelSearch(), nulls or ChannelNulls()
        self.search = Search(batch, discovery, activity_documents=self.nulls.activity_documents)
        self.stripe: Stripe = self.search.stripes((0,), self.design.floor)[0]
        self._plain: dict[tuple[str, int], HeadOnArms] = {}
        self._spread_of: dict[int, float] = {}
        self._of_pool: dict[int, np.ndarray] = {}

    @property
    def sets(self) -> Arms:
        """The sets documents. Raises FraError where the layer was measured without them."""
        if self._sets is None:
            raise FraError(f"layer {self.discovery.frozen.layer} was measured without the documents for sets")
        return self._sets

    @sets.setter
    def sets(self, sets: Arms) -> None:
        self._sets = sets

    def candidates(self, head: int, n: int | None = None, arm: Arm | None = None) -> tuple[Tensor, Tensor]:
        """The n strongest channels of a head in the search, with their values; of its scrambled self where that is
        given as `arm`.
        """
        return self.stripe.strongest(arm or self.discovery, head, self.design.candidates if n is None else n)

    # ---- scrambled heads

    def turned(self, head: int, k: int) -> tuple[Tensor, float]:
        """The k-th scramble of a head: a rotation and a stretch."""
        frozen = self.confirmation.repeated.frozen
        seed = seed_of(*self.seed_parts, "scramble", str(head), str(k))
        generator = torch.Generator().manual_seed(seed % 2**63)
        rotation = random_rotation(frozen.W_k.shape[-1], generator, frozen.W_k)
        few = self.nulls.spread_documents
        if head not in self._spread_of:
            self._spread_of[head] = row_spread(frozen, head, few)
        return rotation, stretch_to_match(frozen, head, rotation, few, self._spread_of[head])

    def scrambled(self, head: int, k: int, which: str, n: int | None = None) -> tuple[HeadOnArms, Tensor]:
        """The k-th scramble of a head on the few documents on which channels are ranked ("channels") or sets ("sets"),
        and the n channels that the whole search finds in it.
        """
        rotation, stretch = self.turned(head, k)
        turned = self.discovery.with_weights(scramble(self.discovery.frozen, head, rotation, stretch))
        pairs, _ = self.candidates(head, n, turned)
        arms = self._documents(which)
        return HeadOnArms(scrambled_arms(arms, head, rotation, stretch), head, self._on(which, head).queries), pairs

    def scrambled_best(self, head: int, k: int, at_least: float = -np.inf) -> float:
        """Best channel effect of the whole search on the k-th scramble of a head (or `at_least`, where none reaches
        it), on the few confirmation documents.
        """
        on, pairs = self.scrambled(head, k, "channels")
        return best_effect(on, pairs, least=self.design.least_documents, at_least=at_least)

    def scrambled_set(self, head: int, k: int) -> float:
        """Effect of the set that the whole search finds in the k-th scramble of a head, on the few sets documents."""
        on, pairs = self.scrambled(head, k, "sets")
        return set_effect(on, pairs)

    def own_set(self, head: int) -> float:
        """Effect of the head's own set on the same few documents."""
        return set_effect(self._on("sets", head), self.candidates(head)[0])

    def _on(self, which: str, head: int) -> HeadOnArms:
        """The head as it is on the documents that its scrambles are measured on, kept for the one head that is being
        drawn for.
        """
        if (which, head) not in self._plain:
            arms = self._documents(which)
            for arm in (arms.repeated, arms.control):
                arm.coefficients("query", head), arm.coefficients("key", head)  # kept for every scramble
            self._plain = {(which, head): HeadOnArms(arms, head)}
        return self._plain[which, head]

    def _documents(self, which: str) -> Arms:
        return self.few_confirmation if which == "channels" else self._few_sets

    @property
    def ranked_on(self) -> Int[Tensor, " m"]:
        """Indices of the confirmation documents on which channels are ranked among those of scrambles."""
        batch = self.confirmation.batch
        return evenly(len(batch), self.nulls.scramble_documents, batch.periods.device)

    @cached_property
    def few_confirmation(self) -> Arms:
        """Both arms on `ranked_on`."""
        return few_arms(self.confirmation, self.ranked_on)

    @cached_property
    def _few_sets(self) -> Arms:
        sets = self.sets
        return few_arms(sets, evenly(len(sets.batch), self.nulls.set_documents, sets.batch.periods.device))

    # ---- other lags

    @cached_property
    def _lags(self) -> dict[int, Stripe]:
        shifts = range(self.nulls.first_lag, self.nulls.first_lag + self.nulls.lags)
        return self.search.stripes(tuple(shifts), self.design.floor)

    def best_at_lags(self, head: int, at_least: float = -np.inf) -> float:
        """Largest channel effect that the same search finds at any other lag (or `at_least`, where none reaches it)."""
        best, own = at_least, HeadOnArms(self.confirmation, head)
        for shift, stripe in self._lags.items():
            keys, documents = shifted_keys(self.confirmation.batch, shift)
            pairs, _ = stripe.strongest(self.discovery, head, self.design.candidates)
            there = own.on_stripe(keys)
            best = max(best, best_effect(there, pairs, documents, least=self.design.least_documents, at_least=best))
        return best

    # ---- couplings

    @cached_property
    def _matching(self) -> tuple[Tensor, Tensor, cKDTree]:
        pool = self.search.live_pairs(self.nulls.pool, np.random.default_rng(seed_of(*self.seed_parts, "pool")))
        activity = self.search.activity(pool)
        spread = activity.std(0).clamp(min=1e-6)
        return pool, spread, cKDTree((activity / spread).cpu().numpy())

    def matched_couplings(self, head: int, pairs: Tensor) -> Float[np.ndarray, "n matched"]:
        """Couplings of the head's own pairs that are nearest to each pair in activity, ascending."""
        pool, spread, tree = self._matching
        if head not in self._of_pool:
            self._of_pool[head] = self.typical(head, pool).cpu().numpy()
        own = self._of_pool[head]
        _, near = tree.query((self.search.activity(pairs) / spread).cpu().numpy(), k=min(self.nulls.matched, len(pool)))
        return np.asarray(np.sort(own[near.reshape(len(pairs), min(self.nulls.matched, len(pool)))], axis=1))

    def others_median(self, head: int, pairs: Tensor) -> Float[Tensor, " n"]:
        """Median coupling of the same pairs over the layer's other heads; -inf where there is none."""
        n_heads = self.confirmation.repeated.frozen.n_heads
        others = [self.typical(other, pairs) for other in range(n_heads) if other != head]
        if not others:
            return torch.full((len(pairs),), -torch.inf, device=pairs.device)
        return torch.stack(others).median(0).values

    def typical(self, head: int, pairs: Tensor) -> Float[Tensor, " n"]:
        """G_ij, averaged over the offsets of the induction stripe where it depends on them."""
        arms = self.confirmation
        if arms.repeated.frozen.rotary is None:
            return pair_couplings(arms.repeated, head, pairs, pairs[:0, 0])[:, 0]
        offsets, times = torch.unique(arms.batch.periods - 1, return_counts=True)
        weight = times.to(arms.repeated.codes.value.dtype)
        mean: Tensor = pair_couplings(arms.repeated, head, pairs, offsets) @ (weight / weight.sum())
        return mean

    # ---- random atoms

    @cached_property
    def over_atoms(self) -> dict[int, tuple[float, list[float]]]:
        """By TIH: the set effect with the dictionary's own features and with each dictionary of random atoms, all found
        on the same few discovery documents and measured on the same few sets documents.
        """
        batch, sets, n = self.search.batch, self.sets, self.nulls.atom_documents
        chosen_on = evenly(len(batch), n, batch.periods.device)
        few = few_arms(sets, evenly(len(sets.batch), n, sets.batch.periods.device))
        discovery = few_of_arm(self.discovery, chosen_on)
        return set_effects_of_atoms(
            batch, chosen_on, discovery, few, self.tih, self.design, self.nulls, self.seed_parts
        )


def screen_head(layer: LayerScreen, head: int, is_tih: bool) -> HeadScreen:
    """The whole screen of one head, without nulls. Sets are measured on TIHs, which the claims about sets are about."""
    sizes, size = layer.design.sizes, layer.design.candidates
    pairs_all, values_all = layer.candidates(head, max(*sizes, size) if is_tih else size)
    pairs, values = pairs_all[:size], values_all[:size]
    confirmation = HeadOnArms(layer.confirmation, head)
    effects = confirmation.channels(pairs)
    E = mean_effect(effects, layer.design.least_documents)
    coupling = layer.typical(head, pairs)
    matched = layer.matched_couplings(head, pairs)
    sets = HeadOnArms(layer.sets, head) if is_tih else None
    best = int(np.argmax(E)) if len(E) else None
    tokens = live_tokens(layer.confirmation, pairs)
    heaviest = torch.tensor([row["heaviest"] for row in tokens], device=pairs.device)
    batch = layer.confirmation.batch
    at_rows = batch.tokens[batch.row_doc, batch.row_pos]
    without = confirmation.channels(pairs, at_rows[:, None] != heaviest[None, :])
    rows = np.zeros(0) if sets is None else np.bincount(sets.batch.row_doc.cpu().numpy(), minlength=len(sets.batch))
    return HeadScreen(
        layer=layer.discovery.frozen.layer,
        head=head,
        pairs=pairs.cpu().numpy(),
        search_value=values.cpu().numpy(),
        coupling=coupling.cpu().numpy(),
        effects=effects,
        ranked=effects.of(layer.ranked_on.cpu().numpy()),
        discovered=None if layer.chosen_on is None else HeadOnArms(layer.chosen_on, head).channels(pairs),
        sources=batch.sources,
        n_rows=len(confirmation.keys),
        coupling_rank=(matched <= coupling.cpu().numpy()[:, None]).mean(1),
        above_heads=(coupling - layer.others_median(head, pairs)).cpu().numpy(),
        set_effects={} if sets is None else {n: sets.removed_together(pairs_all[:n]) for n in sizes},
        set_sources=() if sets is None else sets.batch.sources,
        set_rows=rows.astype(float),
        contrast=np.zeros(0) if sets is None else sets.by_document(sets.contrast),
        blocks={} if sets is None else stripe_blocks(sets),
        marginals=None
        if best is None or not is_tih
        else (
            confirmation.marginal("query", int(pairs[best, 0])),
            confirmation.marginal("key", int(pairs[best, 1])),
        ),
        tokens=tokens,
        without_heaviest=mean_effect(without, layer.design.least_documents),
        example=None if best is None else example(layer.confirmation, head, pairs[best]),
    )
