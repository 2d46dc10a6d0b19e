"""Recursive attribution: a head-output feature's pre-activation as a sum over everything upstream, patterns and
normalisation scales frozen.

A frozen attention layer is linear, so what reads head outputs at layer L reads values, hence the residual stream before
L, hence what every component wrote there; a pull-back of one linear functional, layer by layer. Dictionaries on the way
resolve what they were trained on into features, bias and error (Kissane et al. 2024 call it recursive DFA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.architecture import Model
from fra.architectures.face import face, facing
from fra.architectures.known import architecture_of
from fra.attribution.head_outputs import Live, observe
from fra.core.frozen import read_hooks, read_present
from fra.core.weights import OVWeights, ov_weights
from fra.dictionaries.codes import Codes, codes, gain_and_offset
from fra.dictionaries.encoder import encode, encoder
from fra.dictionaries.hooks import POS_EMBED, LayerHooks, is_normalized
from fra.errors import FraError

Functional = Float[Tensor, "n pos d_model"]
"""For each of n pre-activations, what it reads at each position of the residual stream."""


@dataclass(frozen=True)
class Term:
    """One upstream component's contribution to n pre-activations."""

    component: str
    """embed, pos_embed, mlp, b_V (with the norm's bias), b_O, feature, bias and error (of a dictionary), or encoder
    bias."""
    layer: int | None
    """None for the embeddings."""
    head: int | None
    """Of b_V; None otherwise."""
    hook: str | None
    """Of a dictionary's terms."""
    value: Float[Tensor, "n pos"]
    """By the position at which the component stands; all features of a position together (see `Trace.features`)."""


@facing
@dataclass(frozen=True)
class Trace:
    """n pre-activations resolved into terms; made by `fra.attribution.recursive`."""

    at: Live
    terms: list[Term] = field(default_factory=list)
    features: dict[str, tuple[Tensor, Tensor, Float[Tensor, "n n_entries"]]] = field(default_factory=dict)
    """For each dictionary on the way: position and id of every live feature in the document, and its contributions."""

    def total(self) -> Float[Tensor, " n"]:
        """Every term summed: the pre-activations."""
        return torch.stack([term.value.sum(1) for term in self.terms]).sum(0)

    def without(self, component: str) -> Float[Tensor, " n"]:
        """The sum with one kind of component left out."""
        kept = [term.value.sum(1) for term in self.terms if term.component != component]
        return torch.stack(kept).sum(0) if kept else torch.zeros_like(self.total())

    def components(self) -> list[str]:
        """The kinds of component that occur."""
        return sorted({term.component for term in self.terms})


@dataclass(frozen=True)
class _Layer:
    """What is frozen of one layer on one document."""

    pattern: Float[Tensor, "n_heads q_pos k_pos"]
    sigma: Float[Tensor, " pos"]
    ov: OVWeights
    b_O: Float[Tensor, " d_model"]
    after: Float[Tensor, "pos d_model"]
    """Diagonal of a norm after attention (Gemma 2 and 3): its weight over its scale; ones where there is none."""
    mlp: Float[Tensor, "pos d_model"]
    z: Float[Tensor, "pos n_heads d_head"]
    before: Float[Tensor, "pos d_model"]
    attn_out: Float[Tensor, "pos d_model"] | None
    """What attention writes, where the model shows it."""


