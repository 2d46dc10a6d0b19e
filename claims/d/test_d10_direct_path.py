"""D10. The direct path of an induction feature to the logits matters more than its path through the MLP.

The family's features are ablated (as in D09, in planted documents that hold their token) and the change is led down one
path: added to the last residual stream only, or seen by the MLP of the same layer only, whose output then goes on
freely. Paired: the same rows (where the feature fires), both loss changes. In the last layer there is no third path;
below it, later layers are one, and the change in the whole model stands beside.

H0: of |direct| + |MLP|, summed over rows, the direct path has at most half (the same hypothesis as a difference of at
most zero nats, in a unit that does not depend on how much the feature does); or, on rows whose next token is the
feature's, direct - MLP <= 0 nats, signed, decreases kept. Control: a matched feature (density, token) for each pair,
drawn anew, in the same document; its share must be smaller. Bar: one half, "more than" as said; documents resampled.
Worth: 0.1 of a share (60 to 40), and 0.05 nat, 5 % of a token's probability.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.families.designs import AblatedPairs, FamilySelection
from fra.stimuli.designs import PlantedTokens, RepeatedSets

CLAIM = Claim(
    id="D10",
    title="An induction feature's direct path to the logits matters more than its path through the MLP",
    h0="share of the direct path in |loss change| by it and by that through the MLP <= 0.5",
    condition="share of the direct path",
    bar=0.5,
    bars={
        "direct less MLP, own token": 0.0,
        "over matched features": 0.0,
    },
    gates={"features": 10},
    worth={
        "share of the direct path": 0.1,
        "direct less MLP, own token": 0.05,
        "over matched features": 0.1,
    },
    statistic="path_patched_loss/2",
    stimuli=("repeated_random", "repeated_natural"),
    n=1000,
    design=(TokenInduction(), RepeatedSets(), FamilySelection(), PlantedTokens(), AblatedPairs()),
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d09_d10_paths import path_evidence

    return path_evidence(CLAIM, families)


def test_d10(head, evidence, verdict):
    verdict(evidence.get(head))
