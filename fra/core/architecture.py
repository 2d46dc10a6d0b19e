"""What is particular to a model's family, in one object: names, weights, norms, positions, scale, masks, precision.

Everything else in `fra` holds for any attention of this form, which an `Architecture` fills in and which `freeze` and
`resolve_output` hold against the model's own numbers (`fra.core.frozen.check_scores`, `check_output`):

    n(x)    = ((x - mean x, where the norm centres) / sigma) * w + b         sigma from the model's own pass
    q, k    = n(x) @ W_Q + b_Q,  n(x) @ W_K + b_K                            key heads repeated over their groups
    q, k    = q / rms(q) * w_q,  k / rms(k) * w_k                            where there is a QK-norm
    q, k    = R_t q, R_s k                                                   where positions rotate
    scores  = cap(scale * <q_t, k_s>),  cap(u) = c tanh(u / c)               what hook_attn_scores shows where unmasked
    pattern = softmax over the keys 0 <= t - s < window                      hook_pattern
    z       = pattern @ (n(x) @ W_V + b_V),  result = z @ W_O                hook_z

The two classes of TransformerLens are two Architectures. A model of another class gets one by `register_architecture`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedRootModule, HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge

from fra.dictionaries.hooks import LayerHooks, is_normalized
from fra.errors import FraError

if TYPE_CHECKING:
    Model: TypeAlias = TransformerBridge | HookedTransformer
else:  # a registered architecture may be of any class with hook points
    Model = TransformerBridge | HookedRootModule

ANGLES = ("cos", "sin")
"""Keys of the hooks that a layer without rotation may have and never fire."""


@dataclass(frozen=True)
class Norm:
    """All of a norm but its scale, which is frozen at what a pass shows: x -> (x - mean, where `centred`) / scale *
    weight + bias.
    """

    weight: Float[Tensor, " d_model"] | None = None
    """As it multiplies: a family that stores it minus one has one added. None where there is none, or it was folded."""
    bias: Float[Tensor, " d_model"] | None = None
    centred: bool = False

    def fold(
        self, W: Float[Tensor, "n_heads d_model d_head"], b: Float[Tensor, "n_heads d_head"]
    ) -> tuple[Float[Tensor, "n_heads d_model d_head"], Float[Tensor, "n_heads d_head"]]:
        """W' and b' with (norm of x) @ W + b = (x / scale) @ W' + b', in the precision of W: W' = C diag(weight) W,
        where C takes the mean out, and b' = b + bias @ W.
        """
        if self.bias is not None:
            b = b + self.bias.detach().to(W) @ W
        if self.weight is not None:
            W = self.weight.detach().to(W)[:, None] * W
        return (W - W.mean(dim=1, keepdim=True) if self.centred else W), b

    def weight_or_ones(self, like: Float[Tensor, "*rows d_model"]) -> Float[Tensor, " d_model"]:
        """The weight in the precision of `like`; ones where there is none."""
        return like.new_ones(like.shape[-1]) if self.weight is None else self.weight.detach().to(like)


QKNorm: TypeAlias = tuple[Float[Tensor, " d_head"], float]
"""Weight and epsilon of an RMS norm of each head's queries or keys."""


@dataclass(frozen=True)
class RawQK:
    """What a layer holds of queries and keys, nothing folded; key heads repeated over their groups."""

    W_Q: Float[Tensor, "n_heads d_model d_head"]
    W_K: Float[Tensor, "n_heads d_model d_head"]
    b_Q: Float[Tensor, "n_heads d_head"]
    b_K: Float[Tensor, "n_heads d_head"]
    norm: Norm
    """The norm before attention."""
    scale: float
    """What <q, k> is multiplied by."""
    norm_q: QKNorm | None = None
    norm_k: QKNorm | None = None
    softcap: float | None = None
    window: int | None = None
    """Keys at a distance of `window` or more are masked; None where only the future is."""


