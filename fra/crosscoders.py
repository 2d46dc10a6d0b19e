"""Crosscoders from files, and what they read of a model.

A crosscoder's folder has `crosscoder.safetensors` (W_enc [n_slots, d, d_sae], W_dec [d_sae, n_slots, d], b_enc [d_sae],
b_dec [n_slots, d]; where activations had their mean subtracted mean [n_slots, d], where it is no ReLU threshold
[d_sae], and where it is known active_mean [d_sae], each feature's mean while live) and `crosscoder.json`, which says
model and hook of each slot: {"slots": [{"model": "base", "hook": "blocks.1.hook_resid_pre"}, ...]}. Two public layouts
are read by `from_model_diffing` and `from_dictionary_learning`; safetensors alone, never a pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fra.dictionaries.crosscoder import Crosscoder, Placed, Slot
from fra.targets.loading import read_crosscoder as load
from fra.targets.loading import read_tensors


def from_model_diffing(file: str | Path, slots: Sequence[tuple[str, str]]) -> Crosscoder:
    """A crosscoder in the layout of the model-diffing replication of Kissane et al.: W_enc [2, d, d_sae], W_dec [d_sae,
    2, d], b_enc, b_dec [2, d]. slots: (model, hook) of each. Activations are to be scaled as they were in training:
    where that scaling is not folded into the weights, `features` are not those of training.
    """
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    tensors = read_tensors(Path(file), names)
    return Crosscoder(tuple(Slot(*one) for one in slots), *(tensors[name] for name in names))


def from_dictionary_learning(file: str | Path, slots: Sequence[tuple[str, str]]) -> Crosscoder:
    """A crosscoder (CrossCoder, with a ReLU) in the layout of dictionary_learning: encoder.weight [n_layers, d, dict],
    encoder.bias [dict], decoder.weight [n_layers, dict, d], decoder.bias [n_layers, d]. slots: (model, hook) of each.
    """
    names = ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")
    W_enc, W_dec, b_enc, b_dec = map(read_tensors(Path(file), names).__getitem__, names)
    if W_dec.ndim == 3:
        W_dec = W_dec.transpose(0, 1).contiguous()
    return Crosscoder(tuple(Slot(*one) for one in slots), W_enc, W_dec, b_enc, b_dec)


__all__ = ["Crosscoder", "Placed", "Slot", "from_dictionary_learning", "from_model_diffing", "load"]
