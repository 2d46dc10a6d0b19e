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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from weakref import ref

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.model_bridge import TransformerBridge

from fra.checkpoints.lens import HookedTransformer
from fra.dictionaries.hooks import LayerHooks, is_normalized
from fra.errors import FraError

if TYPE_CHECKING:
    Model: TypeAlias = TransformerBridge | HookedTransformer
else:  # a registered architecture may be of any class with hook points
    Model = TransformerBridge | HookedRootModule

ANGLES = ("cos", "sin")
"""Keys of the hooks that a layer without rotation may have and never fire."""

UNHEARD = (
    "its points of attention fire when attention is over (as TransformerBridge's do for GPT-Neo, GPT-J, OPT and models "
    "in TransformerLens' own format): heads are resolved all the same, and where scores must change, use "
    "HookedTransformer (transformer-lens<4; fra.load_target does)"
)


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
        return torch.cat((turned * self.cos[pos] + self._quarter(turned) * self.sin[pos], kept), dim=-1)

    def relative(self, u: Float[Tensor, "*n d_head"], v: Float[Tensor, "*n d_head"]) -> Float[Tensor, "*n parts"]:
        """What does not depend on positions in <R_t u, R_s v> = relative(u, v) . turns(t - s): by pair of dimensions
        that turn together its cosine's part and its sine's, last what no turn changes.
        """
        rot = self.cos.shape[-1]
        at_zero = self.rotate(v[..., None, :], torch.zeros(1, dtype=torch.long, device=v.device))[..., 0, :]
        first, kept = u[..., :rot], (u[..., rot:] * v[..., rot:]).sum(-1, keepdim=True)
        parts = [self._folded(a * at_zero[..., :rot]) for a in (first, self._quarter(first))]
        return torch.cat((*parts, kept), dim=-1)

    def turns(self, offsets: Int[Tensor, " n"]) -> Float[Tensor, "n parts"]:
        """Cosine and sine of each pair of dimensions at each offset t - s >= 0, and a column of ones."""
        of_pair = slice(None, None, 2) if self.adjacent else slice(self.cos.shape[-1] // 2)
        cos, sin = (table[offsets][:, of_pair] for table in (self.cos, self.sin))
        return torch.cat((cos, sin, torch.ones_like(cos[:, :1])), dim=-1)

    def _quarter(self, v: Float[Tensor, "*n rot"]) -> Float[Tensor, "*n rot"]:
        """A quarter turn further."""
        half = v.shape[-1] // 2
        if self.adjacent:
            return torch.stack((-v[..., 1::2], v[..., ::2]), dim=-1).flatten(-2)
        return torch.cat((-v[..., half:], v[..., :half]), dim=-1)

    def _folded(self, v: Float[Tensor, "*n rot"]) -> Float[Tensor, "*n half"]:
        """Sums over the two dimensions of each pair, which have one angle."""
        half = v.shape[-1] // 2
        return v[..., ::2] + v[..., 1::2] if self.adjacent else v[..., :half] + v[..., half:]


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

    def fires_afterwards(self, layer: int) -> bool:
        """Whether a layer's attn_scores and pattern fire when attention is over: attn_scores does not show scores then
        (they are made of what points q and k show), and an edit of either is not heard.
        """
        return False

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


Side = Literal["query", "key"]
