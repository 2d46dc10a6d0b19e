"""Direct feature attribution (DFA): which heads and which source positions make a head-output feature fire.

A dictionary on `hook_z` reads the concatenated head outputs linearly before its activation function, and a head's
output is a sum over the positions that it attends to, so that a feature's pre-activation is a sum over heads and over
source positions (Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse Autoencoders"):

    pre_f(t) = sum_h gain_t z[t,h] . W_enc[h,:,f] + bias_f,    z[t,h] = sum_s A_h(t,s) v[s,h]

`observe` runs documents once and answers everything about them; `pre_activation`, `by_head` and `by_source` are short
forms for one document; `recursive` goes on to every component upstream. The pattern and the dictionary's normalisation,
where it has one, are frozen at their values.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from fra._head_outputs import HeadOutputs, Live, observe
from fra._recursive import Term, Trace, recursive
from fra.core.weights import Model
from fra.dictionaries.encoder import Encoder, encoder, head_output_layer

__all__ = [
    "Encoder",
    "HeadOutputs",
    "Live",
    "Term",
    "Trace",
    "by_head",
    "by_source",
    "encoder",
    "head_output_layer",
    "observe",
    "pre_activation",
    "recursive",
]


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
    head: int | None = None,
) -> Float[Tensor, "q_pos k_pos n_features"]:
    """DFA by source position on one document, of all heads together or of one: summed over k_pos, `by_head` (summed
    over heads, or of that head). Raises FraError as `pre_activation`.
    """
    return observe(model, sae, tokens).by_source(features, head)[0]
