"""Does FRA sum to the scores, and on the OV side to the head's output? The error of the sum against the model's own
numbers, and what leaving a term or the signs out does to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.coded import measure_arm
from fra.core.output import ResolvedOutput, Space
from fra.core.reductions import TERMS
from fra.core.resolve import ResolvedHead, resolve
from fra.core.weights import Model, ov_weights
from fra.dictionaries.codes import dictionary_hook
from fra.dictionaries.hooks import LayerHooks
from fra.interventions.attach import Intervention
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.conditions import exact

_AT_ONCE = 1_024  # entries of a side

DROPPED = (*(f"{side} {term}" for side in ("query", "key") for term in TERMS), "scale")
"""What `errors` leaves out in turn: each kind of term on each side, and the score's scale."""


def errors(model: Model, sae: Any, tokens: Int[Tensor, " pos"], layer: int, head: int) -> dict[str, float]:
    """Largest error over all unmasked entries, as a share of the sum of absolute terms: `complete`, and one for each of
    DROPPED that the head has (a bias of zeros or a scale of one can be left out unnoticed).

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
        for side, own in (("query", [(term, other) for other in TERMS]), ("key", [(other, term) for other in TERMS])):
            left_out = torch.stack([blocks[block] for block in own])
            if bool(left_out.any()):
                found[f"{side} {term}"] = worst(scores - left_out.sum(0))
    if resolved.frozen.scale != 1:
        found["scale"] = worst(scores / resolved.frozen.scale)
    return found


def absolute_terms(resolved: ResolvedHead) -> Float[Tensor, "q_pos k_pos"]:
    """Sum of the absolute values of every term of every score: features, bias and error on both sides."""
    sides = []
    for side in (resolved.query, resolved.key):
        n = torch.arange(resolved.n_pos, device=side.bias.device)
        vectors = torch.cat([side.entries.vector, side.bias, side.error])
        sides.append((torch.cat([side.entries.pos, n, n]), vectors))
    (at_q, q), (at_k, k) = sides
    by_key = q.new_zeros(resolved.n_pos, len(q))
    for start in range(0, len(k), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        by_key.index_add_(0, at_k[part], (k[part] @ q.mT).abs())
    total = q.new_zeros(resolved.n_pos, resolved.n_pos).index_add_(1, at_q, by_key)
    return total.mT.to(resolved.frozen.x).clamp(min=torch.finfo(torch.float32).tiny)


LEFT_OUT = "error with a term left out"
OUTPUT_DROPPED = TERMS
"""What `output_errors` leaves out in turn."""


@torch.no_grad()
def output_errors(model: Model, sae: Any, tokens: Int[Tensor, " pos"], layer: int) -> dict[int, dict[str, float]]:
    """For every head of a layer, how far signed contributions to its output are from the model's own output.

    `z` and `result`: largest error over all positions and coordinates, as a share of the sum of absolute products (of
    every coordinate of every feature, of bias and error with every weight that it passes: what bounds the rounding of
    sums of products, Higham 2002, Accuracy and Stability of Numerical Algorithms, ch. 3), against hook_z and against
    what the attention module puts out when the other heads' hook_z is zero. One for each of OUTPUT_DROPPED that there
    is (not for biases of zeros): the same for z without that kind of term. `norms`: the median over positions, in the
    space where it is smaller, of what norms of contributions without their signs add up to beyond the norm of the
    output, as a share of that sum: 0 where nothing cancels.

    Raises FraError as `fra.resolve` does.
    """
    arm = measure_arm(model, sae, tokens[None], layer, dictionary_hook(sae))
    weights = ov_weights(model, layer, arm.frozen.hook_name)
    own_z, own_out = own_outputs(model, tokens.to(arm.frozen.x.device), layer, arm.frozen.n_heads)
    found = {}
    for head in range(arm.frozen.n_heads):
        output = ResolvedOutput(arm, weights, head)
        truth: dict[Space, tuple[Tensor, Tensor]] = {
            "z": (own_z[:, head].to(arm.frozen.x), own_z.new_zeros(()).to(arm.frozen.x)),
            "result": (own_out[head].to(arm.frozen.x), own_out[-1].to(arm.frozen.x)),  # the last: b_O alone
        }
        row: dict[str, float] = {}
        norms = []
        products = _absolute_products(output)
        for space, (whole, constant) in truth.items():
            terms = output.terms(space)
            parts = output.gains(), output.directions(space)
            through = products if space == "z" else products @ weights.W_O[head].abs()
            yardstick = (through + constant.abs()).clamp(min=torch.finfo(torch.float32).tiny)
            total = parts[0] @ parts[1] + terms["bias"] + terms["error"] + constant
            row[space] = float(((total - whole).abs() / yardstick).max())
            if space == "z":
                row |= {
                    term: float(((total - terms[term] - whole).abs() / yardstick).max())
                    for term in OUTPUT_DROPPED
                    if bool(terms[term].any())
                }
            size = parts[0].abs() @ parts[1].norm(dim=-1) + terms["bias"].norm(dim=-1) + terms["error"].norm(dim=-1)
            norms.append(float(((size - (whole - constant).norm(dim=-1)) / size).median()))
        found[head] = row | {"norms": min(norms)}
    return found


def _absolute_products(output: ResolvedOutput) -> Float[Tensor, "pos d_head"]:
    """Sum of the absolute values of all products that make up a head's z."""
    frozen, codes = output.arm.frozen, output.arm.codes
    W_V, b_V = output.weights.W_V[output.head].abs(), output.weights.b_V[output.head].abs()
    others = (codes.bias.abs() + codes.error.abs())[0] / frozen.sigma[0][:, None]
    features = output.gains().abs() @ codes.decoder[output.live].abs()
    return (features + output.pattern @ others) @ W_V + output.pattern @ b_V.expand(len(others), -1)


