"""Families of head-output features: "{token} is next by induction", selected by attribution and tested by behaviour.

A token induction head's *selection* is every feature with at least SHARE of its direct feature attribution from that
head, on discovery documents (sum of squares of what each head contributes where the feature fires). A feature's *token*
is the one that its direct path to the logits raises most. Each has a *matched* feature: at most CONTROL_SHARE from any
induction head of the layer, its density within a factor of two, and of those the one that raises the token most.
The *behaviour test* plants the tokens in repeated random passages: the feature should fire before the token's second
occurrence, and not before its first; both are counted, separately. What passes is the head's *family*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.architectures.known import architecture_of
from fra.attribution.examples import FEATURE, feature_example
from fra.attribution.head_outputs import HeadOutputs, Live, observe
from fra.core.weights import Model
from fra.dictionaries.encoder import head_output_layer
from fra.dictionaries.hooks import LayerHooks, head_output_layer_of
from fra.induction.status import HeadStatus, head_status
from fra.interventions.patching import effective_decoder, readout
from fra.stimuli import repeated
from fra.stimuli import sets as document_sets
from fra.stimuli.designs import RepeatedSets
from fra.targets.target import text_of
from fra.verdicts.claim import parse_head

if TYPE_CHECKING:
    from fra.measures.families.measures import Ablated
    from fra.targets.target import Target

SHARE = 0.60
CONTROL_SHARE = 0.10
LEAST_ROWS = 10
"""Rows of discovery documents on which a feature must fire: a floor on activity, never on effects."""
HITS_ABOVE = 0.60
FIRSTS_BELOW = 0.20
"""A feature that fires before one first occurrence in five does not wait for the repeat."""
REPEATS = 12
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
    controls: Int[np.ndarray, " n"]
    """The matched feature; -1 where none is left within a factor of two in density."""
    control_tokens: Int[np.ndarray, " n"]
    """The matched feature's own token; -1 without one."""


@dataclass(frozen=True)
class Behaviour:
    """What features did before tokens planted in repeated passages: one row for each (feature, token)."""

    features: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    repeats: Int[np.ndarray, " n"]
    hits: Int[np.ndarray, " n"]
    """Second occurrences before which it fired."""
    firsts: Int[np.ndarray, " n"]
    """First occurrences before which it fired: false fires."""
    sourced: Int[np.ndarray, " n"]
    """Hits whose strongest source, over all heads, is the earlier token."""
    others: Int[np.ndarray, " n"]
    """Second occurrences of *other* planted tokens before which it fired: a feature that says "something repeats"."""
    other_repeats: Int[np.ndarray, " n"]
    hits_by_document: Int[np.ndarray, "n n_docs"]
    sourced_by_document: Int[np.ndarray, "n n_docs"]

    @property
    def passes(self) -> Bool[np.ndarray, " n"]:
        """Fires before more than HITS_ABOVE of second occurrences, and before less than FIRSTS_BELOW of first ones."""
        n = np.maximum(self.repeats, 1)
        return np.asarray((self.repeats > 0) & (self.hits / n > HITS_ABOVE) & (self.firsts / n < FIRSTS_BELOW))


