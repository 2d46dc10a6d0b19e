"""Which architecture a model has: those of TransformerLens' classes, and what users register."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from fra.architectures.architecture import Architecture, Model
from fra.architectures.bridge import BridgeArchitecture
from fra.architectures.hooked import HookedArchitecture
from fra.checkpoints.lens import HookedTransformer
from fra.errors import FraError
from fra.verdicts.claim import parse_head

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


def architecture_of(model: Any) -> Architecture:
    """The architecture of a model, made once. Raises FraError for a model that nothing registered is about."""
    try:
        made = _MADE.get(model)
    except TypeError as error:  # no weak reference: None, a string
        raise FraError(f"{model!r:.60} is no model: give one of TransformerLens, as target.model is.") from error
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


def check_layer_and_head(model: Any, layer: Any, head: Any = None) -> None:
    """Raises FraError where the model has no such layer or query head."""
    own = architecture_of(model)
    for what, index, size in (("layer", layer, own.n_layers), ("head", head, own.n_heads)):
        if index is not None and not isinstance(index, (int, np.integer)):
            raise FraError(f"{what} {index!r} is no number: give one from 0 to {size - 1}.")
        if index is not None and not 0 <= index < size:
            raise FraError(f"{what} {index} is out of range: the model has {size} {what}s, 0 to {size - 1}.")


def place_of(layer: int | None, head: int | str | None) -> tuple[int, int]:
    """Layer and head as numbers, from numbers or a name. Raises FraError where they do not say which, or two."""
    if isinstance(head, str):
        own, number = parse_head(head)
        if layer not in (None, own):
            raise FraError(f"head {head!r} lies in layer {own}, and layer={layer} is asked for: correct one of them.")
        return own, number
    if layer is None or head is None:
        raise FraError('say which head: layer=1, head=4, or head="L1H4".')
    return layer, head


def layer_and_heads(layer: int | None, heads: Sequence[int | str] | str | None) -> tuple[int, tuple[int, ...] | None]:
    """A layer and some of its heads as numbers, from numbers or names as "L1H4" (one name stands for a list of it);
    None for all heads. Raises FraError where they do not say which layer, or two.
    """
    named = [heads] if isinstance(heads, str) else heads
    if named is None:
        if layer is None:
            raise FraError('say which layer: layer=1, or heads by name: heads=["L1H4"].')
        return layer, None
    places = [place_of(layer, head) for head in named]
    layers = {own for own, _ in places}
    if len(layers) > 1:
        raise FraError(f"heads {list(named)} lie in several layers: give those of one.")
    if not places and layer is None:
        raise FraError('heads names none: give at least one, as heads=["L1H4"].')
    return (layers.pop() if layers else layer or 0), tuple(head for _, head in places)


Tokens: TypeAlias = Tensor | np.ndarray | Sequence[int]
"""Token ids of one document."""


def one_document(tokens: Any) -> Int[Tensor, " pos"]:
    """Token ids of one document as a tensor. Raises FraError for a text, floating-point numbers, and several
    documents.
    """
    wanted = "tokens must be the integer ids of one document, of shape [pos]"
    if isinstance(tokens, str):
        raise FraError(
            f"{wanted}, not a text: give the ids that target.tokens(text) or model.to_tokens(text)[0] makes."
        )
    try:
        given = tokens if isinstance(tokens, Tensor) else torch.as_tensor(np.asarray(tokens))
    except (TypeError, ValueError, RuntimeError) as error:
        raise FraError(f"{wanted}, not a {type(tokens).__name__} of something else.") from error
    if given.numel() == 0:
        raise FraError("tokens are empty: give at least one token.")
    if given.ndim == 2 and len(given) == 1 and not given.is_floating_point() and given.dtype != torch.bool:
        raise FraError(f"{wanted}, not of shape {list(given.shape)}: give tokens[0].")
    if given.ndim != 1 or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise FraError(f"{wanted}, not {given.dtype} of shape {list(given.shape)}: give one document's integer ids.")
    return given.long()


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
