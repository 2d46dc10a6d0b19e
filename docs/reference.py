"""The reference pages that can be read off the code: public names, the command, pytest's options, the ledger."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import fra

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path) -> None:
    """All pages, into a folder that holds nothing else; the notebooks of examples/ beside them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pages = {"api": api(), "commands": commands(), "options": options(), "ledger": ledger()}
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        shutil.copyfile(notebook, folder / notebook.name)


def api() -> str:
    """Every public name, with its docstring and, of classes, its public methods."""
    parts = ["# Public names", "", 'Shapes are those of jaxtyping: `Float[Tensor, "q_pos k_pos"]`.', ""]
    for name in sorted(fra.__all__):
        value = getattr(fra, name)
        if isinstance(value, types.ModuleType):
            parts += [f"## fra.{name}", "", *_module(f"fra.{name}", value)]
        else:
            parts += [f"## fra.{name}", "", *_documented(f"fra.{name}", value)]
    return "\n".join(parts)


def _documented(path: str, value: Any) -> list[str]:
    doc = inspect.getdoc(value) or "(see its source)"
    if inspect.isclass(value):
        own = [
            (name, member)
            for name, member in vars(value).items()
            if not name.startswith("_")
            and (callable(member) or isinstance(member, property) or hasattr(member, "func"))
        ]
        lines = [_fenced(f"class {path}", "python"), _text(doc)]
        for name, member in own:
            function = getattr(member, "fget", None) or getattr(member, "func", None) or member
            lines += [
                f"**{name}**",
                "",
                _fenced(_signature(name, function), "python"),
                _text(inspect.getdoc(function) or ""),
            ]
        return lines
    if callable(value):
        return [_fenced(_signature(path, value), "python"), _text(doc)]
    return [_text(f"{path}: {type(value).__name__}")]


def _module(path: str, module: types.ModuleType) -> list[str]:
    lines = [_text(inspect.getdoc(module) or "")]
    public = getattr(module, "__all__", None)
    names = public if public is not None else [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]  # fmt: skip
    for name in names:
        value = getattr(module, name)
        if callable(value) and not isinstance(value, types.ModuleType):
            lines += [f"### {path}.{name}", "", *_documented(f"{path}.{name}", value)]
    return lines


def _signature(name: str, function: Any) -> str:
    try:
        text = str(inspect.signature(function))
    except (TypeError, ValueError):
        text = "(...)"
    text = text.replace("torch.Tensor", "Tensor").replace("typing.", "")
    return f"{name}{text}" if len(text) < 90 else textwrap.fill(f"{name}{text}", 100, subsequent_indent="    ")


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```\n"


def _text(doc: str) -> str:
    """A docstring as it is: it is plain text, with indented code."""
    return _fenced(doc, "text") if doc else ""


def commands() -> str:
    """`fra --help` and that of every subcommand."""
    from typer.testing import CliRunner

    from fra.commands.app import COMMANDS, build

    os.environ["COLUMNS"] = "100"
    parts = ["# The command fra", ""]
    app = build()
    there = {command.name for command in app.registered_commands}
    for arguments in ([], *([name] for name in COMMANDS if name in there)):
        shown = CliRunner().invoke(app, [*arguments, "--help"], prog_name="fra").output
        parts += [f"## {' '.join(['fra', *arguments])}", "", _fenced(shown.strip("\n"), "text")]
    return "\n".join(parts)


def options() -> str:
    """What `pytest claims/` takes, as pytest says it."""
    command = [sys.executable, "-m", "pytest", "claims", "--help", "-p", "no:cacheprovider"]
    shown = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"}
    )
    lines = shown.stdout.splitlines()
    start = next(
        n for n, line in enumerate(lines) if line.startswith("fra:") or line.startswith("claims about attention heads")
    )
    end = next((n for n in range(start + 1, len(lines)) if lines[n] and not lines[n].startswith(" ")), len(lines))
    return "\n".join(
        [
            "# Options of pytest claims/",
            "",
            "Each has a second name, as `--fra-device`, for where another plugin has taken the first. Exit status: 0;",
            "1 for refutations that are not known, failures and errors; 4 for a bad option, target or registration.",
            "",
            _fenced("\n".join(lines[start:end]).rstrip(), "text"),
        ]
    )


def ledger() -> str:
    """The schema of the ledger, from the models that read it."""
    from fra.verdicts.ledger import Header, Ledger, Row

    parts = ["# The ledger", "", "JSON, schema 1; written whole or not at all. A row a head and claim.", ""]
    for model, what in ((Row, "A row"), (Header, "The header")):
        parts += [f"## {what}", "", "| key | holds |", "|---|---|"]
        for name, field in model.model_fields.items():
            parts.append(f"| `{field.alias or name}` | {_kind(field.annotation)} |")
        parts.append("")
    schema = json.dumps(Ledger.model_json_schema(by_alias=True), indent=1)
    parts += ["## As JSON schema", "", _fenced(schema, "json")]
    return "\n".join(parts)


def _kind(annotation: Any) -> str:
    return "`" + str(getattr(annotation, "__name__", annotation)).replace("|", "or").replace("typing.", "") + "`"
