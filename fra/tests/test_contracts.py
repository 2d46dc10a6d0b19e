"""The house: each contract of pyproject.toml broken once, and what import-linter does not look at."""

from __future__ import annotations

import importlib.util
import pkgutil
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import fra

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ROOT / "fra"
CONTRACTS = {
    contract["id"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
OFFENCES = [  # a contract, and one line in one file that breaks it
    ("rooms", "fra/errors.py", "import fra.verdicts"),
    ("rooms", "fra/core/__init__.py", "import fra.report"),
    ("rooms", "fra/targets/__init__.py", "import fra.claim"),
    ("rooms", "fra/doctor.py", "import fra.commands"),
    ("rooms", "fra/attic/__init__.py", "import fra.errors"),
    ("rooms", "fra/attic.py", "import fra.errors"),
    ("chapters", "fra/measures/pairs/__init__.py", "import fra.measures.scores"),
    ("measures", "fra/induction/__init__.py", "import fra.measures"),
    ("circles", "fra/verdicts/claim.py", "import fra.verdicts.samples"),
    ("circles", "fixtures/registry.py", "import fixtures.options"),
    ("light", "fra/claim.py", "import pytest"),
    ("light", "fra/verdicts/files.py", "import torch"),
    ("light", "fra/plot/drawings.py", "import torch"),
    ("light", "fra/report/tokens.py", "import fra.core.weights"),
    ("library", "fra/errors.py", "import fixtures.target"),
    ("library", "fra/stimuli/sets.py", "import pytest"),
    ("tests", "fra/cards.py", "import fra.tests.models"),
    ("fixtures", "fixtures/threads.py", "import claims.q.test_q01_scores"),
]


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's sources, to be spoilt."""
    folder = tmp_path_factory.mktemp("house")
    for source in [
        ROOT / "pyproject.toml",
        *(p for f in ("fra", "fixtures") for p in (ROOT / f).rglob("*.py")),
    ]:
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    return folder


def _lint(folder: Path, *options: str) -> tuple[int, str]:
    command = [Path(sysconfig.get_path("scripts")) / "lint-imports", "--no-cache", "--no-logo", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_the_contracts_are_kept_and_each_is_broken_below(copied: Path) -> None:
    code, said = _lint(copied)
    assert code == 0, said
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken." in said
    assert {name for name, _, _ in OFFENCES} == set(CONTRACTS)


@pytest.mark.parametrize(("name", "file", "line"), OFFENCES)
def test_a_contract_notices_one_import(copied: Path, name: str, file: str, line: str) -> None:
    path = copied / file
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    try:
        path.write_text(f"{before or ''}\n{line}\n", encoding="utf-8")
        code, said = _lint(copied, "--contract", name)
    finally:
        if before is not None:
            path.write_text(before, encoding="utf-8")
        else:
            path.unlink()
            if path.name == "__init__.py":
                path.parent.rmdir()
    assert code == 1, said
    assert f"{CONTRACTS[name]['name']} BROKEN" in said


def _modules() -> Iterator[tuple[str, str]]:
    """Room and name of every module of the library that is no package; a room in a room is "measures.pairs"."""
    for found in pkgutil.walk_packages(fra.__path__, "fra."):
        if not found.ispkg and not found.name.startswith("fra.tests"):
            room, _, name = found.name.removeprefix("fra.").rpartition(".")
            yield room, name


ROOMS = {path.parent.name for path in HOUSE.glob("*/__init__.py")} - {"tests"}
DOORS = {path.stem for path in HOUSE.glob("*.py")} - {"__init__", "__main__"}


def test_fra_shows_doors_and_rooms_alone() -> None:
    (layers,) = [contract for contract in CONTRACTS.values() if contract["type"] == "layers"]
    named = [name.strip() for layer in layers["layers"] for name in layer.split("|")]
    assert sorted(named) == sorted(ROOMS | DOORS | {"__main__"})
    public = {"resolve", "remove", "judge", "census", "load_target"}
    assert not ROOMS & (public | {"tests"}), "a room of that name would rebind the public function"
    beside = {path.name for path in HOUSE.iterdir() if not path.name.startswith(("__", "."))}
    files = {f"{door}.py" for door in DOORS} | {"py.typed"}
    assert beside == ROOMS | files | {"tests"}, "whatever is neither room nor door belongs into a room"


def test_every_module_stands_in_one_room_and_hides_nothing() -> None:
    held: dict[str, list[str]] = {}
    for room, name in _modules():
        if name != "__main__":
            held.setdefault(room, []).append(name)
    assert set(held.pop("")) == DOORS
    assert {room.split(".")[0] for room in held} == ROOMS
    for room, modules in held.items():
        assert room.count(".") == room.startswith("measures"), f"{room}: rooms hold modules, measures holds rooms"
        assert len(modules) <= 12, f"{room} holds {len(modules)} modules"
        assert not [name for name in modules if name.startswith("_")], f"{room}: a room is private as a whole"


def test_shapes_are_checked_in_every_room() -> None:
    def checked(name: str) -> bool:
        spec: ModuleSpec | None = importlib.util.find_spec(name)
        return spec is not None and type(spec.loader).__module__.startswith("jaxtyping")

    rooms = {room for room, _ in _modules() if room} - {"statistics"}  # the plugins of fixtures/ import all of it
    covered = {room for room, name in _modules() if room and checked(f"fra.{room}.{name}")}
    assert covered >= rooms, f"fra/tests/conftest.py misses {rooms - covered}"