@torch.no_grad()
def token_effects(
    model: Model, directions: Float[Tensor, "n d_model"], at: Float[Tensor, " d_model"]
) -> Float[Tensor, "n d_vocab"]:
    """What each direction does to the logits on the direct path, per unit: the derivative of the final norm and the
    unembedding at residual `at`, by central differences, less its mean over the vocabulary.
    """
    step = 0.02 * at.norm() / directions.norm(dim=-1, keepdim=True).clamp(min=1e-12)

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
    model: Model, dictionary: Any, observed: HeadOutputs, heads: Sequence[int], at: Float[Tensor, " d_model"]
) -> dict[int, Selection]:
    """Selections of the layer's induction heads `heads` with their matches; `at`: a typical final residual."""
    shares, rows = attribution_shares(observed)
    layer = head_output_layer(dictionary)
    live = rows >= LEAST_ROWS
    chosen = {h: torch.nonzero(live & (shares[:, h] >= SHARE))[:, 0] for h in heads}
    pool = torch.nonzero(live & (shares[:, list(heads)].amax(1) < CONTROL_SHARE))[:, 0]
    W_O = model.blocks[layer].attn.W_O.detach().reshape(-1, at.shape[-1])
    directions = effective_decoder(dictionary).to(W_O) @ W_O

    def token(ids: Tensor) -> Tensor:
        parts = [token_effects(model, directions[part], at).argmax(-1) for part in torch.split(ids, _FEATURES_AT_ONCE)]
        return torch.cat(parts) if parts else ids

    tokens = {h: token(ids) for h, ids in chosen.items()}
    columns = torch.unique(torch.cat([*tokens.values(), pool[:0]]))
    raised, own = [], []
    for part in torch.split(pool, _FEATURES_AT_ONCE) if len(pool) else ():
        effects = token_effects(model, directions[part], at)
        raised.append((effects / effects.std(-1, keepdim=True))[:, columns])
        own.append(effects.argmax(-1))
    found = {}
    for h in heads:
        free = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
        controls, control_tokens = [], []
        for feature, top in zip(chosen[h].tolist(), tokens[h].tolist(), strict=True):
            near = free & (rows[pool] * 2 >= rows[feature]) & (rows[pool] <= 2 * rows[feature])
            if not bool(near.any()):
                controls.append(-1)
                control_tokens.append(-1)
                continue
            column = int((columns == top).nonzero()[0, 0])
            best = int(torch.cat(raised)[:, column].masked_fill(~near, -torch.inf).argmax())
            free[best] = False
            controls.append(int(pool[best]))
            control_tokens.append(int(torch.cat(own)[best]))
        found[h] = Selection(
            f"L{layer}H{h}",
            chosen[h].cpu().numpy(),
            tokens[h].cpu().numpy(),
            shares[chosen[h], h].cpu().numpy(),
            rows[chosen[h]].cpu().numpy(),
            np.asarray(controls, dtype=np.int64),
            np.asarray(control_tokens, dtype=np.int64),
        )
    return found


