"""Does FRA's ranking predict causes? Single terms of single scores, drawn across rows, keys and heads, taken out of a
forward pass one at a time.

Within one cell (t, s) of one head the softmax factor is the same for all terms and cannot reorder them: what it is
worth shows only across rows, keys and heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from fra.core.coded import Arm, pair_couplings
from fra.core.weights import Model
from fra.dictionaries.codes import neuronpedia
from fra.dictionaries.texts import text_of
from fra.interventions.downstream import Scene
from fra.measures.pairs.designs import SingleTerms
from fra.search.examples import Shown, example_on_text
from fra.statistics.stats import seed_of
from fra.stimuli.padding import Texts
from fra.targets.target import has_dictionary
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import WHOLE, Beside, Sampled, decide, means_of

if TYPE_CHECKING:
    from fra.targets.target import Target

PREDICTORS = WEIGHTED, RAW, ACTIVATION = "centred and softmax-weighted", "raw score", "activation alone"
"""|A (F - sum_u A F)| of the term by itself, = A (1 - A) |F|; |F|; a_i a_j."""
CHANGES = ("loss", "logit", "KL")
"""|change| of the next token's loss, of its logit (less the mean of all logits), and KL of the output, at the row."""
RHO = "rank correlation"
GAINS = {"gain over the raw score": RAW, "gain over activation alone": ACTIVATION}
"""Further conditions, and over which predictor."""
_TOLD_AT_ONCE = 5


@dataclass(frozen=True)
class Terms:
    """Terms of one document at one layer, what was expected of them and what their removal did."""

    head: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    key: Int[np.ndarray, " n"]
    channel: Int[np.ndarray, "n 2"]
    expected: Float[np.ndarray, "n predictors"]
    changed: Float[np.ndarray, "n changes"]
    shown: Shown | None = None
    """The channel of the term that changed the loss most."""

    @property
    def largest(self) -> int:
        """The term that changed the loss most."""
        return int(self.loss.argmax())

    @property
    def loss(self) -> Float[np.ndarray, " n"]:
        """|change| of the loss."""
        return self.changed[:, CHANGES.index("loss")]


@dataclass(frozen=True)
class _Drawn:
    """One term: where it stands, its value F, and the product of its activations."""

    head: int
    row: int
    key: int
    channel: tuple[int, int]
    value: float
    activation: float


def _draw(arm: Arm, pattern: Sequence[Tensor], design: SingleTerms, rng: np.random.Generator) -> list[_Drawn]:
    """Terms of every head: the row uniform, the key uniform or by attention in turn, the pair uniform among those
    live there.

    Keys by attention alone would hardly vary in it; uniform ones alone would hardly matter.
    """
    pos = arm.codes.shape[1]
    start = np.searchsorted(arm.codes.row.cpu().numpy(), np.arange(pos + 1))
    drawn = []
    for head, attention in enumerate(pattern):
        for number in range(design.terms_a_head):
            row = int(rng.integers(min(design.first_row, pos - 2), pos - 1))
            weight = attention[0, row].double().cpu().numpy()
            weight = weight / weight.sum() if number % 2 else (weight > 0) / (weight > 0).sum()
            key = int(rng.choice(pos, p=weight))
            if start[row] == start[row + 1] or start[key] == start[key + 1]:
                continue  # no feature is live there
            q, k = (int(rng.integers(start[at], start[at + 1])) for at in (row, key))
            pair = torch.stack([arm.codes.feature[q], arm.codes.feature[k]])
            coupling = pair_couplings(arm, head, pair[None], torch.tensor([row - key], device=pair.device))[0, 0]
            entry = torch.tensor([q], device=pair.device), torch.tensor([k], device=pair.device)
            activation = float(arm.coefficients("query", head, entry[0]) * arm.coefficients("key", head, entry[1]))
            value = activation * float(coupling)
            drawn.append(_Drawn(head, row, key, (int(pair[0]), int(pair[1])), value, activation))
    return drawn


@torch.no_grad()
def measure_terms(
    model: Model, sae: Any, tokens: Int[Tensor, " pos"], layer: int, rng: np.random.Generator, design: SingleTerms
) -> Terms:
    """Draws terms of every head of a layer on one document, and removes each by itself, at its own entry, from a
    forward pass: at the row t, the model's output is compared with what it was.

    Raises FraError as `fra.resolve` does.
    """
    scene = Scene(model, sae, tokens[None], layer)
    n_heads, pos = scene.arm.frozen.n_heads, len(tokens)
    heads = [scene.head(head) for head in range(n_heads)]
    drawn = _draw(scene.arm, [head.pattern for head in heads], design, rng)
    device = scene.arm.frozen.x.device
    d_head = heads[0].values.shape[-1]
    delta = torch.zeros(len(drawn), pos, n_heads, d_head, device=device, dtype=heads[0].values.dtype)
    expected = np.zeros((len(drawn), len(PREDICTORS)))
    for number, term in enumerate(drawn):
        own = heads[term.head]
        scores = own.scores[0, term.row].clone()
        scores[term.key] -= term.value
        seen = own.scores[0, term.row] > -torch.inf
        after = scene.arm.frozen.cap(scores).masked_fill(~seen, -torch.inf).softmax(-1)
        delta[number, term.row, term.head] = (after - own.pattern[0, term.row]) @ own.values[0]
        attention = float(own.pattern[0, term.row, term.key])
        expected[number] = attention * (1 - attention) * abs(term.value), abs(term.value), abs(term.activation)
    rows = torch.tensor([term.row for term in drawn], device=device)
    following = tokens.to(device)[rows + 1][:, None]
    before = scene.down.logits(torch.zeros_like(rows), rows).double()
    with scene.down.shifted(None, delta):
        logits = scene.down.logits(torch.arange(len(drawn), device=device), rows, copies=len(drawn)).double()
    clean, log_p = before.log_softmax(-1), logits.log_softmax(-1)
    fall = [values.gather(1, following)[:, 0] for values in (clean - log_p, before - logits)]
    centred = fall[1] - (before - logits).mean(-1)
    changed = torch.stack([fall[0].abs(), centred.abs(), (clean.exp() * (clean - log_p)).sum(-1)], dim=1)
    top = drawn[int(changed[:, CHANGES.index("loss")].argmax())] if drawn else None
    return Terms(
        np.array([term.head for term in drawn]),
        np.array([term.row for term in drawn]),
        np.array([term.key for term in drawn]),
        np.array([term.channel for term in drawn]).reshape(-1, 2),
        expected,
        np.asarray(changed.cpu()),
        None if top is None else _shown(scene.arm, top, tokens),
    )


