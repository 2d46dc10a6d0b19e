"""Every number that can move a verdict is registered: designs of claims, and no constants beside them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fra.errors import FraError

registries = importlib.import_module("fixtures.registry")  # a test of the suite, from within the library

ROOT = Path(__file__).resolve().parents[3]
ROOMS = ("fra/measures", "fra/attribution", "fra/induction", "fra/search", "fra/stimuli")
"""Where claims are measured."""
COMPUTES = re.compile(r"_?[A-Z_]*(AT_ONCE|BYTES|CELLS|TOGETHER|CHUNKS?|LISTED)")
"""How much is computed at once, or listed beside a verdict: neither moves a number of it."""
ROUNDING = {
    ("fra/search/best_effect.py", "_FIRST"): "how many channels are measured first: the largest is the same",
    ("fra/search/best_effect.py", "_ROUNDING_OF_FLOAT32"): "slack of a bound, many times float32's",
    ("fra/search/power.py", "_ROUNDING"): "slack of a comparison, many times float64's",
    ("fra/measures/scores/layer.py", "_FEWEST_DOCUMENTS"): "fewer texts are an error, no number",
    ("fra/search/examples.py", "LONGEST"): "positions of a picture",
    ("fra/search/examples.py", "_BEHIND"): "positions of a picture",
    ("fra/attribution/head_outputs.py", "_LARGEST"): "larger results are an error, no number",
    ("fra/stimuli/repeated.py", "_TRIES"): "exchanges until a derangement is given up: an error, no number",
    ("fra/stimuli/sources.py", "_FEWEST"): "sources over which a selection is spread: made the same for every claim",
}
"""Other module-level numbers, each with the reason why no verdict moves with it."""


def _numeric(node: ast.expr | None) -> bool:
    """Whether an expression is a number, or a tuple or a dictionary of numbers."""
    if isinstance(node, ast.UnaryOp):
        return _numeric(node.operand)
    if isinstance(node, ast.BinOp):
        return _numeric(node.left) and _numeric(node.right)
    if isinstance(node, ast.Tuple):
        return bool(node.elts) and all(_numeric(inner) for inner in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("tuple", "range"):
        return all(_numeric(inner) for inner in node.args)
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool)


def numbers_beside(source: str) -> Iterator[str]:
    """Module-level names that are bound to numbers, and parameters with a number above 2 as their default."""
    tree = ast.parse(source)
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if targets and _numeric(getattr(node, "value", None)):
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names = [*node.args.posonlyargs, *node.args.args]
            given = list(zip(names[len(names) - len(node.args.defaults) :], node.args.defaults, strict=True))
            given += list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
            for arg, default in given:
                if isinstance(default, ast.Constant) and type(default.value) in (int, float) and default.value > 2:
                    yield f"{node.name}({arg.arg}=)"


@pytest.mark.parametrize("room", ROOMS)
def test_no_number_of_a_measurement_stands_outside_of_a_design(room: str) -> None:
    found = []
    for file in sorted((ROOT / room).rglob("*.py")):
        if file.name == "designs.py" or file.stem.endswith("_designs"):
            continue
        name = str(file.relative_to(ROOT))
        for constant in numbers_beside(file.read_text()):
            if not COMPUTES.fullmatch(constant) and (name, constant) not in ROUNDING and "top=" not in constant:
                found.append(f"{name}: {constant}")
    assert not found, "a number that can move a verdict belongs into a frozen design that the claim registers"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("DRAWS = 20", ["DRAWS"]),
        ("A, B = 60, 40", ["A", "B"]),
        ("SHIFTS: tuple[int, ...] = tuple(range(2, 42))", ["SHIFTS"]),
        ("BAR = -0.5", ["BAR"]),
        ("def f(n: int = 20, *, m: float = 0.3, k: int = 7) -> None: ...", ["f(n=)", "f(k=)"]),
        ("NAME = 'x'\nFLAG = True\ndef f(n: int = 1): x = 20", []),
    ],
)
def test_a_number_beside_is_noticed(source: str, found: list[str]) -> None:
    assert list(numbers_beside(source)) == found


def leaves(part: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value in a design, with the way to it."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*at, field.name))
        else:
            yield (*at, field.name), value


def changed(part: Any, at: tuple[str, ...]) -> Any:
    """The design with one value changed a little."""
    value = getattr(part, at[0])
    if len(at) > 1:
        return dataclasses.replace(part, **{at[0]: changed(value, at[1:])})
    other = (
        not value
        if isinstance(value, bool)
        else value + 1
        if isinstance(value, (int, float))
        else (*value, value[-1])
        if isinstance(value, tuple)
        else f"{value}!"
    )
    return dataclasses.replace(part, **{at[0]: other})


@pytest.fixture(scope="module")
def registry() -> Any:
    return registries.read_registry(ROOT / "claims")


def test_every_number_of_every_design_is_registered(registry: Any) -> None:
    seen = 0
    for claim in registry.claims.values():
        for k, part in enumerate(claim.design):
            for at, _ in leaves(part):
                design = (*claim.design[:k], changed(part, at), *claim.design[k + 1 :])
                other = dataclasses.replace(claim, design=design)
                altered = dataclasses.replace(
                    registry, claims={claim.id: other}, registered={claim.id: registry.registered[claim.id]}
                )
                with pytest.raises(FraError, match="register it with --register"):
                    altered.check()
                seen += 1
    assert seen > len(registry.claims), "designs hold the numbers"


def test_every_design_is_registered_by_a_claim_and_every_number_in_it_is_read(registry: Any) -> None:
    used = {type(part) for claim in registry.claims.values() for part in claim.design}
    code = "\n".join(
        file.read_text() for folder in (*ROOMS, "claims", "fixtures") for file in sorted((ROOT / folder).rglob("*.py"))
    )
    for file in sorted(ROOT.glob("fra/**/*designs.py")):
        if "tests" in file.parts:
            continue
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            assert node.name in {cls.__name__ for cls in used} or re.search(rf": {node.name}\b", file.read_text()), (
                f"no claim registers {file.name}: {node.name}"
            )
            values = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            for field in (n.target.id for n in values if not isinstance(n.value, ast.Call)):
                assert re.search(rf"\.{field}\b", code + file.read_text()), f"nothing reads {node.name}.{field}"


def test_every_finding_registers_what_it_measures_with(registry: Any) -> None:
    bare = [claim.id for claim in registry.claims.values() if claim.kind == "finding" and not claim.design]
    assert not bare, "a finding without a design has its numbers elsewhere"


def test_findings_and_identities_are_told_apart(registry: Any) -> None:
    exact = {claim.id for claim in registry.claims.values() if claim.kind == "identity"}
    assert exact == {"B01", "B02", "C01", "D02", "D03", "D17", "Q01", "Q13", "Q13.bias", "Q18", "Q19", "S01"}
