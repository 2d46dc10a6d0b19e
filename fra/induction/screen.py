"""One screen of a layer's heads for induction channels: search, effects, nulls, sets, power. Numbers only;
fra.induction.cih judges them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from scipy.stats import t as student
from torch import Tensor

from fra.core.coded import Arm, pair_couplings
from fra.core.threads import each
from fra.errors import FraError
from fra.induction.best_effect import MIN_LIVE_DOCUMENTS, best_effect, mean_effect
from fra.induction.channels import Arms, Effects, HeadOnArms, shifted_keys
from fra.induction.examples import Example, example, live_tokens
from fra.induction.nulls import draw_atoms, random_atoms, random_rotation, scramble, scrambled_arms, stretch_to_match
from fra.induction.planting import Planting
from fra.induction.search import FLOOR_DOCUMENTS, SET_SIZE, Search, Stripe
from fra.induction.stripe_blocks import stripe_blocks
from fra.stimuli.repeated import Batch
from fra.verdicts.stats import seed_of

SHIFTS = tuple(range(2, 42))
SCRAMBLES = 20
ATOM_SEEDS = 2
SET_SIZES = (1, 50, 500, 5_000)
POOL = 20_000
MATCHED = 200
PLANTED = 16
"""Channels planted to measure a head's power; with fewer than PLANTED_AT_LEAST nothing is known of it."""
PLANTED_AT_LEAST = 10
PLANTING_TRIES = 150
PLANTED_SELECTIVITY = 0.6


