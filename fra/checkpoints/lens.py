"""What differs between versions of TransformerLens: 3 has HookedTransformer and its loading; 4 has neither, and makes
models in its own format a TransformerBridge.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from fra.errors import FraError

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer, HookedTransformerConfig, loading_from_pretrained
    from transformer_lens.model_bridge import TransformerBridge
else:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig, loading_from_pretrained
    except ImportError:  # TransformerLens 4

        class HookedTransformer:
            """No model is one."""

        HookedTransformerConfig = loading_from_pretrained = None

__all__ = [
    "HookedTransformer",
    "HookedTransformerConfig",
    "has_hooked",
    "load_native",
    "loading_from_pretrained",
    "model_names",
]

_NATIVE = {
    *("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "d_vocab_out", "n_key_value_heads"),
    *("act_fn", "eps", "normalization_type", "final_rms", "gated_mlp", "attn_only", "attn_scale"),
    *("attn_scores_soft_cap", "output_logits_soft_cap", "attention_dir"),
}
"""What TransformerLens 4's own models do as a configuration says."""
_NO_MATTER = {
    *("device", "dtype", "init_weights", "seed", "init_mode", "initializer_range", "n_devices", "n_params"),
    *("model_name", "tokenizer_name", "original_architecture", "default_prepend_bos", "default_padding_side"),
    *("tokenizer_prepends_bos", "from_checkpoint", "checkpoint_index", "checkpoint_value", "checkpoint_label_type"),
    *("use_hook_tokens", "use_hook_mlp_in", "use_attn_result", "use_attn_in", "use_split_qkv_input", "tokenizer"),
}
"""What does not change a loaded model's function."""
_AS_IT_DOES = {"use_attn_scale": True, "positional_embedding_type": "standard"}
"""Of what else a configuration says, the value that they follow; of all others, one that says nothing."""
_SAYS_NOTHING = (None, False, -1)


def has_hooked() -> bool:
    """Whether TransformerLens has HookedTransformer, as before version 4."""
    return loading_from_pretrained is not None


@cache
def model_names() -> dict[str, str]:
    """TransformerLens' short names of models, in lower case, and their names on the hub."""
    if loading_from_pretrained is not None:
        found: dict[str, str] = loading_from_pretrained.make_model_alias_map()
        return found
    from transformer_lens import supported_models  # type: ignore[unreachable]

    aliases: Any = supported_models.MODEL_ALIASES
    return {alias.lower(): name for name, every in aliases.items() for alias in (name, *every)}


def load_native(
    config: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Any, device: Any, dtype: Any
) -> TransformerBridge:
    """A model in TransformerLens' own format (HookedTransformerConfig's fields, HookedTransformer's parameters) under
    TransformerLens 4. Raises FraError for a configuration that it would not follow, and weights that do not fit.
    """
    for key, value in config.items():
        followed = value == _AS_IT_DOES[key] if key in _AS_IT_DOES else value in _SAYS_NOTHING
        if key not in _NATIVE | _NO_MATTER and not followed:
            raise FraError(
                f"the model's configuration says {key} = {value!r}, which TransformerLens 4 does not do in models of "
                "its own format: install transformer-lens<4, or use another model."
            )
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    sizes: dict[str, Any] = {key: value for key, value in config.items() if key in _NATIVE and value is not None}
    sizes["normalization_type"] = config.get("normalization_type", "LN")
    cfg = TransformerBridgeConfig(**sizes, architecture="TransformerLensNative")
    model: Any = TransformerBridge.boot_native(cfg, tokenizer=tokenizer, device=device, dtype=dtype)
    model.load_state_dict(convert_tl_checkpoint(dict(state), cfg), strict=True)
    bridge: TransformerBridge = model
    return bridge
