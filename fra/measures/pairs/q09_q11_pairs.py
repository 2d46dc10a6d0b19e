"""Which pairs of features are a head's strongest on natural text, and how far that is the head's doing: self channels
(i = j), stability over halves of the documents, and whether couplings foretell attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.core.coded import Arm, measure_arm
from fra.dictionaries.codes import neuronpedia
from fra.errors import CannotLoad
from fra.induction.examples import example_on_text
from fra.induction.nulls import draw_atoms, random_atoms
from fra.measures.pairs.activity import FLOOR, Activity, halves, mean_while_live, summed
from fra.measures.pairs.q10_prediction import Prediction, predictions
from fra.report.pictures import ON_NATURAL, ChannelPicture
from fra.targets.target import text_of
from fra.verdicts.jackknife import Jackknifed, jackknifed
from fra.verdicts.stats import seed_of

if TYPE_CHECKING:
    from fra.targets.target import Target

STRONGEST = 50
_CANDIDATES = 300
"""The strongest of each list, among which the list without one source is looked for."""
_DRAWS = 40
"""Relabellings a layer, shared out among its heads and pooled."""
LEAST = 0.5 / STRONGEST


@dataclass(frozen=True)
class Natural:
    """Natural documents for one layer: padded tokens, lengths and sources."""

    tokens: Int[Tensor, "batch pos"]
    lengths: tuple[int, ...]
    sources: tuple[str, ...]


def natural(target: Target, n: int, longest: int = 128) -> Natural:
    """n of the target's texts, spread over all of them, BOS first where it has one, cut to the context, with sources.

    Raises CannotLoad where there are fewer.
    """
    from fra.stimuli.natural import natural_with_sources

    documents, sources = natural_with_sources(target, n, longest)
    width = max(map(len, documents))
    padded = torch.stack([torch.cat([ids, ids[:1].expand(width - len(ids))]) for ids in documents])
    return Natural(padded, tuple(map(len, documents)), sources)


def why_not(arm: Arm) -> str | None:
    """Why a layer's channels cannot be ranked by position part times coupling, in a sentence; None where they can."""
    if arm.frozen.rotary is not None:
        return "couplings turn with the distance (rotary positions): a pair has no one coupling to rank by"
    return None


@dataclass
class HeadPairs:
    """What one head's strongest pairs show."""

    self_share: Jackknifed
    """Share of i = j among the 50 of largest sum |F| over t > s."""
    self_coactive: Jackknifed
    """The same among the 50 of largest sum of a_i a_j, whatever the head."""
    self_shuffled: list[float]
    """The same as the first, key features relabelled in the coupling alone."""
    stable: Jackknifed
    """Jaccard of the 50 of largest mean |F| while live, over halves of the sources, jointly live in 10 documents."""
    stable_shuffled: list[float]
    """The first, with key features of the second half relabelled."""
    stable_any: Jackknifed | None = None
    """The first without any minimum, for pairs or for features: live together once is enough."""
    stable_atoms: Jackknifed | None = None
    """The first, with random atoms for features."""
    strongest: list[tuple[int, int]] = field(default_factory=list)
    """The 50 by sum |F|."""
    picture: ChannelPicture | None = None
    """The first of them on a document, as the report draws it."""


@dataclass(frozen=True)
class LayerPairs:
    """What the pairs of one layer show."""

    pairs: list[HeadPairs] | str
    """One a head, or why they cannot be ranked."""
    predictions: list[Prediction] | str
    """One a head, or why nothing can be foretold."""
    n_documents: int
    n_heads: int
    unstable: str | None = None
    """Why lists of halves cannot be compared, though pairs can be ranked; None where they can."""


@torch.no_grad()
def measure_layer(target: Target, documents: Natural, layer: int) -> LayerPairs:
    """Every head's strongest pairs on the documents, and what its couplings foretell. Raises FraError where the layer
    has no dictionary, CannotLoad for documents of one source; where there are too few live pairs, or too many, the
    layer says so.
    """
    hook, sae = target.dictionary_for(layer)
    arm = measure_arm(target.model, sae, documents.tokens, layer, hook)
    seed_parts = (target.name, "pairs", f"layer {layer}")
    found = measure_arm_pairs(arm, documents, seed_parts)
    text, page = text_of(target.tokenizer), neuronpedia(sae)
    for head, own in enumerate(found.pairs if isinstance(found.pairs, list) else ()):
        shown = example_on_text(arm, head, own.strongest[0], documents.tokens, documents.lengths)
        own.picture = None if shown is None else shown.picture(ON_NATURAL, text, page)
    return found


