"""Every mutant that mutmut's operators make of a module, and the tests that must notice it: `make mutmut`.

`python -m fra.tests.mutations [FILE ...]` reads `mutations.toml` beside this file: which modules, which tests, and
which mutants mean the same as the code, each with its reason. mutmut's own runner leaves out decorated functions,
properties and what stands in a class or a module, which here is half of the code: so its operators
(`mutmut.mutation.mutators`) make the mutants, and each is tried in a fork of a process that has the libraries loaded,
on the tests that call the mutated function, fastest first, until one fails. Prose (a literal of three words or more)
and annotations are left alone.

A mutant that all tests let pass *survives*. Exit status: 0 where every survivor is explained, 1 where one is not, 2
where an explanation no longer fits the code or the tests fail without a mutant.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import sys
import tempfile
import tomllib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import libcst as cst
import pytest
from mutmut.mutation.mutators import mutation_operators

from fra.errors import FraError

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutations.toml")
MEMORY = 12 * 2**30
"""Bytes of address space of one run: a mutant may ask for more than there is."""


@dataclass(frozen=True)
class Mutation:
    """One mutant of a file."""

    file: str
    where: str
    """The function or class that it is in, or "module"."""
    in_function: bool
    change: str
    """The lines that change, ` => ` between what they are and what they would be, stripped."""
    source: str
    """The whole file, mutated."""


@dataclass(frozen=True)
class Module:
    """A module under test: its file, the tests, and what leaves its meaning alone."""

    file: str
    tests: tuple[str, ...]
    but: tuple[str, ...]
    """Tests left out: those that start processes, which would import the code as it is."""
    equivalent: dict[str, str]
    """Reason by change."""

    @property
    def name(self) -> str:
        """Dotted."""
        return self.file.removesuffix(".py").replace("/", ".")


def read(path: Path = LIST) -> list[Module]:
    """The modules of the list. Raises FraError where a change is explained twice."""
    found = []
    for entry in tomllib.loads(path.read_text())["module"]:
        reasons: dict[str, str] = {}
        for group in entry.get("equivalent", []):
            for change in group["changes"]:
                if reasons.setdefault(change, group["why"]) is not group["why"]:
                    raise FraError(f"{path.name}: {change!r} of {entry['file']} is explained twice")
        found.append(Module(entry["file"], tuple(entry["tests"]), tuple(entry.get("but", ())), reasons))
    return found


class _Visitor(cst.CSTVisitor):
    """Collects (node, mutated node) everywhere but in annotations and prose."""

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.Annotation, cst.Import, cst.ImportFrom)):
            return False
        if isinstance(node, cst.SimpleString) and len(str(node.evaluated_value).split()) > 2:
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                self.found += [(node, mutated) for mutated in operator(node)]
        return True


def mutations(file: str, source: str) -> list[Mutation]:
    """All mutants of a source, in its order; each once, and only such as compile."""
    module, tree = cst.parse_module(source), ast.parse(source)
    parts = [module.code_for_node(part) for part in module.body]
    start = source.index("".join(parts))
    found: dict[str, Mutation] = {}
    for part, code in zip(module.body, parts, strict=True):
        visitor = _Visitor()
        part.visit(visitor)
        for node, mutated in visitor.found:
            new = module.code_for_node(part.deep_replace(node, mutated))
            text = source[:start] + new + source[start + len(code) :]
            try:
                compile(text, file, "exec")
            except SyntaxError:
                continue
            line, change = _change(source, text)
            if text != source:
                found.setdefault(text, Mutation(file, *_where(tree, line), change, text))
        start += len(code)
    return list(found.values())


def _change(old: str, new: str) -> tuple[int, str]:
    """The first line that differs, from 1, and what is there in either text."""
    a, b = old.splitlines(), new.splitlines()
    start = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    end = 0
    while end < min(len(a), len(b)) - start and a[len(a) - 1 - end] == b[len(b) - 1 - end]:
        end += 1
    sides = (" ".join(line.strip() for line in text[start : len(text) - end]) for text in (a, b))
    return start + 1, " => ".join(sides)


def _where(tree: ast.Module, line: int) -> tuple[str, bool]:
    """The function or class that holds a line (of nested functions the outermost), and whether it is a function."""
    names: list[str] = []
    body: Sequence[ast.stmt] = tree.body
    while inner := [
        node
        for node in body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line <= (node.end_lineno or 0)
    ]:
        names.append(inner[0].name)
        if isinstance(inner[0], ast.FunctionDef):
            return ".".join(names), True
        body = inner[0].body
    return ".".join(names) or "module", False


class _Served(importlib.machinery.SourceFileLoader, importlib.abc.MetaPathFinder):
    """Imports one module from a text, under its own file's name."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self._source = source

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None
        )

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self._source, self.path, "exec", dont_inherit=True)


@dataclass(frozen=True)
class Ran:
    """What a test did where nothing is mutated."""

    seconds: float
    called: frozenset[str]
    """The functions of the module that it called; "" stands for all tests: called before any began."""


class _Watch:
    """Notes how long each test takes and which functions of a file it calls."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._called: set[str] = set()
        self.seconds: dict[str, float] = {}
        self.called: dict[str, list[str]] = {}
        sys.setprofile(self._call)

    def _call(self, frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename == self._path:
            self._called.add(frame.f_code.co_qualname.partition(".<locals>")[0])

    def pytest_runtest_logstart(self) -> None:
        self.called.setdefault("", sorted(self._called))
        self._called.clear()
        sys.setprofile(self._call)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        self.called[report.nodeid] = sorted(self._called)


class _Order:
    """Some tests alone, in the order given."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._place = {test: k for k, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._place), key=lambda item: self._place[item.nodeid])


