"""The list of planted bugs fits the code, and the tool tells what tests notice from what they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fra.errors import FraError
from fra.tests import mutants
from fra.tests.mutants import ROOT, Mutant, read, run


def test_every_entry_fits_the_code_and_names_tests_that_are_there() -> None:
    for one in read():
        source = (ROOT / one.file).read_text()
        assert source.count(one.old) == 1, f"{one.name!r}: write the entry anew"
        compile(source.replace(one.old, one.new), one.file, "exec")
        for test in one.tests:
            assert (ROOT / test.split("::")[0]).is_file(), test


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "area.py").write_text("def area(a, b):\n    return a * b\n\n\ndef double(a):\n    return 2 * a\n")
    (tmp_path / "test_area.py").write_text("from area import area\n\n\ndef test_area():\n    assert area(2, 3) == 6\n")
    (tmp_path / "test_red.py").write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(mutants, "COPIED", ("area.py", "test_area.py", "test_red.py"))
    return tmp_path


def test_a_bug_is_caught_or_survives_and_the_project_stays_as_it_is(project: Path) -> None:
    caught = Mutant("sum", "area.py", "a * b", "a + b", ("test_area.py",))
    survives = Mutant("triple", "area.py", "2 * a", "3 * a", ("test_area.py",))
    found = {o.mutant.name: o.caught for o in run([caught, survives, caught], project, 1)}
    assert found == {"sum": True, "triple": False}
    assert "a * b" in (project / "area.py").read_text()


def test_what_shows_nothing_is_refused(project: Path) -> None:
    red = Mutant("sum", "area.py", "a * b", "a + b", ("test_red.py",))
    with pytest.raises(FraError, match="fail where nothing is planted"):
        list(run([red], project, 1))
    gone = Mutant("gone", "area.py", "a - b", "a + b", ("test_area.py",))
    with pytest.raises(FraError, match="stands 0 times in"):
        list(run([gone], project, 1))
    broken = Mutant("syntax", "area.py", "def area(a, b):", "def area(a, b:", ("test_area.py",))
    (outcome,) = run([broken], project, 1)
    assert not outcome.caught, "a file that cannot be imported shows nothing about its tests"


def test_the_list_is_checked(tmp_path: Path) -> None:
    for text, says in (
        ('[[mutant]]\nname = "x"\nfile = "f"\nold = "a"\nnew = "b"', "lacks 'tests'"),
        ('[[mutant]]\nname = "x"\nfile = "f"\nold = "a"\nnew = "a"\ntests = ["t"]', "changes nothing"),
    ):
        (tmp_path / "m.toml").write_text(text)
        with pytest.raises(FraError, match=says):
            read(tmp_path / "m.toml")
