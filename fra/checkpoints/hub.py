"""What comes from the Hugging Face hub: models as snapshots, dictionaries through SAELens, text through datasets.

Each says in one sentence what is missing where the hub is not reached, and finds what an earlier run has cached.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fra.checkpoints.weights import first_line
from fra.errors import CannotLoad, FraError

_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
TRANSFORMER_LENS_AUTHORS = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")
"""Whose models on the hub TransformerLens keeps in its own format."""
PICKLED_LOADERS = frozenset({"connor_rob_hook_z", "goodfire", "deepseek_r1", "qwen_scope", "dictionary_learning_1"})
"""Loaders of SAELens that call torch.load: their releases exist only as pickles."""


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Turns what the hub's client raises into one sentence: CannotLoad where it is out of reach, FraError where it
    does not exist.
    """
    try:
        yield
    except GatedRepoError as error:
        raise CannotLoad(f"{what} is gated: accept its licence on the hub and log in (hf auth login).") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise FraError(
            f"the hub has no {what.removeprefix('the ')}: check its name and revision ({first_line(error)})."
        ) from error
    except LocalEntryNotFoundError as error:
        raise CannotLoad(
            f"{what} is not on this machine and the Hugging Face hub "
            "is not reached: connect, or download it beforehand."
        ) from error
    except EntryNotFoundError as error:
        raise FraError(f"{what} lacks a file on the hub ({first_line(error)}).") from error
    except OSError as error:  # no route, offline mode, and what the hub answers instead of a file
        raise CannotLoad(
            f"{what} cannot be had from the Hugging Face hub ({first_line(error)}): connect, or download it beforehand."
        ) from error


def is_transformer_lens_format(name: str) -> bool:
    """Whether TransformerLens keeps the model of that name in its own format, which is a pickle, and not in Hugging
    Face's.
    """
    from fra.checkpoints.lens import model_names

    return str(model_names().get(name.lower(), name)).startswith(TRANSFORMER_LENS_AUTHORS)


def fetch_model(name: str, revision: str | None) -> Path:
    """The directory of a Hugging Face model, downloaded or cached: config, tokenizer and safetensors, never a
    pickle.
    """
    from fra.checkpoints.lens import model_names

    official = model_names().get(name.lower(), name)
    with reaching(f"the model {name!r}"):
        return Path(snapshot_download(official, revision=revision, allow_patterns=list(_MODEL_FILES)))


def fetch_transformer_lens_model(name: str, *, allow_pickle: bool, load: Any) -> Any:
    """A model that TransformerLens keeps in its own format, which is a pickle; `load()` loads it."""
    if not allow_pickle:
        raise FraError(
            f"the model {name!r} exists only as a pickle, which can run code when loaded: set allow_pickle_release = "
            "true in the target file if you trust it."
        )
    with reaching(f"the model {name!r}"):
        return load()


def _check_release(release: str, sae_id: str, *, allow_pickle: bool) -> None:
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    if release not in known:
        if "/" in release:  # a repository in SAELens' own format
            return
        close = difflib.get_close_matches(release, known, n=3)
        hint = (
            f"it knows {', '.join(close)}" if close else "see its list of releases, or give a repository as OWNER/NAME"
        )
        raise FraError(f"SAELens knows no release {release!r}: {hint}.")
    ids = known[release].saes_map
    if sae_id not in ids:
        close = difflib.get_close_matches(sae_id, ids, n=3) or sorted(ids)[:3]
        raise FraError(f"the release {release!r} has no dictionary {sae_id!r}: it has {', '.join(close)}, ...")
    if get_conversion_loader_name(release) in PICKLED_LOADERS and not allow_pickle:
        raise FraError(
            f"the dictionaries of {release!r} exist only as pickles, which can run code when loaded: set "
            "allow_pickle_release = true in the target file if you trust them."
        )


def dictionary_metadata(release: str, sae_id: str, *, allow_pickle: bool) -> dict[str, Any]:
    """What SAELens knows of a released dictionary, without its weights."""
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    _check_release(release, sae_id, allow_pickle=allow_pickle)
    with reaching(f"the dictionary {sae_id!r} of {release!r}"):
        found: dict[str, Any] = load_sae_config_from_huggingface(release, sae_id).get("metadata", {})
    return found


def fetch_dictionary(release: str, sae_id: str, *, device: str, dtype: str, allow_pickle: bool) -> Any:
    """A released dictionary, by SAELens' own loader. Raises CannotLoad without a hub, FraError for an unknown one or
    an unwanted pickle.
    """
    from sae_lens import SAE

    _check_release(release, sae_id, allow_pickle=allow_pickle)
    with reaching(f"the dictionary {sae_id!r} of {release!r}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of processing, which the target settles
        return SAE.from_pretrained(release, sae_id, device=device, dtype=dtype)


def dataset_texts(name: str, limit: int, split: str = "train", column: str = "text") -> list[str]:
    """The first `limit` non-empty texts of a column of a dataset's split, streamed."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    what = f"the dataset {name!r}"
    try:
        with reaching(what):
            try:
                rows = load_dataset(name, split=split, streaming=True)
            except ValueError as error:  # 'Bad split', and a configuration that must be named
                raise FraError(
                    f"{what} cannot be read ({first_line(error)}): correct text.split or the name."
                ) from error
            if rows.column_names is not None and column not in rows.column_names:
                raise FraError(
                    f"{what} has no column {column!r} (it has "
                    f"{', '.join(rows.column_names)}): name the one that holds text as text.column."
                )
            return list(islice((text for row in rows if isinstance(text := row[column], str) and text.strip()), limit))
    except DatasetsError as error:
        raise CannotLoad(f"{what} cannot be loaded ({first_line(error)}).") from error
