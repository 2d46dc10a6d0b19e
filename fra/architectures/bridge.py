"""TransformerBridge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from fra.architectures.architecture import ANGLES, Norm, QKNorm, RawOV, RawQK, Rotary
from fra.architectures.shared import TransformerLensArchitecture, raw_ov
from fra.dictionaries.hooks import LayerHooks
from fra.errors import FraError


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
        return self.norm_of(module) if module is not None and self.model.cfg.normalization_type else Norm()

    def _qk_norm(self, attn: Any, name: str) -> QKNorm | None:
        if name not in attn.submodules or getattr(attn, name).original_component is None:
            return None
        norm, eps = getattr(attn, name), self.model.cfg.eps
        own = getattr(norm.original_component, "variance_epsilon", getattr(norm.original_component, "eps", eps))
        return self._multiplier(norm.weight.detach()), float(own)

    def read_qk(self, layer: int) -> RawQK:
        """Scale, softcap and window are attributes of transformers' attention modules (`scaling`,
        `attn_logit_softcapping`, `sliding_window`); GPT-2's divides by sqrt(d_head), and by the layer's number where
        its configuration says so (GPT2Attention.forward); GPT-Neo's by nothing.
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
        elif isinstance(hf, GPTNeoSelfAttention):
            scale = 1.0
        elif hasattr(hf, "accepts_pattern_fn"):  # TransformerLens' own, which divides by it
            scale = 1.0 / float(hf.scale)
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
            softcap=getattr(hf, "attn_logit_softcapping", None) or _positive(getattr(hf, "attn_scores_soft_cap", None)),
            window=self._window(hf, layer),
        )

    def fires_afterwards(self, layer: int) -> bool:
        """Where attention is left to the module inside, whose weights TransformerBridge shows at both points."""
        attn = getattr(self.model.blocks[layer], "attn", None)
        return isinstance(attn, AttentionBridge) and type(attn).forward is AttentionBridge.forward

    def _window(self, hf: Any, layer: int) -> int | None:
        config: Any = getattr(hf, "config", None)
        if isinstance(hf, GPTNeoSelfAttention):
            return int(config.window_size) if config.attention_layers[layer] == "local" else None
        kinds = getattr(config, "layer_types", None)
        if kinds and kinds[layer] == "full_attention":
            return None
        own = hf if hasattr(hf, "sliding_window") else config
        return getattr(own, "sliding_window", None) or None  # 0 stands for none, too

    def read_ov(self, layer: int) -> RawOV:
        """Value heads are not repeated in the Bridge; biases are None where the model has none."""
        attn = self.attention(layer)
        return raw_ov(attn, self._norm(layer))

    def rotary_hooks(self, layer: int) -> dict[str, str]:
        """The Bridge shows the angles of every pass; a layer without rotation (SmolLM3, Cohere 2) never fires them."""
        names = {"cos": LayerHooks(layer).cos, "sin": LayerHooks(layer).sin}
        return names if self.has(names["cos"]) else {}

    def rotary(self, layer: int, seen: Mapping[str, Tensor], n_pos: int, dtype: torch.dtype) -> Rotary | None:
        """Angles as shown, which must be the same for all documents. The Bridge keeps both halves alike; where adjacent
        dimensions turn together, it spreads the first half over the pairs. CodeGen shows none and keeps a table, sines
        before cosines (CodeGenAttentionBridge).
        """
        attn = self.attention(layer).original_component
        table = getattr(attn, "embed_positions", None)
        if isinstance(table, Tensor):
            home = next(attn.parameters()).device  # a model may lie on several
            sin, cos = (half.repeat_interleave(2, dim=1) for half in table[:n_pos].to(home, dtype).chunk(2, dim=1))
            return Rotary(cos, sin, adjacent=True)
        if "cos" not in seen:
            return None
        adjacent = bool(getattr(self.model.cfg, "rotary_adjacent_pairs", False))
        shown = [seen[key].reshape(-1, n_pos, seen[key].shape[-1]) for key in ANGLES]
        if any(len(rows) > 1 and not bool((rows == rows[:1]).all()) for rows in shown):
            raise FraError(
                f"the documents of this batch are rotated by different angles in layer {layer} (some are padded on the "
                "left, or have positions of their own): pad on the right, or run them one by one."
            )
        cos, sin = (rows[0].to(dtype) for rows in shown)
        if adjacent:
            cos, sin = (part[:, : part.shape[1] // 2].repeat_interleave(2, dim=1) for part in (cos, sin))
        return Rotary(cos, sin, adjacent)


def _positive(softcap: float | None) -> float | None:
    """TransformerLens says -1 where there is none."""
    return softcap if softcap is not None and softcap > 0 else None
