"""Weights on this machine, checked before a library opens them: safetensors only, whole, finite, and fitting their
config.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fra.errors import FraError

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npz", ".npy")
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")
"""A bare pickle, and the zip that torch.save writes."""
_SAFE = "save them as safetensors (safetensors.torch.save_file, or save_pretrained)"

LIBRARY_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
    *(EOFError, UnpicklingError, SafetensorError),
)
"""What TransformerLens, SAELens and transformers raise for files that do not fit them."""

_CHUNK = 1 << 22
SAE_CONFIG = "cfg.json"
SAE_WEIGHTS = "sae_weights.safetensors"
CROSSCODER_CONFIG = "crosscoder.json"
CROSSCODER_WEIGHTS = "crosscoder.safetensors"
CROSSCODER_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
CROSSCODER_MAY_HAVE = ("mean", "threshold", "active_mean")


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file. Raises FraError where it is missing or something else; `what` says whose it is."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise FraError(f"{what} has no {file.name}: {file} does not exist.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FraError(f"{what} has an unreadable {file.name}: {file} is not JSON ({str(error)[:100]}).") from error
    if not isinstance(value, dict):
        raise FraError(f"{what} has an unreadable {file.name}: {file} holds no JSON object.")
    return value


def _tensors(file: Path, what: str) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                yield name, opened.get_tensor(name)
    except FileNotFoundError as error:
        raise FraError(f"{what} lacks a weights file: {file} does not exist.") from error
    except (SafetensorError, OSError, ValueError) as error:
        with file.open("rb") as raw:
            start = raw.read(4)
        if start.startswith(_PICKLE_STARTS):
            reason = f"is a pickle under that name, and pickles are not loaded: {_SAFE}"
        else:
            reason = f"is truncated or damaged ({str(error)[:100]}): copy or download it again"
        raise FraError(f"the weights file {file} of {what} {reason}.") from error


def _finite(tensor: Tensor) -> bool:
    # torch cannot ask 8-bit floats; widening any other could itself overflow.
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def check_file(file: Path, what: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file. Raises FraError where it is missing, truncated, a pickle, empty, or
    holds NaN or infinity.
    """
    shapes = {}
    for name, tensor in _tensors(file, what):
        if tensor.is_floating_point() and not _finite(tensor):
            raise FraError(
                f"the weights file {file} of {what} holds NaN or infinity in {name!r}: these weights are broken."
            )
        shapes[name] = tuple(tensor.shape)
    if not shapes:
        raise FraError(f"the weights file {file} of {what} holds no tensors.")
    return shapes


def _directory(folder: Path, what: str) -> None:
    if folder.is_dir():
        return
    if folder.suffix in _PICKLES and folder.exists():
        raise FraError(f"{what} is a pickle ({folder}), and pickles are not loaded: {_SAFE} and give the directory.")
    if folder.exists():
        raise FraError(f"{what} is a file ({folder}): give the directory that holds it.")
    raise FraError(f"{what} is missing: there is no directory {folder}; put it there, or correct the path.")


def _no_weights(folder: Path, what: str, expected: str) -> FraError:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        return FraError(
            f"{what} offers its weights as a pickle ({folder / pickles[0]}), and pickles are not loaded: {_SAFE}."
        )
    return FraError(f"{what} has no weights: {folder / expected} does not exist.")


def model_files(folder: Path, what: str) -> list[Path]:
    """The safetensors files of a Hugging Face directory: `model.safetensors`, or the shards that its index names.
    Raises FraError without.
    """
    _directory(folder, what)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        raise _no_weights(folder, what, "model.safetensors")
    shards = read_json(index, what).get("weight_map")
    if (
        not isinstance(shards, dict)
        or not shards
        or not all(isinstance(name, str) and Path(name).name == name for name in shards.values())
    ):
        raise FraError(f"{what} has an unreadable index: {index} names no shards.")
    return [folder / name for name in sorted(set(shards.values()))]


def check_model(folder: Path, what: str) -> dict[str, Any]:
    """Checks a model directory and returns its config (config.json), without building the model.

    Raises FraError, in one sentence, where the directory, its config or weights are missing, the weights are pickled,
    truncated or not finite.
    """
    files = model_files(folder, what)
    config = read_json(folder / "config.json", what)
    for file in files:
        check_file(file, what)
    for pattern in ("*.json", "*.txt"):
        for file in sorted(folder.glob(pattern)):
            with file.open("rb") as opened:
                if opened.read(3) == b"\xef\xbb\xbf":
                    # transformers stops at it, or takes it for part of a vocabulary's first word
                    raise FraError(f"{what}: {file.name} begins with a byte order mark: save it as UTF-8 without one.")
    return config


def first_line(error: BaseException) -> str:
    """The first line of a library's message, shortened and without its full stop, to stand within a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].rstrip().endswith(":") and len(lines) > 1:  # torch says which tensors in the next
        lines[0] = f"{lines[0].rstrip()} {lines[1].strip()}"
    return lines[0].strip()[:200].rstrip(".")


def check_dictionary_directory(folder: Path, what: str) -> dict[str, Any]:
    """Checks a SAELens directory and returns its config (cfg.json), without building the dictionary.

    Raises FraError where it is missing, a pickle, truncated, of a width other than its config's, or holds NaN or
    infinity.
    """
    _directory(folder, what)
    if not (folder / SAE_WEIGHTS).exists():
        raise _no_weights(folder, what, SAE_WEIGHTS)
    config = read_json(folder / SAE_CONFIG, what)
    shapes = check_file(folder / SAE_WEIGHTS, what)
    sizes = config.get("d_in"), config.get("d_sae")
    if "W_dec" in shapes and shapes["W_dec"] != (sizes[1], sizes[0]):
        raise FraError(
            f"{what} does not fit its config: W_dec in {folder / SAE_WEIGHTS} has shape {shapes['W_dec']} where "
            f"{SAE_CONFIG} says d_sae {sizes[1]} and d_in {sizes[0]}."
        )
    return config


def check_crosscoder_directory(folder: Path, what: str) -> None:
    """Checks a crosscoder's directory as far as its files tell. Raises FraError where it is missing, a pickle,
    truncated, or holds NaN or infinity.
    """
    _directory(folder, what)
    if not (folder / CROSSCODER_WEIGHTS).exists():
        raise _no_weights(folder, what, CROSSCODER_WEIGHTS)
    read_json(folder / CROSSCODER_CONFIG, what)
    check_file(folder / CROSSCODER_WEIGHTS, what)


def hash_files(digest: Any, files: Sequence[Path]) -> None:
    """Feeds names and contents of files to a hashlib object."""
    for file in files:
        digest.update(f"file {file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)


def hash_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Feeds names, shapes, types and values of tensors to a hashlib object."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"tensor {name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the deprecation notice of HookedTransformer, which is used on purpose, and without progress printed while
    loading.
    """
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
