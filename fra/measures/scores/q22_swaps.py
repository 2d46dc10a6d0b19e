"""What happens to a row of attention when one token is swapped, and who can tell beforehand.

A document's token at position s is exchanged for another and the model runs again: the truth is the change of the
head's pattern in the rows t >= s. It is predicted from the document as it was and from what other documents show of
tokens:

- *features*: scores as features and biases give them (no error term). At s the features expected of the new token
  come to those that are there, and the features expected of the old one go; at s + 1 those expected behind either; all
  others stay.
- *token-pair means*: the attention map's own account (`fra.measures.scores.q22_pair_means`).
- *token dictionary*: as features, with every position told by its current and previous token alone.
- *position only*: means by lag.
- *activations* (beside, judged by nobody): as features, with the whole activations in the place of features: what the
  bilinear form and expected activations do without any dictionary.

Each predictor gets two readings (the predicted change added to the head's own scores, or the predicted scores put in
their place) and a factor; the reading and the factor are chosen, head by head, on documents of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.frozen import freeze
from fra.core.threads import each
from fra.dictionaries.codes import codes
from fra.dictionaries.tokens import TokenDictionary, learn
from fra.errors import CannotLoad
from fra.measures.scores.layer import FEATURES, TOKENS, CarriedLayer
from fra.measures.scores.q22_pair_means import PairMeans, Places, places
from fra.measures.scores.q22_picture import SWAP, swap_picture
from fra.measures.scores.q22_scene import READINGS, Swaps, scene
from fra.stimuli.padding import Texts
from fra.targets.target import text_of
from fra.verdicts.samples import ByDocument
from fra.verdicts.stats import seed_of

PAIRS, POSITION = "token-pair means", "position only"
CONTROLS = (PAIRS, TOKENS, POSITION)
PREDICTORS = (FEATURES, *CONTROLS, "activations")

PER_DOCUMENT, TUNING = 4, 2
"""Swaps in a measured document, and in one of the selection documents."""

SEEN = 10
"""New tokens are drawn from those that the estimation documents hold at least so often: every predictor knows them."""


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
        FEATURES: learn((x - codes(layer.sae, x).error) / sigma, tokens, texts.lengths),
        "activations": learn(x / sigma, tokens, texts.lengths),
    }
    scores = got["scores"].to(like).masked_fill(~mask, 0.0)
    scores = scores - (scores.sum(-1) / mask.sum(-1))[..., None]
    pos = torch.arange(x.shape[1], device=x.device)
    real = mask & (pos < torch.tensor(texts.lengths, device=x.device)[:, None])[:, :, None] & (pos > 0)[:, None]
    doc, query, key = real.nonzero(as_tuple=True)
    return Elsewhere(tables, places(tokens, doc, query, key), doc, scores)


@torch.no_grad()
def telling(layer: CarriedLayer) -> dict[str, ByDocument]:
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
    on_measured = scenes[-1]
    asked = [places(tokens, *own.swaps.changed) for own in scenes for tokens in (own.swaps.before, own.swaps.after)]
    pair_means = PairMeans(known.seen, asked, int(layer.model.cfg.d_vocab))

    def measure(head: int) -> ByDocument:
        at_places = known.of(head)
        by_position, by_pairs = pair_means.predict(at_places)
        found: dict[str, list[list[np.ndarray]]] = {name: [] for name in PREDICTORS}
        for number, own in enumerate(scenes):
            truth = own.truth(head)
            for name in PREDICTORS:
                counted = name in (PAIRS, POSITION)
                if counted:
                    means = by_pairs if name == PAIRS else by_position
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
        tuning, ((total, _, _), *_) = found[FEATURES]
        shown = swap_picture(on_measured, head, total, *tune(tuning), text_of(layer.model.tokenizer))
        counts = np.bincount(on_measured.swaps.doc.cpu(), weights=total, minlength=len(sets.measured))

        def lead(control: str) -> np.ndarray:
            by_swap = explained[FEATURES] - explained[control]
            return np.bincount(on_measured.swaps.doc.cpu(), weights=by_swap, minlength=len(sets.measured))

        sums = {f"over {control}": lead(control) for control in CONTROLS}
        detail = ({} if shown is None else {SWAP: shown}) | {
            "R2 of the change in attention": {
                name: float(value.sum() / total.sum()) for name, value in explained.items()
            },
            "readings and factors": how,
            "swaps": len(total),
        }
        return ByDocument(sums, dict.fromkeys(sums, counts), sets.measured.sources, detail=detail)

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
