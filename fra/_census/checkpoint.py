"""The folder in which a census keeps what it has seen, so that it goes on there after an interruption.

What stands there is believed only as far as it is a beginning of the census that asks: its documents in its order,
each once. One process at a time works in a folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout
from torch import Tensor

from fra._census.corpus import Corpus, read, write
from fra.errors import FraError


class Checkpoint:
    """One census's folder, locked while it is entered."""

    def __init__(self, folder: Path, about: dict[str, object], order: Sequence[int]):
        """about: what the census is of, to be found in every part. order: its documents' numbers as they are seen."""
        self.folder, self._about, self._order = folder, about, order
        self._n_parts = 0
        self._held = ExitStack()

    def __enter__(self) -> Checkpoint:
        """Raises FraError where the folder cannot be written to, and where another process works in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(FileLock(self.folder / ".lock", blocking=False))
        except Timeout as error:
            raise FraError(
                f"another census is at work in the checkpoint {self.folder}: wait for it, or give another folder."
            ) from error
        except (OSError, NotImplementedError, ValueError) as error:  # ValueError: a name with a null character
            raise FraError(
                f"the checkpoint {str(self.folder)!r} cannot be used as a folder "
                f"({getattr(error, 'strerror', None) or error}): give one that can be written to."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def parts(self) -> list[tuple[Corpus, dict[str, Tensor]]]:
        """What has been saved, in order. Raises FraError for parts of another census, and for parts that are damaged or
        missing, that somebody else's are among, or that hold other documents than the first of this census.
        """
        found: list[tuple[Corpus, dict[str, Tensor]]] = []
        done = 0
        names = sorted(path.name for path in self.folder.glob("part-*.safetensors"))
        for number, name in enumerate(names):
            if name != self._path(number).name:
                raise self._broken(f"{self._path(number).name} is missing, and {name} is there")
            try:
                part, wrote, tensors = read(self._path(number))
            except FraError as error:
                raise self._broken(f"{name} is damaged or no part of a census") from error
            if wrote != self._about:
                raise FraError(
                    f"the checkpoint {self.folder} is of other documents, weights or reductions, another shard or "
                    "version, or follows other channels: give another folder, or delete it."
                )
            documents = part.number.tolist()
            if documents != list(self._order[done : done + len(documents)]):
                raise self._broken(f"{name} does not go on where those before it end")
            found.append((part, tensors))
            done += len(documents)
        self._n_parts = len(names)
        return found

    def save(self, part: Corpus, more: Mapping[str, Tensor]) -> None:
        """Writes the next part; complete or absent, whatever interrupts."""
        write(part, self._path(self._n_parts), self._about, more)
        self._n_parts += 1

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06}.safetensors"

    def _broken(self, what: str) -> FraError:
        return FraError(
            f"the checkpoint {self.folder} cannot be gone on with: {what}; delete that file and those after it, or "
            "give another folder."
        )
