"""A checkpoint is believed as far as it is a beginning of the census that asks, and one process works in it."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from fra._census import observe
from fra._census.census import census
from fra._census.result import Census
from fra.errors import FraError
from fra.tests.models import random_tokens, tiny, tiny_sae
from fra.tests.tiny_targets import one_sentence

HOOK = "blocks.1.hook_resid_pre"
DOCUMENTS = [random_tokens(5 + seed % 7, seed) for seed in range(9)]
N_PARTS = 3


def take(folder: Path | None, documents: list[torch.Tensor] = DOCUMENTS) -> Census:
    return census(tiny("gpt2"), tiny_sae(HOOK), documents, 1, checkpoint=folder, checkpoint_every=3)


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.safetensors"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished checkpoint of three parts."""
    monkeypatch.setattr(observe, "TOKENS_AT_ONCE", 1)
    take(tmp_path / "c")
    assert len(parts(tmp_path / "c")) == N_PARTS
    return tmp_path / "c"


def first_of_two_runs(folder: Path) -> None:
    """What a second process that did not wait left behind: the same documents under the next names."""
    for number, part in enumerate(parts(folder)):
        shutil.copy(part, folder / f"part-{N_PARTS + number:06}.safetensors")


def without_a_tensor(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(parts(folder)[1], framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(parts(folder)[1])
    del tensors["value"]
    save_file(tensors, parts(folder)[1], metadata=metadata)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "one is missing": (lambda f: parts(f)[1].unlink(), "part-000001.safetensors is missing, and part-000002"),
    "the first is missing": (lambda f: parts(f)[0].unlink(), "part-000000.safetensors is missing"),
    "documents twice": (first_of_two_runs, "part-000003.safetensors does not go on where"),
    "one in place of another": (lambda f: shutil.copy(parts(f)[0], parts(f)[1]), "part-000001.* does not go on where"),
    "cut off": (lambda f: parts(f)[2].write_bytes(parts(f)[2].read_bytes()[:-9]), "part-000002.* is damaged"),
    "a tensor is missing": (without_a_tensor, "part-000001.* is damaged"),
    "another name": (lambda f: (f / "part-old.safetensors").write_text("x"), "part-000003.* is missing, and part-old"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_beginning_is_refused(how: str, folder: Path) -> None:
    damage, message = BROKEN[how]
    damage(folder)
    with pytest.raises(FraError, match=message) as caught:
        take(folder)
    assert "delete that file and those after it" in one_sentence(caught.value)


def test_a_beginning_is_gone_on_with(folder: Path) -> None:
    whole = take(None)
    for lost in (parts(folder)[2:], parts(folder)[1:], parts(folder)):
        for part in lost:
            part.unlink()
        again = take(folder)
        assert sorted(again.corpus.number.tolist()) == list(range(len(DOCUMENTS)))
        pd.testing.assert_frame_equal(again.channels(), whole.channels(), check_exact=True)


def test_batches_may_be_cut_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version may run more tokens at once: a batch that was seen in part is not seen again."""
    for part in parts(folder)[1:]:
        part.unlink()
    monkeypatch.setattr(observe, "TOKENS_AT_ONCE", 40)
    again = take(folder)
    assert sorted(again.corpus.number.tolist()) == list(range(len(DOCUMENTS)))


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom filelock import FileLock\n"
        f"with FileLock({str(tmp_path / '.lock')!r}):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(FraError, match="another census is at work in the checkpoint"):
            take(tmp_path)
        other.communicate("")
    assert take(tmp_path).n_documents == len(DOCUMENTS)


def test_it_is_let_go_of_after_an_error(folder: Path) -> None:
    with pytest.raises(FraError, match="is of other documents"):
        take(folder, DOCUMENTS[:4])
    assert take(folder).n_documents == len(DOCUMENTS)


def test_bad_places_get_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "a\0b"):
        with pytest.raises(FraError, match="cannot be used as a folder") as caught:
            take(place)
        one_sentence(caught.value)
    for place in (tmp_path, tmp_path / "file" / "below", tmp_path / ("n" * 300), tmp_path / "a\0b"):
        with pytest.raises(FraError, match="cannot be written to") as caught:
            take(None).save(place)
        one_sentence(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_full_disk_leaves_what_was_there(folder: Path) -> None:
    kept = parts(folder)[:1]
    for part in parts(folder)[1:]:
        part.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # as a disk on which so many bytes are left
    try:
        with pytest.raises(FraError, match="cannot be written to") as caught:
            take(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_sentence(caught.value)
    assert parts(folder) == kept and not list(folder.glob(".part*"))
    assert take(folder).n_documents == len(DOCUMENTS)


def test_a_part_is_no_census(folder: Path) -> None:
    with pytest.raises(FraError, match="is a part of a checkpoint"):
        Census.load(parts(folder)[0], tiny("gpt2"), tiny_sae(HOOK), 1)
