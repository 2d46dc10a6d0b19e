"""Shards merged are the one run to the bit; parts that are not of one whole are refused by name."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fra._census import observe
from fra._census.census import census
from fra._census.corpus import read
from fra._census.result import Census
from fra._census.shards import check_shard, cut
from fra.errors import FraError
from fra.tests._census.test_census import interrupt_once
from fra.tests.models import D_SAE, random_tokens, tiny, tiny_sae
from fra.tests.tiny_targets import one_sentence

HOOK = "blocks.1.hook_resid_pre"
DOCUMENTS = [random_tokens(4 + (5 * seed) % 9, seed) for seed in range(23)]
STRIPES = [[1, seed % 4] for seed in range(23)]
CHANNELS = torch.tensor([[i % D_SAE, j % D_SAE] for i in range(0, 60, 7) for j in range(0, 60, 11)])
COUNTS = (1, 2, 3, 7, 40)
"""The last has more shards than the plan has batches."""


def take(kind: str = "gpt2", documents: Any = DOCUMENTS, **options: Any) -> Census:
    return census(tiny(kind), tiny_sae(HOOK), documents, 1, **options)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "TOKENS_AT_ONCE", 24)


def assert_same(one: Census, other: Census) -> None:
    own, its = one.corpus.tensors(), other.corpus.tensors()
    assert own.keys() == its.keys()
    for name in own:
        assert own[name].dtype == its[name].dtype
        assert torch.equal(own[name], its[name]), name
    assert (one.heads, one.reduces, one.fingerprint, one.shard) == (other.heads, other.reduces, other.fingerprint, None)


def save_all(folder: Path, of: int, **options: Any) -> list[Path]:
    paths = [folder / f"{k}-of-{of}.safetensors" for k in range(1, of + 1)]
    for k, path in enumerate(paths, 1):
        take(shard=(k, of), **options).save(path)
    return paths


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])  # with rotation and a QK-norm the second
@pytest.mark.parametrize("of", COUNTS)
def test_shards_merged_are_one_run_to_the_bit(of: int, kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reduce": ("sum", "mass", "contrast"), "stripes": STRIPES, "follow": CHANNELS}
    whole = take(kind, **options)
    shards = [take(kind, shard=(k, of), **options) for k in range(1, of + 1)]
    assert [one.n_documents for one in shards].count(0) > 0 or of < 40
    assert sum(one.n_documents for one in shards) == len(DOCUMENTS)
    # Whoever is ready first comes first.
    merged = shards[-1].merge(*shards[:-1])
    paths = [tmp_path / f"{k}" for k in range(of)]
    for one, path in zip(shards, paths, strict=True):
        one.save(path)
    assert Census.merge_files(paths[::-1], tmp_path / "whole") == len(DOCUMENTS)
    whole.save(tmp_path / "one")
    (_, about, tensors), (_, its_about, its_tensors) = read(tmp_path / "one"), read(tmp_path / "whole")
    assert about == its_about
    assert tensors.keys() == its_tensors.keys()
    assert all(torch.equal(tensors[name], its_tensors[name]) for name in tensors)
    loaded = Census.load(tmp_path / "whole", tiny(kind), tiny_sae(HOOK), 1)
    for found in (merged, loaded):
        assert_same(found, whole)
        pd.testing.assert_frame_equal(found.followed(), whole.followed(), check_exact=True)
        for name in ("sum", "mass", "contrast"):
            pd.testing.assert_frame_equal(found.channels(name, 50), whole.channels(name, 50), check_exact=True)


def test_a_part_that_is_loaded_is_still_a_part(tmp_path: Path) -> None:
    paths = save_all(tmp_path, 40)
    parts = [Census.load(path, tiny("gpt2"), tiny_sae(HOOK), 1) for path in paths]
    assert str(parts[4].shard) == "shard 5/40" in repr(parts[4])
    assert_same(parts[0].merge(*parts[1:]), take())
    empty = next(one for one in parts if not one.n_documents)
    assert empty._repr_html_()
    with pytest.raises(FraError, match="has no live entries: merge it"):
        empty.channels()


def test_batches_are_cut_evenly_and_none_is_lost() -> None:
    for n in range(12):
        for of in range(1, 15):
            shards = [cut(range(n), k, of) for k in range(1, of + 1)]
            assert [x for own in shards for x in own] == list(range(n))
            assert max(map(len, shards)) - min(map(len, shards)) <= 1


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, about = load_file(path), json.loads(metadata["about"])
    change(about, tensors)
    save_file(tensors, path, {"format": metadata["format"], "about": json.dumps(about)})


def of_another(folder: Path, **options: Any) -> None:
    take(shard=(2, 3), **options).save(folder / "2-of-3.safetensors")


def with_versions(folder: Path, **changed: str) -> None:
    rewritten(folder / "2-of-3.safetensors", lambda about, _: about["shard"]["versions"].update(changed))


def shifted(folder: Path) -> None:
    def change(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors["number"] = tensors["number"].flip(0) + 1

    rewritten(folder / "2-of-3.safetensors", change)


def seen_twice(folder: Path) -> None:
    rewritten(folder / "2-of-3.safetensors", lambda _, tensors: tensors["number"].fill_(int(tensors["number"][0])))


def whole_one(folder: Path) -> None:
    take().save(folder / "2-of-3.safetensors")


def cut_short(folder: Path) -> None:
    path = folder / "2-of-3.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def of_seven(folder: Path) -> None:
    shutil.copy(save_all(folder, 7)[1], folder / "2-of-3.safetensors")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / "2-of-3.safetensors").unlink(), "shards are missing: 2/3; take them"),
    "twice": (lambda f: shutil.copy(f / "1-of-3.safetensors", f / "2-of-3.safetensors"), "shard 1/3 is there twice"),
    "of other documents": (
        lambda f: of_another(f, documents=[*DOCUMENTS[:-1], random_tokens(12, 99)]),
        "1-of-3.* and .*2-of-3.* are of other documents or stripes",
    ),
    "of other stripes": (lambda f: of_another(f, stripes=[1] * 23), "2-of-3.* are of other documents or stripes"),
    "of another model": (lambda f: of_another(f, kind="qwen3"), "2-of-3.* are of other weights, dictionary"),
    "of other heads": (lambda f: of_another(f, heads=[0]), "2-of-3.* are of other heads"),
    "of other reductions": (lambda f: of_another(f, reduce="abs"), "2-of-3.* are of other reductions"),
    "following others": (lambda f: of_another(f, follow=CHANNELS), "2-of-3.* are of other followed channels"),
    "of another fra": (lambda f: with_versions(f, fra="0.0.1"), r"library versions or device \(fra .* and 0.0.1\)"),
    "of another device": (lambda f: with_versions(f, device="cuda"), r"\(device cpu and cuda\)"),
    "of another division": (of_seven, "is shard 1/3 and .*2-of-3.* is shard 2/7"),
    "a whole census": (whole_one, "2-of-3.* is a whole census and no shard"),
    "cut short": (cut_short, "2-of-3.* cannot be read"),
    "no census": (lambda f: (f / "2-of-3.safetensors").write_text("x"), "2-of-3.* cannot be read"),
    "with others' documents": (shifted, "-of-3.* holds documents of other shards"),
    "with a document twice": (seen_twice, "2-of-3.* holds documents of other shards"),
}


@pytest.mark.parametrize("how", WRONG)
def test_parts_that_make_no_whole_are_refused_by_name(how: str, tmp_path: Path) -> None:
    save_all(tmp_path, 3)
    spoil, message = WRONG[how]
    spoil(tmp_path)
    output = tmp_path / "out" / "whole"
    with pytest.raises(FraError, match=message) as caught:
        Census.merge_files(sorted(tmp_path.glob("?-of-3.safetensors")), output)
    one_sentence(caught.value)
    assert not output.exists() and not list(tmp_path.glob("out/.*"))


def test_in_memory_they_are_refused_too() -> None:
    parts = [take(shard=(k, 3)) for k in (1, 2, 3)]
    for wrong, message in (
        (parts[:2], "shards are missing: 3/3"),
        ([*parts, parts[1]], "shard 2/3 is there twice"),
        ([*parts[:2], take(shard=(3, 3), documents=DOCUMENTS[::-1])], "of shard 3/3 are of other documents"),
        ([*parts, take()], "a census of 23 documents is a whole census"),
    ):
        with pytest.raises(FraError, match=message) as caught:
            wrong[0].merge(*wrong[1:])
        one_sentence(caught.value)


@pytest.mark.parametrize("shard", [(0, 3), (4, 3), (1, 0), (1.0, 3), (True, 3), "1/3", 3, (1, 2, 3)])
def test_what_is_no_shard_is_refused(shard: Any) -> None:
    with pytest.raises(FraError, match="is no shard: give"):
        check_shard(shard)


def test_a_shard_beyond_the_last_is_refused_before_anything_is_run() -> None:
    with pytest.raises(FraError, match="is no shard: give"):
        take(shard=(4, 3))


def test_an_interrupted_shard_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(shard=(2, 2), follow=CHANNELS)
    options: dict[str, Any] = {"checkpoint": tmp_path, "checkpoint_every": 2, "follow": CHANNELS}
    seen = interrupt_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        take(shard=(2, 2), **options)
    assert list(tmp_path.glob("part-*"))
    for other in ((1, 2), (2, 3), None):
        with pytest.raises(FraError, match="another shard"):
            take(shard=other, **options)
    n_before = len(seen)
    again = take(shard=(2, 2), **options)
    assert len(seen) - n_before < len(set(again.corpus.number.tolist()))
    assert torch.equal(again.corpus.value, expected.corpus.value)
    assert torch.equal(again.corpus.number, expected.corpus.number)
    pd.testing.assert_frame_equal(again.followed(), expected.followed(), check_exact=True)


def _write_often(path: Path, source: Path, n: int) -> None:
    one = Census.load(source, tiny("gpt2"), tiny_sae(HOOK), 1)
    for _ in range(n):
        one.save(path)


def test_of_two_writers_of_one_part_one_wins_and_neither_breaks_it(tmp_path: Path) -> None:
    first, second = save_all(tmp_path, 2)
    path = tmp_path / "part"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(path, source, 60)) for source in (first, second)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            _, about, _ = read(path)  # whole whenever it is looked at
            seen.add(str(about["shard"]))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(seen) == 2
    assert not list(tmp_path.glob(".part*"))


def test_memory_of_a_merge_is_that_of_one_part(tmp_path: Path) -> None:
    """A thousand parts, of which the first is a real one and the others its copies with other documents."""
    (source,) = save_all(tmp_path, 1)
    tensors, of = load_file(source), 1000
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    paths = []
    for k in range(of):
        about = json.loads(metadata["about"])
        about["shard"] |= {"number": k + 1, "of": of, "n_documents": 23 * of}
        paths.append(tmp_path / f"many-{k}")
        own = tensors | {"number": tensors["number"] + 23 * k}
        save_file(own, paths[-1], {"format": metadata["format"], "about": json.dumps(about)})
    tracemalloc.start()
    assert Census.merge_files(paths, tmp_path / "whole") == 23 * of
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    corpus, _, _ = read(tmp_path / "whole")
    assert len(corpus.number) == 23 * of == len(torch.unique(corpus.number))
    assert torch.equal(corpus.feature, tensors["feature"].repeat(of))
    assert peak < 10_000 * of + 10 * source.stat().st_size
