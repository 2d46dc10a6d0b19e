"""What is wrong with a target as far as its files tell, found before a model is loaded or a test collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fra.checkpoints.weights import CROSSCODER_CONFIG, SAE_CONFIG, read_json
from fra.dictionaries.hooks import is_head_output
from fra.errors import FraError

if TYPE_CHECKING:
    from fra.targets.file import DictionaryTable
    from fra.targets.target import Target

# What configurations of Hugging Face and of TransformerLens call them.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")


def preflight(target: Target) -> list[str]:
    """Holds the target file against the files that it names, as far as these are on this machine; returns what is to be
    known of the text (`Target.remarks`).

    Raises FraError, in one sentence, where [size] is not the model's, a tokenizer is missing, a dictionary was trained
    at another hook or has another width than the model, or the text cannot be used. Nothing is loaded: what passes here
    is still to be admitted.
    """
    config: Mapping[str, Any] = {}
    if target.model_folder is not None:
        config = read_json(target.model_folder / "config.json", f"the model of {target.name!r}")
        if isinstance(nested := config.get("text_config"), dict):
            config = {**config, **nested}
        for what, stated, names in (("n_layers", target.n_layers, _LAYERS), ("n_heads", target.n_heads, _HEADS)):
            check_size(target.name, what, stated, _first(config, names))
        if not any((target.model_folder / name).exists() for name in _TOKENIZERS):
            raise FraError(
                f"the model of {target.name!r} has no tokenizer: {target.model_folder} holds none of "
                f"{', '.join(_TOKENIZERS[:4])}; save it there (tokenizer.save_pretrained)."
            )
    for entry in (*target.spec.saes, *target.spec.seed, *target.spec.study):
        if entry.path is not None:
            _check_dictionary(target, entry, _first(config, _WIDTH))
    for entry in target.spec.crosscoders:
        _check_crosscoder(target, entry)
    return target.remarks()


def check_size(target: str, what: str, stated: int, found: int | None) -> None:
    """Raises FraError where a number of [size] is not the model's; None: the model does not say."""
    if found is not None and stated != found:
        raise FraError(f"size.{what} of {target!r} is {stated} and the model has {found}: correct the target file.")


def check_hook(declared: str, trained: Any) -> None:
    """Raises FraError where a dictionary is to be used at another hook than its metadata names."""
    if trained is not None and trained != declared:
        raise FraError(
            f"the dictionary at {declared!r} was trained at {trained!r}: name that "
            "hook in the target file, or give the dictionary of this one (accept_mismatch = true in its table "
            "overrules its metadata)."
        )


def _check_dictionary(target: Target, entry: DictionaryTable, width: int | None) -> None:
    config = read_json(target.folder_of(entry) / SAE_CONFIG, f"the dictionary at {entry.hook!r}")
    metadata = config.get("metadata")
    # SAELens before version 6 kept it flat.
    if not entry.accept_mismatch:
        check_hook(entry.hook, (metadata if isinstance(metadata, dict) else config).get("hook_name"))
    own = config.get("d_in")
    if not is_head_output(entry.hook) and isinstance(own, int) and width is not None and own != width:
        raise FraError(
            f"the dictionary at {entry.hook!r} has width {own} and the model has {width}: it belongs to another model."
        )


def _check_crosscoder(target: Target, entry: DictionaryTable) -> None:
    slots = read_json(target.folder_of(entry) / CROSSCODER_CONFIG, f"the crosscoder at {entry.hook!r}").get("slots")
    if not isinstance(slots, list):
        return  # what loading says in its own words
    if entry.slot is not None and entry.slot >= len(slots):
        raise FraError(
            f"the crosscoder at {entry.hook!r} has {len(slots)} slots, and the target file says slot {entry.slot}: "
            "they are numbered from 0."
        )


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := config.get(name), int)), None)
