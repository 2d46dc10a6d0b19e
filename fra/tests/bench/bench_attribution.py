"""What DFA by source position costs, in time and memory, against the einsum that materialises everything.

The strongest source of 1 000 features on 100 documents of 128 tokens: of every feature at every position, and of the
features that fire. Work and base run in processes of their own, in turn, so that each has a peak of its own and a slow
moment of the machine meets both. FRA_BENCH=small for a smoke run; the base needs 8 GB otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

SMALL = os.environ.get("FRA_BENCH") == "small"
ROUNDS = 1 if SMALL else 3
SIZES = {"docs": 5, "pos": 32, "features": 50} if SMALL else {"docs": 100, "pos": 128, "features": 1_000}
L0 = 24
"""Of 2 048 features: a thousand of them have 24 * 1000 / 2048 firings at a position."""

SCRIPT = """
import json, sys, time, torch
from fra.dictionaries.encoder import Encoder
from fra.attribution.head_outputs import HeadOutputs, Live
torch.set_num_threads(1)
torch.set_grad_enabled(False)
what, docs, n_pos, n_features, per_row = json.loads(sys.argv[1])
heads, d_head = 8, 32
g = torch.Generator().manual_seed(0)
v = torch.randn(docs, n_pos, heads, d_head, generator=g)
scores = torch.randn(docs, heads, n_pos, n_pos, generator=g)
A = scores.masked_fill(torch.ones(n_pos, n_pos).triu(1).bool(), -torch.inf).softmax(-1)
W = torch.randn(heads, d_head, n_features, generator=g)
rows = torch.arange(docs * n_pos).repeat_interleave(per_row)
feature = torch.rand(docs * n_pos, n_features, generator=g).topk(per_row).indices.flatten()
live = Live(rows // n_pos, rows % n_pos, feature, torch.ones(len(rows)))
gain, real = torch.ones(docs, n_pos), torch.ones(docs, n_pos, dtype=torch.bool)
z = torch.einsum("bhqk,bkhd->bqhd", A, v)
o = HeadOutputs(Encoder("h", 0, W, torch.zeros(n_features), "none"), z, v, A, gain, real, live)
after = torch.ones(n_pos, n_pos).triu(1).bool()
features = torch.arange(n_features)

def everything():
    read = torch.einsum("bkhd,hdf->bhkf", v, W)
    every = torch.einsum("bhqk,bhkf->bqkf", A, read)
    return every.masked_fill_(after[:, :, None], -torch.inf)

def work():
    if what == "every position, base":
        return everything().max(2).values.double().sum()
    if what == "every position":
        return o.strongest_sources(features)[1].double().sum()
    if what == "firings, base":
        return everything()[live.doc, live.pos, :, live.feature].max(1).values.double().sum()
    return o.top_sources(live)[1].double().sum()

def status(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))

torch.ones(1, 1 << 20) @ torch.ones(1 << 20, 8)
open("/proc/self/clear_refs", "w").write("5")  # the peak of making the workload does not count
before = status("VmRSS")
start = time.process_time()
answer = float(work())
print(json.dumps([time.process_time() - start, status("VmHWM") - before, answer]))
"""


def run(what: str) -> tuple[float, float, float]:
    """CPU seconds, bytes beyond the workload, and the sum of what was found."""
    per_row = max(1, L0 * SIZES["features"] // 2_048)
    given = [what, SIZES["docs"], SIZES["pos"], SIZES["features"], per_row]
    command = [sys.executable, "-c", SCRIPT, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, more, answer = json.loads(done.stdout)
    return float(seconds), float(more), float(answer)


@pytest.fixture(scope="module", params=["every position", "firings"])
def measured(request: pytest.FixtureRequest) -> tuple[str, np.ndarray, np.ndarray]:
    """What was asked, and [rounds, 3] of the work and of its base."""
    what = request.param
    rounds = [(run(what), run(f"{what}, base")) for _ in range(ROUNDS)]
    return what, *(np.array(column) for column in zip(*rounds, strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize(("column", "unit", "reach"), [(0, "CPU seconds", 1.0), (1, "peak bytes", 0.1)])
def test_by_source(
    benchmark: Any, measured: tuple[str, np.ndarray, np.ndarray], column: int, unit: str, reach: float
) -> None:
    what, mine, theirs = measured
    np.testing.assert_allclose(mine[:, 2], theirs[:, 2], rtol=1e-4)  # the same answer
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        row=f"DFA by source, strongest at {what}: {SIZES['features']} features, {SIZES['docs']} documents of "
        f"{SIZES['pos']} ({unit})",
        against="the einsum that materialises everything",
        reach=reach,
        work_s=float(np.median(mine[:, column])),
        base_s=float(np.median(theirs[:, column])),
        threads=1,
    )
    assert mine[:, column].min() > 0
