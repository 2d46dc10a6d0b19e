"""Block-diagonal against dense dictionaries of equal width: encoding and a training step, as ratios beside 1 / n_heads.

Both are timed in the same run, in turns, so that a busy machine slows both. TopK and Adam do not shrink with the
blocks, so that measured ratios stay above 1 / n_heads, which multiply-adds reach exactly (claim B01). Run it by
`pytest fra/tests/bench/bench_blockdiag.py -o python_files='bench_*.py' -s`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from sae_lens import (
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput

from fra.dictionaries.blockdiag import BlockDiagonalTrainingSAE, BlockDiagonalTrainingSAEConfig

Benchmark = Callable[..., Any]
D_HEAD, EXPANSION, ROWS, ROUNDS = 64, 8, 512, 9


def _pair(n_heads: int, activation: str) -> tuple[Any, Any]:
    """A block-diagonal and a dense dictionary in training, of the widths of GPT-2's head outputs (12 heads)."""
    sizes = {"d_in": n_heads * D_HEAD, "d_sae": EXPANSION * n_heads * D_HEAD}
    block = BlockDiagonalTrainingSAE(
        BlockDiagonalTrainingSAEConfig(**sizes, n_heads=n_heads, activation=activation, k=4, head_scale=False)
    )
    if activation == "topk":
        return block, TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=4 * n_heads))
    return block, StandardTrainingSAE(StandardTrainingSAEConfig(**sizes))


def _work(sae: Any, work: str, x: torch.Tensor) -> Callable[[], Any]:
    if work == "encode":
        return torch.no_grad()(lambda: sae.encode(x))
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-4)

    def step() -> None:
        sae.training_forward_pass(TrainStepInput(x, {"l1": 1.0}, None, 0, False)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


@pytest.mark.parametrize("work", ["encode", "training step"])
@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize("n_heads", [8, 12])
def test_block_against_dense(benchmark: Benchmark, n_heads: int, activation: str, work: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, n_heads * D_HEAD)
    block, dense = (_work(sae, work, x) for sae in _pair(n_heads, activation))
    dense()
    times: dict[str, list[float]] = {"block": [], "dense": []}

    def timed(name: str, run: Callable[[], Any]) -> None:
        start = time.perf_counter()
        run()
        times[name].append(time.perf_counter() - start)

    def both() -> None:
        timed("block", block)

    benchmark.pedantic(both, setup=lambda: timed("dense", dense), rounds=ROUNDS, warmup_rounds=1)
    ratio = median(times["block"]) / median(times["dense"])
    benchmark.extra_info.update({"ratio to dense": ratio, "1 / n_heads": 1 / n_heads})  # type: ignore[attr-defined]
    print(f"\n{n_heads} heads, {activation}, {work}: {ratio:.3f} of dense, 1 / n_heads = {1 / n_heads:.3f}")
    assert ratio < 1