@torch.no_grad()
def measure_arm_pairs(arm: Arm, documents: Natural, seed_parts: Sequence[str]) -> LayerPairs:
    """`measure_layer` of documents that went through model and dictionary."""
    first = halves(documents.sources, seed_parts)
    heads, n = range(arm.frozen.n_heads), len(documents.lengths)
    try:
        activity = Activity(arm, documents.lengths, documents.sources, first)
        foretold = predictions(activity, heads, seed_parts)
    except CannotLoad as lacking:  # lists need as many live pairs
        return LayerPairs(str(lacking), str(lacking), n, len(heads))
    if (problem := why_not(arm)) is not None:
        return LayerPairs(problem, foretold, n, len(heads))
    found = Lists(activity, seed_parts).heads(heads)
    unstable = activity.too_few(of_each_half=True)
    if unstable is None:
        generator = torch.Generator().manual_seed(seed_of(*seed_parts, "atoms"))
        atoms = random_atoms(arm, draw_atoms(len(arm.codes.decoder), generator, arm.frozen.x))
        try:
            unstable = _controls(found, arm, atoms, documents, first, seed_parts)
        except CannotLoad as lacking:
            unstable = f"a control of stability: {lacking}"
    return LayerPairs(found, foretold, n, len(heads), unstable)


def _controls(
    found: list[HeadPairs],
    arm: Arm,
    atoms: Arm,
    documents: Natural,
    first: Bool[np.ndarray, " n"],
    seed_parts: Sequence[str],
) -> str | None:
    """Sets the stability of every head's lists without the minimum, and of those of random atoms; or says why not."""
    heads, given = range(len(found)), (documents.lengths, documents.sources, first)
    control = Activity(atoms, *given)
    if (why := control.too_few(of_each_half=True)) is not None:
        return f"random atoms, the control: {why}"
    jaccards = Lists(control, seed_parts).stability(heads)
    del control  # tables of the same size follow
    loose = Lists(Activity(arm, *given, floor=1), seed_parts, floor=1).stability(heads)
    for own, own_any, own_atoms in zip(found, loose, jaccards, strict=True):
        own.stable_any, own.stable_atoms = own_any, own_atoms
    return None


