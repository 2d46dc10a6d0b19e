"""What the engine costs, as ratios measured in one run: each test times the work and what it is held against, in turn.

`make bench-census` prints the table, for one thread and all of them (some eight minutes on a calm machine). A ratio
that is beyond its reach does not fail: it is a figure, and says so in the table. FRA_BENCH=small for a smoke run,
FRA_BENCH_LARGEST=1 for the memory of the largest size too (two minutes more), FRA_BENCH_ROUNDS for more rounds.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fra
from fra._census.corpus import Corpus
from fra._census.observe import Layer
from fra.core.blocks import Side, causal_blocks
from fra.core.channels import reduce_channels
from fra.core.reductions import Entries, top_terms
from fra.errors import FraError
from fra.tests.bench import reference, workloads

Benchmark = Callable[..., Any]
SMALL = os.environ.get("FRA_BENCH") == "small"
ROUNDS = 1 if SMALL else int(os.environ.get("FRA_BENCH_ROUNDS", "2"))
N_POS, L0, D_HEAD, N_HEADS = (32, 8, 64, 8) if SMALL else (128, 32, 64, 8)
N_DOCS = {"mini": 64, "gpt2": 8}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = [int(os.environ["FRA_BENCH_THREADS"])] if "FRA_BENCH_THREADS" in os.environ else sorted({1, CORES})
SPREAD = ("sum", "abs", "count")


@pytest.fixture(params=THREADS, ids=lambda n: f"threads={n}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds where one thread works, so that other processes count less; else seconds on the clock."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    gc.collect()
    start = clock()
    work()
    return clock() - start


def held_against(
    benchmark: Any,
    work: Callable[[], Any],
    base: Callable[[], Any],
    *,
    row: str,
    against: str,
    reach: float,
    long: bool = False,
    **more: Any,
) -> None:
    """Rounds of both in turn, so that a slow moment of the machine meets both; the ratio is that of the minima. What is
    `long` has one round, and none to warm up.
    """
    if not long:
        work()
    mine: list[float] = []
    theirs: list[float] = []
    benchmark.pedantic(
        lambda: mine.append(seconds(work)),
        setup=lambda: theirs.append(seconds(base)),
        rounds=1 if long else ROUNDS,
        warmup_rounds=0,
    )
    benchmark.extra_info.update(
        row=row,
        against=against,
        reach=reach,
        work_s=min(mine),
        base_s=min(theirs),
        threads=torch.get_num_threads(),
        **more,
    )
    assert min(mine) > 0


@pytest.mark.parametrize("d_sae", [4_096, 24_576])
def test_values(benchmark: Any, threads: int, d_sae: int) -> None:
    """All causal feature-feature values of a head, from its directions, against one product of as many numbers."""
    corpus, layer = workloads.entries(1, N_POS, L0, d_sae), workloads.layer(d_sae, 1)
    live, slot = torch.unique(corpus.feature.long(), return_inverse=True)
    pos = torch.arange(N_POS).repeat_interleave(L0)
    u, v = layer.directions("query", 0, live), layer.directions("key", 0, live)
    n_values = N_POS * (N_POS + 1) // 2 * L0**2
    left, right = torch.randn(len(pos), D_HEAD), torch.randn(D_HEAD, n_values // len(pos))

    def work() -> int:
        sides = [Side(pos, slot, of[slot] * corpus.value[:, None], N_POS) for of in (u, v)]
        return sum(block.terms.numel() for block in causal_blocks(*sides))

    assert work() >= n_values
    held_against(
        benchmark,
        work,
        lambda: left @ right,
        row=f"values of a head, d_sae {d_sae}",
        against="a matrix product of as many numbers",
        reach=1.5,
    )


@pytest.mark.parametrize("d_sae", [4_096, 24_576])
def test_top(benchmark: Any, threads: int, d_sae: int) -> None:
    """The 1 000 strongest terms of a head against its values alone."""
    corpus, layer = workloads.entries(1, N_POS, L0, d_sae), workloads.layer(d_sae, 1)
    live, slot = torch.unique(corpus.feature.long(), return_inverse=True)
    pos = torch.arange(N_POS).repeat_interleave(L0)
    vectors = [layer.directions(side, 0, live)[slot] * corpus.value[:, None] for side in ("query", "key")]
    sides = [Side(pos, slot, vector, N_POS) for vector in vectors]
    q, k = (Entries(pos, corpus.feature.long(), vector, None, None) for vector in vectors)
    mask = layer.mask(N_POS)
    held_against(
        benchmark,
        lambda: top_terms(q, k, mask, 1_000, "abs", torch.float32),
        lambda: [block.terms for block in causal_blocks(*sides)] and None,
        row=f"top 1 000 of a head, d_sae {d_sae}",
        against="its values alone",
        reach=1.3,
    )


def _entries(layer: Layer, corpus: Corpus) -> list[Entries]:
    """Both sides of a resolved head, in double precision as `fra.resolve` makes them."""
    live, slot = torch.unique(corpus.feature.long(), return_inverse=True)
    pos, value = torch.arange(N_POS).repeat_interleave(L0), corpus.value.double()
    sides = []
    for side in ("query", "key"):
        direction = layer.directions(side, 0, live).double()
        vector = direction[slot] * value[:, None]
        if layer.rotary is None:
            sides.append(Entries(pos, corpus.feature.long(), vector, value, direction))
        else:
            sides.append(
                Entries(pos, corpus.feature.long(), layer.rotary.rotate(vector.float(), pos).double(), None, None)
            )
    return sides


@pytest.mark.parametrize("d_sae", [4_096, 24_576])
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_channels_of_a_resolved_head(benchmark: Any, threads: int, d_sae: int, rotary: bool) -> None:
    """`ResolvedHead.channels(n=50)` by sum."""
    corpus = workloads.entries(1, N_POS, L0, d_sae)
    layer = workloads.layer(d_sae, 1, n_pos=N_POS if rotary else None)
    q, k = _entries(layer, corpus)
    held_against(
        benchmark,
        lambda: reduce_channels(q, k, layer.mask(N_POS), "sum", 50, 1, d_sae, torch.float32),
        lambda: reference.channels(layer, corpus, 0, ("sum",), 50),
        row=f"ResolvedHead.channels(n=50), d_sae {d_sae}{', RoPE' if rotary else ''}",
        against="one product and indexed add a position pair",
        reach=1 / 15,
    )


@pytest.mark.parametrize("d_sae", [4_096, 24_576])
def test_top_of_a_resolved_head(benchmark: Any, threads: int, d_sae: int) -> None:
    """`ResolvedHead.top(1000)`, in double precision, against the bare causal products in single precision."""
    corpus, layer = workloads.entries(1, N_POS, L0, d_sae), workloads.layer(d_sae, 1)
    q, k = _entries(layer, corpus)
    left, right = q.vector.float(), k.vector.float()
    cuts = range(0, len(left), 1024)
    held_against(
        benchmark,
        lambda: top_terms(q, k, layer.mask(N_POS), 1_000, "abs", torch.float32),
        lambda: [left[low : low + 1024] @ right[: low + 1024].mT for low in cuts],
        row=f"ResolvedHead.top(1000), d_sae {d_sae}",
        against="bare causal products",
        reach=4,
    )


@pytest.mark.parametrize("n_heads", [1, 8])
@pytest.mark.parametrize("d_sae", [4_096, 24_576])
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_channels(benchmark: Any, threads: int, d_sae: int, n_heads: int, rotary: bool) -> None:
    """Sum, absolute sum and count of all live channels, and the 50 strongest by each."""
    corpus = workloads.entries(1, N_POS, L0, d_sae)
    layer = workloads.layer(d_sae, n_heads, n_pos=N_POS if rotary else None)
    found = workloads.of(layer, corpus).strongest(SPREAD, 50)
    for head in range(n_heads) if threads == 1 else ():  # the same answers
        for name, (values, _) in reference.channels(layer, corpus, head, SPREAD, 50).items():
            mine = found[name][found[name]["head"] == head]["value"].to_numpy()
            np.testing.assert_allclose(np.abs(mine), values.abs().numpy(), rtol=1e-3)
    held_against(
        benchmark,
        lambda: workloads.of(layer, corpus).strongest(SPREAD, 50),
        lambda: [reference.channels(layer, corpus, head, SPREAD, 50) for head in range(n_heads)],
        row=f"sum, abs, count, top 50: {n_heads} head(s), d_sae {d_sae}{', RoPE' if rotary else ''}",
        against="one product and indexed adds a position pair",
        reach=1 / (15 if n_heads == 1 else 25),
        long=rotary,
    )


@pytest.mark.parametrize("d_sae", [4_096, 24_576])
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_stripes(benchmark: Any, threads: int, d_sae: int, rotary: bool) -> None:
    """Stripe sums of all channels of eight heads, and the 50 strongest."""
    offset = N_POS // 4
    corpus = workloads.entries(1, N_POS, L0, d_sae, offset)
    layer = workloads.layer(d_sae, N_HEADS, n_pos=N_POS if rotary else None)
    held_against(
        benchmark,
        lambda: workloads.of(layer, corpus).strongest(("sum",), 50, where="stripe"),
        lambda: [reference.channels(layer, corpus, head, ("sum",), 50, offset) for head in range(N_HEADS)],
        row=f"stripe sums, top 50: 8 heads, d_sae {d_sae}{', RoPE' if rotary else ''}",
        against="the same, the stripe's pairs alone",
        reach=1 / 10,
    )


@pytest.mark.parametrize("where", ["all", "stripe"])
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("size", ["mini", "gpt2"])
def test_census_against_forward(benchmark: Any, threads: int, size: str, rotary: bool, where: Any) -> None:
    """A whole census, model and dictionary included, and the 50 strongest of every head, against the forward pass."""
    n_docs = 2 if SMALL else N_DOCS[size]
    model, sae, layer = workloads.whole_model("mini" if SMALL else size, rotary)
    real = False
    if size == "mini" and not rotary:
        try:
            target = fra.load_target("mini")
            (_, sae), model, real = target.dictionary_for(layer), target.model, True
        except FraError:
            pass
    if real:
        text = model.to_tokens(" ".join(document.text for document in target.documents()), truncate=False)[0]
        documents = list(text[: n_docs * 128].split(128))
    else:
        g = torch.Generator().manual_seed(3)
        documents = list(torch.randint(1, model.cfg.d_vocab, (n_docs, 128), generator=g))
    batches = torch.stack(documents).split(16)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(batch)

    stripes = [32] * len(documents)
    held_against(
        benchmark,
        lambda: fra.census(model, sae, documents, layer, stripes=stripes).channels(n=50, where=where),
        forward,
        row=f"census of {'sums' if where == 'all' else 'stripes'}, {n_docs} documents of 128: "
        f"{size + '-sized' * (not real)}{', RoPE' if rotary else ''}",
        against="the model's forward pass",
        reach=3.0 if rotary else 1.0,
        long=rotary,
    )


MEMORY = """
import json, sys, torch
torch.set_num_threads(1)
from fra.tests.bench import workloads
n_pos, l0, d_sae = json.loads(sys.argv[1])
corpus, layer = workloads.entries(1, n_pos, l0, d_sae), workloads.layer(d_sae, 1, d_model=64)
small = workloads.entries(1, 16, 4, d_sae)
workloads.of(layer, small).strongest(("sum",), 50)
torch.ones(1, 1 << 20) @ torch.ones(1 << 20, 8)
def status(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))
entry_bytes = 2 * n_pos * l0 * 64 * 4 + corpus.nbytes
open("/proc/self/clear_refs", "w").write("5")  # the peak of making the workload does not count
before = status("VmRSS")
workloads.of(layer, corpus, memory_budget=2 * entry_bytes).strongest(("sum",), 50)
print(json.dumps([entry_bytes, status("VmHWM") - before]))
"""


MEMORY_SIZES = [(128, 8, 2_048)] if SMALL else [(1_024, 64, 65_536), (128, 32, 24_576)]
if os.environ.get("FRA_BENCH_LARGEST"):
    MEMORY_SIZES.append((4_096, 128, 131_072))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("sizes", MEMORY_SIZES, ids=str)
def test_memory(benchmark: Any, sizes: tuple[int, int, int]) -> None:
    """Peak memory beyond what was there, against the entries projected on both sides (64 numbers each)."""

    def work() -> list[int]:
        run = [sys.executable, "-c", MEMORY, json.dumps(sizes)]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        found: list[int] = json.loads(done.stdout)
        return found

    entry_bytes, more = benchmark.pedantic(work, rounds=1)
    benchmark.extra_info.update(
        row="memory at T {:,}, L0 {}, d_sae {:,} (bytes)".format(*sizes),
        against="the projected entries",
        reach=8.0,
        work_s=more,
        base_s=entry_bytes,
        threads=1,
    )
    assert more > 0, "nothing was measured"
    assert SMALL or more < 4 * sizes[2] ** 2 / 10, "a table of d_sae by d_sae was made"


GROWTH: dict[str, tuple[list[int], float]] = {
    "T": ([64, 128, 256, 512], 2.0),
    "L0": ([8, 16, 32, 64], 2.0),
    "d_sae": ([4_096, 8_192, 16_384, 32_768], 1.0),
    "heads": ([2, 4, 8, 16], 1.0),
    "documents": ([8, 16, 32, 64], 1.0),
}


@pytest.mark.parametrize("what", list(GROWTH))
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_growth(benchmark: Any, what: str, rotary: bool) -> None:
    """Exponent of the cost of sums in one size, over a factor of 8, the others fixed."""
    steps, expected = GROWTH[what]
    taken = []
    for step in steps[:2] if SMALL else steps:
        size = {"T": 128, "L0": 16, "d_sae": 4_096, "heads": 2, "documents": 4} | {what: step}
        corpus = workloads.entries(size["documents"], size["T"], size["L0"], size["d_sae"])
        layer = workloads.layer(size["d_sae"], size["heads"], d_model=64, n_pos=size["T"] if rotary else None)
        census = workloads.of(layer, corpus)
        census.channels("sum", n=50)
        taken.append(min(seconds(lambda census=census: census.channels("sum", n=50)) for _ in range(3)))
    slope = float(np.polyfit(np.log(steps[: len(taken)]), np.log(taken), 1)[0])
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(exponent=slope, expected=expected, grows=what, rotary=rotary, seconds=taken)
    assert np.isfinite(slope)
