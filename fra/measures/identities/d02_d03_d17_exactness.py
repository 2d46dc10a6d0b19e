"""Does attribution sum to the pre-activation? The error of each sum against the dictionary's own number, and what
leaving a part out does to it.

The yardstick is the sum of the absolute values of what is added up, single products included: a pre-activation near
zero that is the sum of large terms is not a large relative error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fra import attribution
from fra.attribution.head_outputs import HeadOutputs, Live
from fra.core.weights import Model, ov_weights
from fra.dictionaries.encoder import own_pre_activation
from fra.dictionaries.hooks import LayerHooks, output_layer_of
from fra.errors import FraError
from fra.measures.identities.designs import Recursion
from fra.measures.identities.precision import settled
from fra.measures.identities.q01_q18_exactness import largest
from fra.targets.target import head_output_hooks
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.conditions import exact
from fra.verdicts.pooled import NO_HEAD_OUTPUT_DICTIONARY

if TYPE_CHECKING:
    from fra.targets.target import Target

Errors = dict[str, float]
"""The largest error over the yardstick: `complete`, and one for each part left out."""

_TINY = torch.finfo(torch.float32).tiny


def _largest(off: Tensor, yardstick: Tensor) -> float:
    return float((off.abs() / yardstick.clamp(min=_TINY)).max())


def _firing(at: Live, hook: str) -> Live:
    if not len(at):
        raise FraError(f"no feature of the dictionary at {hook!r} fires in a document: there is no sum to check.")
    return at


@torch.no_grad()
def head_errors(target: Target, hook: str, tokens: Int[Tensor, " pos"]) -> Errors:
    """DFA by head plus the bias against the dictionary's own pre-activation: every position, every feature."""
    sae = target.dictionaries[hook]
    o = attribution.observe(target.model, sae, tokens)
    truth = own_pre_activation(sae, o.x[0])
    features = torch.arange(o.encoder.d_sae, device=o.z.device)
    by_head, bias = o.by_head(features)[0], o.bias(features)
    bias = bias if bias.ndim == 1 else bias[0]
    weight = o.encoder.weight.flatten(0, 1)
    yardstick = (o.z[0].flatten(1).abs() @ weight.abs()) * o.gain[0, :, None] + bias.abs()
    found = {"complete": _largest(by_head.sum(1) + bias - truth, yardstick)}
    if bool(bias.any()):
        found["bias"] = _largest(by_head.sum(1) - truth, yardstick)
    for head in range(o.n_heads):
        if bool(by_head[:, head].any()):  # a head that writes nothing leaves nothing out
            rest = by_head.sum(1) - by_head[:, head] + bias
            found[f"head {head}"] = _largest(rest - truth, yardstick)
    return found


@torch.no_grad()
def source_errors(target: Target, hook: str, tokens: Int[Tensor, " pos"]) -> Errors:
    """DFA by source position plus the bias against the dictionary's own pre-activation, at every firing.

    Left out or spoilt in turn: the bias, b_V (with the norm's bias), the pattern's rows (each takes another row's
    place), and under grouped queries the key-value heads (each query head reads the next group's).
    """
    sae = target.dictionaries[hook]
    o = attribution.observe(target.model, sae, tokens)
    at, bias = _firing(o.live, hook), o.entries_bias(o.live)
    truth = own_pre_activation(sae, o.x[0])[at.pos, at.feature]
    size = dataclasses.replace(
        o, values=o.values.abs(), encoder=dataclasses.replace(o.encoder, weight=o.encoder.weight.abs())
    )
    yardstick = size.sources(at).sum(1) + bias.abs()

    def off(changed: HeadOutputs, constant: Tensor = bias) -> float:
        return _largest(changed.sources(at).sum(1) + constant - truth, yardstick)

    found = {"complete": off(o)}
    if bool(bias.any()):
        found["bias"] = off(o, torch.zeros_like(bias))
    found["rows of the pattern"] = off(dataclasses.replace(o, pattern=o.pattern.roll(1, dims=2)))
    b_V = ov_weights(target.model, o.encoder.layer, LayerHooks(o.encoder.layer).resid_pre).b_V
    if bool(b_V.any()):
        found["b_V"] = off(dataclasses.replace(o, values=o.values - b_V.to(o.values)))
    groups = _queries_for_each_key_head(target.model, o)
    if groups > 1:
        found["key-value head"] = off(dataclasses.replace(o, values=o.values.roll(groups, dims=2)))
    return found


