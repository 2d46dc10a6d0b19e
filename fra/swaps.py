"""What happens to a row of attention when one token is swapped, and who can tell beforehand.

A document's token at position s is exchanged for another and the model runs again: the truth is the change of the
head's pattern in the rows t >= s. It is predicted from the document as it was and from what other documents show of
tokens:

- *features*: scores as features and biases give them (no error term). At s the features expected of the new token
  come to those that are there, and the features expected of the old one go; at s + 1 those expected behind either; all
  others stay.
- *token-pair means*: the attention map's own account (`fra._pair_means`).
- *token dictionary*: as features, with every position told by its current and previous token alone.
- *position only*: means by lag.
- *activations* (beside, judged by nobody): as features, with the whole activations in the place of features: what the
  bilinear form and expected activations do without any dictionary.

Each predictor gets two readings (the predicted change added to the head's own scores, or the predicted scores put in
their place) and a factor; the reading and the factor are chosen, head by head, on documents of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra._pair_means import PairMeans, Places, places
from fra._swap_pictures import SWAP, swap_picture
from fra.carried import FEATURES, CarriedLayer, Texts, observe
from fra.core.frozen import FrozenLayer, Side, freeze
from fra.core.threads import each
from fra.dictionaries.codes import codes
from fra.dictionaries.tokens import TokenDictionary, learn
from fra.errors import CannotLoad
from fra.targets.target import text_of
from fra.verdicts.samples import Measured
from fra.verdicts.stats import seed_of

PREDICTORS = ("features", "token-pair means", "token dictionary", "position only", "activations")
READINGS = ("added", "put in place")
PER_DOCUMENT, TUNING = 4, 2
"""Swaps in a measured document, and in one of the selection documents."""
STRIDE = 4
"""Of the rows behind s + 1 every fourth is looked at, and counts four times: they are many, and alike."""
SEEN = 10
"""New tokens are drawn from those that the estimation documents hold at least so often: every predictor knows them."""


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

    @cached_property
    def weight(self) -> Int[Tensor, "n pos"]:
        """How often a row counts: rows s and s + 1 once, every STRIDE-th of the later ones STRIDE times; 0 where
        nothing can change, and behind the document's end. Which of the later rows: in turn from swap to swap.
        """
        behind = torch.arange(self.before.shape[1], device=self.at.device) - self.at[:, None]
        turn = torch.arange(len(self.at), device=self.at.device)[:, None]
        later = STRIDE * ((behind >= 2) & ((behind - 2 - turn) % STRIDE == 0)).long()
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


def frequent(texts: Texts, at_least: int = SEEN) -> Int[np.ndarray, " n"]:
    """Tokens that stand at least so often behind the texts' first position. Raises CannotLoad for fewer than 2."""
    real = np.concatenate([ids[1:n].numpy() for ids, n in zip(texts.tokens, texts.lengths, strict=True)])
    ids, count = np.unique(real, return_counts=True)
    if (count >= at_least).sum() < 2:
        raise CannotLoad(f"the text has fewer than 2 tokens that occur {at_least} times: add text to text.documents")
    return np.asarray(ids[count >= at_least])


def draw(texts: Texts, tokens: Int[np.ndarray, " n"], per_document: int, seed: int, device: torch.device) -> Swaps:
    """Swaps at random positions behind the first and before the last, to random other tokens of `tokens`."""
    rng = np.random.default_rng(seed)
    doc, at, new = [], [], []
    for number, length in enumerate(texts.lengths):
        for _ in range(per_document if length > 2 else 0):
            position = int(rng.integers(1, length - 1))
            others = tokens[tokens != int(texts.tokens[number, position])]
            doc.append(number)
            at.append(position)
            new.append(int(rng.choice(others)))
    where = torch.tensor(doc, device=device)
    position_of = torch.tensor(at, device=device)
    before = texts.tokens.to(device)[where]
    after = before.clone()
    after[torch.arange(len(doc), device=device), position_of] = torch.tensor(new, device=device)
    return Swaps(texts, where, position_of, before, after, torch.tensor(texts.lengths, device=device)[where])


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
class Scene:
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

    def only(self, swap: int) -> Scene:
        """One of the swaps."""
        s, one = self.swaps, slice(swap, swap + 1)
        alone = Swaps(s.texts, *(part[one] for part in (s.doc, s.at, s.before, s.after, s.lengths)))
        inputs = {name: (before, after[one]) for name, (before, after) in self.inputs.items()}
        return Scene(alone, self.frozen, self.after[one], inputs)

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
) -> Scene:
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
    return Scene(swaps, whole, after, inputs)


@dataclass(frozen=True)
class Elsewhere:
    """What the estimation documents tell: expected inputs by token, and row-centred scores at their places."""

    tables: dict[str, TokenDictionary]
    seen: Places
    doc: Int[Tensor, " m"]
    scores: Float[Tensor, "docs n_heads pos pos"]
    """The model's own, row-centred over unmasked keys."""

    def of(self, head: int) -> Float[Tensor, " m"]:
        """Row-centred scores of one head at the places seen."""
        return self.scores[self.doc, head, self.seen.query, self.seen.key]


