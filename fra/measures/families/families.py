"""Families of head-output features: "{token} is next by induction", selected by attribution and tested by behaviour.

A token induction head's *selection* is every feature that draws most of its direct feature attribution from that head,
on discovery documents (sum of squares of what each head contributes where the feature fires). A feature's *token* is
the one that its direct path to the logits raises most. Each has *matched* features: next to nothing from any induction
head of the layer, a like density, and of those the ones that raise the token most (`FamilySelection` has the numbers).
The *behaviour test* plants the tokens in repeated random passages, in two halves (`fra.attribution.planted`).
What passes in the first half is the head's *family*; every number of it is taken on other documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.known import architecture_of
from fra.attribution.examples import FEATURE, feature_example
from fra.attribution.head_outputs import HeadOutputs, Live, observe
from fra.attribution.planted import PlantedHalf, behaviour, observe_planted
from fra.core.weights import Model
from fra.dictionaries.encoder import head_output_layer
from fra.dictionaries.hooks import LayerHooks, head_output_layer_of
from fra.dictionaries.texts import text_of
from fra.errors import FraError
from fra.induction.designs import TokenInduction
from fra.induction.status import HeadStatus, head_status
from fra.interventions.patching import effective_decoder, readout
from fra.measures.families.designs import AblatedPairs, FamilySelection, NeedingFeatures
from fra.stimuli import repeated
from fra.stimuli import sets as document_sets
from fra.stimuli.designs import PlantedTokens, RepeatedSets
from fra.stimuli.padding import Texts
from fra.verdicts.claim import Claim, parse_head

if TYPE_CHECKING:
    from fra.measures.families.measures import Ablated
    from fra.targets.target import Target

_FEATURES_AT_ONCE = 256


@dataclass(frozen=True)
class Selection:
    """The features of one head and their matches; arrays of one length, sorted by feature."""

    head: str
    features: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    """What each raises most on the direct path."""
    shares: Float[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]
    """Discovery rows on which it fires."""
    matches: tuple[Int[np.ndarray, " _n_matches"], ...]
    """The matched features of each, those that raise its token most first; none where no density is like its own."""
    token_of: Mapping[int, int]
    """The matched features' own tokens."""

    def matched(self, which: Int[np.ndarray, " n_some"]) -> Int[np.ndarray, " n_distinct"]:
        """All matched features of some of the features (indices), each once."""
        return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(self.matches[k] for k in which.tolist())]))


@torch.no_grad()
def token_effects(
    model: Model, directions: Float[Tensor, "n d_model"], at: Float[Tensor, " d_model"], size: float
) -> Float[Tensor, "n d_vocab"]:
    """What each direction does to the logits on the direct path, per unit: the derivative of the final norm and the
    unembedding at residual `at`, by central differences, less its mean over the vocabulary. size: of the difference, as
    a share of the residual's norm.
    """
    step = size * at.norm() / directions.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def logits(sign: int) -> Tensor:
        return readout(model, (at + sign * step * directions)[None])[0].double()

    found = (logits(1) - logits(-1)) / (2 * step.double())
    centred: Tensor = found - found.mean(-1, keepdim=True)
    return centred


def attribution_shares(observed: HeadOutputs) -> tuple[Float[Tensor, "d_sae n_heads"], Int[Tensor, " d_sae"]]:
    """Each head's share of a feature's sum of squared contributions where it fires, BOS left out; and on how many rows
    it fires. Shares of a feature that never fires are NaN.
    """
    live = observed.live.where(observed.live.pos > 0)
    d_sae = observed.encoder.d_sae
    squares = observed.z.new_zeros(d_sae, observed.n_heads).double()
    squares.index_add_(0, live.feature, observed.entries_by_head(live).double().square())
    return squares / squares.sum(1, keepdim=True), torch.bincount(live.feature, minlength=d_sae)