def largest(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The largest of each name over the rows that have it; NaN where one of them is: an error that is no number must
    not vanish in a maximum.
    """
    found: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            found[name] = float(np.maximum(found.get(name, -np.inf), value))
    return found


def sums_evidence(
    claim: Claim,
    head: str,
    rows: Sequence[Mapping[str, float]],
    whole: Sequence[str],
    dropped: Sequence[str],
    at_least: Mapping[str, str],
) -> Evidence:
    """Evidence of one head that terms add up, from one row of errors a document.

    whole: names of errors of the complete sum, whose largest is the headline. dropped: of sums with a term left out,
    the smallest of which must exceed the bar LEFT_OUT. at_least: bars that what stands under a name must exceed in
    every document.
    """
    worst = largest(rows)
    error = float(np.max([worst[name] for name in whole]))
    left_out = {name: worst[name] for name in dropped if name in worst}
    numbers = {bar: float(np.min([row[name] for row in rows])) for bar, name in at_least.items()}
    numbers[LEFT_OUT] = float(np.min(list(left_out.values()))) if left_out else float("nan")
    above = [exact(name, value, claim.bar_of(name)) for name, value in numbers.items()]
    return Evidence(
        claim=claim,
        head=head,
        candidates={"every term": (exact(claim.condition, error, claim.bar, above=False), *above)},
        n=len(rows),
        detail={"error with one kind of term left out": left_out},
    )


def own_outputs(
    model: Model, tokens: Int[Tensor, " pos"], layer: int, n_heads: int
) -> tuple[Float[Tensor, "pos n_heads d_head"], Float[Tensor, "n_heads_and_one pos d_model"]]:
    """hook_z, and what the attention module puts out with one head at a time, the others' hook_z set to zero (last:
    with none).
    """
    seen: dict[str, Tensor] = {}
    alone = torch.cat([torch.eye(n_heads), torch.zeros(1, n_heads)]).to(tokens.device)

    def keep_one(z: Tensor, hook: Any) -> Tensor:
        by_head = z.flatten(2).view(*z.shape[:2], n_heads, -1)
        seen["z"] = by_head[0].clone()
        return (by_head * alone[:, None, :, None].to(z)).view_as(z)

    def look(module: Any, inputs: Any, output: Any) -> None:
        seen["out"] = output[0] if isinstance(output, tuple) else output

    attention: Any = model.blocks[layer].attn
    handle = attention.register_forward_hook(look)
    try:
        with Intervention(model, [], [(LayerHooks(layer).z, keep_one)]):
            model(tokens.expand(n_heads + 1, -1), stop_at_layer=layer + 1)
    finally:
        handle.remove()
    return seen["z"], seen["out"]
