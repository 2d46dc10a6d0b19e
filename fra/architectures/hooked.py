"""HookedTransformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fra.architectures.architecture import Norm, RawOV, RawQK, Rotary
from fra.architectures.shared import TransformerLensArchitecture, raw_ov
from fra.errors import FraError


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
        for flag in ("use_split_qkv_input", "use_attn_in"):
            if getattr(cfg, flag, False):
                raise FraError(
                    f"the model's attention input is split by head ({flag}): switch that off "
                    f"(model.set_{flag}(False)) before it is resolved."
                )
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
        return raw_ov(self.attention(layer), self.norm_of(self.model.blocks[layer].ln1))

    def rotary(self, layer: int, seen: Mapping[str, Tensor], n_pos: int, dtype: torch.dtype) -> Rotary | None:
        """Rows of the layer's table, the same for every document."""
        if self.model.cfg.positional_embedding_type != "rotary":
            return None
        attn, adjacent = self.attention(layer), bool(getattr(self.model.cfg, "rotary_adjacent_pairs", False))
        return Rotary(attn.rotary_cos[:n_pos].to(dtype), attn.rotary_sin[:n_pos].to(dtype), adjacent)
