"""B01. Weights and multiply-adds of a block-diagonal dictionary are 1 / n_heads of the dense one's; biases do not
shrink.

Dictionaries of the target's size (four features a dimension), as they are stored and as they compute: parameters by
name, multiply-adds by PyTorch's own counter of operations, forward and in a training step.

H0: some ratio is 1e-9 or more away from 1 / n_heads. Control: dense matrices with zeros off the blocks, which is the
published code's way, must *not* come down to it. Bar: a count is exact. Measured time depends on machine and size and
is a benchmark (fra/tests/bench/bench_blockdiag.py), not a verdict.
"""

import pytest

from fra.claim import Claim
from fra.measures.block_diagonal.designs import Cost

CLAIM = Claim(
    id="B01",
    title="Weights and multiply-adds of a block-diagonal dictionary are 1/n_heads",
    h0="|count / dense count * n_heads - 1| >= 1e-9 for weights or multiply-adds",
    kind="identity",
    condition="distance from 1 / n_heads",
    bar=1e-9,
    above=False,
    bars={"biases: distance from 1": 1e-9, "masked dense dictionary: distance from 1 / n_heads": 0.5},
    below=("biases: distance from 1",),
    statistic="block_cost/1",
    stimuli=("random weights",),
    n=1,
    min_sources=1,
    design=(Cost(),),
)


@pytest.fixture(scope="module")
def evidence(target):
    from fra.measures.block_diagonal.b01_b02_blocks import cost_evidence

    return cost_evidence(CLAIM, target)


def test_b01(evidence, verdict):
    verdict(evidence)
