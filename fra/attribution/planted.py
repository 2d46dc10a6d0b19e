"""Features before tokens that were planted in repeated random passages: what fires there, how strongly, and from where.

A planted token stands once in each copy of a passage. The row before an occurrence is the one on which it is predicted:
before the second one, token induction can; before the first, nothing can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.attribution.head_outputs import Live, observe
from fra.core.weights import Model
from fra.stimuli import repeated
from fra.stimuli.designs import PlantedTokens
from fra.stimuli.padding import Texts

_DOCUMENTS_AT_ONCE = 32


@dataclass(frozen=True)
class PlantedHalf:
    """One half of the planted documents, and some features on it."""

    documents: tuple[repeated.PlantedDocument, ...]
    texts: Texts
    features: Int[np.ndarray, " n_features"]
    """Those that were looked at, sorted."""
    live: Live
    """Where they fire, BOS left out."""
    source: Int[Tensor, " n_live"]
    """Of what fires before the second occurrence of the feature's own token, the position that contributes most over
    all heads; -1 elsewhere.
    """

    @cached_property
    def before(self) -> dict[str, Int[np.ndarray, "n_docs pos"]]:
        """The planted token whose "first" or "second" occurrence is next, on the row before it; -1 elsewhere."""
        shape = tuple(self.texts.tokens.shape)
        found = {name: np.full(shape, -1, dtype=np.int64) for name in ("first", "second")}
        for number, planted in enumerate(self.documents):
            for token, index in planted.planted.items():
                found["first"][number, index] = token
                found["second"][number, planted.document.period + index] = token
        return found

    @cached_property
    def seconds(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """(document, row, token) of every second occurrence, by document and row."""
        doc, pos = np.nonzero(self.before["second"] != -1)
        return doc, pos, self.before["second"][doc, pos]

    @property
    def sources(self) -> tuple[str, ...]:
        """One of each document."""
        return self.texts.sources

    def holding(self, token: int) -> Int[np.ndarray, " n_some"]:
        """Documents in which the token was planted, ascending."""
        doc, _, tokens = self.seconds
        return np.asarray(doc[tokens == token])

    def values(
        self,
        doc: Int[np.ndarray, " n"],
        pos: Int[np.ndarray, " n"],
        features: Int[np.ndarray, " n_some"],
    ) -> Float[np.ndarray, "n n_some"]:
        """Activations of some of the features on some rows; 0 where they are silent."""
        shape = self.texts.tokens.shape
        row_of = np.full(shape, -1, dtype=np.int64)
        row_of[doc, pos] = np.arange(len(doc))
        column_of = np.full(max(int(self.features.max(initial=0)), int(features.max(initial=0))) + 1, -1)
        column_of[features] = np.arange(len(features))
        at = {name: getattr(self.live, name).cpu().numpy() for name in ("doc", "pos", "feature", "value")}
        row, column = row_of[at["doc"], at["pos"]], column_of[at["feature"]]
        there = (row != -1) & (column != -1)
        found = np.zeros((len(doc), len(features)))
        found[row[there], column[there]] = at["value"][there]
        return found

    def before_seconds(self, features: Int[np.ndarray, " n_some"]) -> Float[np.ndarray, "n_seconds n_some"]:
        """Activations before every second occurrence."""
        doc, pos, _ = self.seconds
        return self.values(doc, pos, features)


@torch.no_grad()
def observe_planted(
    model: Model,
    dictionary: Any,
    documents: Sequence[repeated.PlantedDocument],
    own: Mapping[int, int],
    others: Iterable[int],
) -> PlantedHalf:
    """Runs planted documents and keeps what some features do there.

    own: features and their tokens, whose sources are kept; others: further features.
    """
    texts = Texts.of([p.document.tokens for p in documents], [p.document.source for p in documents])
    wanted = np.asarray(sorted({*own, *others}), dtype=np.int64)
    tokens_of = torch.full((int(dictionary.cfg.d_sae),), -1, dtype=torch.long)
    tokens_of[torch.tensor(list(own), dtype=torch.long)] = torch.tensor(list(own.values()), dtype=torch.long)
    keep = torch.zeros(int(dictionary.cfg.d_sae), dtype=torch.bool)
    keep[torch.from_numpy(wanted)] = True
    empty = torch.zeros(0, dtype=torch.long)
    bare = PlantedHalf(tuple(documents), texts, wanted, Live(empty, empty, empty, empty.float()), empty)
    second = torch.from_numpy(bare.before["second"])
    parts = []
    rows = texts.documents()
    for some in torch.split(torch.argsort(torch.tensor(texts.lengths), stable=True), _DOCUMENTS_AT_ONCE):
        seen = observe(model, dictionary, [rows[n] for n in some.tolist()])
        home = seen.z.device
        live = seen.live.where(keep.to(home)[seen.live.feature] & (seen.live.pos > 0))
        number = some.to(home)[live.doc]
        here = second.to(home)[number, live.pos]
        hit = (here != -1) & (here == tokens_of.to(home)[live.feature])
        source = torch.full_like(live.pos, -1)
        source[hit] = seen.top_sources(live.where(hit))[0][:, 0]
        parts.append((number, live.pos, live.feature, live.value, source))
    doc, *rest = (torch.cat(each) for each in zip(*parts, strict=True))
    order = torch.argsort(doc, stable=True)
    pos, feature, value, source = (each[order] for each in rest)
    return PlantedHalf(tuple(documents), texts, wanted, Live(doc[order], pos, feature, value), source)


@dataclass(frozen=True)
class Behaviour:
    """What features did before planted tokens: one row for each (feature, token)."""

    features: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    repeats: Int[np.ndarray, " n"]
    """Second occurrences."""
    hits: Int[np.ndarray, " n"]
    """Of them, those before which it fired."""
    firsts: Int[np.ndarray, " n"]
    """First occurrences before which it fired: false fires."""
    hits_by_document: Int[np.ndarray, "n n_docs"]
    sourced_by_document: Int[np.ndarray, "n n_docs"]
    """Hits whose strongest source is the earlier token; of features on their own token."""

    def passes(self, design: PlantedTokens) -> Bool[np.ndarray, " n"]:
        """Which fire before enough second occurrences and before few first ones."""
        n = np.maximum(self.repeats, 1)
        hits, firsts = self.hits / n > design.hits_above, self.firsts / n < design.firsts_below
        return np.asarray((self.repeats > 0) & hits & firsts)


def behaviour(planting: PlantedHalf, features: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"]) -> Behaviour:
    """The behaviour test of (feature, token) pairs, which are distinct, on one half of the planted documents."""
    live = planting.live
    doc, pos, feature = (part.cpu().numpy() for part in (live.doc, live.pos, live.feature))
    by_document = np.zeros((3, len(features), len(planting.documents)), dtype=np.int64)
    scale = 1 + max(int(tokens.max(initial=0)), *(int(part.max(initial=0)) for part in planting.before.values()))
    pairs = features.astype(np.int64) * scale + tokens
    order = np.argsort(pairs)

    def count(into: Int[np.ndarray, "n n_docs"], here: Int[np.ndarray, " n_some"], some: np.ndarray) -> None:
        key = feature[some] * scale + here[some]
        at = np.minimum(np.searchsorted(pairs[order], key), max(len(pairs) - 1, 0))
        mine = pairs[order][at] == key if len(pairs) else np.zeros(len(key), dtype=bool)
        np.add.at(into, (order[at[mine]], doc[some][mine]), 1)

    second, first = (planting.before[name][doc, pos] for name in ("second", "first"))
    count(by_document[0], second, np.flatnonzero(second != -1))
    count(by_document[1], first, np.flatnonzero(first != -1))
    periods = np.asarray([p.document.period for p in planting.documents])
    key_of = pos - periods[doc] + 1  # the earlier occurrence of the token that comes next
    count(by_document[2], second, np.flatnonzero((second != -1) & (planting.source.cpu().numpy() == key_of)))
    planted = planting.seconds[2]
    return Behaviour(
        features=features,
        tokens=tokens,
        repeats=np.asarray([int((planted == t).sum()) for t in tokens.tolist()], dtype=np.int64),
        hits=by_document[0].sum(1),
        firsts=by_document[1].sum(1),
        hits_by_document=by_document[0],
        sourced_by_document=by_document[2],
    )


def scales(
    choosing: PlantedHalf, features: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Each feature's scale: its median activation before second occurrences of its own token, silence counted as 0.

    choosing: the half in which families are chosen, never the one that is measured.
    """
    values = choosing.before_seconds(features)
    planted = choosing.seconds[2]
    own = [values[planted == token, k] for k, token in enumerate(tokens.tolist())]
    return np.asarray([float(np.median(part)) if len(part) else float("nan") for part in own])