class Nursery:
    """Runs a module's tests on a text of it, each time in a fork of this process."""

    def __init__(self, module: Module, longest: float = float("inf")) -> None:
        self.module = module
        source = (ROOT / module.file).read_text()
        with tempfile.TemporaryDirectory() as folder:
            noted = Path(folder) / "noted.json"
            if (status := self._fork(source, (), 3_600, noted)) != pytest.ExitCode.OK:
                raise FraError(f"the tests of {module.file} fail where nothing is mutated (pytest ends with {status})")
            seconds, called = json.loads(noted.read_text())
        self._always = frozenset(called[""])
        self._ran = {
            test: Ran(seconds[test], frozenset(called[test]))
            for test in sorted(seconds, key=seconds.__getitem__)
            if seconds[test] <= longest
        }
        self.limit = 60 + int(5 * sum(seconds.values()))  # of the processor, which may be busy elsewhere

    def tests_of(self, mutation: Mutation) -> list[str]:
        """The tests that call the function mutated, fastest first; all where it is not within one."""
        anywhere = not mutation.in_function or mutation.where in self._always
        return [test for test, ran in self._ran.items() if anywhere or mutation.where in ran.called]

    def notices(self, mutation: Mutation) -> bool:
        """Whether a test fails, or they all take too much time or memory."""
        if not (tests := self.tests_of(mutation)):
            return False
        status = self._fork(mutation.source, tests, self.limit)
        if status in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise FraError(f"no test of {self.module.file} ran: pytest ends with {status}")
        return status != pytest.ExitCode.OK

    def _fork(self, source: str, tests: Sequence[str], limit: int, noted: Path | None = None) -> int:
        sys.stdout.flush()
        if not (child := os.fork()):
            try:
                os.setpgid(0, 0)
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
                status = self._run(source, tests, noted)
            except BaseException:  # an exit or a lack of memory notices the mutant too
                status = pytest.ExitCode.INTERNAL_ERROR
            os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _run(self, source: str, tests: Sequence[str], noted: Path | None) -> int:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.meta_path.insert(0, _Served(self.module.name, ROOT / self.module.file, source))
        watch = _Watch(ROOT / self.module.file) if noted else _Order(tests)
        options = ["-q", "-x", "--tb=no", "--assert=plain", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
        left_out = [f"--deselect={test}" for test in self.module.but]
        status = pytest.main([*options, *left_out, *self.module.tests], plugins=[watch])
        if noted and isinstance(watch, _Watch):
            sys.setprofile(None)
            noted.write_text(json.dumps([watch.seconds, watch.called]))
        return int(status)


def preload(modules: Sequence[Module]) -> None:
    """Import once whatever the tests need of other packages, and nothing of fra: every fork has it then."""
    before = set(sys.modules)
    for test in {test.partition("::")[0] for module in modules for test in module.tests}:
        importlib.import_module(test.removesuffix(".py").replace("/", "."))
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "fra":
            del sys.modules[name]
    sys.modules.pop("fra.verdicts", None)
    # The same examples each time, none kept in a file, and no search for a smaller one.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutations", database=None, derandomize=True, deadline=None, phases=phases)
    hypothesis.settings.load_profile("mutations")


def survivors(nursery: Nursery, chosen: Sequence[Mutation]) -> Iterator[tuple[Mutation, bool]]:
    """Each mutant with whether a test noticed it, as they end."""
    for one in chosen:
        yield one, nursery.notices(one)


def main(argv: list[str] | None = None) -> int:
    """Print each survivor, with its reason where it has one, and the counts by module."""
    parser = argparse.ArgumentParser(prog="python -m fra.tests.mutations", description="Mutants that tests must see.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="only these modules")
    parser.add_argument("-k", default="", metavar="WORD", help="only mutants with this in their function or change")
    parser.add_argument("--longest", type=float, default=float("inf"), help="leave out tests longer than so many s")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only those that an earlier run printed into FILE")
    parser.add_argument("--unexplained", action="store_true", help="leave out mutants that have a reason")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    code = 0
    try:
        modules = [module for module in read() if not options.files or module.file in options.files]
        if not options.list:
            preload(modules)
        for module in modules:
            made = mutations(module.file, (ROOT / module.file).read_text())
            if strange := module.equivalent.keys() - {one.change for one in made}:
                raise FraError(f"{LIST.name}: no mutant of {module.file} is {sorted(strange)[0]!r}; write it anew")
            chosen = [one for one in made if options.k in f"{one.where}: {one.change}"]
            if options.again:
                lines = options.again.read_text().splitlines()
                chosen = [one for one in chosen if any(line.endswith(f": {one.where}: {one.change}") for line in lines)]
            if options.unexplained:
                chosen = [one for one in chosen if one.change not in module.equivalent]
            if options.list:
                print("\n".join(f"{module.file}: {one.where}: {one.change}" for one in chosen))
                continue
            nursery, explained, open_ = Nursery(module, options.longest), 0, 0
            for k, (one, noticed) in enumerate(survivors(nursery, chosen), 1):
                if noticed:
                    continue
                why = module.equivalent.get(one.change)
                explained, open_ = explained + (why is not None), open_ + (why is None)
                print(f"[{k}/{len(chosen)}] {why or 'SURVIVES'}: {one.where}: {one.change}", flush=True)
            dead = len(chosen) - explained - open_
            print(f"{module.file}: {len(chosen)} mutants, {dead} noticed, {explained} explained, {open_} survive")
            code |= int(open_ > 0)
    except FraError as error:
        print(f"fra.tests.mutations: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
