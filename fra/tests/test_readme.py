"""The README's target file and the claims of docs/own-claim.md, as they stand there, run on a tiny model; what the
README says of itself and of mini.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fra.tests.claims import declared_in
from fra.tests.models import D_MODEL, build_model
from fra.tests.tiny_targets import signed_axes

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLAIM_PAGE = (ROOT / "docs" / "own-claim.md").read_text(encoding="utf-8")
N_DOCUMENTS = 100
WORDS = ("one", "two", "three", "four", "five", "six", "seven")


def _block(language: str, containing: str, page: str = README) -> str:
    """The one block of the README, or of another page, in that language that holds a certain text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return str(found)


def _claims() -> tuple[str, str]:
    """The claim of one condition, and that of several: with the head and the test of the first, as the README says."""
    simple, several = (_block("python", f'id="{name}"', CLAIM_PAGE) for name in ("X01", "X02"))
    head, test = simple.partition("CLAIM = ")[0], simple[simple.index("def test_") :]
    return simple, f"{head}{several}\n\n{test}"


def _code_lines(source: str) -> int:
    """Lines that hold code: no blanks, no docstring."""
    docstring = len(source[: source.index('"""', 3)].splitlines())
    return sum(bool(line.strip()) for line in source.splitlines()[docstring:])


def _text(number: int) -> str:
    words = [WORDS[(number + k * (1 + number % 5)) % len(WORDS)] for k in range(6)]
    return f"{words[0]} and {words[1]} make {words[2]}, said {words[3]}; {words[4]} more than {words[5]}"


def _pull(folder: Path, text: str, head: int) -> float:
    """The example's effect on one document, from the files alone: GPT-2's first layer, a TopK dictionary, float64."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokens = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    weights = load_file(folder / "model/model.safetensors")
    w = {name.removeprefix("transformer."): a.astype(float) for name, a in weights.items()}
    sae = {name: a.astype(float) for name, a in load_file(folder / "saes/layer0/sae_weights.safetensors").items()}
    k = json.loads((folder / "saes/layer0/cfg.json").read_text())["k"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
    before = (x - sae["b_dec"]) @ sae["W_enc"] + sae["b_enc"]
    kept = np.zeros_like(before)
    np.put_along_axis(kept, np.argsort(before, 1)[:, -k:], 1.0, 1)
    decoder = sae["W_dec"] - sae["W_dec"].mean(1, keepdims=True)
    features = (np.maximum(before, 0) * kept) @ decoder * w["h.0.ln_1.weight"]
    width = D_MODEL // 4
    start = head * width
    w_q, w_k = (w["h.0.attn.c_attn.weight"][:, at + start : at + start + width] for at in (0, D_MODEL))
    ff = (features @ w_q) @ (features @ w_k).T / np.sqrt(width)
    return float(np.mean([ff[t, 0] - ff[t, : t + 1].mean() for t in range(1, len(tokens))]))


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the README's target file, its claim, a model, dictionaries and text."""
    folder = pytester.path
    target = _block("toml", 'name = "mine"')
    (folder / "mine.toml").write_text(target)
    build_model("gpt2", folder / "model")
    for entry in tomllib.loads(target)["dictionary"]:
        signed_axes(folder / entry["path"], entry["hook"])  # good enough to be admitted
    (folder / "text").mkdir()
    for number in range(N_DOCUMENTS):
        (folder / "text" / f"t{number:03d}.txt").write_text(_text(number))
    (folder / "claims").mkdir()
    for number, claim in enumerate(_claims(), 1):
        (folder / "claims" / f"test_x0{number}.py").write_text(claim)
    (folder / "conftest.py").write_bytes((ROOT / "conftest.py").read_bytes())
    pytester.makeini("[pytest]")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    return folder


