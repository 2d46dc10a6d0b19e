"""What TransformerLens' two classes of models have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fra.architectures.architecture import Architecture, Norm, RawOV
from fra.errors import FraError


class TransformerLensArchitecture(Architecture, ABC):
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

    @abstractmethod
    def norm_of(self, module: Any) -> Norm:
        """A norm's weight as it multiplies, its bias, and whether it centres: each class keeps them in its own way."""

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


def raw_ov(attn: Any, norm: Norm) -> RawOV:
    """Values and outputs of an attention component, value heads repeated over their groups."""
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
