"""What differs between versions of TransformerLens: 3 has HookedTransformer and its loading, 4 has not."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from fra.errors import FraError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer, HookedTransformerConfig, loading_from_pretrained
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
    "loading_from_pretrained",
    "model_names",
    "need_hooked",
]


@cache
def model_names() -> dict[str, str]:
    """TransformerLens' short names of models, in lower case, and their names on the hub."""
    if loading_from_pretrained is not None:
        found: dict[str, str] = loading_from_pretrained.make_model_alias_map()
        return found
    from transformer_lens import supported_models  # type: ignore[unreachable]

    aliases: Any = supported_models.MODEL_ALIASES
    return {alias.lower(): name for name, every in aliases.items() for alias in (name, *every)}


def need_hooked(what: str) -> None:
    """Raises FraError where TransformerLens has no HookedTransformer any more."""
    if loading_from_pretrained is None:
        raise FraError(
            f"{what} needs HookedTransformer, which TransformerLens 4 has not: install transformer-lens<4, or use "
            "another model."
        )