def _shown(arm: Arm, term: _Drawn, tokens: Int[Tensor, " pos"]) -> Shown | None:
    """The term's channel on the document, as far as the term's row."""
    there = torch.zeros(1, len(tokens), len(tokens), dtype=torch.bool)
    there[0, term.row, term.key] = True
    return example_on_text(arm, term.head, term.channel, tokens[None], [len(tokens)], there)


def rank_correlations(layers: Sequence[Terms]) -> Float[np.ndarray, "predictors changes"]:
    """Spearman correlation over all terms of one document, of every predictor with every change; NaN where one of them
    is constant.
    """
    expected = np.concatenate([terms.expected for terms in layers])
    changed = np.concatenate([terms.changed for terms in layers])
    found = np.full((len(PREDICTORS), len(CHANGES)), np.nan)
    for p in range(len(PREDICTORS)):
        for c in range(len(CHANGES)):
            if np.ptp(expected[:, p]) > 0 and np.ptp(changed[:, c]) > 0:
                found[p, c] = float(spearmanr(expected[:, p], changed[:, c]).statistic)
    return found


def largest_term(target: Target, change: float, layer: int, terms: Terms) -> dict[str, Any]:
    """The term that changed a loss most, as a row shows it."""
    at = terms.largest
    assert terms.shown is not None
    page = neuronpedia(target.dictionary_for(layer)[1])
    where = f"L{layer}H{terms.head[at]}: a document's first tokens"
    term = f"query {terms.row[at]}, key {terms.key[at]}: without it the loss there changes by {change:.2g} nat"
    return {
        "the term that changed a loss most": {"term": term}
        | terms.shown.picture(where, text_of(target.tokenizer), page)
    }


def ranking_evidence(
    claim: Claim, target: Target, texts: Texts, progress: Callable[[str], None] = lambda _: None
) -> Evidence:
    """Q12: one row for the whole target, from the beginnings of documents; documents of one source are one cluster."""
    design = claim.designed(SingleTerms)
    layers = [layer for layer in range(target.n_layers) if has_dictionary(target, layer)]
    if not layers:
        return Evidence(claim=claim, head=None, cannot="the target has no dictionary at any layer's attention input")
    found, by_layer = [], []
    top: tuple[float, int, Terms] | None = None
    for number, document in enumerate(texts.documents()):
        if number % _TOLD_AT_ONCE == 0:
            progress(f"{claim.id}: document {number + 1} of {len(texts)}")
        terms = []
        for layer in layers:
            rng = np.random.default_rng(seed_of(target.name, claim.statistic, str(number), str(layer)))
            sae = target.dictionary_for(layer)[1]
            own = measure_terms(target.model, sae, document[: design.length], layer, rng, design)
            terms.append(own)
            if own.shown is not None and (top is None or own.loss.max() > top[0]):
                top = float(own.loss.max()), layer, own
        found.append(rank_correlations(terms))
        by_layer.append([rank_correlations([one])[PREDICTORS.index(WEIGHTED), CHANGES.index("loss")] for one in terms])
    rho = np.array(found)
    columns = [
        Sampled(
            name=name,
            samples={WHOLE: means_of(claim, target.name, WHOLE, name, values, None, texts.sources)},
            bounded=(-1.0, 1.0) if name == claim.condition else (-2.0, 2.0),
        )
        for name, values in conditions(rho).items()
    ]
    detail: dict[str, Any] = {
        "Spearman's rho, mean over documents": [
            {"ranked by": predictor} | {f"with |change| of {c}": float(m) for c, m in zip(CHANGES, row, strict=True)}
            for predictor, row in zip(PREDICTORS, rho.mean(0), strict=True)
        ],
        "by layer": {
            f"layer {layer}": float(value) for layer, value in zip(layers, np.mean(by_layer, axis=0), strict=True)
        },
        "terms a document": len(layers) * target.n_heads * design.terms_a_head,
    }
    if top is not None:
        detail = largest_term(target, *top) | detail
    return decide(claim, columns, {WHOLE: Beside(candidates=("single terms",), detail=detail)}, q_over=())[WHOLE]


def conditions(
    rho: Float[np.ndarray, "n_documents predictors changes"],
) -> dict[str, Float[np.ndarray, " n_documents"]]:
    """What is asked of every document: the rank correlation with the loss, and its lead over the other predictors."""
    with_loss = dict(zip(PREDICTORS, rho[:, :, CHANGES.index("loss")].T, strict=True))
    headline = with_loss[WEIGHTED]
    return {RHO: headline} | {name: headline - with_loss[predictor] for name, predictor in GAINS.items()}
