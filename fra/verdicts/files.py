"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fra.errors import FraError


def check_writable(path: Path) -> None:
    """Make the folder of an output and try to write there. Raises FraError, so that it is known before anything is
    measured.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise FraError(f"{path} is a directory; name a file to write to")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise FraError(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all (a temporary file in the same folder, then a rename). Raises FraError."""
    check_writable(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        Path(name).chmod(0o666 & ~_umask())
        os.replace(name, path)
    except OSError as error:
        raise FraError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
