"""Short forms of direct feature attribution, for one document."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from fra.attribution.head_outputs import observe
from fra.core.weights import Model


def pre_activation(
    model: Model, sae: Any, tokens: Int[Tensor, " pos"], features: Int[Tensor, " n_features"]
) -> Float[Tensor, "pos n_features"]:
    """What the dictionary's activation function sees, on one document. Raises FraError as `observe` does, and for ids
    that the dictionary does not have.
    """
    return observe(model, sae, tokens).pre_activation(features)[0]


def by_head(
    model: Model, sae: Any, tokens: Int[Tensor, " pos"], features: Int[Tensor, " n_features"]
) -> Float[Tensor, "pos n_heads n_features"]:
    """DFA by head on one document: summed over heads and with the bias, the pre-activation. Raises FraError as
    `pre_activation`.
    """
    return observe(model, sae, tokens).by_head(features)[0]


def by_source(
    model: Model,
    sae: Any,
    tokens: Int[Tensor, " pos"],
    features: Int[Tensor, " n_features"],
    head: int | str | None = None,
) -> Float[Tensor, "q_pos k_pos n_features"]:
    """DFA by source position on one document, of all heads together or of one: summed over k_pos, `by_head` (summed
    over heads, or of that head). Raises FraError as `pre_activation`.
    """
    return observe(model, sae, tokens).by_source(features, head)[0]
