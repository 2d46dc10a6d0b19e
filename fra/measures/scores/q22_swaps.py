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

What a predictor tells of a document is its R2, but for one thing: where more change is foretold than there is, the
squared error counts against what was foretold, `1 - |a - b|^2 / max(|a|^2, |b|^2)` with the true change a and the
foretold b, summed over the document's swaps. It is 1 for the change itself, 0 for "no change" and never below -3,
whatever a predictor says; R2 has no such floor, and one document in which next to nothing happens can decide a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.threads import each
from fra.dictionaries.codes import codes
from fra.dictionaries.texts import text_of
from fra.dictionaries.tokens import TokenDictionary, learn
from fra.errors import CannotLoad
from fra.measures.scores.designs import Swapping
from fra.measures.scores.layer import FEATURES, TOKENS, CarriedLayer
from fra.measures.scores.q22_pair_means import PairMeans, Places, places
from fra.measures.scores.q22_picture import SWAP, swap_picture
from fra.measures.scores.q22_scene import READINGS, Swaps, scene
from fra.statistics.stats import seed_of
from fra.stimuli.padding import Texts
from fra.verdicts.samples import ByDocument

PAIRS, POSITION = "token-pair means", "position only"
CONTROLS = (PAIRS, TOKENS, POSITION)
PREDICTORS = (FEATURES, *CONTROLS, "activations")


def frequent(texts: Texts, at_least: int = Swapping.seen) -> Int[np.ndarray, " n"]:
    """Tokens that stand at least so often behind the texts' first position. Raises CannotLoad for fewer than 2."""
    real = np.concatenate([ids[1:n].numpy() for ids, n in zip(texts.tokens, texts.lengths, strict=True)])
    ids, count = np.unique(real, return_counts=True)
    if (count >= at_least).sum() < 2:
        raise CannotLoad(f"the text has fewer than 2 tokens that occur {at_least} times: add text to text.documents")
    return np.asarray(ids[count >= at_least])


def draw(
    texts: Texts,
    tokens: Int[np.ndarray, " n"],
    per_document: int,
    seed_parts: Sequence[str],
    device: torch.device,
    stride: int = Swapping.stride,
) -> Swaps:
    """Swaps at random positions behind the first and before the last, to random other tokens of `tokens`; what is drawn
    for a document does not depend on the others.
    """
    doc, at, new = [], [], []
    for number, length in enumerate(texts.lengths):
        rng = np.random.default_rng(seed_of(*seed_parts, str(number)))
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
    lengths = torch.tensor(texts.lengths, device=device)[where]
    return Swaps(texts, where, position_of, before, after, lengths, stride)


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
def telling(layer: CarriedLayer, design: Swapping) -> dict[str, ByDocument]:
    """Q22 at every head of a layer: by how much the features tell more of the change in a document (`told`) than each
    control does.
    """
    frozen, sets = layer.frozen, layer.sets
    device, new = frozen.x.device, frequent(sets.estimation, design.seen)
    known = elsewhere(layer)
    tuned_on, tuning_codes = layer.selection

    def drawn(texts: Texts, name: str, number: int) -> Swaps:
        return draw(texts, new, number, (*layer.seed_parts[:-1], "swaps", name), device, design.stride)

    tuning_swaps = drawn(sets.selection, "tuning", design.tuning)
    on_tuning = scene(layer, tuned_on, tuning_codes.error, tuning_swaps, known.tables)
    measured_swaps = drawn(sets.measured, "measured", design.measured)
    on_measured = scene(layer, frozen, layer.codes(FEATURES).error, measured_swaps, known.tables)
    scenes = (on_tuning, on_measured)
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
        chosen = {
            name: tune([by_document(sums, on_tuning.swaps) for sums in tuning], design)
            for name, (tuning, _) in found.items()
        }
        scores = {
            name: told(by_document(found[name][1][reading], on_measured.swaps), factor, design.least)
            for name, (reading, factor) in chosen.items()
        }
        happens = np.isfinite(scores[FEATURES])
        total = found[FEATURES][1][0][0]
        shown = swap_picture(on_measured, head, total, *chosen[FEATURES], text_of(layer.model.tokenizer))
        weighed = {
            name: float((2 * f * found[name][1][r][1] - f**2 * found[name][1][r][2]).sum() / total.sum())
            for name, (r, f) in chosen.items()
        }
        sums = {f"over {name}": np.where(happens, scores[FEATURES] - scores[name], 0.0) for name in CONTROLS}
        detail = ({} if shown is None else {SWAP: shown}) | {
            "told of the change in attention": {name: float(np.nanmean(own)) for name, own in scores.items()},
            "R2 of all swaps together, by how much they change": weighed,
            "readings and factors": {
                name: f"{READINGS[reading]}, times {factor:g}" for name, (reading, factor) in chosen.items()
            },
            "swaps": len(total),
            "documents in which attention changes": int(happens.sum()),
        }
        counts = happens.astype(np.float64)
        return ByDocument(sums, dict.fromkeys(sums, counts), sets.measured.sources, detail=detail)

    heads = list(layer.heads)
    measured = each(measure, heads, device)
    return {f"L{layer.layer}H{head}": own for head, own in zip(heads, measured, strict=True)}


def by_document(sums: Float[np.ndarray, "3 n"], swaps: Swaps) -> Float[np.ndarray, "3 n_docs"]:
    """Sums over the swaps of each document."""
    doc = swaps.doc.cpu().numpy()
    return np.stack([np.bincount(doc, weights=own, minlength=len(swaps.texts)) for own in sums])


def told(sums: Float[np.ndarray, "3 n"], factor: float, least: float) -> Float[np.ndarray, " n"]:
    """What a predictor times `factor` tells of each document, from total, cross and square: 1 less its squared error
    over the larger of the squared change and the square of what it foretells. NaN where less than `least` changes.
    """
    total, cross, square = sums[0], factor * sums[1], factor**2 * sums[2]
    error = total - 2 * cross + square
    return np.where(total >= least, 1 - error / np.maximum(np.maximum(total, square), least), np.nan)


def tune(tuning: Sequence[Float[np.ndarray, "3 n"]], design: Swapping) -> tuple[int, float]:
    """The reading and the factor that tell most of the tuning documents, on average; of equals the first. Without a
    document in which attention changes: no change.
    """
    best = (0, 0.0, -np.inf)
    for reading, sums in enumerate(tuning):
        for factor in design.factors:
            scores = told(sums, factor, design.least)
            mean = float(scores[np.isfinite(scores)].mean()) if np.isfinite(scores).any() else 0.0
            if mean > best[2]:
                best = (reading, factor, mean)
    return best[0], best[1]
