"""One attention layer on one batch of documents, with everything but its input frozen.

Once the normalisation scale and the QK-norm gain are frozen, a head's score is bilinear in the attention input. This
module reads the weights, scales, rotations and masks that make it so out of a TransformerLens model, and refuses a
model whose own scores it cannot reproduce.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from fra.core.weights import Model, QKWeights, check_layer_and_head, qk_weights
from fra.dictionaries.hooks import attention_input_layer
from fra.errors import FraError

__all__ = [
    "FrozenLayer",
    "Model",
    "Rotary",
    "Side",
    "attention_input_layer",
    "check_layer_and_head",
    "check_tokens",
    "freeze",
    "qk_weights",
]

Side = Literal["query", "key"]


def check_tokens(model: Model, tokens: Int[Tensor, "batch pos"]) -> None:
    """Raises FraError for empty tokens, ids outside the vocabulary, and text longer than the model's context."""
    if tokens.numel() == 0:
        raise FraError("tokens are empty: give at least one token.")
    n_ctx, d_vocab = int(model.cfg.n_ctx), int(model.cfg.d_vocab)
    if tokens.shape[1] > n_ctx:
        raise FraError(f"the text has {tokens.shape[1]} tokens and the model's context holds {n_ctx}: shorten it.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise FraError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {d_vocab}: tokenize with this model's "
            f"own tokenizer."
        )


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of one layer, on the first `rot` dimensions of a head."""

    cos: Float[Tensor, "pos rot"]
    sin: Float[Tensor, "pos rot"]
    adjacent: bool
    """True: dimensions (0,1), (2,3), ... turn together (GPT-J, GLM); False: (i, i + rot/2) (Llama, NeoX)."""

    def rotate(self, v: Float[Tensor, "*batch n d_head"], pos: Int[Tensor, " n"]) -> Float[Tensor, "*batch n d_head"]:
        """`v[..., n, :]` turned by the angles of position `pos[n]`."""
        rot = self.cos.shape[-1]
        turned, kept = v[..., :rot], v[..., rot:]
        if self.adjacent:
            quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        else:
            quarter = torch.cat((-turned[..., rot // 2 :], turned[..., : rot // 2]), dim=-1)
        return torch.cat((turned * self.cos[pos] + quarter * self.sin[pos], kept), dim=-1)


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
    """The model's own hook_attn_scores, after softcap; its values where masked differ between model classes."""
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

    def cap(self, scores: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Scores after the layer's softcap, where it has one: what hook_attn_scores shows."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

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


def read_hooks(model: Model, tokens: Tensor, layer: int, names: dict[str, str]) -> dict[str, Tensor]:
    """The named hooks of one forward pass up to `layer`. Unknown names are refused: both model classes ignore them
    silently.
    """
    missing = [name for name in names.values() if name not in model.hook_dict]
    if missing:
        hint = "; it has no LayerNorm there" if any("ln1" in name for name in missing) else ""
        raise FraError(f"the model has no hook {missing[0]!r}{hint}: use a dictionary at a hook that it has.")
    _, cache = model.run_with_cache(tokens, names_filter=list(names.values()), stop_at_layer=layer + 1)
    absent = [name for name in names.values() if name not in cache]
    if absent:
        raise FraError(
            f"the hook {absent[0]!r} exists and did not fire: this attention cannot be observed; load the model as "
            f"HookedTransformer."
        )
    return {key: cache[name] for key, name in names.items()}


def rotary_of(model: Model, layer: int, got: dict[str, Tensor], pos: int, dtype: torch.dtype) -> Rotary | None:
    adjacent = bool(getattr(model.cfg, "rotary_adjacent_pairs", False))
    if isinstance(model, HookedTransformer):
        if model.cfg.positional_embedding_type != "rotary":
            return None
        attn: Any = model.blocks[layer].attn
        return Rotary(attn.rotary_cos[:pos].to(dtype), attn.rotary_sin[:pos].to(dtype), adjacent)
    if "cos" not in got:
        return None
    cos, sin = (got[key].reshape(-1, pos, got[key].shape[-1])[0].to(dtype) for key in ("cos", "sin"))
    if adjacent:
        # The Bridge keeps both halves alike and spreads the first over adjacent pairs.
        cos, sin = (part[:, : part.shape[1] // 2].repeat_interleave(2, dim=1) for part in (cos, sin))
    return Rotary(cos, sin, adjacent)


def folded_gain(weights: QKWeights, side: Side, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W and b with the QK-norm's weight folded in, and its 1/rms for every head and position (ones without QK-norm)."""
    W, b, norm = (
        (weights.W_q, weights.b_q, weights.norm_q) if side == "query" else (weights.W_k, weights.b_k, weights.norm_k)
    )
    if norm is None:
        return W, b, inputs.new_ones(inputs.shape[0], W.shape[0], inputs.shape[1])
    weight, eps = norm
    projected = torch.einsum("btd,hde->bhte", inputs, W) + b[:, None]
    return W * weight, b * weight, (projected.pow(2).mean(-1) + eps).rsqrt()


@torch.no_grad()
def freeze(
    model: Model, tokens: Int[Tensor, "batch pos"], layer: int, hook_name: str, dtype: torch.dtype | None = None
) -> FrozenLayer:
    """Runs `tokens` (documents of equal length) and freezes attention layer `layer`, as read at `hook_name`.

    Raises FraError for a layer, hook or tokens that do not fit the model; where softmax(hook_attn_scores) is not
    hook_pattern (plain attention in TransformerBridge: load the model as HookedTransformer); where scores hold NaN; and
    where the scores of this module differ from the model's.
    """
    check_tokens(model, tokens)
    weights = qk_weights(model, layer, hook_name, dtype)
    block = f"blocks.{layer}"
    names = {"x": hook_name, "scores": f"{block}.attn.hook_attn_scores", "pattern": f"{block}.attn.hook_pattern"}
    before_norm = not hook_name.endswith("hook_normalized")
    if before_norm and f"{block}.ln1.hook_scale" in model.hook_dict:
        names["sigma"] = f"{block}.ln1.hook_scale"
    if isinstance(model, TransformerBridge) and f"{block}.attn.hook_cos" in model.hook_dict:
        names |= {"cos": f"{block}.attn.hook_cos", "sin": f"{block}.attn.hook_sin"}
    home = weights.W_q.device
    got = read_hooks(model, tokens.to(home), layer, names)
    target = weights.W_q.dtype
    pos = tokens.shape[1]
    x = got["x"].to(target)
    sigma = got["sigma"].to(target)[..., 0] if "sigma" in got else x.new_ones(x.shape[:2])
    ahead = torch.arange(pos, device=home)[:, None] - torch.arange(pos, device=home)
    mask = (ahead >= 0) & (ahead < (pos if weights.window is None else weights.window))
    inputs = x / sigma[..., None]
    W_q, b_q, gain_q = folded_gain(weights, "query", inputs)
    W_k, b_k, gain_k = folded_gain(weights, "key", inputs)
    frozen = FrozenLayer(
        layer=layer,
        n_heads=W_q.shape[0],
        hook_name=hook_name,
        x=x,
        sigma=sigma,
        W_q=W_q,
        W_k=W_k,
        b_q=b_q,
        b_k=b_k,
        gain_q=gain_q,
        gain_k=gain_k,
        rotary=rotary_of(model, layer, got, pos, target),
        scale=weights.scale,
        softcap=weights.softcap,
        mask=mask,
        model_scores=got["scores"].to(target),
        pattern=got["pattern"].to(target),
    )
    _check_frozen(frozen, got["scores"].dtype)
    return frozen


def _check_frozen(frozen: FrozenLayer, dtype: torch.dtype) -> None:
    """Refuses a layer whose hooks or formula are not what this module takes them for. `dtype` is the model's."""
    where, mask, scores = f"layer {frozen.layer}", frozen.mask, frozen.model_scores
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    if bool(scores.isnan().any()):
        raise FraError(f"the attention scores of {where} hold NaN: check the model's weights.")
    seen = scores > torch.finfo(dtype).min / 2  # masked: -inf in one model class, finfo.min in the other
    softmax = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    if float((softmax - frozen.pattern).abs().max()) > tolerance:
        raise FraError(
            f"softmax of hook_attn_scores is not hook_pattern in {where}: this model class shows something else at "
            f"that hook "
            "(TransformerBridge does for GPT-Neo, GPT-J and OPT; attention sinks do too); load the model as "
            "HookedTransformer."
        )
    if not bool((seen == mask).all()):
        raise FraError(
            f"the model masks other keys in {where} than a causal or sliding-window mask would: padding and custom "
            f"masks are not resolved."
        )
    for head in range(frozen.n_heads):
        size = (
            frozen.scale
            * frozen.vectors("query", head).norm(dim=-1).max()
            * frozen.vectors("key", head).norm(dim=-1).max()
        )
        error = (frozen.cap(frozen.scores(head)) - scores[:, head])[:, mask].abs().max()
        if not float(error) <= tolerance * float(size):
            raise FraError(
                f"the scores of {where} head {head} cannot be reproduced from its weights (off by {float(error):.3g}): "
                "this architecture's attention is not one that can be resolved."
            )
