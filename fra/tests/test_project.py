"""The project around the code: lazy imports, packaging, pins, the two commands."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from itertools import pairwise
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fra
from fra.errors import FraError

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(text) for text in PROJECT["dependencies"]]
OPTIONAL = [Requirement(text) for extra in ("gguf", "plot", "ray") for text in PROJECT["optional-dependencies"][extra]]
DEV = [Requirement(text) for extra in ("dev", "mutations") for text in PROJECT["optional-dependencies"][extra]]
PIN = re.compile(r"(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)==(?P<version>[0-9][0-9a-z.]*)")
HEAVY = ("torch", "pytest", "transformer_lens", "sae_lens")


def _pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    matches = [PIN.fullmatch(line) for line in lines]
    odd = [line for line, match in zip(lines, matches, strict=True) if match is None]
    assert not odd, f"constraints.txt pins name==version and nothing else (no URL, hash, local version): {odd}"
    names = [match["name"] for match in matches if match is not None]
    assert names == sorted(set(names)), "constraints.txt is sorted and names each package once"
    return {match["name"]: Version(match["version"]) for match in matches if match is not None}


def _run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import fra; dir(fra); fra.__version__",
        "import fra.claim, fra.statistics.stats, fra.verdicts.ledger, fra.report.page",
    ],
)
def test_what_is_light_imports_nothing_heavy(code: str) -> None:
    loaded = _run(f"{code}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))")
    assert json.loads(loaded) == [], f"after {code!r} these are imported too"


def test_public_functions_stay_callable_whatever_was_imported() -> None:
    for module in pkgutil.walk_packages(fra.__path__, "fra."):
        if not module.name.startswith("fra.tests") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    from fra._census import census as whole_census
    from fra.core import resolve as resolving

    assert fra.resolve is resolving.resolve
    assert fra.census is whole_census.census
    assert callable(fra.remove)
    assert callable(fra.judge)
    assert callable(fra.load_target)
    for name in fra.__all__:
        assert getattr(fra, name) is not None
    with pytest.raises(AttributeError, match="attribute resolv"):
        fra.resolv  # noqa: B018


def test_shapes_and_types_are_checked_while_the_suite_runs() -> None:
    import numpy as np
    from jaxtyping import TypeCheckError

    from fra.stimuli.repeated import derange

    with pytest.raises(TypeCheckError):
        derange(np.zeros((2, 20), dtype=np.int64), np.random.default_rng(0))


def test_version_is_the_same_everywhere() -> None:
    assert fra.__version__ == PROJECT["version"]
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_wheel_holds_the_library_without_its_tests(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        path
        for path in (ROOT / "fra").rglob("*")
        if path.suffix in (".py", ".pyi", ".j2", ".js", ".css") or path.name == "py.typed"
    }
    library = {path.relative_to(ROOT).as_posix() for path in sources if "tests" not in path.relative_to(ROOT).parts}
    assert {"fra/__init__.py", "fra/py.typed"} <= library
    for suffix in (".j2", ".js", ".css"):
        assert any(name.endswith(suffix) for name in library), "templates, scripts and styles are package data"
    assert names == library


def test_constraints_cover_every_dependency_with_its_own() -> None:
    pins = _pins()
    for requirement in [*NEEDED, *DEV]:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned"
        assert requirement.specifier.contains(pins[name]), f"{requirement} excludes {pins[name]}"
    unseen, seen = [canonicalize_name(requirement.name) for requirement in [*NEEDED, *DEV]], set[str]()
    while unseen:
        name = unseen.pop()
        if name in seen or name.startswith(("nvidia-", "cuda-", "triton")):  # each build of torch pins its own
            continue
        seen.add(name)
        assert name in pins, f"{name}, which a dependency needs, is not pinned"
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # needed elsewhere only
        for requirement in map(Requirement, needs):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                unseen.append(canonicalize_name(requirement.name))


def _imports(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.partition(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield path, node.module.partition(".")[0]


SKIPPED_WITHOUT = {"ray"}
"""Extras whose tests skip where they are not installed: a job of CI has them, `make test` does without."""


def test_what_is_imported_is_declared() -> None:
    providers = packages_distributions()
    needed = {canonicalize_name(requirement.name) for requirement in NEEDED}
    dev = {canonicalize_name(requirement.name) for requirement in DEV}
    optional = {canonicalize_name(requirement.name) for requirement in OPTIONAL}
    assert optional - SKIPPED_WITHOUT <= dev, "the tests need what users may do without"
    dev |= SKIPPED_WITHOUT
    checked = 0
    for path, module in (pair for folder in ("fra", "fixtures", "claims") for pair in _imports(ROOT / folder)):
        if module in sys.stdlib_module_names or module in ("fra", "fixtures", "claims", "__future__"):
            continue
        shipped = path.relative_to(ROOT).parts[0] == "fra" and "tests" not in path.relative_to(ROOT).parts
        allowed = needed | optional if shipped else needed | dev
        given_by = {canonicalize_name(name) for name in providers.get(module, [module])}
        assert given_by & allowed, f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not name"
        checked += 1
    assert checked > 20


RUN_NOT_IMPORTED = {"beartype", "import-linter", "mypy", "pre-commit", "pytest-benchmark", "pytest-xdist", "ruff"}
"""Development tools: named to a command, to pytest or to jaxtyping's import hook."""