def test_the_claims_of_the_readme_run_on_the_target_of_the_readme(project: Path, pytester: pytest.Pytester) -> None:
    registered = pytester.runpytest_subprocess("claims", "--target", "mine.toml", "--register")
    assert registered.ret == 0, registered.outlines
    assert {"X01", "X02"} == set(tomllib.loads((project / "claims" / "registered.toml").read_text()))

    done = pytester.runpytest_subprocess("claims", "--target", "mine.toml", "--ledger", "ledger.json")
    assert done.ret in (0, 1), done.outlines
    rows = json.loads((project / "ledger.json").read_text())["verdicts"]
    simple, several = ([row for row in rows if row["claim"] == name] for name in ("X01", "X02"))
    for own in (simple, several):
        assert [row["head"] for row in own] == [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    for row in rows:
        assert row["verdict"] in ("SUPPORTED", "REFUTED", "INCONCLUSIVE"), row["detail"]
        assert row["low"] <= row["effect"] <= row["high"]
        assert (row["bar"], row["n"]) == (0.5, N_DOCUMENTS)
        assert not row["detail"].get("exploratory"), "it was registered"
    header = json.loads((project / "ledger.json").read_text())["header"]
    assert [note["hook"] for note in header["dictionaries"]] == [f"blocks.{n}.ln1.hook_normalized" for n in (0, 1)]
    assert all(note["l0"] == 12 and note["d_sae"] == 2 * D_MODEL for note in header["dictionaries"])
    assert len({note["sha256"] for note in header["dictionaries"]}) == 2
    said = header["text"]
    assert (said["documents"], said["n_documents"], said["n_sources"]) == ("text", N_DOCUMENTS, N_DOCUMENTS)
    assert "".join(said["first_tokens"][1:]).strip()[:4] == _text(0)[:4]
    for head in range(4):
        expected = np.mean([_pull(project, _text(number), head) for number in range(N_DOCUMENTS)])
        for own in (simple, several):
            assert own[head]["effect"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    (claim,) = declared_in(project / "claims" / "test_x02.py")
    for row in several:
        (conditions,) = row["detail"]["candidates"].values()
        assert list(conditions) == ["pull", *claim.bars], "three conditions and a control"
        assert [shown["bar"] for shown in conditions.values()] == [claim.bar, *claim.bars.values()]
    assert done.ret == int(any(row["verdict"] == "REFUTED" for row in rows))


@pytest.mark.long
def test_the_claim_of_the_readme_on_a_target_with_one_layers_dictionary(
    project: Path, pytester: pytest.Pytester
) -> None:
    target = (project / "mine.toml").read_text()
    start = target.rindex("[[dictionary]]\n")
    (project / "mine.toml").write_text(target[:start] + target[target.index("[heads]") :])
    (project / "claims" / "test_x02.py").unlink()
    done = pytester.runpytest_subprocess("claims", "--target", "mine.toml", "--ledger", "ledger.json")
    rows = {row["head"]: row for row in json.loads((project / "ledger.json").read_text())["verdicts"]}
    assert all(rows[f"L0H{head}"]["effect"] is not None for head in range(4)), done.outlines
    for head in range(4):
        row = rows[f"L1H{head}"]
        assert row["verdict"] == "CANNOT_RUN"
        assert "no dictionary at the attention input of layer 1" in row["detail"]["reason"]


def test_a_claim_of_several_conditions_is_hardly_longer() -> None:
    simple, several = map(_code_lines, _claims())
    assert several - simple <= 15


def test_the_library_works_without_pytest_as_the_readme_shows() -> None:
    names: dict[str, Any] = {}
    exec(_block("python", 'fra.load_target("mini")'), names)
    found, n_pos = names["m"], len(names["tokens"])
    assert found.scores().shape == (n_pos, n_pos)
    assert len(found.channels(n=10)) == len(found.top(10)) == 10


def test_the_readme_keeps_its_order() -> None:
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    assert headings == [
        "Two commands",
        "Look first",
        "How to read a verdict",
        "Your own model and SAE",
        "Adding a claim",
        "Documentation",
        "Hardware",
        "Citing",
    ]
    assert README.index("![") < README.index("## Two commands")


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_lines_are_wrapped_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if len(line) > 118 and not line.startswith("|")] == []
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name} leads to {link}"


