"""Q22: one token of a document exchanged for another, and what that truly does to rows of attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.core.frozen import FrozenLayer, Side
from fra.dictionaries.tokens import TokenDictionary
from fra.measures.scores.layer import CarriedLayer, observe
from fra.stimuli.padding import Texts

READINGS = ("added", "put in place")


@dataclass(frozen=True)
class Swaps:
    """Documents with one token exchanged, several a document."""

    texts: Texts
    doc: Int[Tensor, " n"]
    """Which of the texts."""
    at: Int[Tensor, " n"]
    before: Int[Tensor, "n pos"]
    after: Int[Tensor, "n pos"]
    lengths: Int[Tensor, " n"]
    stride: int
    """Of the rows behind s + 1 so many are passed over for one that is looked at, and counts for them."""

    @cached_property
    def weight(self) -> Int[Tensor, "n pos"]:
        """How often a row counts: rows s and s + 1 once, every `stride`-th of the later ones `stride` times; 0 where
        nothing can change, and behind the document's end. Which of the later rows: in turn from swap to swap.
        """
        behind = torch.arange(self.before.shape[1], device=self.at.device) - self.at[:, None]
        turn = torch.arange(len(self.at), device=self.at.device)[:, None]
        later = self.stride * ((behind >= 2) & ((behind - 2 - turn) % self.stride == 0)).long()
        real = behind + self.at[:, None] < self.lengths[:, None]
        return (((behind == 0) | (behind == 1)).long() + later) * real

    @property
    def rows(self) -> Bool[Tensor, "n pos"]:
        """Rows that are looked at."""
        return self.weight > 0

    @cached_property
    def changed(self) -> tuple[Tensor, Tensor, Tensor]:
        """(swap, query, key) of the scores that predictors change: rows and columns s and s + 1."""
        pos = torch.arange(self.before.shape[1], device=self.at.device)
        near = (pos == self.at[:, None]) | (pos == self.at[:, None] + 1)
        causal = pos[:, None] >= pos
        where = (near[:, :, None] | near[:, None, :]) & causal & self.rows[:, :, None]
        swap, query, key = where.nonzero(as_tuple=True)
        return swap, query, key


def exchanged(
    y: Float[Tensor, "docs pos d_model"], expected: TokenDictionary, swaps: Swaps
) -> Float[Tensor, "n two d_model"]:
    """Inputs at s and s + 1 after the swap: what stood there, and what the swap adds to it as tokens tell."""
    every = torch.arange(len(swaps.at), device=y.device)[:, None]
    near = torch.stack((swaps.at, swaps.at + 1), dim=1)
    added = expected.predict(swaps.after)[every, near] - expected.predict(swaps.before)[every, near]
    return y[swaps.doc[:, None], near] + added


@dataclass(frozen=True)
class Truth:
    """One head in the rows that can change: its scores and pattern before the swap, and the pattern's change."""

    scores: Float[Tensor, "rows pos"]
    pattern: Float[Tensor, "rows pos"]
    change: Float[Tensor, "rows pos"]