@torch.no_grad()
def select(
    model: Model,
    dictionary: Any,
    observed: HeadOutputs,
    heads: Sequence[int],
    at: Float[Tensor, " d_model"],
    design: FamilySelection,
) -> dict[int, Selection]:
    """Selections of the layer's induction heads `heads` with their matches; `at`: a typical final residual."""
    shares, rows = attribution_shares(observed)
    layer = head_output_layer(dictionary)
    live = rows >= design.least_rows
    chosen = {h: torch.nonzero(live & (shares[:, h] >= design.share))[:, 0] for h in heads}
    pool = torch.nonzero(live & (shares[:, list(heads)].amax(1) < design.control_share))[:, 0]
    W_O = model.blocks[layer].attn.W_O.detach().reshape(-1, at.shape[-1])
    directions = effective_decoder(dictionary).to(W_O) @ W_O

    def effects(ids: Tensor) -> Iterator[Tensor]:
        for part in torch.split(ids, _FEATURES_AT_ONCE) if len(ids) else ():
            yield token_effects(model, directions[part], at, design.step)

    tokens = {h: torch.cat([ids[:0], *(part.argmax(-1) for part in effects(ids))]) for h, ids in chosen.items()}
    columns = torch.unique(torch.cat([*tokens.values(), pool[:0]]))
    raised, own = [columns.new_zeros(0, len(columns)).double()], [pool[:0]]
    for part in effects(pool):
        raised.append((part / part.std(-1, keepdim=True))[:, columns])
        own.append(part.argmax(-1))
    by_token, own_token = torch.cat(raised), torch.cat(own)
    found = {}
    for h in heads:
        matches = []
        for feature, top in zip(chosen[h].tolist(), tokens[h].tolist(), strict=True):
            low, high = rows[feature] / design.density_factor, rows[feature] * design.density_factor
            near = torch.nonzero((rows[pool] >= low) & (rows[pool] <= high))[:, 0]
            column = int(torch.searchsorted(columns, top))
            best = by_token[near, column].argsort(descending=True, stable=True)[: design.matches]
            matches.append(near[best])
        every = torch.unique(torch.cat([pool[:0], *matches]))
        found[h] = Selection(
            f"L{layer}H{h}",
            chosen[h].cpu().numpy(),
            tokens[h].cpu().numpy(),
            shares[chosen[h], h].cpu().numpy(),
            rows[chosen[h]].cpu().numpy(),
            tuple(pool[some].cpu().numpy() for some in matches),
            dict(zip(pool[every].tolist(), own_token[every].tolist(), strict=True)),
        )
    return found


@dataclass
class LayerFamilies:
    """One layer with a head-output dictionary and induction heads, on discovery and measurement documents."""

    target: Target
    layer: int
    heads: list[int]
    """The layer's induction heads."""
    discovery: repeated.Batch
    documents: repeated.Batch
    """For every quoted number: none of them chose anything."""
    pool: Int[np.ndarray, " n_pool"]
    selecting: FamilySelection = field(default_factory=FamilySelection)
    planting: PlantedTokens = field(default_factory=PlantedTokens)
    losses: dict[tuple[int | None, int | None, NeedingFeatures], Tensor] = field(default_factory=dict, repr=False)
    """Losses on natural documents with a head of a layer put out, or none, for all who ask for them
    (`d13_polysemantic`); one for all layers.
    """
    ablated: dict[tuple[str, AblatedPairs], tuple[Ablated, Ablated]] = field(
        default_factory=dict, init=False, repr=False
    )
    """By head, what ablating its family did, and its matches: two claims ask for it, and it is measured once
    (`fra.measures.families.d09_d10_paths`).
    """
    _natural: dict[NeedingFeatures, tuple[Texts, HeadOutputs]] = field(default_factory=dict, init=False, repr=False)

    @property
    def model(self) -> Model:
        """The target's."""
        return self.target.model

    @cached_property
    def dictionary(self) -> Any:
        """At the layer's hook_z."""
        return self.target.dictionaries[LayerHooks(self.layer).z]

    @cached_property
    def found(self) -> HeadOutputs:
        """Discovery documents."""
        return observe(self.model, self.dictionary, whole(self.discovery))

    @cached_property
    def observed(self) -> HeadOutputs:
        """Measurement documents."""
        return observe(self.model, self.dictionary, whole(self.documents))

    @cached_property
    def selections(self) -> dict[int, Selection]:
        """By head."""
        last = LayerHooks(architecture_of(self.model).n_layers - 1).resid_post
        n = self.selecting.typical
        some = self.discovery.tokens[:n].to(self.found.z.device)
        with torch.no_grad():
            resid = self.model.run_with_cache(some, names_filter=[last])[1][last]
        typical = resid[:, 1:][self.found.real[:n, 1:]].mean(0)
        return select(self.model, self.dictionary, self.found, self.heads, typical, self.selecting)

    @cached_property
    def choosing(self) -> PlantedHalf | None:
        """The half of the planted documents in which families and scales are chosen: the selections' own tokens. None
        where there is nothing to plant.
        """
        own = {t for s in self.selections.values() for t in s.tokens.tolist()}
        return self.plant("choosing", own)

    @cached_property
    def measured(self) -> PlantedHalf | None:
        """The other half, where every number is taken: the selections' tokens and those of their matches."""
        own = {t for s in self.selections.values() for t in (*s.tokens.tolist(), *s.token_of.values())}
        return self.plant("measured", own)

    def plant(self, half: str, tokens: set[int]) -> PlantedHalf | None:
        """Documents in which these tokens are planted, special ones left out; None where none is left."""
        tokens = tokens - {int(i) for i in self.target.tokenizer.all_special_ids}
        if not tokens:
            return None
        documents = repeated.repeated_planted(
            sorted(tokens),
            self.pool,
            min(int(self.model.cfg.n_ctx), self.planting.longest),
            self.target.bos,
            (self.target.name, "repeated_planted", half, str(self.layer)),
            repeats=self.planting.repeats,
        )
        own = {
            f: t for s in self.selections.values() for f, t in zip(s.features.tolist(), s.tokens.tolist(), strict=True)
        }
        others = {f for s in self.selections.values() for f in s.token_of}
        return observe_planted(self.model, self.dictionary, documents, own, others)

    def texts_of(
        self, design: NeedingFeatures, made: Callable[[LayerFamilies, NeedingFeatures], Texts]
    ) -> tuple[Texts, HeadOutputs]:
        """Natural documents, and the layer's head outputs on them; read once for all heads of the layer."""
        if design not in self._natural:
            texts = made(self, design)
            self._natural[design] = texts, observe(self.model, self.dictionary, texts.documents())
        return self._natural[design]

    def picture(self, feature: int, heads: Mapping[str, int | None], at: Live | None = None) -> dict[str, Any]:
        """{FEATURE: the feature where it fires most on measurement documents, with its source through some heads}
        (`fra.attribution.examples.feature_example`); empty where it never fires there.
        """
        text = text_of(self.target.tokenizer)
        found = feature_example(self.observed, self.dictionary, self.documents.tokens, feature, text, heads, at)
        return {} if found is None else {FEATURE: found}

    def family(self, head: int) -> Int[np.ndarray, " n"]:
        """Indices into the head's selection of the features that pass the behaviour test, in the half of the planted
        documents where families are chosen.
        """
        if self.choosing is None:
            return np.zeros(0, dtype=np.int64)
        s = self.selections[head]
        return np.flatnonzero(behaviour(self.choosing, s.features, s.tokens).passes(self.planting))


