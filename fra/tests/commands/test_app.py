"""The command `fra`: light, one sentence for bad input, and the same functions as `python -m fra.x`."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fra
from fra.commands import app
from fra.errors import FraError
from fra.tests.verdicts.test_ledger import make_ledger
from fra.verdicts import ledger as ledgers

ROOT = Path(__file__).resolve().parents[3]
WRAPPED = {"cards": "fra.cards", "report": "fra.report.page", "compare": "fra.compare", "frontiers": "fra.frontiers",
           "structured": "fra.structured"}  # fmt: skip
NEEDS = {"explore": "fra.explorer.command"}
THERE = [
    name
    for name, module in app.COMMANDS.items()
    if all(
        (ROOT / f"{needed.partition(':')[0].replace('.', '/')}.py").exists()
        for needed in (module, NEEDS.get(name, module))
    )
]


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_help_is_light_and_names_every_subcommand_that_is_there() -> None:
    code = (
        "import sys, json; from fra.commands.app import main; code = main(['--help']); heavy = ('torch', 'numpy', "
        "'pandas', 'scipy', 'transformers', 'transformer_lens', 'sae_lens', 'jinja2', 'pytest'); "
        "print(json.dumps([code, [m for m in heavy if m in sys.modules]]))"
    )
    *said, last = _python("-c", code).stdout.splitlines()
    assert json.loads(last) == [0, []]
    for name in THERE:
        assert any(re.search(rf"\b{name}\b", line) for line in said), name
    assert {"cards", "report", "compare", "frontiers", "structured", "doctor", "new-claim"} <= set(THERE)


@pytest.mark.parametrize("name", THERE)
def test_every_subcommand_has_help_for_each_of_its_options(name: str) -> None:
    command = app.command_of(name)
    assert inspect.getdoc(command)
    shown = CliRunner().invoke(app.build(), [name, "--help"], terminal_width=200)
    assert shown.exit_code == 0, shown.output
    first = inspect.getdoc(command).split()[0].rstrip(":,.")
    assert first in shown.output
    for line in re.findall(r"^│ [* ]*(-.*)│$", shown.output, re.MULTILINE):
        assert re.search(r"  \S.*\S.*  ", line), f"{name}: an option without a word of help: {line}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["doctor", "no-such-target"], "no-such-target"),
        (["cards", "no-such-target", "--hook", "blocks.0.attn.hook_z", "-o", "x"], "no-such-target"),
        (["frontiers", "no-such-target", "-o", "x.csv"], "no-such-target"),
        (["structured", "mini", "-n", "0"], "at least one sentence"),
        (["report", "nowhere.json", "-o", "x.html"], "nowhere.json"),
        (["compare", "nowhere.json", "nowhere.json"], "nowhere.json"),
        (["compare", "a.json", "b.json", "--tolerance", "2"], "it is a share"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_4(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.main(arguments) == 4
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("fra: ") and said in line
    assert list(tmp_path.iterdir()) == []


def test_as_a_program_it_never_shows_a_traceback() -> None:
    done = _python("-m", "fra", "report", "nowhere.json", "-o", "x.html")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (4, "", 1)
    assert _python("-m", "fra", "--version").stdout == f"fra {fra.__version__}\n"


def test_a_wrong_option_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["structured", "--nope"]) == 2
    assert "--nope" in capsys.readouterr().err


def test_what_a_subcommand_returns_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = import_module("fra.compare")
    seen: list[Any] = []
    monkeypatch.setattr(compare, "run", lambda *args, **options: seen.append((args, options)) or 1)
    assert app.main(["compare", "a.json", "b.json", "--all", "--tolerance", "0.5"]) == 1
    assert seen == [((["a.json", "b.json"],), {"tolerance": 0.5, "expect_equal": False, "every": True, "outputs": []})]


@pytest.mark.parametrize(("name", "module"), WRAPPED.items())
def test_both_ways_to_run_it_have_the_same_options_and_defaults(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = import_module(module)
    parsers: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, argv: Any = None) -> Any:
        parsers.append(self)
        raise FraError("seen")

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        assert own.main([]) == 2
    old = {action.dest: action.default for action in parsers[0]._actions if action.dest != "help"}
    parameters = inspect.signature(app.command_of(name)).parameters.values()
    new = {p.name: None if p.default is inspect.Parameter.empty else p.default for p in parameters}
    assert new == old
    assert {p.name for p in inspect.signature(own.run).parameters.values()} == set(new)


@pytest.mark.parametrize("module", ["fra", "fra.report"])
def test_a_terminal_without_the_characters_gets_escapes(module: str, tmp_path: Path) -> None:
    ledgers.write(make_ledger(), tmp_path / "l.json")
    command = [sys.executable, "-m", module, *(["report"] if module == "fra" else []), str(tmp_path / "l.json")]
    plain = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    out = tmp_path / "verdicts \u2713.html"
    done = subprocess.run(
        [*command, "-o", str(out)], cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **plain}
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"wrote .*verdicts .*\\", done.stdout)
    assert out.exists()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    ledgers.write(make_ledger(), tmp_path / "l.json")
    command = [sys.executable, "-m", "fra", "report", str(tmp_path / "l.json"), "-o", str(tmp_path / "r.html")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == app.REFUSED
    assert done.stderr == "fra: what is printed cannot be written: No space left on device.\n"
