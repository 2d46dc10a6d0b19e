"""`fra census` as a user has it: one process, shards in a loop and as a job array, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fra import shards
from fra._census import observe
from fra._census.corpus import read
from fra.errors import FraError
from fra.tests._census.test_census import interrupt_once
from fra.tests.tiny_targets import one_sentence

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "examples" / "slurm"
COMMAND = pytest.mark.skipif(find_spec("fra.__main__") is None, reason="the command `fra` is not there")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.txt").write_text(" ".join(f"the cat saw {number} birds" for _ in range(3 + 20 * number)))
    return folder


def take(output: Path, texts: Path, **options: Any) -> list[str]:
    said: list[str] = []
    shards.run("mini", 1, output, documents=texts, say=said.append, **options)
    return said


def assert_same_file(one: Path, other: Path) -> None:
    (_, about, tensors), (_, its_about, its_tensors) = read(one), read(other)
    assert about == its_about
    assert tensors.keys() == its_tensors.keys()
    assert all(torch.equal(tensors[name], its_tensors[name]) for name in tensors)


@COMMAND
@pytest.mark.long
def test_the_loop_and_the_job_array_end_as_one_process_does(texts: Path, tmp_path: Path) -> None:
    options = {"heads": "L1H3,5", "reduces": "sum,contrast", "stripes": "3,200", "longest": 150}
    take(tmp_path / "one", texts, **options)
    fake = tmp_path / "bin" / "sbatch"  # runs what it is given at once, the tasks of an array one after another
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/bash\nset -e\nfor a in "$@"; do case "$a" in --array=1-*) n="${a#--array=1-}";; esac; done\n'
        'echo "$@" >> "$OUT/submitted"\n'
        'if [ -n "$n" ]; then for k in $(seq "$n"); do SLURM_ARRAY_TASK_ID="$k" SLURM_CPUS_PER_TASK=1 bash "${@: -1}" '
        '1>&2; done; echo "77;cluster"; else bash "${@: -1}" 1>&2; fi\n'
    )
    fake.chmod(0o755)
    for script, n in (("loop.sh", 2), ("submit.sh", 2)):
        out = tmp_path / script
        own = {
            "TARGET": "mini",
            "LAYER": "1",
            "SHARDS": str(n),
            "OUT": str(out),
            "FRA": f"{sys.executable} -m fra",
        }
        own["OPTIONS"] = f"--documents {texts} --heads L1H3,5 --reduce sum,contrast --stripes 3,200 --longest 150"
        environment = os.environ | own | {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", str(SLURM / script)], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert_same_file(out / "census.safetensors", tmp_path / "one")
        assert not list(out.glob(".*")), "what was kept of a run goes when its part is there"
    submitted = (tmp_path / "submit.sh" / "submitted").read_text().splitlines()
    assert "--dependency=afterok:77" in submitted[1]


def test_a_shard_that_is_there_is_not_taken_again_and_another_is_not_written_over(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "part"
    options: dict[str, Any] = {"longest": 60}
    # Interrupted, and gone on with by the same command.
    interrupt_once(monkeypatch)
    monkeypatch.setattr(shards, "EVERY", 1)
    monkeypatch.setattr(observe, "TOKENS_AT_ONCE", 64)
    with pytest.raises(KeyboardInterrupt):
        take(part, texts, shard="1/1", **options)
    assert not part.exists() and list((tmp_path / ".part.going").glob("part-*"))
    take(part, texts, shard="1/1", **options)
    assert not (tmp_path / ".part.going").exists()
    before = part.stat().st_mtime_ns
    assert take(part, texts, shard="1/1", **options) == [f"shard 1/1: {part} is there already"]
    for other, message in (
        ({"shard": "1/2"}, "is there and is shard 1/1 and not shard 1/2"),
        ({"shard": "1/1", "heads": "2"}, "is there and is of other heads"),
        ({"shard": "1/1", "longest": 50}, "is there and is of other (documents|tokens)"),
    ):
        with pytest.raises(FraError, match=message) as caught:
            take(part, texts, **(options | other))
        one_sentence(caught.value)
    assert part.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "0/3"}, "--shard 0/3 is no shard: say K/N"),
        ({"shard": "3"}, "--shard 3 is no shard"),
        ({"shard": "a/b"}, "--shard a/b is no shard"),
        ({"reduces": "sum,largest"}, "--reduce 'largest' is unknown"),
        ({"reduces": "contrast"}, "needs stripes"),
        ({"heads": "L0H1"}, "lies in layer 0"),
        ({"heads": "99"}, "head 99"),
        ({"stripes": "x"}, "--stripes x is none"),
        ({"stripes": "-1"}, "--stripes -1 is none"),
        ({"stripes": "none.json"}, "none.json cannot be read"),
    ],
)
def test_bad_options_get_one_sentence(options: dict[str, Any], message: str, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(FraError, match=message) as caught:
        take(tmp_path / "out", texts, **options)
    one_sentence(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_places_and_layers_get_one_sentence(texts: Path, tmp_path: Path) -> None:
    for layer, output, documents, message in (
        (9, tmp_path / "out", texts, "layer 9 is out of range"),
        (1, tmp_path, texts, "is a directory"),
        (1, tmp_path / "out", tmp_path / "nowhere", "there are no documents at"),
    ):
        with pytest.raises(FraError, match=message) as caught:
            shards.run("mini", layer, output, documents=documents)
        one_sentence(caught.value)
    with pytest.raises(FraError, match="there are no parts to merge"):
        shards.merge([], tmp_path / "out")