def test_what_is_declared_is_imported() -> None:
    providers = packages_distributions()
    by_folder: dict[str, set[str]] = {"library": set(), "suite": set()}
    for path, module in (pair for folder in ("fra", "fixtures", "claims") for pair in _imports(ROOT / folder)):
        parts = path.relative_to(ROOT).parts
        given_by = {canonicalize_name(name) for name in providers.get(module, [module])}
        by_folder["library" if parts[0] == "fra" and "tests" not in parts else "suite"] |= given_by
    needed = {canonicalize_name(requirement.name) for requirement in NEEDED}
    assert needed - by_folder["library"] == set(), "the library does not import these"
    dev = {canonicalize_name(requirement.name) for requirement in DEV} - RUN_NOT_IMPORTED
    assert dev - by_folder["library"] - by_folder["suite"] == set(), "nothing imports these"


def test_claims_get_fixtures_by_injection() -> None:
    found = [(path.name, module) for path, module in _imports(ROOT / "claims") if module in ("fixtures", "conftest")]
    assert found == [], "a claim names its fixtures as parameters and imports fra alone"


OURS = ("fra", "fixtures", "claims")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_census"  # a room, not a secret


def _private_names(tree: ast.Module) -> Iterator[str]:
    """Private names of our own modules that another module imports, reads or patches."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OURS:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.partition(".")[0] in OURS]
            imported |= {root: root for alias in ours if (root := alias.name.partition(".")[0])}
            imported |= {alias.asname or alias.name: alias.name for alias in ours}
    yield from (name for name in imported.values() if any(map(_is_private, name.split("."))))

    def dotted(node: ast.expr) -> str | None:
        """`module.thing.name` in full, where it starts from what was imported."""
        if isinstance(node, ast.Name):
            return imported.get(node.id)
        above = dotted(node.value) if isinstance(node, ast.Attribute) else None
        return None if above is None else f"{above}.{node.attr}"  # type: ignore[union-attr]

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and (name := dotted(node)):
            yield name
        elif isinstance(node, ast.Call) and len(node.args) > 1 and (owner := dotted(node.args[0])):
            named = node.args[1]
            if isinstance(named, ast.Constant) and isinstance(named.value, str) and _is_private(named.value):
                yield f"{owner}.{named.value}"


def _patches_by_path(tree: ast.Module) -> Iterator[int]:
    """Lines that patch "a.dotted.name": nothing but the run itself would notice that the name has moved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.func, (ast.Attribute, ast.Name)):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            first = node.args[0]
            if called in ("setattr", "delattr", "patch") and isinstance(first, ast.Constant):
                yield node.lineno


def test_modules_are_used_by_their_public_names_and_patched_as_objects() -> None:
    files = [path for folder in ("fra/tests", "fixtures", "claims") for path in sorted((ROOT / folder).rglob("*.py"))]
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}
    assert [f"{file}:{line}" for file, tree in trees.items() for line in _patches_by_path(tree)] == []
    found = {file: set(_private_names(tree)) for file, tree in trees.items()}
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from fra.statistics.stats import _Tail", "fra.statistics.stats._Tail"),
        ("from fra.statistics import stats as s\ns._Tail()", "fra.statistics.stats._Tail"),
        ("import fra.claim\nfra.claim._ID", "fra.claim._ID"),
        ("import fra.statistics.stats as s\ns._Tail()", "fra.statistics.stats._Tail"),
        ("from fra.core import frozen\nm.setattr(frozen, '_rms', 1)", "fra.core.frozen._rms"),
        ("from fra._census import dense", None),
        ("from fra.core import frozen\nfrozen.__name__\nself._own", None),
    ],
)
def test_a_private_name_is_noticed(source: str, name: str | None) -> None:
    assert list(_private_names(ast.parse(source))) == ([] if name is None else [name])
    assert not list(_patches_by_path(ast.parse(source)))
    assert list(_patches_by_path(ast.parse("m.setattr('fra.core.frozen.rms', 1)"))) == [1]


def test_a_class_is_known_by_its_name() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "fra").rglob("*.py")):
        file = path.relative_to(ROOT)
        for node in [] if "tests" in file.parts else ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{file.as_posix()}:{node.lineno}")
    assert len(places) > 100
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_architecture_names_every_room_and_door_in_their_order() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    named = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    rooms = {f"fra/{path.parent.name}/" for path in (ROOT / "fra").glob("*/__init__.py")} - {"fra/tests/"}
    doors = {f"fra/{path.name}" for path in (ROOT / "fra").glob("*.py")} - {"fra/__init__.py"}
    assert sorted(named) == sorted(rooms | doors)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    drawn = [layer.replace("|", "&") for layer in layers]
    arrows = re.findall(r"^ +(.* --> .*)$", page, re.MULTILINE)
    assert arrows == [f"{above} --> {below}" for above, below in pairwise(drawn)]
    for file in re.findall(r"`((?:fra|fixtures|claims)/[^`]+)`|\]\(([^)]+)\)", page):
        (path,) = filter(None, file)
        assert (ROOT / path).exists(), f"ARCHITECTURE.md leads to {path}, which is not there"
    assert "(ARCHITECTURE.md)" in (ROOT / "README.md").read_text()


