"""Weight processing of a model: which of TransformerLens' rewrites its weights went through, and whether a dictionary
was trained under the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fra.dictionaries.hooks import point_of
from fra.errors import FraError

FLAGS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
"""The keyword arguments of TransformerLens' weight processing, in its own words."""

NAMED: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "folded": frozenset(FLAGS),
}
"""`none` is `from_pretrained_no_processing`, `folded` is what `HookedTransformer.from_pretrained` does by default."""

# What changes the activation at a hook; at any other hook, everything does. hook_normalized fired after the norm's
# weight in older TransformerLens, so fold_ln counts there.
_REACHES = (
    (re.compile(r"hook_(resid_(pre|mid|post)|embed|pos_embed)"), frozenset({"center_writing_weights"})),
    (re.compile(r"ln[12]\.hook_normalized"), frozenset({"fold_ln"})),
    (re.compile(r"attn\.hook_[zv]"), frozenset({"fold_value_biases"})),
    # b_V through W_O is in what attention writes either way.
    (re.compile(r"hook_attn_out"), frozenset({"center_writing_weights"})),
)


def describe(flags: frozenset[str]) -> str:
    """`none`, `folded`, or the flags that are on."""
    for name, known in NAMED.items():
        if flags == known:
            return name
    return " + ".join(flag for flag in FLAGS if flag in flags)


def declared_by(metadata: Mapping[str, Any]) -> dict[str, bool] | None:
    """The flags that a dictionary's metadata names, or None where it says nothing about processing.

    SAELens trains through `from_pretrained_no_processing(**model_from_pretrained_kwargs)`: a flag that is not named
    was off. A dictionary trained on the Hugging Face model itself (`model_class_name`) saw unprocessed weights.
    """
    kwargs = metadata.get("model_from_pretrained_kwargs")
    if isinstance(kwargs, Mapping):
        return {flag: bool(kwargs[flag]) for flag in FLAGS if flag in kwargs}
    return {} if metadata.get("model_class_name") == "AutoModelForCausalLM" else None


def disagreement(hook: str, named: Mapping[str, bool] | None, processing: frozenset[str]) -> str | None:
    """What a dictionary's metadata says of processing that the model's is not, as the beginning of a sentence; None
    where the two agree.

    named: what `declared_by` found. Flags that it names must agree; flags that it does not name were off, which
    matters only where they reach the activation at `hook` (folding LayerNorm leaves the residual stream as it is).
    None: it cannot disagree.
    """
    if named is None:
        return None
    reaches = next((flags for pattern, flags in _REACHES if pattern.fullmatch(point_of(hook))), frozenset(FLAGS))
    for flag in FLAGS:
        trained, used = named.get(flag, False), flag in processing
        if trained != used and (flag in named or flag in reaches):
            return (
                f"the dictionary at {hook!r} was trained with {flag} {'on' if trained else 'off'}, and the model's "
                f"weight processing ({describe(processing)}) has it {'on' if used else 'off'}"
            )
    return None


def check_agreement(hook: str, named: Mapping[str, bool] | None, processing: frozenset[str]) -> None:
    """Raises FraError where the metadata of the dictionary at `hook` names other processing than `processing`."""
    if found := disagreement(hook, named, processing):
        raise FraError(
            f"{found}: set model.processing in the target file to what the dictionary was trained under ("
            "`fra doctor TARGET` tries both)."
        )


def settle(declared: frozenset[str] | None, dictionaries: Mapping[str, Mapping[str, bool] | None]) -> frozenset[str]:
    """The model's processing: as declared by the target, else as the dictionaries say it was when they were trained.

    dictionaries: for each hook, the flags that the dictionary's metadata names (None: it says nothing). What a target
    declares holds, whatever they say: metadata may be wrong (SAELens writes its defaults for a model that it was
    given), and admission measures which fits.
    Raises FraError where nobody says, and where the target says nothing and two dictionaries contradict each other.
    """
    if declared is not None:
        return declared
    told = [named for named in dictionaries.values() if named is not None]
    if not told:
        raise FraError(
            "neither the target nor a dictionary says how the model's weights were processed: set model.processing in "
            "the target file "
            '("none", "folded", or a table of TransformerLens\' flags); `fra doctor TARGET` tries both.'
        )
    processing = frozenset(flag for named in told for flag, on in named.items() if on)
    for hook, named in dictionaries.items():
        check_agreement(hook, named, processing)
    return processing