def _queries_for_each_key_head(model: Model, o: HeadOutputs) -> int:
    attn: Any = model.blocks[o.encoder.layer].attn
    stored = len(attn.W_V)
    if stored == o.n_heads:  # HookedTransformer repeats key-value heads in its weights
        stored = int(getattr(model.cfg, "n_key_value_heads", None) or stored)
    return o.n_heads // stored


@torch.no_grad()
def recursive_errors(target: Target, hook: str, tokens: Int[Tensor, " pos"], design: Recursion) -> Errors:
    """Recursive attribution against the dictionary's own pre-activation, at some firings late in the document: down to
    the components, through the dictionaries of head outputs below, and to those of attention inputs; each kind of term
    left out in turn. The yardstick is the sum of absolute terms.
    """
    sae, model = target.dictionaries[hook], target.model
    o = attribution.observe(model, sae, tokens)
    late = torch.nonzero(o.live.pos >= int(design.late * len(tokens)))[:, 0]
    chosen = torch.zeros(len(o.live), dtype=torch.bool, device=late.device)
    chosen[late[:: max(1, len(late) // design.firings)][: design.firings]] = True
    at = _firing(o.live.where(chosen), hook)
    truth = own_pre_activation(sae, o.x[0])[at.pos, at.feature]
    found: Errors = {"complete": 0.0}
    for given in _routes(target, o.encoder.layer):
        trace = attribution.recursive(model, sae, tokens, at, given)
        yardstick = torch.stack([term.value.abs().sum(1) for term in trace.terms]).sum(0)
        found = largest([found, {"complete": _largest(trace.total() - truth, yardstick)}])
        for component in trace.components():
            if any(bool(term.value.any()) for term in trace.terms if term.component == component):
                off = _largest(trace.without(component) - truth, yardstick)
                found = largest([found, {component: off}])
    return found


def _routes(target: Target, layer: int) -> list[dict[str, Any]]:
    """Which dictionaries a trace ends at: none, those of head outputs below, those of attention inputs."""
    below = [hook for hook in target.dictionaries if output_layer_of(hook) in range(layer)]
    read = [(own.normalized, own.resid_pre) for own in map(LayerHooks, range(layer + 1))]
    inputs = [hook for hook in target.dictionaries if any(hook in points for points in read)]
    routes = [[], below, *([hook] for hook in inputs)]
    return [{hook: target.dictionaries[hook] for hook in route} for k, route in enumerate(routes) if route or k == 0]


def evidence(
    claim: Claim,
    target: Target,
    documents: Sequence[Int[Tensor, " _pos"]],
    errors: Callable[[Target, str, Int[Tensor, " pos"]], Errors],
) -> Evidence:
    """One row for every dictionary of head outputs: the largest error of the complete sum, and the smallest that
    leaving out any one part makes; in float64 where the target's precision does not reach the bar.
    """
    hooks = head_output_hooks(target)
    if not hooks:
        return Evidence(claim=claim, head=None, cannot=NO_HEAD_OUTPUT_DICTIONARY)
    return settled(target, lambda at, _: {None: _measured(claim, at, hooks, documents, errors)})[None]


def _measured(
    claim: Claim,
    target: Target,
    hooks: Sequence[str],
    documents: Sequence[Int[Tensor, " _pos"]],
    errors: Callable[[Target, str, Int[Tensor, " pos"]], Errors],
) -> Evidence:
    found = {hook: largest(errors(target, hook, tokens) for tokens in documents) for hook in hooks}
    complete = float(np.max([row["complete"] for row in found.values()]))
    (control,) = claim.bars
    least = min(value for row in found.values() for name, value in row.items() if name != "complete")
    conditions = (
        exact(claim.condition, complete, claim.bar, above=False),
        exact(control, least, claim.bar_of(control)),
    )
    return Evidence(
        claim=claim,
        head=None,
        candidates={"every dictionary": conditions},
        n=len(documents),
        detail={"largest error by dictionary and part left out": found},
    )