@face
def recursive(
    model: Model, sae: Any, tokens: Int[Tensor, " pos"], at: Live, dictionaries: Mapping[str, Any] | None = None
) -> Trace:
    """Resolves pre-activations of a dictionary of head outputs, or of what attention writes, on one document into every
    upstream component.

    at: the entries (positions and features; document 0), as `observe(...).live` gives them. dictionaries: SAEs by their
    hooks, at `attn.hook_z` or `hook_attn_out` of layers below or at an attention input (`ln1.hook_normalized`,
    `hook_resid_pre`) of this or a layer below; the trace ends at their features, biases and errors there instead of
    going through. Of several in one layer the last one on the way from input to output is used.

    Raises FraError as `observe` does; where a layer's output is not its attention plus its MLP; and for a dictionary at
    another hook.
    """
    with torch.no_grad():
        seen = observe(model, sae, tokens)
        layer = seen.encoder.layer
        given = dict(dictionaries or {})
        allowed = {
            *(LayerHooks(n).z for n in range(layer)),
            *(LayerHooks(n).attn_out for n in range(layer)),
            *(LayerHooks(n).normalized for n in range(layer + 1)),
            *(LayerHooks(n).resid_pre for n in range(layer + 1)),
        }
        if strange := sorted(set(given) - allowed):
            raise FraError(
                f"a dictionary at {strange[0]!r} does not lie upstream of the head outputs of layer {layer}: give ones "
                "at attn.hook_z or hook_attn_out of layers below, ln1.hook_normalized or hook_resid_pre."
            )
        frozen, pos_embed = freeze_below(model, tokens, layer)
        trace = Trace(at)
        n, pos = len(at), len(tokens)
        reads = seen.z.new_zeros(n, pos, seen.n_heads, seen.z.shape[-1])
        weight = seen.encoder.weight.permute(2, 0, 1)[at.feature] * seen.gain[0, at.pos, None, None]
        reads[torch.arange(n), at.pos] = weight
        constant = seen.z.new_zeros(n, pos)
        constant[torch.arange(n), at.pos] = seen.encoder.bias[at.feature]
        trace.terms.append(Term("encoder bias", layer, None, None, constant))
        if seen.encoder.b_O is not None:
            added = seen.z.new_zeros(n, pos)
            added[torch.arange(n), at.pos] = seen.gain[0, at.pos] * seen.encoder.b_O[at.feature]
            trace.terms.append(Term("b_O", layer, None, None, added))
        below = _through_attention(trace, frozen, layer, reads, given, model, tokens)
        for number in range(layer - 1, -1, -1):
            part = frozen[number]
            trace.terms.append(Term("mlp", number, None, None, _on(below, part.mlp)))
            if (hook := LayerHooks(number).attn_out) in given:
                if part.attn_out is None:
                    raise FraError(f"the model does not show {hook!r}: leave out the dictionary there.")
                _resolve_output(trace, given[hook], hook, number, part.attn_out[:, None], below[:, :, None])
                continue
            attended = below * part.after
            trace.terms.append(Term("b_O", number, None, None, attended @ part.b_O))
            reads = torch.einsum("nsm,hdm->nshd", attended, part.ov.W_O)
            hook = LayerHooks(number).z
            if hook in given:
                _resolve_output(trace, given[hook], hook, number, part.z, reads)
            else:
                below = below + _through_attention(trace, frozen, number, reads, given, model, tokens)
        embed = frozen[0].before if pos_embed is None else frozen[0].before - pos_embed
        trace.terms.append(Term("embed", None, None, None, _on(below, embed)))
        if pos_embed is not None:
            trace.terms.append(Term("pos_embed", None, None, None, _on(below, pos_embed)))
        return trace


def _on(reads: Functional, vectors: Float[Tensor, "pos d_model"]) -> Float[Tensor, "n pos"]:
    return (reads * vectors).sum(-1)


def _through_attention(
    trace: Trace,
    frozen: list[_Layer],
    number: int,
    reads: Float[Tensor, "n pos n_heads d_head"],
    given: Mapping[str, Any],
    model: Model,
    tokens: Tensor,
) -> Functional:
    """What reads head outputs of a layer, as what reads the residual stream before it; zero where a dictionary of the
    attention input takes over.
    """
    part = frozen[number]
    on_values = torch.einsum("hts,nthd->nshd", part.pattern, reads)
    by_head = torch.einsum("nshd,hd->nhs", on_values, part.ov.b_V)
    for head in range(by_head.shape[1]):
        trace.terms.append(Term("b_V", number, head, None, by_head[:, head]))
    below = torch.einsum("nshd,hmd->nsm", on_values, part.ov.W_V) / part.sigma[:, None]
    for hook in (LayerHooks(number).normalized, LayerHooks(number).resid_pre):
        if hook in given:
            _resolve_input(trace, given[hook], hook, number, part, below, model, tokens)
            return torch.zeros_like(below)
    return below


def _resolve_input(
    trace: Trace, sae: Any, hook: str, number: int, part: _Layer, below: Functional, model: Model, tokens: Tensor
) -> None:
    x = part.before
    if is_normalized(hook):
        x = read_hooks(model, tokens[None].to(x.device), number, {"x": hook})["x"][0]
        x, weights = x.to(part.before), ov_weights(model, number, hook, part.before.dtype)
        # W_V as folded for this hook reads what the norm has scaled: its weight is folded in either way.
        if not torch.allclose(weights.W_V, part.ov.W_V):
            raise FraError(f"the value map at {hook!r} is not that of the residual stream before it.")
        below = below * part.sigma[:, None]
    _resolved(trace, codes(sae, x[None]), hook, number, below)


