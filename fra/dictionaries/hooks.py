"""The grammar of hook names, in TransformerLens' words: a layer's points, which layer a name is of, and whether a
dictionary there reads inputs or outputs of attention.

`fra` says these names whatever the model calls its own points; `Architecture.point` translates.
"""

from __future__ import annotations

import re

from fra.errors import FraError


class LayerHooks:
    """The names of one layer's points."""

    def __init__(self, layer: int) -> None:
        block = f"blocks.{layer}"
        self.layer = layer
        self.resid_pre = f"{block}.hook_resid_pre"
        """[batch, pos, d_model]: the residual stream that the layer reads."""
        self.resid_mid = f"{block}.hook_resid_mid"
        """[batch, pos, d_model]: after attention, before the MLP."""
        self.resid_post = f"{block}.hook_resid_post"
        """[batch, pos, d_model]: the residual stream behind the layer."""
        self.normalized = f"{block}.ln1.hook_normalized"
        """[batch, pos, d_model]: behind the norm's centring and scale, before its weight and bias."""
        self.scale = f"{block}.ln1.hook_scale"
        """[batch, pos, 1]: what that norm divides by."""
        self.post_scale = f"{block}.ln1_post.hook_scale"
        """[batch, pos, 1]: what a norm after attention divides by (Gemma 2 and 3)."""
        self.attn_scores = f"{block}.attn.hook_attn_scores"
        """[batch, n_heads, q_pos, k_pos]: after scale, softcap and mask, before softmax."""
        self.pattern = f"{block}.attn.hook_pattern"
        """[batch, n_heads, q_pos, k_pos]: after softmax."""
        self.q = f"{block}.attn.hook_q"
        """[batch, pos, n_heads, d_head], or flattened in the last two: queries as projected, with b_Q."""
        self.k = f"{block}.attn.hook_k"
        """[batch, pos, n_key_value_heads, d_head], or flattened in the last two: keys as projected, with b_K."""
        self.v = f"{block}.attn.hook_v"
        """[batch, pos, n_key_value_heads, d_head], or flattened in the last two: values, with b_V."""
        self.z = f"{block}.attn.hook_z"
        """[batch, pos, n_heads, d_head], or flattened in the last two: pattern times values."""
        self.cos = f"{block}.attn.hook_cos"
        """[batch, pos, rot]: cosines of the rotary angles (TransformerBridge)."""
        self.sin = f"{block}.attn.hook_sin"
        """[batch, pos, rot]: their sines."""
        self.attn_out = f"{block}.hook_attn_out"
        """[batch, pos, d_model]: what attention writes, b_O included; behind a norm after attention (Gemma 2 and 3)."""
        self.mlp_out = f"{block}.hook_mlp_out"
        """[batch, pos, d_model]: what the MLP writes."""
        self.attention = (f"{block}.ln1.", f"{block}.attn.")
        """What the names of points within attention, its norm included, begin with."""

    def inputs(self) -> tuple[str, ...]:
        """The points at which a dictionary of this layer's attention input may have been trained."""
        before = () if self.layer == 0 else (LayerHooks(self.layer - 1).resid_post,)
        return (self.normalized, self.resid_pre, *before)


POS_EMBED = "hook_pos_embed"
"""[batch, pos, d_model]: position embeddings, where the model adds some to the residual stream."""

_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
BEFORE_ATTENTION = ("ln1.hook_normalized", "hook_resid_pre", "hook_resid_post")
"""The points, by their names within a layer, that attention of this layer or of the next one reads."""


def layer_of(hook: str) -> int | None:
    """The layer in which a point lies; None for one outside all layers."""
    found = _IN_BLOCK.fullmatch(hook)
    return int(found[1]) if found else None


def point_of(hook: str) -> str:
    """The name within its layer; the whole name of a point outside all layers."""
    found = _IN_BLOCK.fullmatch(hook)
    return found[2] if found else hook


def is_head_output(hook: str) -> bool:
    """Whether the hook holds head outputs, each by itself."""
    return hook.endswith("attn.hook_z")


def is_attention_output(hook: str) -> bool:
    """Whether the hook holds what attention writes: head outputs through W_O, summed."""
    return hook.endswith("hook_attn_out")


def is_output(hook: str) -> bool:
    """Whether what stands there is linear in head outputs: these themselves, or what attention writes."""
    return is_head_output(hook) or is_attention_output(hook)


def head_output_layer_of(hook: str) -> int | None:
    """The layer of a head-output hook; None for another hook."""
    return layer_of(hook) if point_of(hook) == "attn.hook_z" else None


def output_layer_of(hook: str) -> int | None:
    """The layer of a hook at head outputs or at what attention writes; None for another hook."""
    return layer_of(hook) if point_of(hook) in ("attn.hook_z", "hook_attn_out") else None


def is_normalized(hook: str) -> bool:
    """Whether the hook lies behind the norm's scale, so that what stands there is not divided by it again."""
    return hook.endswith("hook_normalized")


def is_attention_input(hook_name: str) -> bool:
    """Whether some attention layer reads this hook."""
    return layer_of(hook_name) is not None and point_of(hook_name) in BEFORE_ATTENTION


def attention_input_layer(hook_name: str) -> int:
    """The layer whose attention input is read at `hook_name` (`hook_resid_post` of layer L feeds layer L + 1).

    Raises FraError for a hook of head outputs or of what attention writes, and for any other that is no attention
    input.
    """
    layer = layer_of(hook_name)
    if layer is not None and point_of(hook_name) in BEFORE_ATTENTION:
        return layer + (point_of(hook_name) == "hook_resid_post")
    if hook_name.endswith("hook_z"):
        raise FraError(
            f"{hook_name!r} holds head outputs, not an attention input: W_Q and W_K do "
            "not read it, even where the widths agree; use a dictionary at "
            "ln1.hook_normalized, hook_resid_pre, or hook_resid_post of the layer before."
        )
    if is_attention_output(hook_name):
        raise FraError(
            f"{hook_name!r} holds what attention writes, not an attention input: W_Q and W_K of its layer do not read "
            "it, even where the widths agree; use a dictionary at ln1.hook_normalized, hook_resid_pre, or "
            "hook_resid_post of the layer before."
        )
    raise FraError(
        f"{hook_name!r} is not an attention input; use blocks.L.ln1.hook_normalized, "
        "blocks.L.hook_resid_pre, or blocks.L.hook_resid_post."
    )
