"""Files that are written whole or not at all.

What is no regular file (a device, a pipe) is written into as it is: a rename would put a file in its place. A link is
followed, so that it stays one; a file that is there keeps its mode.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from fra.errors import FraError


def check_writable(path: Path) -> None:
    """Make the folder of an output and try to write there. Raises FraError, so that it is known before anything is
    measured.
    """
    try:
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise FraError(f"{path} is a directory; name a file to write to.")
        if not _is_regular(path):
            if not os.access(path, os.W_OK):
                raise FraError(f"{path} cannot be written: Permission denied.")
            return  # opening a pipe would wait for its reader
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("ab").close()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        if isinstance(error, FraError):
            raise
        raise FraError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from error


def write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all (a temporary file in the same folder, then a rename); into a device or a pipe,
    straight. Raises FraError.
    """
    check_writable(path)
    path = Path(os.path.realpath(path))
    if not _is_regular(path):
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise FraError(f"{path} cannot be written: {error.strerror or error}.") from error
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        Path(name).chmod(stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
        os.replace(name, path)
    except OSError as error:
        raise FraError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _is_regular(path: Path) -> bool:
    """Whether a file is there that can be replaced, or nothing at all."""
    return not path.exists() or stat.S_ISREG(path.stat().st_mode)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