@dataclass(frozen=True)
class Families:
    """A target's induction heads and the layers in which they have families; measured as far as it is asked for."""

    target: str
    status: Mapping[str, HeadStatus]
    layers: Mapping[int, LayerFamilies]
    pool: Int[np.ndarray, " n_pool"]
    """Tokens for random passages."""
    known_tih: Sequence[str] = ()
    progress: Callable[[str], None] = field(default=lambda _: None)
    stimulus: str = "repeated_random"
    """What the status was measured on."""
    controls: Mapping[str, float] = field(default_factory=dict)
    """None: a family is looked for in any layer with an induction head."""
    designs: tuple[Any, ...] = ()
    """What the heads and layers were surveyed by."""

    @property
    def heads(self) -> list[str]:
        """Induction heads whose layer has a head-output dictionary."""
        return [f"L{n}H{h}" for n, layer in sorted(self.layers.items()) for h in layer.heads]

    def registered_by(self, claim: Claim) -> None:
        """Raises FraError where the claim registers another design than the one that was used."""
        for design in self.designs:
            if claim.designed(type(design)) != design:
                raise FraError(f"{claim.id} registers another {type(design).__name__} than families are surveyed by")

    def of(self, head: str) -> tuple[LayerFamilies, int]:
        """The layer of an induction head, and its number there."""
        layer, number = parse_head(head)
        return self.layers[layer], number


def survey(
    target: Target,
    progress: Callable[[str], None] = lambda _: None,
    *,
    selecting: FamilySelection | None = None,
    planting: PlantedTokens | None = None,
    sets: RepeatedSets | None = None,
    induction: TokenInduction | None = None,
) -> Families:
    """Which heads are induction heads on `repeated_random` (status documents), and their layers with a head-output
    dictionary; `repeated_natural` gives discovery documents and, from its other two sets, those of measurement.
    """
    progress("induction heads of head-output dictionaries")
    model, sizes, tih = target.model, sets or RepeatedSets(), induction or TokenInduction()
    selecting, planting = selecting or FamilySelection(), planting or PlantedTokens()
    designs = (tih, sizes, selecting, planting)
    status_documents = document_sets.documents(target, "repeated_random", sizes)["status"]
    status = head_status(model, status_documents, target=target.name, stimulus="repeated_random", design=tih)
    dictionaries = {head_output_layer_of(hook) for hook in target.dictionaries} - {None}
    heads = [parse_head(name) for name, s in status.items() if s.status == "TIH"]
    layers = sorted({layer for layer, _ in heads if layer in dictionaries})
    pool = repeated.token_pool(
        document_sets.mean_prediction(model, target), [int(i) for i in target.tokenizer.all_special_ids]
    )
    if not layers:
        return Families(target.name, status, {}, pool, target.known_tih, progress, designs=designs)
    cut = document_sets.documents(target, "repeated_natural", sizes)
    documents = repeated.join(cut["confirmation"], cut["sets"])
    losses: dict[tuple[int | None, int | None, NeedingFeatures], Tensor] = {}
    made = {
        n: LayerFamilies(target, n, own, cut["discovery"], documents, pool, selecting, planting, losses)
        for n, own in ((n, [h for layer, h in heads if layer == n]) for n in layers)
    }
    return Families(target.name, status, made, pool, target.known_tih, progress, designs=designs)


def whole(batch: repeated.Batch) -> list[Int[Tensor, " pos"]]:
    """The batch's documents without their padding."""
    return [row[: 2 * int(p) + 1] for row, p in zip(batch.tokens, batch.periods, strict=True)]
