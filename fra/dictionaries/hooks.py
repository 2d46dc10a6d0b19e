"""The grammar of hook names: which layer a dictionary reads, and whether it reads inputs or outputs of attention."""

from __future__ import annotations

import re

from fra.errors import FraError


def is_head_output(hook: str) -> bool:
    """Whether the hook holds head outputs."""
    return hook.endswith("attn.hook_z")


def head_output_layer_of(hook: str) -> int | None:
    """The layer of a head-output hook; None for another hook."""
    parts = hook.split(".")
    return int(parts[1]) if hook.endswith(".attn.hook_z") and parts[1].isdigit() else None


_INPUT_HOOK = re.compile(r"blocks\.(\d+)\.(ln1\.hook_normalized|hook_resid_pre|hook_resid_post)")


def attention_input_layer(hook_name: str) -> int:
    """The layer whose attention input is read at `hook_name` (`hook_resid_post` of layer L feeds layer L + 1).

    Raises FraError for a head-output hook (`hook_z`) and for any other hook that is no attention input.
    """
    found = _INPUT_HOOK.fullmatch(hook_name)
    if found:
        return int(found[1]) + (found[2] == "hook_resid_post")
    if hook_name.endswith("hook_z"):
        raise FraError(
            f"{hook_name!r} holds head outputs, not an attention input: W_Q and W_K do not read it, even where the "
            f"widths agree; "
            "use a dictionary at ln1.hook_normalized, hook_resid_pre, or hook_resid_post of the layer before."
        )
    raise FraError(
        f"{hook_name!r} is not an attention input; use blocks.L.ln1.hook_normalized, blocks.L.hook_resid_pre, or "
        f"blocks.L.hook_resid_post."
    )
