"""Does FRA sum to the scores through a crosscoder? As Q01, at every slot that is this model at an attention input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from fra.core.resolve import ResolvedHead, resolve
from fra.core.weights import Model
from fra.dictionaries.crosscoder import Placed
from fra.dictionaries.hooks import attention_input_layer, is_attention_input
from fra.measures.identities.q01_q18_exactness import DROPPED, absolute_terms, errors, sums_evidence
from fra.verdicts.claim import Claim, Evidence

if TYPE_CHECKING:
    from fra.targets.target import Target

WITHOUT_MEAN = "error without the mean"
NO_CROSSCODER = "the target has no crosscoder at this layer's attention input"
NO_MEAN = "no mean was subtracted for the target's crosscoders at this layer, so that it cannot be left out"


def slots(target: Target) -> Iterator[tuple[int, Placed]]:
    """(layer, crosscoder placed there) of every slot that is the target's model at an attention input."""
    for placed in target.crosscoders.values():
        own = placed.crosscoder.slot(placed.at).model
        for number, slot in enumerate(placed.crosscoder.slots):
            if slot.model == own and is_attention_input(slot.hook):
                layer = attention_input_layer(slot.hook)
                if layer < target.n_layers:
                    yield layer, replace(placed, at=number)


@torch.no_grad()
def without_mean(model: Model, placed: Placed, tokens: Int[Tensor, " pos"], layer: int, head: int) -> float:
    """Largest error of the sum whose bias term lacks the mean, as `errors` measures it."""
    whole = resolve(model, placed, tokens, layer, head)
    mean = placed.crosscoder.mean
    if mean is None:
        return float("nan")
    bias = whole.codes.bias - mean[placed.at].to(whole.codes.bias)
    spoilt = ResolvedHead(whole.frozen, replace(whole.codes, bias=bias), head)
    error = (whole.frozen.cap(spoilt.scores()) - whole.frozen.model_scores[0, head]).abs() / absolute_terms(whole)
    return float(error[whole.frozen.mask].max())


def evidence(
    claim: Claim, target: Target, documents: Sequence[Int[Tensor, " pos"]], layers: frozenset[int]
) -> dict[str | None, Evidence]:
    """Every head of these layers, whatever crosscoder reads it: the largest error counts."""
    found: dict[str | None, Evidence] = {}
    read = [(layer, placed) for layer, placed in slots(target) if layer in layers]
    for layer in sorted(layers):
        own = [placed for at, placed in read if at == layer]
        why = NO_CROSSCODER if not own else NO_MEAN if any(one.crosscoder.mean is None for one in own) else None
        for head in range(target.n_heads):
            name = f"L{layer}H{head}"
            if why is not None:
                found[name] = Evidence(claim=claim, head=name, cannot=why)
                continue
            rows = [
                errors(target.model, one, tokens, layer, head)
                | {"mean": without_mean(target.model, one, tokens, layer, head)}
                for one in own
                for tokens in documents
            ]
            made = sums_evidence(claim, name, rows, ("complete",), DROPPED, {WITHOUT_MEAN: "mean"})
            found[name] = replace(made, n=len(documents))
    return found
