"""B02. Every feature of a block-diagonal dictionary belongs to one head.

The target's block-diagonal dictionaries (and one freshly started, so that the claim runs everywhere), saved, loaded,
folded and loaded again: off-block weights must be exactly zero, and with all heads but its own put to zero a feature
must not change by a bit on natural documents. Per-head TopK, JumpReLU or ReLU: under a TopK over all heads they
compete, which is shown beside.

H0: an off-block weight is not zero, or a feature changes. Control: in dense dictionaries more than half of the features
must change, else the ablation shows nothing. Bar: fewer than one entry and fewer than one feature in a million: exact.
"""

import pytest

from fra.claim import Claim
from fra.measures.block_diagonal.designs import Belonging, Study

CLAIM = Claim(
    id="B02",
    title="Every feature of a block-diagonal dictionary belongs to one head",
    h0="some off-block weight is not 0 after save, load and folding, or a feature changes without the other heads",
    kind="identity",
    condition="off-block weights that are not zero",
    bar=1.0,
    above=False,
    bars={
        "share of features that change without the other heads": 1e-6,
        "the same share in a dense dictionary": 0.5,
    },
    below=("share of features that change without the other heads",),
    statistic="block_belonging/1",
    stimuli=("natural",),
    n=6,
    min_sources=6,
    design=(Belonging(), Study()),
)


@pytest.fixture(scope="module")
def evidence(target, frontier):
    from fra.measures.block_diagonal.b01_b02_blocks import belonging_evidence

    return belonging_evidence(CLAIM, target, frontier(CLAIM.designed(Study)))


def test_b02(evidence, verdict):
    verdict(evidence)
