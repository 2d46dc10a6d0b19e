"""Examples in docstrings and in the documentation's pages run, and show what they say."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import fra

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "fra").rglob("*.py")
    if "tests" not in file.parts and re.search(r"^ *>>> ", file.read_text(encoding="utf-8"), re.MULTILINE)
)


def test_the_main_door_has_examples() -> None:
    for function in (fra.resolve, fra.remove, fra.load_target):
        assert ">>>" in (function.__doc__ or "")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_show_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    names = vars(module) | {"fra": fra}
    found = [
        test
        for value in vars(module).values()
        if getattr(value, "__module__", None) == name
        for test in finder.find(value, f"{name}.{value.__name__}", module=False, globs=dict(names))
        if test.examples
    ]
    assert found
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("page", ["tutorial.md"])
def test_python_of_the_documentation_runs(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    blocks_sum = sum(names["blocks"].values())
    assert blocks_sum == pytest.approx(float(names["m"].scores()[names["q_pos"], names["k_pos"]]), abs=1e-3)
