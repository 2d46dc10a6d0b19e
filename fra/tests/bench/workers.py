"""What it costs to spread a census: `python -m fra.tests.bench.workers [-o FILE.md]` (needs Ray).

By CPU time, which does not depend on what else a machine does: the work is what workers spend on observing; all that
the caller, the workers beside that, and Ray's own processes spend (less what the caller and Ray take while waiting)
from the first task that is measured to the last is coordination.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fra
from fra._census.census import PASSES, elsewhere, prepare
from fra._census.corpus import read
from fra._census.result import Census
from fra.workers.cluster import crew
from fra.workers.pool import Lost, as_done

SHARDS = 10_000
IDLE_S = 10.0


class Cost(NamedTuple):
    """CPU seconds of a run on workers."""

    workers: int
    tasks: int
    work: float
    caller: float
    beside: float
    """Of workers, beside the work."""
    ray: float
    """Of Ray's own processes."""

    @property
    def share(self) -> float:
        return (self.caller + self.beside + self.ray) / self.work


def timed(make: Callable[[], Callable[[Any], Any]]) -> Callable[[Any], tuple[float, float, Any]]:
    """In a worker: the CPU time of a task's work, and of the process so far, with the result."""
    work = make()

    def do(task: Any) -> tuple[float, float, Any]:
        begun = time.process_time()
        result = work(task)
        return time.process_time() - begun, time.process_time(), result

    return do


def of_ray() -> float:
    """CPU seconds of Ray's own processes so far."""
    import psutil

    own = [child for child in psutil.Process().children(recursive=True) if "ray::Worker" not in child.name()]
    return sum(sum(child.cpu_times()[:2]) for child in own)


def coordination(workers: int) -> Cost:
    """Of a census of mini's text on so many workers."""
    target = fra.load_target("mini")
    _, sae = target.dictionary_for(1)
    documents = [target.tokens(document.text) for document in target.documents()]
    planned = prepare(target.model, sae, documents, 1)
    told = [([documents[i] for i in batch], list(batch), [[] for _ in batch]) for batch in planned.batches]
    tasks = [told[low : low + PASSES] for low in range(0, len(told), PASSES)]
    first = [told[:1]] * workers  # loads the model; not measured
    with crew(workers, gpu=False) as found:
        results = as_done(found, partial(timed, elsewhere(planned)), [*first, *tasks], tries=1, depth=2)
        before: list[float] = []
        for _ in first:
            _, result = next(results)
            assert not isinstance(result, Lost)
            before.append(result[1])
        idle, still = of_ray(), time.process_time()
        time.sleep(IDLE_S)
        idle, still = (of_ray() - idle) / IDLE_S, (time.process_time() - still) / IDLE_S
        caller, ray, wall = time.process_time(), of_ray(), time.monotonic()
        work, last = 0.0, dict[int, float]()
        for number, result in results:
            assert not isinstance(result, Lost)
            work += result[0]
            last[number] = result[1]
        wall = time.monotonic() - wall
        caller, ray = time.process_time() - caller - still * wall, of_ray() - ray - idle * wall
    # A worker's clock at its last task, less that at its first: the clocks of both ends, whichever worker is which.
    ends = sorted(last.values())[-workers:]
    return Cost(workers, len(tasks), work, caller, max(0.0, sum(ends) - sum(before) - work), max(0.0, ray))


def headers(folder: Path) -> tuple[float, int, int]:
    """Seconds, peak bytes and bytes of the whole, of merging parts of one small document each."""
    from fra.tests.models import random_tokens, tiny, tiny_sae

    source = folder / "source"
    fra.census(tiny("gpt2"), tiny_sae("blocks.1.hook_resid_pre"), [random_tokens(4, 0)], 1, shard=(1, 1)).save(source)
    raw = source.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    at = header["number"]["data_offsets"][0]
    paths = []
    for k in range(SHARDS):
        about = json.loads(header["__metadata__"]["about"])
        about["shard"] |= {"number": k + 1, "of": SHARDS, "n_documents": SHARDS, "n_batches": SHARDS}
        body[at : at + 8] = k.to_bytes(8, "little")
        text = json.dumps({**header, "__metadata__": {**header["__metadata__"], "about": json.dumps(about)}}).encode()
        text += b" " * (-len(text) % 8)
        paths.append(folder / f"part-{k}")
        paths[-1].write_bytes(len(text).to_bytes(8, "little") + text + body)
    tracemalloc.start()
    begun = time.process_time()
    assert Census.merge_files(paths, folder / "whole") == SHARDS
    seconds, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    corpus, _, _ = read(folder / "whole")
    assert corpus.number.tolist() == list(range(SHARDS))
    return seconds, peak, (folder / "whole").stat().st_size


def rows() -> list[str]:
    """Lines of Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, peak, whole = headers(Path(folder))
    lines = [
        f"{SHARDS:,} parts of one document merge in {seconds:.0f} s of CPU time with {peak / 1e6:.0f} MB at most "
        f"({peak / SHARDS / 1e3:.1f} kB a part; the whole has {whole / 1e6:.1f} MB).",
        "",
        "| workers | tasks | work, CPU s | caller, s | workers beside it, s | Ray, s | coordination |",
        "|---|---|---|---|---|---|---|",
    ]
    found = [coordination(workers) for workers in (1, 2)]
    lines += [
        f"| {c.workers} | {c.tasks} | {c.work:.1f} | {c.caller:.2f} | {c.beside:.2f} | {c.ray:.2f} | {c.share:.2%} |"
        for c in found
    ]
    task, caller = found[1].work / found[1].tasks, found[1].caller / found[1].tasks
    lines += [
        "",
        f"By model: a task is {task:.2f} s of work and {1e3 * caller:.1f} ms of the caller's time, which is one "
        f"process: it keeps {task / caller:.0f} workers busy with such tasks, and up to there the share above stays "
        "what it is, since every worker has its next task before it is done with the last.",
    ]
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n".join(rows()) + "\n"
    print(text)
    if given.output is not None:
        given.output.write_text(text)


if __name__ == "__main__":
    main()