def behaviour(
    observed: HeadOutputs, documents: Sequence[repeated.Planted], pairs: Sequence[tuple[int, int]]
) -> Behaviour:
    """The behaviour test of (feature, token) pairs on planted documents that were observed, in their order."""
    features = torch.tensor([f for f, _ in pairs], dtype=torch.long, device=observed.z.device)
    ids, column = torch.unique(features, return_inverse=True)
    live = observed.live
    fires = torch.zeros(*observed.real.shape, len(ids), dtype=torch.bool, device=observed.z.device)
    at = torch.searchsorted(ids, live.feature).clamp(max=max(len(ids) - 1, 0))
    mine = ids[at] == live.feature if len(ids) else torch.zeros(len(live), dtype=torch.bool)
    fires[live.doc[mine], live.pos[mine], at[mine]] = True
    where: dict[int, list[tuple[int, int, int]]] = {}
    for number, planted in enumerate(documents):
        for token, index in planted.planted.items():
            where.setdefault(token, []).append((number, planted.document.period, index))
    every = [
        (n, p.document.period + index, token) for n, p in enumerate(documents) for token, index in p.planted.items()
    ]
    at_second = torch.tensor(every, device=observed.z.device).reshape(-1, 3)
    fired = fires[at_second[:, 0], at_second[:, 1]]  # [n_planted, n_ids]
    repeats, hits, firsts, others, other_repeats = np.zeros((5, len(pairs)), dtype=np.int64)
    hits_by_document, sourced = np.zeros((2, len(pairs), len(documents)), dtype=np.int64)
    entries = []
    for row, (feature, token) in enumerate(pairs):
        other = at_second[:, 2] != token
        others[row], other_repeats[row] = int(fired[other, column[row]].sum()), int(other.sum())
        for number, period, index in where.get(token, []):
            second, first = (bool(fires[number, at, column[row]]) for at in (period + index, index))
            repeats[row] += 1
            hits[row] += second
            firsts[row] += first
            if second:
                hits_by_document[row, number] += 1
                entries.append((number, period + index, feature, row, index + 1))
    if entries:
        doc, pos, which, at_row, key = torch.tensor(entries, device=observed.z.device).unbind(1)
        top, _ = observed.top_sources(Live(doc, pos, which, torch.ones(len(doc), device=doc.device)))
        right = (top[:, 0] == key).cpu().numpy()
        np.add.at(sourced, (at_row.cpu().numpy(), doc.cpu().numpy()), right.astype(np.int64))
    return Behaviour(
        features=features.cpu().numpy(),
        tokens=np.asarray([token for _, token in pairs], dtype=np.int64),
        repeats=repeats,
        hits=hits,
        firsts=firsts,
        sourced=sourced.sum(1),
        others=others,
        other_repeats=other_repeats,
        hits_by_document=hits_by_document,
        sourced_by_document=sourced,
    )


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
    ablated: dict[int, tuple[Ablated, Ablated]] = field(default_factory=dict, init=False, repr=False)
    """By head, what ablating its family did, and its matches: two claims ask for it, and it is measured once
    (`fra.measures.families.d09_d10_paths`).
    """

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
        some = self.discovery.tokens[:16].to(self.found.z.device)
        with torch.no_grad():
            resid = self.model.run_with_cache(some, names_filter=[last])[1][last]
        typical = resid[:, 1:][self.found.real[:16, 1:]].mean(0)
        return select(self.model, self.dictionary, self.found, self.heads, typical)

    @cached_property
    def behaviours(self) -> dict[int, tuple[Behaviour, Behaviour, int]]:
        """By head: the selection on its own tokens; its matches, each on its own token and on that of its feature, in
        turn; and the number of planted documents.
        """
        pairs: dict[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
        for h, s in self.selections.items():
            own = list(zip(s.features.tolist(), s.tokens.tolist(), strict=True))
            rows = zip(s.controls.tolist(), s.control_tokens.tolist(), s.tokens.tolist(), strict=True)
            both = [(c, t) for c, mine, theirs in rows if c >= 0 for t in (mine, theirs)]
            pairs[h] = own, both
        special = {int(i) for i in self.target.tokenizer.all_special_ids}
        tokens = sorted({t for own, both in pairs.values() for _, t in (*own, *both)} - special)
        if not tokens:
            return {}
        planted = repeated.repeated_planted(
            tokens,
            self.pool,
            min(int(self.model.cfg.n_ctx), document_sets.LONGEST_CONTEXT),
            self.target.bos,
            (self.target.name, "repeated_planted", str(self.layer)),
            repeats=REPEATS,
        )
        seen = observe(self.model, self.dictionary, [p.document.tokens for p in planted])
        return {
            h: (behaviour(seen, planted, own), behaviour(seen, planted, both), len(planted))
            for h, (own, both) in pairs.items()
        }

    def picture(self, feature: int, heads: Mapping[str, int | None], at: Live | None = None) -> dict[str, Any]:
        """{FEATURE: the feature where it fires most on measurement documents, with its source through some heads}
        (`fra.attribution.examples.feature_example`); empty where it never fires there.
        """
        text = text_of(self.target.tokenizer)
        found = feature_example(self.observed, self.dictionary, self.documents.tokens, feature, text, heads, at)
        return {} if found is None else {FEATURE: found}

    def family(self, head: int) -> Int[np.ndarray, " n"]:
        """Indices into the head's selection of the features that pass the behaviour test."""
        if head not in self.behaviours:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(self.behaviours[head][0].passes)


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

    @property
    def heads(self) -> list[str]:
        """Induction heads whose layer has a head-output dictionary."""
        return [f"L{n}H{h}" for n, layer in sorted(self.layers.items()) for h in layer.heads]

    def of(self, head: str) -> tuple[LayerFamilies, int]:
        """The layer of an induction head, and its number there."""
        layer, number = parse_head(head)
        return self.layers[layer], number


def survey(target: Target, progress: Callable[[str], None] = lambda _: None) -> Families:
    """Which heads are induction heads on `repeated_random` (status documents), and their layers with a head-output
    dictionary; `repeated_natural` gives discovery documents and, from its other two sets, those of measurement.
    """
    progress("induction heads of head-output dictionaries")
    model, design = target.model, RepeatedSets()
    status_documents = document_sets.documents(target, "repeated_random", design)["status"]
    status = head_status(model, status_documents, target=target.name, stimulus="repeated_random")
    dictionaries = {head_output_layer_of(hook) for hook in target.dictionaries} - {None}
    tih = [parse_head(name) for name, s in status.items() if s.status == "TIH"]
    layers = sorted({layer for layer, _ in tih if layer in dictionaries})
    pool = repeated.token_pool(
        document_sets.mean_prediction(model, target), [int(i) for i in target.tokenizer.all_special_ids]
    )
    if not layers:
        return Families(target.name, status, {}, pool, target.known_tih, progress)
    sets = document_sets.documents(target, "repeated_natural", design)
    documents = repeated.join(sets["confirmation"], sets["sets"])
    made = {
        n: LayerFamilies(target, n, [h for layer, h in tih if layer == n], sets["discovery"], documents, pool)
        for n in layers
    }
    return Families(target.name, status, made, pool, target.known_tih, progress)


def whole(batch: repeated.Batch) -> list[Int[Tensor, " pos"]]:
    """The batch's documents without their padding."""
    return [row[: 2 * int(p) + 1] for row, p in zip(batch.tokens, batch.periods, strict=True)]
