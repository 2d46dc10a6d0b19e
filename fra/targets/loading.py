"""What a target file names, loaded and checked: its model and its dictionaries."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens import SAE
from safetensors.torch import load_file
from torch import Tensor

import fra.dictionaries.blockdiag  # noqa: F401  registers its architecture with SAELens
from fra.checkpoints import hub
from fra.checkpoints.weights import (
    CROSSCODER_CONFIG,
    CROSSCODER_MAY_HAVE,
    CROSSCODER_TENSORS,
    CROSSCODER_WEIGHTS,
    LIBRARY_ERRORS,
    check_dictionary_directory,
    check_file,
    first_line,
    read_json,
)
from fra.dictionaries.codes import check_dictionary, check_kind
from fra.dictionaries.crosscoder import Crosscoder, Placed, Slot
from fra.dictionaries.hooks import attention_input_layer, is_output
from fra.errors import FraError
from fra.targets.models import load_model
from fra.targets.preflight import check_hook

if TYPE_CHECKING:
    from fra.core.weights import Model
    from fra.targets.file import DictionaryTable, TargetSpec


def load_target_model(
    spec: TargetSpec, folder: Path | None, device: str, precision: str, processing: frozenset[str]
) -> Model:
    """The model of a target: from its Hugging Face directory, or by name from the hub where TransformerLens keeps it in
    a format of its own (`folder` None). Raises CannotLoad where the hub is not reached, FraError for broken weights.
    """
    dtype: torch.dtype = getattr(torch, precision)
    if folder is None:
        name = str(spec.model.name)
        return hub.fetch_transformer_lens_model(  # type: ignore[no-any-return]
            name,
            allow_pickle=spec.allow_pickle_release,
            load=lambda: load_model(name, device, dtype, processing, spec.model.revision, spec.model.device_map),
        )
    try:
        return load_model(folder, device, dtype, processing, device_map=spec.model.device_map)
    except FraError:
        raise
    except LIBRARY_ERRORS as error:
        raise FraError(f"the model in {folder} cannot be loaded: {first_line(error)}.") from error


def load_dictionary(
    entry: DictionaryTable,
    folder: Path | None,
    device: str,
    precision: str,
    *,
    allow_pickle: bool,
) -> Any:
    """The dictionary of an entry of a target file, from its directory, or from the hub where that is None; trained
    where it is used, as far as its metadata says it and the entry does not accept another. Raises FraError for any
    other. Under which weight processing it was trained, and whether it fits, admission measures.
    """
    what = f"the dictionary at {entry.hook!r}"
    # Codes of a half-precision model are taken in single precision.
    dtype = "float64" if precision == "float64" else "float32"
    try:
        if folder is None:
            release, sae_id = str(entry.release), str(entry.sae_id)
            sae = hub.fetch_dictionary(release, sae_id, device=device, dtype=dtype, allow_pickle=allow_pickle)
        else:
            check_dictionary_directory(folder, what)
            # SAELens draws random weights before it reads the file's: the caller's seed is not used up.
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")  # of processing, which `settle` decides
                sae = SAE.load_from_disk(folder, device=device, dtype=dtype)
    except FraError:
        raise
    except KeyError as error:
        raise FraError(
            f"{what} cannot be loaded: its config lacks {error}, or SAELens has no such architecture."
        ) from error
    except LIBRARY_ERRORS as error:
        raise FraError(f"{what} cannot be loaded: {first_line(error)}.") from error
    metadata = sae.cfg.metadata
    if metadata.hook_name is None or entry.accept_mismatch:
        metadata.hook_name = entry.hook
    check_hook(entry.hook, metadata.hook_name)
    if is_output(entry.hook):
        check_kind(sae)
    else:
        check_dictionary(sae, hook_name=entry.hook)
    return sae


def read_crosscoder(folder: str | Path) -> Crosscoder:
    """A crosscoder from its folder (`crosscoder.safetensors`, `crosscoder.json`). Raises FraError where something is
    missing, damaged, or does not fit.
    """
    folder = Path(folder)
    config = read_json(folder / CROSSCODER_CONFIG, f"the crosscoder in {folder}")
    named = config.get("slots")
    if not isinstance(named, list) or not all(
        isinstance(one, dict) and isinstance(one.get("model"), str) and isinstance(one.get("hook"), str)
        for one in named
    ):
        raise FraError(
            f'{folder / CROSSCODER_CONFIG} does not say what the slots are: write "slots": [{{"model": "...", '
            '"hook": "..."}}, ...], one for each in the order of the weights.'
        )
    tensors = read_tensors(folder / CROSSCODER_WEIGHTS, CROSSCODER_TENSORS, CROSSCODER_MAY_HAVE)
    return Crosscoder(tuple(Slot(one["model"], one["hook"]) for one in named), **tensors)


def read_tensors(file: Path, names: Sequence[str], may_have: Sequence[str] = ()) -> dict[str, Tensor]:
    """Tensors of a crosscoder's safetensors file. Raises FraError where it is none, lacks one of these names, or has
    more than these and what it may have.
    """
    what = f"the crosscoder {file}"
    shapes = check_file(file, what)
    if missing := [name for name in names if name not in shapes]:
        raise FraError(f"{what} lacks {missing[0]!r}; it has {', '.join(sorted(shapes))}: this is another layout.")
    if more := sorted(set(shapes) - {*names, *may_have}):
        raise FraError(f"{what} holds {more[0]!r} too, which nothing here reads: this is another kind or layout.")
    tensors: dict[str, Tensor] = load_file(file)
    return tensors


def load_crosscoder(
    entry: DictionaryTable,
    folder: Path,
    models: Mapping[str, Path],
    device: str,
    precision: str,
    processing: frozenset[str],
) -> Placed:
    """The crosscoder of an entry of a target file, and the models of its other slots, each from its Hugging Face
    directory, weights processed as the target's own. Raises FraError where it does not fit: hook, slot, models.
    """
    dtype = torch.float64 if precision == "float64" else torch.float32
    crosscoder, slot = read_crosscoder(folder).to(device, dtype), int(entry.slot or 0)
    named = crosscoder.slot(slot).hook
    if named != entry.hook:
        raise FraError(
            f"slot {slot} of the crosscoder in {folder} is at {named!r}, and the target file uses it at "
            f"{entry.hook!r}: name that hook, or the slot of this one."
        )
    attention_input_layer(entry.hook)
    unplaced = Placed(crosscoder, slot, dict.fromkeys(models))  # refuses models that are missing, before any is loaded
    loaded = {name: load_model(models[name], device, dtype, processing) for name in unplaced.models}
    return Placed(crosscoder, slot, loaded)