@dataclass(frozen=True)
class RawOV:
    """What a layer holds of values and outputs, nothing folded; value heads repeated over their groups."""

    W_V: Float[Tensor, "n_heads d_model d_head"]
    b_V: Float[Tensor, "n_heads d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    norm: Norm
    b_O: Float[Tensor, " d_model"] | None = None


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


class Architecture:
    """What is particular to a family, for one model; made by `architecture_of` and never by hand.

    For a model that `fra` does not know, subclass this, give it `names`, `read_qk` and `read_ov` (and `rotary` where
    positions rotate), and hand it to `fra.register_architecture`. The model is a TransformerLens HookedRootModule: its
    hook points are found by `hook_dict`, a pass is `model(tokens)` with `tokens` [batch, pos]. Of the points,
    `LayerHooks` lists names and shapes; needed are those of the dictionary, the norm's scale where the dictionary lies
    before the norm, attn_scores and pattern, z for outputs, v for attribution.

    Weights are read anew at every call, so that an edit of the model is seen.
    """

    names: Mapping[str, str] = {}
    """{name in TransformerLens' words: the model's own}, for the points that it calls otherwise. A dictionary's
    metadata (`hook_name`) is in TransformerLens' words, too."""

    def __init__(self, model: Any) -> None:
        self._model = ref(model)  # the cache of architectures must not keep models alive

    @property
    def model(self) -> Any:
        """The model that this is of."""
        model = self._model()
        if model is None:
            raise FraError("the model of this architecture is gone: ask architecture_of anew.")
        return model

    # Sizes

    @property
    def n_layers(self) -> int:
        """Layers, numbered from 0. This and the other sizes are of `model.cfg` unless a subclass says otherwise."""
        return int(self.model.cfg.n_layers)

    @property
    def n_heads(self) -> int:
        """Query heads of a layer."""
        return int(self.model.cfg.n_heads)

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return int(self.model.cfg.d_head)

    @property
    def n_ctx(self) -> int:
        """Tokens in the longest text."""
        return int(self.model.cfg.n_ctx)

    @property
    def d_vocab(self) -> int:
        """Token ids, from 0."""
        return int(self.model.cfg.d_vocab)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the model's weights."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def tolerance(self) -> float:
        """How far, as a share of the largest product, the model's own numbers may be off what is made of its weights:
        by the weights' precision, since a model may show scores in a wider one than it computed their inputs in.
        """
        return 1e-4 if self.dtype in (torch.float32, torch.float64) else 5e-2

    # Names

    def point(self, hook: str) -> str:
        """The model's own name of a point that is named in TransformerLens' words; other names are taken as own."""
        return self.names.get(hook, hook)

    def hook(self, point: str) -> str:
        """The name in TransformerLens' words of one of the model's own points."""
        return next((hook for hook, own in self.names.items() if own == point), point)

    def has(self, hook: str) -> bool:
        """Whether the model has such a point."""
        return self.point(hook) in self.model.hook_dict

    def input_hooks(self, layer: int, hook_name: str) -> dict[str, str]:
        """The points that freeze a layer as a dictionary at `hook_name` reads it: "x", where it has one the norm's
        scale as "sigma", and those that `rotary` asks for.
        """
        names = {"x": hook_name}
        if not is_normalized(hook_name) and self.has(LayerHooks(layer).scale):
            names["sigma"] = LayerHooks(layer).scale
        return names | self.rotary_hooks(layer)

    def until(self, layer: int) -> dict[str, Any]:
        """Keyword arguments of a pass that may end behind this layer."""
        return {}

    # Attention

    def read_qk(self, layer: int) -> RawQK:
        """Queries and keys of a layer. Raises FraError where its scores are no such form."""
        raise FraError(f"{type(self).__name__} does not say how queries and keys are read: give it read_qk.")

    def read_ov(self, layer: int) -> RawOV:
        """Values and outputs of a layer. Raises FraError where it has none."""
        raise FraError(f"{type(self).__name__} does not say how values and outputs are read: give it read_ov.")

    def rotary_hooks(self, layer: int) -> dict[str, str]:
        """Points that `rotary` reads in a pass, by the keys that it knows them by."""
        return {}

    def rotary(self, layer: int, seen: Mapping[str, Tensor], n_pos: int, dtype: torch.dtype) -> Rotary | None:
        """The rotation of positions 0 to n_pos - 1; None where the layer does not rotate. seen: what the points of
        `rotary_hooks` showed in this pass; a point that did not fire is missing.
        """
        return None

    def held(self, layer: int, name: str) -> Tensor | None:
        """W_Q, W_K, b_Q or b_K as the model holds it, for an edit in place: a view, grouped heads not repeated. None
        where the layer has no such weight.
        """
        raise FraError(f"{type(self).__name__} does not say how its weights are edited: give it held.")

    # The rest of the model

    def norm_after(self, layer: int) -> Norm | None:
        """The norm between attention and the residual stream, where there is one."""
        return None

    def final_norm(self) -> Norm | None:
        """The norm before the unembedding, where there is one."""
        return None

    @property
    def blocks(self) -> Sequence[Any]:
        """The layers as modules that can be called one after another; none where only the whole model can be run."""
        return ()

    def normed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The last residual stream behind the final norm, its scale included."""
        raise FraError(f"{type(self).__name__} does not say how logits are read: give it normed and unembed.")

    def unembed(self, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Logits, before a softcap of logits, of what stands behind the final norm."""
        raise FraError(f"{type(self).__name__} does not say how logits are read: give it normed and unembed.")

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        raise FraError(f"{type(self).__name__} does not say what its unembedding is: give it W_U.")

    @property
    def logits_softcap(self) -> float | None:
        """c, where logits are c tanh(logits / c)."""
        return None

    def readout(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Logits of a last residual stream: final norm, unembedding and the softcap of logits, where there is one."""
        logits, cap = self.unembed(self.normed(resid)), self.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class TransformerLensArchitecture(Architecture):
    """What TransformerBridge and HookedTransformer have in common."""

    def until(self, layer: int) -> dict[str, Any]:
        """Both end a pass before the layer of this number."""
        return {"stop_at_layer": layer + 1}

    def attention(self, layer: int) -> Any:
        """The attention component of a layer. Raises FraError where it has none."""
        attn = getattr(self.model.blocks[layer], "attn", None)
        if attn is None:
            raise FraError(f"layer {layer} has no attention component.")
        return attn

    def bilinear(self, layer: int) -> Any:
        """The attention component of a layer whose positions enter the score by rotation or not at all."""
        kind = getattr(self.model.cfg, "positional_embedding_type", "standard")
        if kind in ("alibi", "relative_positional_bias", "shortformer"):
            raise FraError(
                f"positions of type {kind!r} add to the scores or the "
                "attention input, which is not resolved: use another model."
            )
        return self.attention(layer)

    def held(self, layer: int, name: str) -> Tensor | None:
        """Grouped keys in HookedTransformer are held as _W_K, and W_K is made of them."""
        attn = self.attention(layer)
        found = getattr(attn, f"_{name}", getattr(attn, name, None))
        return None if found is None else found.data

    def norm_of(self, module: Any) -> Norm:
        """A norm's weight as it multiplies, its bias, and whether it centres."""
        raise NotImplementedError

    def norm_after(self, layer: int) -> Norm | None:
        """ln1_post, of Gemma 2 and 3."""
        module = getattr(self.model.blocks[layer], "ln1_post", None)
        return None if module is None else self.norm_of(module)

    def final_norm(self) -> Norm | None:
        """ln_final, unless the model is without norms."""
        module = getattr(self.model, "ln_final", None)
        return None if module is None or not self.model.cfg.normalization_type else self.norm_of(module)

    @property
    def blocks(self) -> Sequence[Any]:
        """Every block takes the residual stream first."""
        return list(self.model.blocks)

    def normed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Through ln_final, where there is one."""
        norm = getattr(self.model, "ln_final", None)
        found: Tensor = resid if norm is None else norm(resid)
        return found

    def unembed(self, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """With b_U, where there is one."""
        logits: Tensor = self.model.unembed(normed)
        return logits

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        W_U: Tensor = self.model.W_U.detach()
        return W_U

    @property
    def logits_softcap(self) -> float | None:
        """TransformerLens says -1 where there is none."""
        cap = float(getattr(self.model.cfg, "output_logits_soft_cap", None) or -1.0)
        return cap if cap > 0 else None


class BridgeArchitecture(TransformerLensArchitecture):
    """TransformerBridge: a model of transformers inside, whose modules tell the truth about scale, rotary dimension and
    QK-norm where the Bridge's own cfg does not; windows are those of the layer's type.
    """

    def _multiplier(self, weight: Tensor) -> Tensor:
        """Gemma's RMSNorm multiplies by 1 + weight, in single precision at least (transformers'
        GemmaRMSNorm.forward).
        """
        if not getattr(self.model.cfg, "rmsnorm_uses_offset", False):
            return weight
        return 1.0 + (weight if weight.dtype == torch.float64 else weight.float())

    def norm_of(self, module: Any) -> Norm:
        """A LayerNorm centres and has a bias, an RMSNorm neither."""
        weight, rms = getattr(module, "weight", None), bool(module.uses_rms_norm)
        bias = None if rms else getattr(module.original_component, "bias", None)
        return Norm(None if weight is None else self._multiplier(weight), bias, not rms)

    def _norm(self, layer: int) -> Norm:
        module = getattr(self.model.blocks[layer], "ln1", None)
        return Norm() if module is None else self.norm_of(module)

    def _qk_norm(self, attn: Any, name: str) -> QKNorm | None:
        if name not in attn.submodules or getattr(attn, name).original_component is None:
            return None
        norm, eps = getattr(attn, name), self.model.cfg.eps
        own = getattr(norm.original_component, "variance_epsilon", getattr(norm.original_component, "eps", eps))
        return self._multiplier(norm.weight.detach()), float(own)

    def read_qk(self, layer: int) -> RawQK:
        """Scale, softcap and window are attributes of transformers' attention modules (`scaling`,
        `attn_logit_softcapping`, `sliding_window`); GPT-2's divides by sqrt(d_head), and by the layer's number where
        its configuration says so (GPT2Attention.forward).
        """
        attn = self.bilinear(layer)
        hf = attn.original_component
        W_Q, W_K = attn.W_Q, attn.W_K
        groups = W_Q.shape[0] // W_K.shape[0]
        zeros = W_Q.new_zeros(W_Q.shape[0], W_Q.shape[-1])
        scale = float(W_Q.shape[-1] ** -0.5)
        if isinstance(attn, JointQKVAttentionBridge):
            if getattr(self.model.cfg, "scale_attn_by_inverse_layer_idx", False):
                scale /= layer + 1
        else:
            scale = float(getattr(hf, "scaling", scale))
        return RawQK(
            W_Q=W_Q,
            W_K=W_K.repeat_interleave(groups, dim=0),
            b_Q=zeros if attn.b_Q is None else attn.b_Q,
            b_K=zeros if attn.b_K is None else attn.b_K.repeat_interleave(groups, dim=0),
            norm=self._norm(layer),
            scale=scale,
            norm_q=self._qk_norm(attn, "q_norm"),
            norm_k=self._qk_norm(attn, "k_norm"),
            softcap=getattr(hf, "attn_logit_softcapping", None),
            window=self._window(hf, layer),
        )

    def _window(self, hf: Any, layer: int) -> int | None:
        config = getattr(hf, "config", None)
        kinds = getattr(config, "layer_types", None)
        if kinds and kinds[layer] == "full_attention":
            return None
        own = hf if hasattr(hf, "sliding_window") else config
        return getattr(own, "sliding_window", None) or None  # 0 stands for none, too

    def read_ov(self, layer: int) -> RawOV:
        """Value heads are not repeated in the Bridge; biases are None where the model has none."""
        attn = self.attention(layer)
        return _raw_ov(attn, self._norm(layer))

    def rotary_hooks(self, layer: int) -> dict[str, str]:
        """The Bridge shows the angles of every pass; a layer without rotation (SmolLM3, Cohere 2) never fires them."""
        names = {"cos": LayerHooks(layer).cos, "sin": LayerHooks(layer).sin}
        return names if self.has(names["cos"]) else {}

    def rotary(self, layer: int, seen: Mapping[str, Tensor], n_pos: int, dtype: torch.dtype) -> Rotary | None:
        """Angles as shown, of the first document. The Bridge keeps both halves alike; where adjacent dimensions turn
        together, it spreads the first half over the pairs. CodeGen shows none and keeps a table, sines before cosines
        (CodeGenAttentionBridge).
        """
        table = getattr(self.attention(layer).original_component, "embed_positions", None)
        if isinstance(table, Tensor):
            sin, cos = (
                half.repeat_interleave(2, dim=1) for half in table[:n_pos].to(self.device, dtype).chunk(2, dim=1)
            )
            return Rotary(cos, sin, adjacent=True)
        if "cos" not in seen:
            return None
        adjacent = bool(getattr(self.model.cfg, "rotary_adjacent_pairs", False))
        cos, sin = (seen[key].reshape(-1, n_pos, seen[key].shape[-1])[0].to(dtype) for key in ANGLES)
        if adjacent:
            cos, sin = (part[:, : part.shape[1] // 2].repeat_interleave(2, dim=1) for part in (cos, sin))
        return Rotary(cos, sin, adjacent)


class HookedArchitecture(TransformerLensArchitecture):
    """HookedTransformer: grouped keys already repeated, norm weights complete, angles in a table; `attn_scale` is what
    scores are divided by (AbstractAttention.calculate_attention_scores).
    """

    def norm_of(self, module: Any) -> Norm:
        """LayerNormPre and RMSNormPre have no weight: it is folded."""
        centred = (self.model.cfg.normalization_type or "").startswith("LN")
        return Norm(getattr(module, "w", None), getattr(module, "b", None), centred)

    def read_qk(self, layer: int) -> RawQK:
        """A local layer sees `window_size` keys; a softcap of -1 is none."""
        attn, cfg = self.bilinear(layer), self.model.cfg
        normed = attn.q_norm is not None
        return RawQK(
            W_Q=attn.W_Q,
            W_K=attn.W_K,
            b_Q=attn.b_Q,
            b_K=attn.b_K,
            norm=self.norm_of(self.model.blocks[layer].ln1),
            scale=1.0 / float(attn.attn_scale),
            norm_q=(attn.q_norm.w.detach(), float(cfg.eps)) if normed else None,
            norm_k=(attn.k_norm.w.detach(), float(cfg.eps)) if normed else None,
            softcap=float(cfg.attn_scores_soft_cap) if cfg.attn_scores_soft_cap > 0 else None,
            window=cfg.window_size if attn.attn_type == "local" else None,
        )

    def read_ov(self, layer: int) -> RawOV:
        """Value heads are already repeated."""
        return _raw_ov(self.attention(layer), self.norm_of(self.model.blocks[layer].ln1))

    def rotary(self, layer: int, seen: Mapping[str, Tensor], n_pos: int, dtype: torch.dtype) -> Rotary | None:
        """Rows of the layer's table, the same for every document."""
        if self.model.cfg.positional_embedding_type != "rotary":
            return None
        attn, adjacent = self.attention(layer), bool(getattr(self.model.cfg, "rotary_adjacent_pairs", False))
        return Rotary(attn.rotary_cos[:n_pos].to(dtype), attn.rotary_sin[:n_pos].to(dtype), adjacent)


