"""One attention layer on one batch of documents, with everything but its input frozen.

Once the normalisation scale and the QK-norm gain are frozen, a head's score is bilinear in the attention input. Here
the weights, scales, rotations and masks that make it so are put together, and held against the model's own scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.architectures.architecture import ANGLES, UNHEARD, Architecture, Model, Rotary, Side
from fra.architectures.circumstances import attached, circumstance
from fra.architectures.known import architecture_of, check_layer_and_head, check_tokens
from fra.architectures.passes import seen
from fra.core.weights import QKWeights, qk_weights
from fra.dictionaries.hooks import LayerHooks, attention_input_layer
from fra.errors import CannotLoad, FraError

__all__ = [
    "FrozenLayer",
    "Model",
    "Rotary",
    "Side",
    "assemble",
    "attention_input_layer",
    "check_layer_and_head",
    "check_scores",
    "check_tokens",
    "folded",
    "freeze",
    "qk_gain",
    "qk_weights",
    "read_hooks",
    "read_present",
    "seen_layer",
]


@dataclass(frozen=True)
class FrozenLayer:
    """One attention layer on one batch of documents, everything but its input frozen.

    S[t,s] = scale * <q_t, k_s> before softcap, with q_t = R_t(gain_q[t] * ((x_t / sigma_t) @ W_q + b_q)) and k_s
    likewise. Centring, the norm's weight and bias, and the weight of a QK-norm are folded into W and b; the norm's
    scale and the QK-norm's 1/rms are the frozen scalars.
    """

    layer: int
    n_heads: int
    hook_name: str
    x: Float[Tensor, "batch pos d_model"]
    """The activation at the dictionary's hook."""
    sigma: Float[Tensor, "batch pos"]
    """The norm's scale; ones at ln1.hook_normalized and in a model without LayerNorm."""
    W_q: Float[Tensor, "n_heads d_model d_head"]
    W_k: Float[Tensor, "n_heads d_model d_head"]
    b_q: Float[Tensor, "n_heads d_head"]
    b_k: Float[Tensor, "n_heads d_head"]
    gain_q: Float[Tensor, "batch n_heads pos"]
    gain_k: Float[Tensor, "batch n_heads pos"]
    rotary: Rotary | None
    scale: float
    softcap: float | None
    mask: Bool[Tensor, "pos pos"]
    """True where the key may be attended."""
    model_scores: Float[Tensor, "batch n_heads pos pos"]
    """The model's own hook_attn_scores, after softcap; its values where masked differ between model classes. Of its own
    queries and keys where that hook shows something else (`Architecture.fires_afterwards`).
    """
    pattern: Float[Tensor, "batch n_heads pos pos"]

    def weights(self, side: Side, head: int) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, " d_head"]]:
        """W and b of one head on one side."""
        return (self.W_q[head], self.b_q[head]) if side == "query" else (self.W_k[head], self.b_k[head])

    def place(
        self, side: Side, head: int, vectors: Float[Tensor, "n d_head"], rows: Int[Tensor, " n"], *, scaled: bool = True
    ) -> Float[Tensor, "n d_head"]:
        """Projected vectors as they enter the score at `rows` (indices into the flattened [batch * pos]): divided by
        the norm's scale (not where `scaled` is False: biases after the norm), times the QK-norm's gain, rotated to
        their position.
        """
        vectors = vectors * self.gain(side, head, rows, scaled=scaled)[:, None]
        return vectors if self.rotary is None else self.rotary.rotate(vectors, rows % self.x.shape[1])

    def gain(self, side: Side, head: int, rows: Int[Tensor, " n"], *, scaled: bool = True) -> Float[Tensor, " n"]:
        """The frozen scalar at `rows`: the QK-norm's gain, divided by the norm's scale where `scaled`."""
        gain = (self.gain_q if side == "query" else self.gain_k)[:, head].flatten()[rows]
        return gain / self.sigma.flatten()[rows] if scaled else gain

    def to(self, dtype: torch.dtype) -> FrozenLayer:
        """The same in another floating-point precision."""
        cast: dict[str, Any] = {
            field.name: value.to(dtype)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.is_floating_point()
        }
        if self.rotary is not None:
            cast["rotary"] = replace(self.rotary, cos=self.rotary.cos.to(dtype), sin=self.rotary.sin.to(dtype))
        return replace(self, **cast)

    def on_cpu(self) -> FrozenLayer:
        """The same on the CPU, in float64: what an accelerator has computed is held against that."""
        moved: dict[str, Any] = {
            field.name: value.cpu() for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)
        }
        if self.rotary is not None:
            moved["rotary"] = replace(self.rotary, cos=self.rotary.cos.cpu(), sin=self.rotary.sin.cpu())
        return replace(self, **moved).to(torch.float64)

    def cap(self, scores: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Scores after the layer's softcap, where it has one: what hook_attn_scores shows. A softcap makes masked
        scores finite: `attention` masks them again.
        """
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def attention(self, scores: Float[Tensor, "*heads pos pos"]) -> Float[Tensor, "*heads pos pos"]:
        """The pattern that scores before softcap make: capped, masked, softmax."""
        return self.cap(scores).masked_fill(~self.mask, -torch.inf).softmax(-1)

    def vectors(self, side: Side, head: int) -> Float[Tensor, "batch pos d_head"]:
        """Queries or keys of one head as they enter the score, biases and rotation included."""
        batch, pos, _ = self.x.shape
        rows = torch.arange(batch * pos, device=self.x.device)
        W, b = self.weights(side, head)
        linear = self.place(side, head, self.x.flatten(0, 1) @ W, rows)
        return (linear + self.place(side, head, b.expand(len(rows), -1), rows, scaled=False)).view(batch, pos, -1)

    def scores(self, head: int) -> Float[Tensor, "batch pos pos"]:
        """Scores of one head before softcap, straight from x; -inf where masked."""
        scores = self.scale * self.vectors("query", head) @ self.vectors("key", head).mT
        return scores.masked_fill(~self.mask, -torch.inf)


def read_present(model: Model, tokens: Tensor, layer: int, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Of the named hooks, in TransformerLens' words, those that fire in one pass up to `layer`; the pass ends when all
    have fired: behind attention scores follow an MLP, and in the last layer the unembedding.
    """
    own = architecture_of(model)
    return seen(model, tokens, layer, {key: name for key, name in names.items() if own.has(name)})


def read_hooks(model: Model, tokens: Tensor, layer: int, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The named hooks of one pass up to `layer`; only those of rotary angles may be silent. Unknown names are refused:
    both model classes of TransformerLens ignore them.
    """
    own = architecture_of(model)
    if LayerHooks(layer).attn_scores in names.values() and own.fires_afterwards(layer):
        raise CannotLoad(f"a {type(model).__name__} shows no scores of layer {layer}: {UNHEARD}.")
    missing = [name for name in names.values() if not own.has(name)]
    if missing:
        if why := attached(model):
            raise FraError(why)
        hint = "; it has no LayerNorm there" if any("ln1" in name for name in missing) else ""
        raise FraError(f"the model has no hook {missing[0]!r}{hint}: use a dictionary at a hook that it has.")
    got = read_present(model, tokens, layer, names)
    absent = [name for key, name in names.items() if key not in got and key not in ANGLES]
    if absent:
        raise FraError(
            f"the hook {absent[0]!r} exists and did not fire: {type(model).__name__} shows no such attention, so it "
            "cannot be resolved; use another model (HookedTransformer shows it where it knows the model)."
        )
    return got


def qk_gain(
    weights: QKWeights, side: Side, inputs: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch n_heads pos"]:
    """The QK-norm's 1/rms for every head and position; ones without QK-norm."""
    W, b, norm = (
        (weights.W_q, weights.b_q, weights.norm_q) if side == "query" else (weights.W_k, weights.b_k, weights.norm_k)
    )
    if norm is None:
        return inputs.new_ones(inputs.shape[0], W.shape[0], inputs.shape[1])
    projected = torch.einsum("btd,hde->bhte", inputs, W) + b[:, None]
    return (projected.pow(2).mean(-1) + norm[1]).rsqrt()


def folded(weights: QKWeights) -> QKWeights:
    """Maps with the QK-norm's weights in them; the norms stay, to say that gains are frozen."""
    q, k = weights.norm_q, weights.norm_k
    one = weights.W_q.new_ones(weights.W_q.shape[-1])
    return replace(
        weights,
        W_q=weights.W_q if q is None else weights.W_q * q[0],
        b_q=weights.b_q if q is None else weights.b_q * q[0],
        W_k=weights.W_k if k is None else weights.W_k * k[0],
        b_k=weights.b_k if k is None else weights.b_k * k[0],
        norm_q=None if q is None else (one, q[1]),
        norm_k=None if k is None else (one, k[1]),
    )


def assemble(
    weights: QKWeights,
    x: Float[Tensor, "batch pos d_model"],
    sigma: Float[Tensor, "batch pos"],
    gains: tuple[Float[Tensor, "batch n_heads pos"], Float[Tensor, "batch n_heads pos"]],
    rotary: Rotary | None,
    model_scores: Float[Tensor, "batch n_heads pos pos"],
    pattern: Float[Tensor, "batch n_heads pos pos"],
) -> FrozenLayer:
    """The frozen layer, of `folded` weights and what a pass has shown."""
    return FrozenLayer(
        layer=weights.layer,
        n_heads=len(weights.W_q),
        hook_name=weights.hook_name,
        x=x,
        sigma=sigma,
        W_q=weights.W_q,
        W_k=weights.W_k,
        b_q=weights.b_q,
        b_k=weights.b_k,
        gain_q=gains[0],
        gain_k=gains[1],
        rotary=rotary,
        scale=weights.scale,
        softcap=weights.softcap,
        mask=weights.mask(x.shape[1]),
        model_scores=model_scores,
        pattern=pattern,
    )


def seen_layer(
    model: Model, weights: QKWeights, seen: Mapping[str, Tensor], scores: Tensor, pattern: Tensor
) -> FrozenLayer:
    """The frozen layer of a pass in which `Architecture.input_hooks` have shown `seen`."""
    dtype = weights.W_q.dtype
    x = seen["x"].to(dtype)
    sigma = seen["sigma"].to(dtype)[..., 0] if "sigma" in seen else x.new_ones(x.shape[:2])
    inputs = x / sigma[..., None]
    gains = qk_gain(weights, "query", inputs), qk_gain(weights, "key", inputs)
    rotary = architecture_of(model).rotary(weights.layer, seen, x.shape[1], dtype)
    return assemble(folded(weights), x, sigma, gains, rotary, scores, pattern)


@torch.no_grad()
def freeze(
    model: Model, tokens: Int[Tensor, "batch pos"], layer: int, hook_name: str, dtype: torch.dtype | None = None
) -> FrozenLayer:
    """Runs `tokens` (documents of equal length) and freezes attention layer `layer`, as read at `hook_name`.

    Raises FraError for a layer, hook or tokens that do not fit the model, and where the model's own scores and pattern
    are not what its weights make (`check_scores`), first where something around the model is why (`circumstance`).
    """
    frozen, got = unchecked(model, tokens, layer, hook_name, dtype)
    try:
        check_scores(frozen, architecture_of(model))
    except FraError as error:
        if why := circumstance(
            model, layer, (got["x"], got.get("scores", frozen.model_scores).masked_fill(~frozen.mask, 0.0))
        ):
            raise FraError(why) from error
        raise
    return frozen


def unchecked(
    model: Model, tokens: Int[Tensor, "batch pos"], layer: int, hook_name: str, dtype: torch.dtype | None = None
) -> tuple[FrozenLayer, dict[str, Tensor]]:
    """`freeze` before its scores are checked, and the hooks that it has read."""
    check_tokens(model, tokens)
    weights = qk_weights(model, layer, hook_name, dtype)
    own, hooks = architecture_of(model), LayerHooks(layer)
    late = own.fires_afterwards(layer)
    shown = {"q": hooks.q, "k": hooks.k} if late else {"scores": hooks.attn_scores}
    got = read_hooks(model, tokens, layer, own.input_hooks(layer, hook_name) | shown | {"pattern": hooks.pattern})
    pattern = got["pattern"].to(weights.W_q.dtype)
    frozen = seen_layer(model, weights, got, got.get("scores", pattern).to(pattern), pattern)
    if late:
        frozen = replace(frozen, model_scores=made_scores(frozen, got["q"], got["k"]))
    return frozen, got


def made_scores(
    frozen: FrozenLayer, q: Float[Tensor, "batch pos *heads"], k: Float[Tensor, "batch pos *heads"]
) -> Float[Tensor, "batch n_heads pos pos"]:
    """What hook_attn_scores would show, of the model's own queries and keys as projected (hook_q, hook_k), where it
    shows something else. `check_scores` holds it against the pattern, and the weights against it.
    """
    batch, pos, _ = frozen.x.shape
    q, k = (vectors.to(frozen.x).reshape(batch, pos, -1, frozen.W_q.shape[-1]).transpose(1, 2) for vectors in (q, k))
    q, k = (
        q * frozen.gain_q[..., None],
        k.repeat_interleave(frozen.n_heads // k.shape[1], dim=1) * frozen.gain_k[..., None],
    )
    if frozen.rotary is not None:
        q, k = (frozen.rotary.rotate(vectors, torch.arange(pos, device=q.device)) for vectors in (q, k))
    return frozen.cap(frozen.scale * q @ k.mT).masked_fill(~frozen.mask, -torch.inf)


def check_scores(frozen: FrozenLayer, architecture: Architecture) -> None:
    """Holds an architecture against a layer's own scores and pattern. Raises FraError where scores hold NaN; where
    softmax(hook_attn_scores) is not hook_pattern; where other keys are masked;
    and where the scores are not those that the weights make.

    The model masks where its pattern is zero: what it shows as the score of a masked key differs between classes.
    """
    where, mask, scores, pattern = f"layer {frozen.layer}", frozen.mask, frozen.model_scores, frozen.pattern
    tolerance, name = architecture.tolerance, type(architecture).__name__
    attended = pattern != 0
    others = FraError(
        f"the model masks other keys in {where} than a causal or sliding-window mask would: attention in both "
        "directions, padding and custom masks are not resolved."
    )
    # First: softmax spreads a NaN over its whole row, masked keys too.
    if bool((scores.isnan() & attended).any()):
        raise FraError(f"the attention scores of {where} hold NaN: check the model's weights.")
    if bool((attended & ~mask).any()):
        raise others
    softmax = scores.masked_fill(~attended, -torch.inf).softmax(-1).masked_fill(~attended, 0.0)
    apart = float((softmax - pattern).abs().max())
    if not apart <= tolerance:
        raise FraError(
            f"softmax of hook_attn_scores is not hook_pattern in {where} (off by {apart:.3g}): the model shows "
            "something else at one of these hooks, or attends to what is no key (attention sinks), so its scores "
            "cannot be resolved."
        )
    for head in range(frozen.n_heads):
        q, k = frozen.vectors("query", head), frozen.vectors("key", head)
        own = (frozen.scale * q @ k.mT).masked_fill(~mask, -torch.inf)
        hidden = mask & ~attended[:, head]
        # A pattern may be zero where softmax has rounded to zero, too; not where the weights make more of it.
        if bool(hidden.any()) and float(frozen.attention(own)[hidden].max()) > tolerance:
            raise others
        size = frozen.scale * q.norm(dim=-1).max() * k.norm(dim=-1).max()
        error = (frozen.cap(own) - scores[:, head]).masked_fill_(~mask, 0.0).abs().max()
        if not float(error) <= tolerance * float(size):
            raise FraError(
                f"the scores of {where} head {head} cannot be reproduced from its weights as {name} reads them (off by "
                f"{float(error):.3g}, where {tolerance * float(size):.3g} is rounding): this architecture's attention "
                "is not one that can be resolved."
            )
