"""Crosscoders from files, and what they read of a model.

A crosscoder's folder has `crosscoder.safetensors` (W_enc [n_slots, d, d_sae], W_dec [d_sae, n_slots, d], b_enc [d_sae],
b_dec [n_slots, d], and where activations had their mean subtracted mean [n_slots, d]) and `crosscoder.json`, which says
model and hook of each slot: {"slots": [{"model": "base", "hook": "blocks.1.hook_resid_pre"}, ...]}. Two public layouts
are read by `from_model_diffing` and `from_dictionary_learning`; safetensors alone, never a pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fra.checkpoints.weights import check_file, read_json
from fra.dictionaries.crosscoder import Crosscoder, Slot
from fra.errors import FraError

WEIGHTS, CONFIG = "crosscoder.safetensors", "crosscoder.json"


def load(folder: str | Path) -> Crosscoder:
    """A crosscoder from its folder (`crosscoder.safetensors`, `crosscoder.json`). Raises FraError where something is
    missing, damaged, or does not fit.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, f"the crosscoder in {folder}")
    named = config.get("slots")
    if not isinstance(named, list) or not all(
        isinstance(one, dict) and isinstance(one.get("model"), str) and isinstance(one.get("hook"), str)
        for one in named
    ):
        raise FraError(
            f'{folder / CONFIG} does not say what the slots are: write "slots": [{{"model": "...", "hook": "..."}}, '
            "...], one for each in the order of the weights."
        )
    tensors = _read(folder / WEIGHTS, ("W_enc", "W_dec", "b_enc", "b_dec"))
    slots = tuple(Slot(one["model"], one["hook"]) for one in named)
    W_enc, W_dec, b_enc, b_dec = (tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    return Crosscoder(slots, W_enc, W_dec, b_enc, b_dec, tensors.get("mean"))


def from_model_diffing(file: str | Path, slots: Sequence[tuple[str, str]]) -> Crosscoder:
    """A crosscoder in the layout of the model-diffing replication of Kissane et al.: W_enc [2, d, d_sae], W_dec [d_sae,
    2, d], b_enc, b_dec [2, d]. slots: (model, hook) of each. Activations are to be scaled as they were in training:
    where that scaling is not folded into the weights, `features` are not those of training.
    """
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    tensors = _read(Path(file), names)
    return Crosscoder(tuple(Slot(*one) for one in slots), *(tensors[name] for name in names))


def from_dictionary_learning(file: str | Path, slots: Sequence[tuple[str, str]]) -> Crosscoder:
    """A crosscoder (CrossCoder, with a ReLU) in the layout of dictionary_learning: encoder.weight [n_layers, d, dict],
    encoder.bias [dict], decoder.weight [n_layers, dict, d], decoder.bias [n_layers, d]. slots: (model, hook) of each.
    """
    names = ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")
    W_enc, W_dec, b_enc, b_dec = map(_read(Path(file), names).__getitem__, names)
    if W_dec.ndim == 3:
        W_dec = W_dec.transpose(0, 1).contiguous()
    return Crosscoder(tuple(Slot(*one) for one in slots), W_enc, W_dec, b_enc, b_dec)


def _read(file: Path, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Tensors of a safetensors file. Raises FraError where it is none, or lacks one of these names."""
    what = f"the crosscoder {file}"
    shapes = check_file(file, what)
    known = {*names, "mean"} if "W_enc" in names else set(names)
    if missing := [name for name in names if name not in shapes]:
        raise FraError(f"{what} lacks {missing[0]!r}; it has {', '.join(sorted(shapes))}: this is another layout.")
    if more := sorted(set(shapes) - known):
        raise FraError(f"{what} holds {more[0]!r} too, which nothing here reads: this is another kind or layout.")
    tensors: dict[str, Any] = load_file(file)
    return tensors


__all__ = ["Crosscoder", "Slot", "from_dictionary_learning", "from_model_diffing", "load"]
