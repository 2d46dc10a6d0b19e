"""Does FRA sum to the scores? The error of the sum against the model's own scores, and what leaving a term out does
to it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra._heads import Model
from fra._resolve import TERMS, ResolvedHead, resolve

DROPPED = (*(f"{side} {term}" for side in ("query", "key") for term in TERMS), "scale")
"""What `errors` leaves out in turn: each kind of term on each side, and the score's scale."""


def errors(model: Model, sae: Any, tokens: Int[Tensor, " pos"], layer: int, head: int) -> dict[str, float]:
    """Largest error over all unmasked entries, as a share of the sum of absolute terms: `complete`, and one for each of
    DROPPED.

    The truth is the model's own hook_attn_scores (after softcap). The sum of absolute terms is the yardstick: a score
    near zero that is the sum of large terms is not a large relative error. Raises FraError as `fra.resolve` does.
    """
    resolved = resolve(model, sae, tokens, layer, head)
    mask, truth = resolved.frozen.mask, resolved.frozen.model_scores[0, head]
    yardstick = absolute_terms(resolved)

    def worst(scores: Float[Tensor, "q_pos k_pos"]) -> float:
        error = (resolved.frozen.cap(scores) - truth).abs() / yardstick
        return float(error[mask].max())

    scores, blocks = resolved.scores(), resolved.blocks()
    found = {"complete": worst(scores)}
    for term in TERMS:
        found[f"query {term}"] = worst(scores - torch.stack([blocks[term, other] for other in TERMS]).sum(0))
        found[f"key {term}"] = worst(scores - torch.stack([blocks[other, term] for other in TERMS]).sum(0))
    found["scale"] = worst(scores / resolved.frozen.scale) if resolved.frozen.scale != 1 else float("nan")
    return found


def absolute_terms(resolved: ResolvedHead) -> Float[Tensor, "q_pos k_pos"]:
    """Sum of the absolute values of every term of every score: features, bias and error on both sides."""
    sides = []
    for side in (resolved._query, resolved._key):
        n = torch.arange(resolved.n_pos, device=side.bias.device)
        vectors = torch.cat([side.entries.vector, side.bias, side.error])
        sides.append((torch.cat([side.entries.pos, n, n]), vectors))
    (at_q, q), (at_k, k) = sides
    by_key = q.new_zeros(resolved.n_pos, len(q))
    for start in range(0, len(k), 1024):  # [1024, n_entries] at a time
        part = slice(start, start + 1024)
        by_key.index_add_(0, at_k[part], (k[part] @ q.mT).abs())
    total = q.new_zeros(resolved.n_pos, resolved.n_pos).index_add_(1, at_q, by_key)
    return total.mT.to(resolved.frozen.x).clamp(min=torch.finfo(torch.float32).tiny)