def _make(tmp_path: Path, *arguments: str, python_exits: int = 0) -> tuple[int, list[str]]:
    """The exit status of make in a copy of the project, and what it asked of its environment's python, a stand-in."""
    log, venv = tmp_path / "asked.txt", tmp_path / "venv"
    python = venv / "bin" / "python"
    if not python.exists():
        python.parent.mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
        (venv / ".fra-made").touch()
    # pip works; anything else exits as told
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in "-m pip"*) exit 0;; esac\nexit {python_exits}\n')
    python.chmod(0o755)
    log.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "ARGS")}
    command = ["make", f"VENV={venv}", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, log.read_text().splitlines() if log.exists() else []


def test_make_installs_only_when_stale_and_then_runs(tmp_path: Path) -> None:
    code, first = _make(tmp_path, "claims", "ARGS=-k Q01")
    installed = "-m pip install --constraint constraints.txt --editable .[dev]"
    ran = "-m pytest claims -n 2 --dist loadfile -r fE --ledger build/ledger.json --report build/report.html -k Q01"
    assert (code, first[-2:]) == (0, [installed, ran])
    assert _make(tmp_path, "claims", "ARGS=-k Q01") == (0, [ran])
    assert _make(tmp_path, "claims", "TARGET=mine.toml")[1][-1].endswith(
        "--report build/report.html --target mine.toml"
    )
    stamp = (tmp_path / "venv" / ".fra-installed").stat().st_mtime
    os.utime(tmp_path / "constraints.txt", (stamp + 10, stamp + 10))
    code, again = _make(tmp_path, "test")
    assert (code, again[-2]) == (0, installed)
    assert again[-1].startswith("-m pytest fra/tests -n 2 --dist loadfile")


def test_make_installs_nothing_into_an_environment_that_it_did_not_make(tmp_path: Path) -> None:
    _make(tmp_path, "help")
    (tmp_path / "venv" / ".fra-made").unlink()
    for goal, ran in (("setup", []), ("test", ["-m pytest fra/tests -n 2 --dist loadfile -m not long"])):
        code, asked = _make(tmp_path, goal)
        assert (code, [line.strip() for line in asked]) == (0, ["-m fixtures.environment", *ran])
    assert not list((tmp_path / "venv").glob(".fra-*"))
    code, asked = _make(tmp_path, "test", python_exits=1)
    assert code != 0
    assert asked == ["-m fixtures.environment"], "nothing runs where something is lacking"


def test_an_environment_of_ones_own_is_told_what_it_lacks(tmp_path: Path) -> None:
    environment = importlib.import_module("fixtures.environment")
    assert environment.lacking() == []
    file = tmp_path / "pyproject.toml"
    file.write_text(
        '[project]\nname = "numpy"\ndependencies = ["no-such-thing-at-all>=2", "numpy<1"]\n'
        "[project.optional-dependencies]\ndev = []\n"
    )
    missing, old = environment.lacking(file)
    assert missing == "no-such-thing-at-all>=2"
    assert old.startswith("numpy<1 (it has ")


def test_an_installed_package_says_where_mini_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fra.targets import file

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(file, "presets", dict)
    with pytest.raises(FraError, match=r"not part of the installed package.*fixtures/targets of fra's repository"):
        fra.load_target("mini")


def test_make_fails_where_the_tests_fail(tmp_path: Path) -> None:
    assert _make(tmp_path, "setup")[0] == 0
    for goal in ("test", "claims", "report"):
        assert _make(tmp_path, goal, python_exits=1)[0] != 0, f"make {goal} hides a failure"


def test_make_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    assert _make(tmp_path, "setup")[0] == 0
    code, asked = _make(tmp_path, "mini", "CORPUS=nowhere")
    assert code != 0
    assert asked == [], "nothing is trained without a corpus"
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\necho "fra needs Python 3.11 or newer" >&2\nexit 1\n')
    old.chmod(0o755)
    (tmp_path / "venv" / "bin" / "python").unlink()
    (tmp_path / "venv" / ".fra-installed").unlink()
    done = subprocess.run(
        ["make", "setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert not (tmp_path / "venv" / ".fra-installed").exists()


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^make (\w+)", blocks[0], re.MULTILINE) == ["claims", "test"]
    assert re.findall(r"^step make (\w+)$", ci, re.MULTILINE) == ["setup", "lint", "test", "claims"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=False).returncode == 0
