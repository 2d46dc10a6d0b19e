"""What a target file names, loaded and checked: its model and its dictionaries."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens import SAE

import fra.dictionaries.blockdiag  # noqa: F401  registers its architecture with SAELens
from fra.checkpoints import hub
from fra.checkpoints.weights import LIBRARY_ERRORS, check_dictionary_directory, first_line
from fra.dictionaries.codes import check_dictionary, check_kind
from fra.dictionaries.hooks import is_output
from fra.errors import FraError
from fra.targets.models import load_model
from fra.targets.preflight import check_hook
from fra.targets.processing import check_agreement, declared_by

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
            load=lambda: load_model(name, device, dtype, processing, spec.model.revision),
        )
    try:
        return load_model(folder, device, dtype, processing)
    except FraError:
        raise
    except LIBRARY_ERRORS as error:
        raise FraError(f"the model in {folder} cannot be loaded: {first_line(error)}.") from error


def load_dictionary(
    entry: DictionaryTable,
    folder: Path | None,
    device: str,
    precision: str,
    processing: frozenset[str] | None,
    *,
    allow_pickle: bool,
) -> Any:
    """The dictionary of an entry of a target file, from its directory, or from the hub where that is None; trained
    where and as it is used. Raises FraError for any other.

    processing: the model's, None where the two are only tried together.
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
    if metadata.hook_name is None:
        metadata.hook_name = entry.hook
    check_hook(entry.hook, metadata.hook_name)
    if processing is not None:
        check_agreement(entry.hook, declared_by(metadata.to_dict()), processing)
    if is_output(entry.hook):
        check_kind(sae)
    else:
        check_dictionary(sae, hook_name=entry.hook)
    return sae