@dataclass(frozen=True)
class Bars:
    """The bars of a CIH channel (CLAIMS): nats, attention, the head's contrast on live rows, coverage."""

    nats: float = 0.10
    attention: float = 0.02
    contrast: float = 0.10
    coverage: float = 0.002


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
    sources: tuple[str, ...]
    n_rows: int
    p_lag: Float[np.ndarray, " n"]
    p_coupling: Float[np.ndarray, " n"]
    """Share of the head's own matched pairs with a larger coupling."""
    above_heads: Float[np.ndarray, " n"]
    """Coupling less the median of the same pair over the layer's other heads."""
    lag_best: Float[np.ndarray, " n_shifts"]
    """Best effect that the same search found on each other stripe."""
    scramble_best: Float[np.ndarray, " n_scrambles"]
    set_effects: Mapping[int, Effects]
    """Of the 1, 50, 500, 5 000 first channels of the search removed together, on the sets documents; one column."""
    set_sources: tuple[str, ...]
    set_rows: Float[np.ndarray, " n_documents"]
    contrast: Float[np.ndarray, " n_documents"]
    """Sum over the rows of each sets document of the head's attention contrast."""
    blocks: Mapping[str, float]
    """Row-centred stripe score, repeated less control, of each of the nine blocks; they add up to the whole."""
    atom_effects: tuple[Effects, ...]
    """The same set found and removed with random atoms for features, one for each seed."""
    scramble_sets: Float[np.ndarray, " n_set_scrambles"]
    marginals: tuple[Effects, Effects] | None
    """Removing (i, .) and (., j) of the first channel."""
    planted_found: int
    planted: int
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
    """Screens the heads of one layer on one stimulus. What the heads share is computed once."""

    def __init__(
        self,
        batch: Batch,
        discovery: Arm,
        confirmation: Arms,
        sets: Arms,
        *,
        seed_parts: Sequence[str],
        bars: Bars | None = None,
        progress: Callable[[str], None] = lambda _: None,
        shifts: Sequence[int] = SHIFTS,
    ) -> None:
        """`shifts`: the stripes of the other lags."""
        _check_disjoint(batch, confirmation.batch, sets.batch)
        self.discovery, self.confirmation, self.sets = discovery, confirmation, sets
        self.seed_parts, self.bars, self.progress = tuple(seed_parts), bars or Bars(), progress
        self.search = Search(batch, discovery)
        self.stripes = self.search.stripes((0, *shifts))
        self._shifted = {shift: shifted_keys(confirmation.batch, shift) for shift in shifts}
        pool = self.search.live_pairs(POOL, np.random.default_rng(seed_of(*self.seed_parts, "pool")))
        activity = self.search.activity(pool)
        self._pool, self._spread = pool, activity.std(0).clamp(min=1e-6)
        self._tree = cKDTree((activity / self._spread).cpu().numpy())

    @property
    def stripe(self) -> Stripe:
        """The induction stripe."""
        return self.stripes[0]

    def candidates(self, head: int, n: int = SET_SIZE, shift: int = 0, arm: Arm | None = None) -> tuple[Tensor, Tensor]:
        """The n strongest channels of a head in the search; of its scrambled self where that is given as `arm`."""
        return self.stripes[shift].strongest(arm or self.discovery, head, n)

    def null_scrambles(self, head: int, with_sets: bool, n: int = SCRAMBLES) -> tuple[list[float], list[float]]:
        """Best channel effect, and where asked for the set effect, of the whole search on n scrambles of the head."""
        generator = torch.Generator().manual_seed(seed_of(*self.seed_parts, "scramble", str(head)) % 2**63)
        best, together = [], []
        for arm in (self.confirmation.repeated, self.confirmation.control, self.sets.repeated, self.sets.control):
            arm.coefficients("query", head), arm.coefficients("key", head)  # kept for every scramble
        W_k = self.confirmation.repeated.frozen.W_k
        for _ in range(n):
            rotation = random_rotation(W_k.shape[-1], generator, W_k)
            stretch = stretch_to_match(self.confirmation.repeated.frozen, head, rotation)
            turned = self.discovery.with_weights(scramble(self.discovery.frozen, head, rotation, stretch))
            pairs, _ = self.candidates(head, arm=turned)
            confirmation = scrambled_arms(self.confirmation, head, rotation, stretch)
            best.append(best_effect(HeadOnArms(confirmation, head), pairs))
            if with_sets:
                sets = scrambled_arms(self.sets, head, rotation, stretch)
                removed = HeadOnArms(sets, head).removed_together(pairs)
                together.append(float(removed.nats.sum() / max(removed.rows.sum(), 1)))
        return best, together

    def null_lags(self, on_confirmation: HeadOnArms, head: int) -> list[float]:
        """Best channel effect of the same search at every other shift."""
        found = []
        for shift, (keys, documents) in self._shifted.items():
            pairs, _ = self.candidates(head, shift=shift)
            found.append(best_effect(on_confirmation.on_stripe(keys), pairs, documents))
        return found

    def coupling_rank(self, head: int, pairs: Tensor, arms: Arms) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Couplings of pairs at the induction stripe, their rank among matched pairs, and what they exceed the other
        heads' median by.
        """
        own = self._typical(arms, head, pairs)
        pool = self._typical(arms, head, self._pool)
        _, near = self._tree.query(
            (self.search.activity(pairs) / self._spread).cpu().numpy(), k=min(MATCHED, len(self._pool))
        )
        share = (pool.cpu().numpy()[near] > own.cpu().numpy()[:, None]).mean(1)
        others = [self._typical(arms, other, pairs) for other in range(arms.repeated.frozen.n_heads) if other != head]
        above = own - torch.stack(others).median(0).values if others else own
        return own, share, above.cpu().numpy()

    def _typical(self, arms: Arms, head: int, pairs: Tensor) -> Tensor:
        """G_ij, averaged over the offsets of the induction stripe where it depends on them."""
        if arms.repeated.frozen.rotary is None:
            return pair_couplings(arms.repeated, head, pairs, pairs[:0, 0])[:, 0]
        offsets, times = torch.unique(arms.batch.periods - 1, return_counts=True)
        weight = times.to(arms.repeated.codes.value.dtype)
        mean: Tensor = pair_couplings(arms.repeated, head, pairs, offsets) @ (weight / weight.sum())
        return mean

    def atoms(self) -> tuple[tuple[Arms, Stripe], ...]:
        """For each seed: the sets arms, and the induction stripe of the discovery arm, with random atoms for
        features.
        """
        decoder = self.discovery.codes.decoder
        self.progress(f"random atoms, {ATOM_SEEDS} dictionaries")

        def one(seed: int) -> tuple[Arms, Stripe]:
            generator = torch.Generator().manual_seed(seed_of(*self.seed_parts, "atoms", str(seed)) % 2**63)
            atoms = draw_atoms(len(decoder), generator, decoder)
            batch = self.search.batch
            search = Search(batch, random_atoms(self.discovery, atoms, 1 + 2 * batch.periods))
            # atoms live more rarely than features: rather a laxer search, which favours them, than a dead control
            floors = (FLOOR_DOCUMENTS // 2**halved for halved in range(FLOOR_DOCUMENTS.bit_length()))
            found = (search.stripes((0,), floor)[0] for floor in floors)
            stripe = next((stripe for stripe in found if len(stripe.pairs) >= SET_SIZE), None)
            if stripe is None:
                raise FraError(
                    f"fewer than {SET_SIZE} pairs of random atoms are live on the stripe of layer "
                    f"{self.discovery.frozen.layer}: a control without anything live measures nothing"
                )
            lengths = 1 + 2 * self.sets.batch.periods
            sides = (random_atoms(arm, atoms, lengths) for arm in (self.sets.repeated, self.sets.control))
            return Arms(self.sets.batch, *sides), stripe

        return tuple(each(one, range(ATOM_SEEDS), decoder.device))

    def plant(self, on_confirmation: HeadOnArms, head: int, values: Tensor) -> tuple[int, int]:
        """How many of PLANTED channels injected at the bars the search finds and the measurement sees, and how many
        were tried.

        A random eligible pair has its coupling raised in the head's scores until it meets every bar of an expressed
        channel on the confirmation documents; found: it then ranks among the candidates of the search, and its effect
        exceeds zero at the level corrected for them. Pairs whose key feature is about as live everywhere else as at
        the stripe's key are passed over: no coupling makes a head attend there by them.
        """
        rng = np.random.default_rng(seed_of(*self.seed_parts, "plant", str(head)))
        stripe = self.stripe
        cut = float(values[-1]) if len(values) >= SET_SIZE else -np.inf
        found = tried = 0
        able = torch.nonzero(stripe.selectivity >= PLANTED_SELECTIVITY)[:, 0].cpu().numpy()
        for number in rng.permutation(able)[:PLANTING_TRIES]:
            if tried == PLANTED:
                break
            planting = Planting(on_confirmation, stripe.pairs[int(number)])
            delta = self._raise_to_bars(planting)
            if delta is None:
                continue
            tried += 1
            coupling = pair_couplings(self.discovery, head, stripe.pairs[int(number)][None], stripe.offsets)[0]
            M = float((stripe.position_part[int(number)] * (coupling + delta)).sum())
            sums = planting.by_document(planting.effects(delta)[0])
            counts = planting.by_document(torch.ones(len(planting.rows)))
            mean, n = sums.sum() / counts.sum(), int((counts > 0).sum())
            error = np.sqrt(n / (n - 1) * np.square(sums - mean * counts).sum()) / counts.sum()
            found += int(cut <= M and mean > student.ppf(1 - 0.05 / SET_SIZE, n - 1) * error)
        return found, tried

    def _raise_to_bars(self, planting: Planting) -> float | None:
        """The smallest coupling (to a tenth) that lifts a planted channel to every bar; None where none does."""
        bars = self.bars
        live = int((planting.by_document(torch.ones(len(planting.rows))) > 0).sum())
        if live < MIN_LIVE_DOCUMENTS or planting.covered < bars.coverage * len(self.confirmation.batch.row_doc):
            return None

        def meets(delta: float) -> bool:
            means = [float(part.mean()) for part in planting.effects(delta)]
            return means[0] >= bars.nats and means[1] >= bars.attention and means[2] >= bars.contrast

        # a typical contribution of 1, 4 or 16 nats: what none of them lifts to the bars cannot be lifted
        low, high = 0.0, None
        for nats in (1.0, 4.0, 16.0):
            if meets(nats / planting.size):
                high = nats / planting.size
                break
            low = nats / planting.size
        if high is None:
            return None
        while high - low > 0.1 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if meets(middle) else (middle, high)
        return high


def screen_head(
    layer: LayerScreen,
    head: int,
    scramble_null: tuple[np.ndarray, np.ndarray],
    atoms: Sequence[tuple[Arms, Stripe]],
    is_tih: bool,
) -> HeadScreen:
    """The whole screen of one head; nulls that the layer shares are handed in.

    Sets are measured on TIHs, which the set claim is about; planted channels on other heads, which it takes to refute.
    """
    pairs_all, values_all = layer.candidates(head, max(SET_SIZES))
    pairs, values = pairs_all[:SET_SIZE], values_all[:SET_SIZE]
    confirmation = HeadOnArms(layer.confirmation, head)
    effects = confirmation.channels(pairs)
    E = mean_effect(effects)
    lag_best = np.asarray(layer.null_lags(confirmation, head))
    coupling, p_coupling, above = layer.coupling_rank(head, pairs, layer.confirmation)
    sets = HeadOnArms(layer.sets, head)
    set_effects = {n: sets.removed_together(pairs_all[:n]) for n in SET_SIZES} if is_tih else {}
    atom_effects = []
    for arms, stripe in atoms if is_tih else ():
        chosen, _ = stripe.strongest(arms.repeated, head, SET_SIZE)
        atom_effects.append(HeadOnArms(arms, head).removed_together(chosen))
    found, tried = (0, 0) if is_tih else layer.plant(confirmation, head, values)
    best = int(np.argmax(E)) if len(E) else None
    tokens = live_tokens(layer.confirmation, pairs)
    heaviest = torch.tensor([row["heaviest"] for row in tokens], device=pairs.device)
    at_rows = layer.confirmation.batch.tokens[layer.confirmation.batch.row_doc, layer.confirmation.batch.row_pos]
    rows = np.bincount(layer.sets.batch.row_doc.cpu().numpy(), minlength=len(layer.sets.batch)).astype(float)
    return HeadScreen(
        layer=layer.discovery.frozen.layer,
        head=head,
        pairs=pairs.cpu().numpy(),
        search_value=values.cpu().numpy(),
        coupling=coupling.cpu().numpy(),
        effects=effects,
        sources=layer.confirmation.batch.sources,
        n_rows=len(confirmation.keys),
        p_lag=_rank(E, lag_best),
        p_coupling=p_coupling,
        above_heads=above,
        lag_best=lag_best,
        scramble_best=scramble_null[0],
        set_effects=set_effects,
        set_sources=layer.sets.batch.sources,
        set_rows=rows,
        contrast=sets.by_document(sets.contrast),
        blocks=stripe_blocks(sets),
        atom_effects=tuple(atom_effects),
        scramble_sets=scramble_null[1],
        marginals=None
        if best is None
        else (sets.marginal("query", int(pairs[best, 0])), sets.marginal("key", int(pairs[best, 1]))),
        planted_found=found,
        planted=tried,
        tokens=tokens,
        without_heaviest=mean_effect(confirmation.channels(pairs, at_rows[:, None] != heaviest[None, :])),
        example=None if best is None else example(layer.confirmation, head, pairs[best]),
    )


def _rank(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """(1 + #{null >= observed}) / (1 + n) for each observed value."""
    at_least: np.ndarray = (null[None, :] >= observed[:, None]).sum(1)
    return np.asarray((1 + at_least) / (1 + len(null)))