def elsewhere(layer: CarriedLayer) -> Elsewhere:
    """The estimation documents through the model and the dictionary."""
    texts, mask, like, got = layer.sets.estimation, layer.frozen.mask, layer.frozen.x, layer.estimation
    x = got["x"].to(like)
    sigma = got["sigma"].to(like) if "sigma" in got else like.new_ones(*x.shape[:2], 1)
    tokens = texts.tokens.to(x.device)
    tables = {
        "features": learn((x - codes(layer.sae, x).error) / sigma, tokens, texts.lengths),
        "activations": learn(x / sigma, tokens, texts.lengths),
    }
    scores = got["scores"].to(like).masked_fill(~mask, 0.0)
    scores = scores - (scores.sum(-1) / mask.sum(-1))[..., None]
    pos = torch.arange(x.shape[1], device=x.device)
    real = mask & (pos < torch.tensor(texts.lengths, device=x.device)[:, None])[:, :, None] & (pos > 0)[:, None]
    doc, query, key = real.nonzero(as_tuple=True)
    return Elsewhere(tables, places(tokens, doc, query, key), doc, scores)


@torch.no_grad()
def telling(layer: CarriedLayer) -> dict[str, Measured]:
    """Q22 at every head of a layer: by how much the features' R2 of the change exceeds that of each control."""
    frozen, sets = layer.frozen, layer.sets
    device, new = frozen.x.device, frequent(sets.estimation)
    known = elsewhere(layer)
    tuned_on = freeze(layer.model, sets.selection.tokens, layer.layer, layer.hook_name)
    seeds = {name: seed_of(*layer.seed_parts[:-1], "swaps", name) for name in ("tuning", "measured")}
    scenes = [
        scene(
            layer,
            tuned_on,
            codes(layer.sae, tuned_on.x).error,
            draw(sets.selection, new, TUNING, seeds["tuning"], device),
            known.tables,
        ),
        scene(
            layer,
            frozen,
            layer.codes(FEATURES).error,
            draw(sets.measured, new, PER_DOCUMENT, seeds["measured"], device),
            known.tables,
        ),
    ]
    asked = [places(tokens, *own.swaps.changed) for own in scenes for tokens in (own.swaps.before, own.swaps.after)]
    pair_means = PairMeans(known.seen, asked, int(layer.model.cfg.d_vocab))

    def measure(head: int) -> Measured:
        at_places = known.of(head)
        by_position, by_pairs = pair_means.predict(at_places)
        found: dict[str, list[list[np.ndarray]]] = {name: [] for name in PREDICTORS}
        for number, own in enumerate(scenes):
            truth = own.truth(head)
            for name in PREDICTORS:
                counted = name in ("token-pair means", "position only")
                if counted:
                    means = by_pairs if name == "token-pair means" else by_position
                    before, after = means[2 * number], means[2 * number + 1]
                else:
                    before, after = own.predicted(name, head)
                found[name].append(own.responses(truth, before, after, centred=counted))
        explained, how = {}, {}
        for name, (tuning, measured) in found.items():
            reading, factor = tune(tuning)
            _, cross, square = measured[reading]
            explained[name] = 2 * factor * cross - factor**2 * square
            how[name] = f"{READINGS[reading]}, times {factor:.2f}"
        total = found["features"][1][0][0]
        shown = swap_picture(scenes[1], head, total, *tune(found["features"][0]), text_of(layer.model.tokenizer))
        counts = np.bincount(scenes[1].swaps.doc.cpu(), weights=total, minlength=len(sets.measured))

        def lead(control: str) -> np.ndarray:
            by_swap = explained["features"] - explained[control]
            return np.bincount(scenes[1].swaps.doc.cpu(), weights=by_swap, minlength=len(sets.measured))

        sums = {f"over {control}": lead(control) for control in PREDICTORS[1:4]}
        detail = ({} if shown is None else {SWAP: shown}) | {
            "R2 of the change in attention": {
                name: float(value.sum() / total.sum()) for name, value in explained.items()
            },
            "readings and factors": how,
            "swaps": len(total),
        }
        return Measured(sums, dict.fromkeys(sums, counts), sets.measured.sources, detail=detail)

    heads = list(layer.heads)
    measured = each(measure, heads, device)
    return {f"L{layer.layer}H{head}": own for head, own in zip(heads, measured, strict=True)}


def tune(tuning: Sequence[Float[np.ndarray, "3 n"]]) -> tuple[int, float]:
    """The reading that explains more of the tuning swaps, and its factor by least squares (not below 0)."""
    best = (0, 0.0, -np.inf)
    for reading, (_, cross, square) in enumerate(tuning):
        factor = max(float(cross.sum() / square.sum()), 0.0) if square.sum() > 0 else 0.0
        explained = float(2 * factor * cross.sum() - factor**2 * square.sum())
        if explained > best[2]:
            best = (reading, factor, explained)
    return best[0], best[1]