def _resolve_output(
    trace: Trace,
    sae: Any,
    hook: str,
    number: int,
    x: Float[Tensor, "pos n_parts width"],
    reads: Float[Tensor, "n pos n_parts width"],
) -> None:
    """Ends the trace at a dictionary of head outputs, or of what attention writes (as one part)."""
    _resolved(trace, head_output_codes(sae, x), hook, number, reads.flatten(2))


def head_output_codes(sae: Any, x: Float[Tensor, "pos n_parts width"]) -> Codes:
    """The codes of one document's head outputs, or of what attention writes (one part), in a dictionary of them.
    Raises FraError for what is no dictionary of these outputs.
    """
    encoder(sae, x)  # refuses what is no dictionary of these outputs
    acts, flat = encode(sae, x), x.flatten(1)
    gain, offset = gain_and_offset(sae, flat)
    row, feature = acts.nonzero(as_tuple=True)
    decoder = sae.W_dec.detach().to(x)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        decoder = decoder / decoder.norm(dim=-1, keepdim=True)
    value = acts[row, feature] * gain[row, 0]
    bias = gain * sae.b_dec.detach().to(x) + offset
    error = (flat - bias).index_add_(0, row, -value[:, None] * decoder[feature])
    return Codes(row, feature, value, decoder, bias[None], error[None], (1, len(x)))


def _resolved(trace: Trace, found: Codes, hook: str, number: int, reads: Float[Tensor, "n pos d"]) -> None:
    by_entry = (reads[:, found.row] * (found.value[:, None] * found.decoder[found.feature])).sum(-1)
    trace.features[hook] = (found.row, found.feature, by_entry)
    at_position = reads.new_zeros(reads.shape[:2]).index_add_(1, found.row, by_entry)
    trace.terms.append(Term("feature", number, None, hook, at_position))
    trace.terms.append(Term("bias", number, None, hook, _on(reads, found.bias[0])))
    trace.terms.append(Term("error", number, None, hook, _on(reads, found.error[0])))


def freeze_below(
    model: Model, tokens: Int[Tensor, " pos"], layer: int
) -> tuple[list[_Layer], Float[Tensor, "pos d_model"] | None]:
    """Every layer up to `layer` on one document, and the position embeddings where the model adds some."""
    own = architecture_of(model)
    names = {"pos_embed": POS_EMBED}
    for n in range(layer + 1):
        at = LayerHooks(n)
        for key in ("resid_pre", "scale", "pattern", "z", "mlp_out", "post_scale", "resid_post", "attn_out"):
            names[f"{key} {n}"] = getattr(at, key)
    seen = read_present(model, tokens[None].to(own.device), layer, names)
    layers: list[_Layer] = []
    for n in range(layer + 1):
        ov = ov_weights(model, n, LayerHooks(n).resid_pre)
        got = {key.removesuffix(f" {n}"): value[0].to(ov.W_V) for key, value in seen.items() if key.endswith(f" {n}")}
        before = got["resid_pre"]
        sigma = got["scale"][:, 0] if "scale" in got else before.new_ones(len(tokens))
        b_O = own.read_ov(n).b_O
        b_O = before.new_zeros(before.shape[1]) if b_O is None else b_O.detach().to(before)
        mlp = got.get("mlp_out", torch.zeros_like(before))
        after, norm = torch.ones_like(before), own.norm_after(n)
        if norm is not None and "post_scale" in got:
            after = norm.weight_or_ones(before) / got["post_scale"]
        z = got["z"].reshape(len(tokens), len(ov.W_O), -1)
        part = _Layer(got["pattern"], sigma, ov, b_O, after, mlp, z, before, got.get("attn_out"))
        if n < layer:
            _check_block(part, n, got["resid_post"], max(1e-3, own.tolerance))
        layers.append(part)
    embedded = seen["pos_embed"][0].to(layers[0].before) if "pos_embed" in seen else None
    return layers, embedded


def _check_block(part: _Layer, n: int, after: Float[Tensor, "pos d_model"], tolerance: float) -> None:
    attention = (torch.einsum("shd,hdm->sm", part.z, part.ov.W_O) + part.b_O) * part.after
    off = float((part.before + attention + part.mlp - after).abs().max())
    if not off <= tolerance * float(after.abs().max()):
        raise FraError(
            f"the output of layer {n} is not its input plus attention plus MLP (off by {off:.3g}): this architecture "
            "does more than that and cannot be traced."
        )


__all__ = ["Term", "Trace", "recursive"]