def test_the_words_of_the_readme_stand_in_the_glossary() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \|", glossary, re.MULTILINE)[1:]
    assert rows == sorted(rows, key=str.casefold)
    for word in ("TIH", "CIH channel", "stripe", "nat", "candidate", "scramble", "discovery", "source", "bar"):
        assert word in rows


def test_every_key_of_a_target_file_is_described() -> None:
    from fra.targets.file import known_keys

    page = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    flags = set(importlib.import_module("fra.targets.file").ProcessingTable.model_fields)
    tables = {"model", "text", "heads", "size", "dictionary", "seed", "study"}
    for key in set(known_keys()) - flags:
        assert f"[{key}]" in page if key in tables else re.search(rf"\b{key}\b", page), f"{key} is not described"


def test_the_known_refutation_of_the_readme_is_read(tmp_path: Path) -> None:
    registry = importlib.import_module("fixtures.registry")
    (tmp_path / "test_x01.py").write_text(_claims()[0])
    (tmp_path / "known.toml").write_text(_block("toml", "[[known]]", CLAIM_PAGE))
    (known,) = registry.read_registry(tmp_path).known
    assert (known.claim, known.target, known.head) == ("X01", "mine", "L1H3")
    assert "bar > 0.5" in known.reason


def test_the_picture_of_the_readme_shows_what_is_measured(tmp_path: Path) -> None:
    import fra

    picture = importlib.import_module("fixtures.picture")
    command = re.search(r'fixtures\.picture (\S+) (\S+) \\\n +"(.*)" -o (\S+)', README)
    assert command is not None
    name, head, text, file = command.groups()
    assert picture.main([name, head, text, "-o", str(tmp_path / "again.svg")]) == 0

    def said(svg: str) -> list[str]:
        return [re.sub(r"\.\d+", "", line) for line in re.findall(r"<text[^>]*>([^<]*)<", svg)]

    assert said((ROOT / file).read_text()) == said((tmp_path / "again.svg").read_text())

    target = fra.load_target(name)
    tokens = target.tokens(text)
    m = fra.resolve(target.model, target.dictionary_for(int(head[1]))[1], tokens, head=head)
    q_pos, k_pos = m.strongest_edge()
    assert tokens[q_pos] == tokens[k_pos - 1], "it attends to what followed this token the first time"
    _, cache = target.model.run_with_cache(tokens[None])
    own = cache[f"blocks.{head[1]}.attn.hook_attn_scores"][0, int(head[3]), q_pos, k_pos]
    parts = [value for _, value in picture.parts(m, q_pos, k_pos)]
    assert sum(parts) == pytest.approx(float(own), abs=1e-4)
    assert f"bring {sum(parts[: picture.SHOWN]):.1f} of the score's {float(own):.1f}" in " ".join(README.split())
    *_, value = m.pair(q_pos, k_pos)
    assert parts[: picture.SHOWN] == pytest.approx(sorted(value.flatten().tolist(), key=abs)[: -picture.SHOWN - 1 : -1])


def test_a_picture_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = importlib.import_module("fixtures.picture")
    for head, text, said in (("L9H9", "some text here", "layer 9"), ("L1H1", "a", "too short")):
        assert picture.main(["mini", head, text, "-o", str(tmp_path / "none.svg")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none.svg").exists()


def test_how_often_nothing_is_called_something_is_what_was_measured() -> None:
    from fra.tests import nulls

    page = nulls.PAGE.read_text(encoding="utf-8")
    said, readme = nulls.short(page), " ".join(README.split())
    assert all(f"{claim} says SUPPORTED of " in said for claim in nulls.ROLES)
    assert said.removesuffix(".") in readme
    assert nulls.short(page.replace("| Q05 | 64 | 0 | 0.046 |", "| Q05 | 64 | 1 | 0.074 |", 1)) != said
