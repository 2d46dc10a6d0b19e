"""B03. Block-diagonal dictionaries are as good as dense ones.

L0 against loss recovered (the dictionary's reconstruction in the place of all head outputs of a layer, zero ablation
as the floor), TopK in every head against TopK over all, at three sparsities each and on equal training tokens: once at
equal width (1 / n_heads of the weights), once at equal weights (n_heads times the width). Loss is interpolated in log
L0 and averaged over the range that the two arms share; L0 is measured on documents of other sources. The documents are
natural passages read twice: on text that repeats nothing a layer whose heads copy may do too little to be missed.

H0: the share of the loss recovered falls short of the dense dictionary's by 0.02 or more. Control: the dense
dictionary, trained on the same tokens in the same order. Three training runs an arm: the interval has the sources of
text and the runs, each as a sample. Gate: in every run its densest point must recover half of the loss, and zero
ablation must cost 0.05 nats a token. Bar: two hundredths is what doubling L0 is commonly worth near the usual 0.8 to
0.95; a shortfall below it would not decide for anyone. Worth seeing: that both are equally good, 0.02 from the bar.
"""

import pytest

from fra.claim import Claim
from fra.measures.block_diagonal.designs import ComparedArms, Study

WIDTH, WEIGHTS = (
    Claim(
        id=f"B03.{suffix}",
        title=f"Block-diagonal dictionaries are as good as dense ones at equal {suffix}",
        h0="loss recovered at equal L0, block-diagonal minus dense, <= -0.02",
        condition="loss recovered, difference",
        bar=-0.02,
        gates={"the control arm recovers": 0.5},
        worth={"loss recovered, difference": 0.02},
        statistic="frontier/2",
        stimuli=("repeated_natural",),
        n=120,
        min_sources=40,
        design=(Study(), ComparedArms()),
    )
    for suffix in ("width", "parameters")
)


@pytest.fixture(scope="module")
def evidence(frontier):
    from fra.measures.block_diagonal.b03_b04_b07_compare import compare

    found = {}
    for claim, arm in ((WIDTH, "block-width"), (WEIGHTS, "block-parameters")):
        study = frontier(claim.designed(Study), *claim.stimuli)
        found[claim.id] = compare(claim, study, arm, "dense", control="dense")
    return found


@pytest.mark.parametrize("claim", [WIDTH, WEIGHTS], ids=lambda claim: claim.id)
def test_b03(claim, evidence, verdict):
    verdict(evidence[claim.id])
