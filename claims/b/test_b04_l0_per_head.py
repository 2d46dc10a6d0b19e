"""B04. What matters in a block-diagonal dictionary is its L0 per head, not its total.

Block-diagonal dictionaries came out with a total L0 of hundreds, and it was proposed that the L0 of one head is what
must be small. If so, a block-diagonal dictionary whose *heads* have an L0 of K stands where a dense dictionary with a
*total* of K stands: it needs rho = n_heads times the total for the same quality. If totals compare, rho = 1. The claim:
rho is nearer to n_heads than to 1, on a log scale. ReLU with an L1 penalty, where each head is free in its L0 (under
per-head TopK the claim is vacuous), three penalties each, on equal training tokens; natural
passages read twice.

H0: rho <= sqrt(n_heads), that is: a block-diagonal dictionary at L0 = sqrt(n_heads) K recovers no less than a dense one
at K (recovery rises with L0). Statistic: the share of the loss recovered by the dense one at K minus that of the
block-diagonal one at sqrt(n_heads) K, averaged over the range that they share and over three training runs of each;
sources of text and runs are both in the interval. Control: the dense dictionary, same penalty, same tokens. Bar: the
midpoint of the two readings. Worth seeing: 0.02, which is what doubling L0 is commonly worth; with 4 heads the two
readings lie as far from the bar, with more they lie further. L0 by head, and rho itself, stand in the detail.
"""

import pytest

from fra.claim import Claim
from fra.measures.block_diagonal.designs import ComparedArms, Study

CLAIM = Claim(
    id="B04",
    title="L0 per head matters, not the total",
    h0="loss recovered, dense at L0 = K minus block-diagonal at sqrt(n_heads) K, <= 0",
    condition="loss recovered, difference",
    bar=0.0,
    gates={"the control arm recovers": 0.5},
    worth={"loss recovered, difference": 0.02},
    statistic="exchange_rate/2",
    stimuli=("repeated_natural",),
    n=120,
    min_sources=40,
    design=(Study(), ComparedArms()),
)


@pytest.fixture(scope="module")
def evidence(target, frontier):
    from dataclasses import replace

    from fra.measures.block_diagonal.b03_b04_b07_compare import compare, exchange_rates

    study, arms = frontier(CLAIM.designed(Study), *CLAIM.stimuli), ("dense-l1", "block-l1")
    found = compare(CLAIM, study, *arms, control="dense-l1", b_over_a=target.n_heads**0.5)
    if "frontier" not in found.detail:
        return found
    return replace(found, detail={"rho, by run": exchange_rates(CLAIM, study, *arms)} | dict(found.detail))


def test_b04(evidence, verdict):
    verdict(evidence)