@dataclass(frozen=True)
class SwapScene:
    """Swaps at one layer: the layer as it was, patterns after the swap, and inputs as predictors take them to be."""

    swaps: Swaps
    frozen: FrozenLayer
    """Of the documents as they were, the input divided by the norm's scale."""
    after: Float[Tensor, "n n_heads pos pos"]
    inputs: dict[str, tuple[Tensor, Tensor]]
    """Before the swap [docs, pos, d_model], and after it at s and s + 1 [n, 2, d_model]."""

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """(swap, position) of the rows that can change, and the number of each, -1 for others."""
        swap, pos = self.swaps.rows.nonzero(as_tuple=True)
        number = torch.full_like(self.swaps.before, -1)
        number[swap, pos] = torch.arange(len(swap), device=swap.device)
        return swap, pos, number

    @cached_property
    def _sides(self) -> dict[Side, tuple[Tensor, Tensor]]:
        """For the places that change, where the query's and the key's vector stand before and after the swap: among all
        positions of all documents, followed by two for each swap.
        """
        swap, query, key = self.swaps.changed
        docs, pos, _ = self.frozen.x.shape
        found: dict[Side, tuple[Tensor, Tensor]] = {}
        sides: tuple[tuple[Side, Tensor], ...] = (("query", query), ("key", key))
        for side, where in sides:
            before = self.swaps.doc[swap] * pos + where
            beside = where - self.swaps.at[swap]
            found[side] = before, torch.where((beside == 0) | (beside == 1), docs * pos + 2 * swap + beside, before)
        return found

    def predicted(self, name: str, head: int) -> tuple[Tensor, Tensor]:
        """Scores before and after the swap at the places that change, as a predictor with inputs sees them."""
        docs, pos, _ = self.frozen.x.shape
        before, after = self.inputs[name]
        inputs = torch.cat((before.flatten(0, 1), after.flatten(0, 1)))
        swapped = (self.swaps.doc * pos + self.swaps.at)[:, None] + torch.arange(2, device=inputs.device)
        rows = torch.cat((torch.arange(docs * pos, device=inputs.device), swapped.flatten()))
        vectors = {}
        for side in self._sides:
            W, b = self.frozen.weights(side, head)
            linear = self.frozen.place(side, head, inputs @ W, rows)
            vectors[side] = linear + self.frozen.place(side, head, b.expand(len(rows), -1), rows, scaled=False)
        (q_before, q_after), (k_before, k_after) = self._sides["query"], self._sides["key"]
        q, k = vectors["query"] * self.frozen.scale, vectors["key"]
        return torch.linalg.vecdot(q[q_before], k[k_before]), torch.linalg.vecdot(q[q_after], k[k_after])

    def truth(self, head: int) -> Truth:
        """What there is to predict at one head."""
        swap, pos, _ = self._rows
        frozen, doc, mask = self.frozen, self.swaps.doc[swap], self.frozen.mask[pos]
        pattern = frozen.pattern[doc, head, pos].masked_fill_(~mask, 0.0)
        change = (self.after[swap, head, pos] - pattern).masked_fill_(~mask, 0.0)
        return Truth(frozen.scores(head)[doc, pos], pattern, change)

    def only(self, swap: int) -> SwapScene:
        """One of the swaps."""
        s, one = self.swaps, slice(swap, swap + 1)
        alone = Swaps(s.texts, *(part[one] for part in (s.doc, s.at, s.before, s.after, s.lengths)), s.stride)
        inputs = {name: (before, after[one]) for name, (before, after) in self.inputs.items()}
        return SwapScene(alone, self.frozen, self.after[one], inputs)

    def responses(
        self, truth: Truth, before: Tensor, after: Tensor, *, centred: bool
    ) -> list[Float[np.ndarray, "3 n"]]:
        """For each of READINGS: total, cross and square of true and predicted change, summed over each swap.

        centred: predictions are of capped, row-centred scores.
        """
        swap, pos, _ = self._rows
        weight = self.swaps.weight[swap, pos]
        found = []
        for predicted in self.changes(truth, before, after, centred=centred):
            pairs = ((truth.change, truth.change), (truth.change, predicted), (predicted, predicted))
            by_row = torch.stack([torch.linalg.vecdot(a, b) for a, b in pairs]).double() * weight
            sums = by_row.new_zeros(3, len(self.swaps.at)).index_add_(1, swap, by_row)
            found.append(np.asarray(sums.cpu()))
        return found

    def changes(
        self, truth: Truth, before: Tensor, after: Tensor, *, centred: bool
    ) -> Iterator[Float[Tensor, "rows pos"]]:
        """For each of READINGS: the predicted change of every row's pattern."""
        _, pos, number = self._rows
        hidden = ~self.frozen.mask[pos]
        own = truth.scores.masked_fill(hidden, 0.0)
        if centred:
            own = self.frozen.cap(own)
            own = own - own.sum(-1, keepdim=True) / (~hidden).sum(-1, keepdim=True)  # masked ones: again below
        of, query, key = self.swaps.changed
        row = number[of, query]
        for reading in READINGS:
            scores = own.clone()
            scores[row, key] = own[row, key] + after - before if reading == "added" else after
            scores = (scores if centred else self.frozen.cap(scores)).masked_fill_(hidden, -torch.inf)
            yield scores.softmax(-1) - truth.pattern


def scene(
    layer: CarriedLayer, frozen: FrozenLayer, own_error: Tensor, swaps: Swaps, tables: dict[str, TokenDictionary]
) -> SwapScene:
    """The swaps run through the model, and every predictor's inputs. own_error: the dictionary's, of frozen.x."""
    after = observe(layer.model, swaps.after, layer.layer, layer.hook_name, ("pattern",))["pattern"].to(frozen.x)
    sigma = frozen.sigma[..., None]
    y, known = frozen.x / sigma, (frozen.x - own_error) / sigma
    tokens = swaps.texts.tokens.to(y.device)
    by_tokens = tables["activations"].predict(tokens)
    inputs = {
        "features": (known, exchanged(known, tables["features"], swaps)),
        "activations": (y, exchanged(y, tables["activations"], swaps)),
        "token dictionary": (by_tokens, exchanged(by_tokens, tables["activations"], swaps)),
    }
    whole = dataclasses.replace(frozen, x=y, sigma=torch.ones_like(frozen.sigma))
    return SwapScene(swaps, whole, after, inputs)