def _raw_ov(attn: Any, norm: Norm) -> RawOV:
    W_V, W_O = attn.W_V, attn.W_O
    groups = len(W_O) // len(W_V)
    b_V = W_V.new_zeros(len(W_V), W_V.shape[-1]) if attn.b_V is None else attn.b_V
    return RawOV(
        W_V=W_V.repeat_interleave(groups, dim=0),
        b_V=b_V.repeat_interleave(len(W_O) // len(b_V), dim=0),
        W_O=W_O,
        norm=norm,
        b_O=getattr(attn, "b_O", None),
    )


Matches: TypeAlias = type | Callable[[Any], bool]
"""A class of models, or a function that says whether it is about a model."""

_KNOWN: list[tuple[Matches, Callable[[Any], Architecture]]] = [
    (TransformerBridge, BridgeArchitecture),
    (HookedTransformer, HookedArchitecture),
]
_MADE: WeakKeyDictionary[Any, Architecture] = WeakKeyDictionary()


def register_architecture(matches: Matches, architecture: Callable[[Any], Architecture]) -> Callable[[], None]:
    """Teaches `fra` the models that `matches` is about, from now on and before all that were known: returns a function
    that takes it back.

    matches: a class of models, or a function of a model. architecture: what makes an `Architecture` of a model,
    generally a subclass. It is believed nowhere: `fra.resolve`, `fra.census` and interventions refuse a layer whose
    scores are not those of its weights, `fra.resolve_output` one whose z is not pattern times values.

        class Mine(fra.Architecture):
            names = {"blocks.0.hook_resid_pre": "layers.0.input", ...}
            def read_qk(self, layer): return fra.RawQK(W_Q=..., W_K=..., b_Q=..., b_K=..., norm=fra.Norm(), scale=...)
            def read_ov(self, layer): return fra.RawOV(W_V=..., b_V=..., W_O=..., norm=fra.Norm())

        fra.register_architecture(MyModel, Mine)

    Raises FraError for what can match or make nothing.
    """
    for given in (matches, architecture):
        if not callable(given):
            raise FraError(f"{given!r} cannot be registered: give a class or a function of a model.")
    entry = (matches, architecture)
    _KNOWN.insert(0, entry)
    _MADE.clear()

    def take_back() -> None:
        if entry in _KNOWN:
            _KNOWN.remove(entry)
            _MADE.clear()

    return take_back


def architecture_of(model: Model) -> Architecture:
    """The architecture of a model, made once. Raises FraError for a model that nothing registered is about."""
    made = _MADE.get(model)
    if made is not None:
        return made
    for matches, make in _KNOWN:
        if isinstance(model, matches) if isinstance(matches, type) else matches(model):
            made = make(model)
            if not isinstance(made, Architecture):
                raise FraError(f"what was registered for {type(model).__name__} made no Architecture but {made!r}.")
            _MADE[model] = made
            return made
    raise FraError(
        f"{type(model).__name__} is a model of a class that fra does not "
        "know: give it an architecture with fra.register_architecture."
    )


def check_layer_and_head(model: Model, layer: int, head: int | None = None) -> None:
    """Raises FraError where the model has no such layer or query head."""
    own = architecture_of(model)
    for what, index, size in (("layer", layer, own.n_layers), ("head", head, own.n_heads)):
        if index is not None and not 0 <= index < size:
            raise FraError(f"{what} {index} is out of range: the model has {size} {what}s, 0 to {size - 1}.")


def check_tokens(model: Model, tokens: Int[Tensor, "batch pos"]) -> None:
    """Raises FraError for empty tokens, ids outside the vocabulary, and text longer than the model's context."""
    if tokens.numel() == 0:
        raise FraError("tokens are empty: give at least one token.")
    own = architecture_of(model)
    n_ctx, d_vocab = own.n_ctx, own.d_vocab
    if tokens.shape[1] > n_ctx:
        raise FraError(f"the text has {tokens.shape[1]} tokens and the model's context holds {n_ctx}: shorten it.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise FraError(
            f"token id {low if low < 0 else high} is outside the vocabulary "
            f"of {d_vocab}: tokenize with this model's own tokenizer."
        )


def working_dtype(model: Model, dtype: torch.dtype | None = None) -> torch.dtype:
    """The precision that is computed in: `dtype`, else the model's own, half precisions raised to float32."""
    own = dtype or architecture_of(model).dtype
    return own if own in (torch.float32, torch.float64) else torch.float32


Side = Literal["query", "key"]
