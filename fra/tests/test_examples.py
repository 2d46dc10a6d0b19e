"""The notebooks of examples/: every cell runs on mini, and they are kept without outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def _cells(file: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == kind]


def _run(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell; the value of its last expression, which a notebook shows."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_something(file: Path) -> None:
    names: dict[str, Any] = {}
    shown = [value for source in _cells(file, "code") if (value := _run(source, names)) is not None]
    assert len(shown) >= 3
    for value in shown:
        assert repr(value)
        if hasattr(value, "_repr_html_"):
            assert "<" in value._repr_html_()


def test_notebooks_are_kept_without_outputs() -> None:
    assert len(NOTEBOOKS) == 3
    for file in NOTEBOOKS:
        held = json.loads(file.read_text())
        assert (held["nbformat"], held["metadata"]["kernelspec"]["name"]) == (4, "python3")
        for cell in held["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, f"{file.name} holds outputs"
        assert _cells(file, "markdown")[0].startswith("# ")
