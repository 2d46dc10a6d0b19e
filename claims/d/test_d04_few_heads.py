"""D04. Features of a head-output dictionary are dominated by few heads; those that are not move the same tokens.

Head h's share of a feature is its part of the sum over firings of squared DFA by head (what Kissane et al. 2024 call
fraction of variance explained). The top head of every feature that fires ten times is chosen on one set of documents,
its share taken on another, from other sources, features weighted alike.

H0: share of the top head <= 0.5, or no more than 0.05 above the control. Control: each feature's encoder blocks trade
places among the heads, stretched to the norms that stood there; at every position as many of these features fire as
did, those with the largest pre-activations, and living features and their top heads are chosen in the same way. There
are 60 such shuffles, each measured on a part of the sources of its own, which counts as one cluster: the scatter of the
control is in the interval. Bar: above one half a head brings more than all others together. Before the share may
refute, three quarters must be told from one half.

D04.spread: of features whose top head has less than half and whose second has at least a fifth, the strongest source
of the one and of the other hold the same token more often than under the same shuffles. H0: the excess is <= 0.10.
Bar: one firing in ten. Several heads often look at the same place whatever a feature reads; the shuffle keeps their
patterns.
"""

import pytest

from fra.claim import Claim
from fra.measures.head_outputs.designs import Alive, Dominance, HeadOutputDocuments

DESIGN = (HeadOutputDocuments(discovery=40), Alive(), Dominance())
DOMINATED = Claim(
    id="D04",
    title="Features are dominated by few heads",
    h0="top head's share of the sum of squared DFA <= 0.5",
    condition="top head's share of squares",
    bar=0.5,
    bars={"over shuffled blocks": 0.05},
    worth={"top head's share of squares": 0.25},
    statistic="top_head_share/2",
    stimuli=("natural",),
    n=120,
    design=DESIGN,
)
SPREAD = Claim(
    id="D04.spread",
    title="Features spread over several heads move the same tokens",
    h0="agreement of the top two heads' source tokens - same under shuffled blocks <= 0.10",
    condition="agreement over shuffled blocks",
    bar=0.10,
    gates={"spread features": 20},
    statistic="source_agreement/2",
    stimuli=("natural",),
    n=120,
    design=DESIGN,
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.head_outputs.d04_heads import dominance_evidence

    return dominance_evidence(DOMINATED, SPREAD, target, progress)


@pytest.mark.parametrize("claim", [DOMINATED, SPREAD], ids=lambda claim: claim.id)
def test_d04(claim, evidence, verdict):
    verdict(evidence[claim.id])
