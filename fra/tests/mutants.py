"""Bugs that are planted one at a time, and the tests that must notice: `make mutants`.

`python -m fra.tests.mutants [-k WORD] [--list]` reads `mutants.toml` beside this file. An entry is a bug as one might
write it: a file, the text as it is, the text as it would be, and the tests that are to fail. Each is planted in a copy
of the project; a bug that its tests let pass *survives*, and so does one whose tests fail without it. 0 where none
does, 1 where one does, 2 where an entry no longer fits the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from fra.errors import FraError

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutants.toml")
COPIED = ("fra", "fixtures", "claims", "conftest.py", "pyproject.toml", "README.md")
FAILED = 1
"""What pytest ends with where tests failed; a file that cannot be collected ends with 2, which shows nothing."""


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    name: str
    """What is wrong, in a few words."""
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def plant(self, root: Path) -> None:
        """Write the bug into the project at `root`. Raises FraError where the text is not there exactly once."""
        path = root / self.file
        source = path.read_text() if path.is_file() else ""
        if source.count(self.old) != 1:
            raise FraError(
                f"{self.name!r}: its text stands {source.count(self.old)} times in {self.file}; write the entry anew"
            )
        path.write_text(source.replace(self.old, self.new))


def read(path: Path = LIST) -> list[Mutant]:
    """The entries of the list. Raises FraError for one that says nothing, or twice the same name."""
    found: dict[str, Mutant] = {}
    for entry in tomllib.loads(path.read_text())["mutant"]:
        if missing := {"name", "file", "old", "new", "tests"} - entry.keys():
            raise FraError(f"{path.name}: an entry lacks {sorted(missing)[0]!r}: {entry.get('name', entry)}")
        one = Mutant(entry["name"], entry["file"], entry["old"], entry["new"], tuple(entry["tests"]))
        if one.old == one.new or not one.tests or found.setdefault(one.name, one) is not one:
            raise FraError(f"{path.name}: {one.name!r} changes nothing, names no test, or stands there twice")
    return list(found.values())


def copy_of(root: Path, folder: Path) -> Path:
    """What tests need of the project, copied."""
    folder.mkdir()
    for name in COPIED:
        source = root / name
        skip = shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=skip)
        else:
            shutil.copy(source, folder / name)
    return folder


def status(root: Path, tests: Sequence[str]) -> int:
    """Exit status of pytest on some tests of the project at `root`."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False).returncode


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    caught: bool
    seconds: float


class Nursery:
    """Copies of the project in which mutants are tried, one at a time in each."""

    def __init__(self, root: Path, folder: Path, jobs: int) -> None:
        self._root, self._free = root, Queue[Path]()
        for k in range(jobs):
            self._free.put(copy_of(root, folder / str(k)))

    def try_(self, mutant: Mutant) -> Outcome:
        """Plant, test, restore."""
        home, start = self._free.get(), time.monotonic()
        try:
            mutant.plant(home)
            try:
                return Outcome(mutant, status(home, mutant.tests) == FAILED, time.monotonic() - start)
            finally:
                shutil.copy(self._root / mutant.file, home / mutant.file)
        finally:
            self._free.put(home)

    def healthy(self, tests: Sequence[str]) -> bool:
        """Whether the tests pass where nothing is planted."""
        home = self._free.get()
        try:
            return status(home, tests) == 0
        finally:
            self._free.put(home)


def run(mutants: Sequence[Mutant], root: Path, jobs: int) -> Iterator[Outcome]:
    """Try each, as they end. Raises FraError where the tests fail without a bug: then they show nothing."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        nursery = Nursery(root, Path(folder), jobs)
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        if not nursery.healthy(tests):
            raise FraError("the tests of these mutants fail where nothing is planted, so that they show nothing")
        yield from pool.map(nursery.try_, mutants)


def main(argv: list[str] | None = None) -> int:
    """Print a line a mutant and what survives."""
    parser = argparse.ArgumentParser(
        prog="python -m fra.tests.mutants", description="Planted bugs that tests must see."
    )
    parser.add_argument("-k", default="", metavar="WORD", help="only those with this word in name or file")
    parser.add_argument("--jobs", type=int, default=2, help="tried at once (default: 2)")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    options = parser.parse_args(argv)
    try:
        chosen = [m for m in read() if options.k in m.name or options.k in m.file]
        if options.list:
            print("\n".join(f"{m.file}: {m.name}" for m in chosen))
            return 0
        survivors = 0
        for outcome in run(chosen, ROOT, options.jobs):
            survivors += not outcome.caught
            word = "caught" if outcome.caught else "SURVIVES"
            print(f"{word:<9} {outcome.seconds:5.0f} s  {outcome.mutant.file}: {outcome.mutant.name}", flush=True)
    except FraError as error:
        print(f"fra.tests.mutants: {error}", file=sys.stderr)
        return 2
    print(f"{len(chosen)} planted bugs, {survivors} of them survive")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