class Lists:
    """The strongest lists of the heads of a layer, whole and without each source."""

    def __init__(self, activity: Activity, seed_parts: Sequence[str], floor: int = FLOOR) -> None:
        """floor: documents of a half in which a pair must be jointly live to be on the list of that half."""
        self.activity, self.seed_parts, self.floor = activity, seed_parts, floor
        self.n = len(activity.live)
        t = activity.tables
        least = t.documents >= floor
        #: rank values without the coupling
        self.mean = [torch.where(least[h], t.products[h] / t.count[h].clamp(min=1), 0.0) for h in (0, 1)]
        self.sum = torch.where(t.documents.sum(0) >= 2 * FLOOR, t.products.sum(0), 0.0)

    def _top(self, values: Float[Tensor, "live live"], n: int) -> Int[Tensor, " n"]:
        """Linear places of the n largest, strongest first."""
        flat = values.flatten()
        n = min(n, len(flat))
        few = flat[:: max(1, len(flat) // (1 << 18))]
        floor = few.topk(n).values[-1] if len(few) >= n else flat.min()  # the n largest are not below
        places = torch.nonzero(flat >= floor)[:, 0]
        found: Tensor = places[flat[places].topk(n).indices]
        return found

    def _candidates(self, parts: Sequence[Tensor], coupling: Tensor) -> list[Tensor]:
        return [self._top(part * coupling, _CANDIDATES) for part in parts]

    def stability(self, heads: Sequence[int]) -> list[Jackknifed]:
        """`HeadPairs.stable` of each head."""
        tops = [self._candidates(self.mean, self.activity.couplings(head)) for head in heads]
        return [own.jaccard(mean_while_live(self.floor)) for own in self._without([tops], heads)[0]]

    def _without(
        self, lists: Sequence[Sequence[Sequence[Tensor]]], heads: Sequence[int]
    ) -> list[list[_WithoutSources]]:
        """For each list and head its candidates with their values by source."""
        every = torch.unique(torch.cat([part for tops in lists for own in tops for part in own]))
        by_source = self.activity.by_source(every)
        i, j = self.activity.live[every // self.n], self.activity.live[every % self.n]
        same = (i == j).cpu().numpy()
        first = np.zeros(len(self.activity.names), dtype=bool)
        first[self.activity.source[self.activity.first]] = True
        found: list[list[_WithoutSources]] = []
        for tops in lists:
            found.append([])
            for own, head in zip(tops, heads, strict=True):
                at = torch.searchsorted(every, torch.unique(torch.cat(list(own))))
                U, V = self.activity.arm.couplings(head)
                size = np.asarray((U[i[at]] * V[j[at]]).sum(-1).abs().double().cpu())
                place = at.cpu().numpy()
                found[-1].append(_WithoutSources(by_source[:, :, place], size, same[place], first))
        return found

    def heads(self, heads: Sequence[int]) -> list[HeadPairs]:
        """Everything about each head but random atoms."""
        stable: list[list[Tensor]] = []
        strong: list[list[Tensor]] = []
        shuffled = []
        for head in heads:
            coupling = self.activity.couplings(head)
            stable.append(self._candidates(self.mean, coupling))
            strong.append(self._candidates([self.sum], coupling))
            draws = -(-_DRAWS // len(heads))
            shuffled.append(self._shuffled(head, coupling, stable[-1][0][:STRONGEST], draws))
        coactive = [[self._top(self.sum, _CANDIDATES)]] * len(heads)
        parts = self._without([stable, strong, coactive], heads)
        live = self.activity.live
        return [
            HeadPairs(
                self_share=parts[1][k].self_share(summed(2 * FLOOR), True),
                self_coactive=parts[2][k].self_share(summed(2 * FLOOR), False),
                self_shuffled=shuffled[k][0],
                stable=parts[0][k].jaccard(mean_while_live(FLOOR)),
                stable_shuffled=shuffled[k][1],
                strongest=[(int(live[p // self.n]), int(live[p % self.n])) for p in strong[k][0][:STRONGEST]],
            )
            for k in range(len(stable))
        ]

    def _shuffled(
        self, head: int, coupling: Float[Tensor, "live live"], first: Int[Tensor, " m"], draws: int
    ) -> tuple[list[float], list[float]]:
        """Self share, and Jaccard with the first half's list, when the coupling belongs to relabelled key features."""
        rng = np.random.default_rng(seed_of(*self.seed_parts, f"head {head}", "labels"))
        shares, overlaps = [], []
        known = set(first.tolist())
        for _ in range(draws):
            label = self.activity.shuffled(rng)
            turned = coupling[:, label]  # column j holds the coupling of the feature that j is taken for
            top = self._top(self.sum * turned, STRONGEST)
            shares.append(float((top // self.n == top % self.n).double().mean()))
            other = self._top(self.mean[1] * turned, STRONGEST)
            overlaps.append(_jaccard(known, set((other // self.n * self.n + label[other % self.n]).tolist())))
        return shares, overlaps


def _jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / max(1, len(a | b))


@dataclass(frozen=True)
class _WithoutSources:
    """A head's candidates: their sums by source, from which every list without a source follows."""

    by_source: Float[np.ndarray, "3 n_sources n"]
    size: Float[np.ndarray, " n"]
    """|G_ij|."""
    same: np.ndarray
    first: np.ndarray
    """Which sources are in the first half."""

    def _top(self, sums: np.ndarray, value: Any, coupled: bool) -> np.ndarray:
        ranked = value(*sums)
        ranked = np.where(np.isfinite(ranked), ranked, 0.0) * (self.size if coupled else 1.0) + np.where(
            np.isfinite(ranked), 0.0, -np.inf
        )
        best = np.argsort(-ranked, kind="stable")[:STRONGEST]
        kept: np.ndarray = best[np.isfinite(ranked[best])]
        return kept

    def jaccard(self, value: Any) -> Jackknifed:
        """Overlap of the lists of both halves."""
        halves = [self.by_source[:, self.first].sum(1), self.by_source[:, ~self.first].sum(1)]
        lists = [set(self._top(half, value, True).tolist()) for half in halves]
        left_out = []
        for source, half in enumerate(np.where(self.first, 0, 1)):
            without = set(self._top(halves[half] - self.by_source[:, source], value, True).tolist())
            left_out.append(_jaccard(without, lists[1 - half]))
        return jackknifed(_jaccard(*lists), left_out, LEAST)

    def self_share(self, value: Any, coupled: bool) -> Jackknifed:
        """Share of i = j among the strongest; NaN where there are none."""
        total = self.by_source.sum(1)

        def share(sums: np.ndarray) -> float:
            top = self._top(sums, value, coupled)
            return float(self.same[top].mean()) if len(top) else float("nan")

        left_out = [share(total - self.by_source[:, source]) for source in range(self.by_source.shape[1])]
        return jackknifed(share(total), left_out, LEAST)
