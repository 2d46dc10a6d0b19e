"""D12. Ablating an induction head turns its family of features off, and ablating another head as much does not.

Every row on which a feature of the family (D07) fires, on natural documents that chose nothing, with the head's output
replaced by its mean over discovery documents: does the feature still fire?

That a feature with 60 % of its squared pre-activation from a head loses it without the head is so by construction. What
can be otherwise is that another head's ablation does it as well. H0: the share of the firing that is turned off, less
the share that another head's ablation turns off *at equal change of the layer's output*, is at most 0.5. Equal change:
on every row the other head's output is moved towards its mean, and past it where need be, until what it writes to the
residual stream has changed in norm as much as mean ablation changes what this head writes. The other head is the one
that turns off most in this way on discovery documents. A feature that needs two heads together is turned off by either,
and fails.

Further: mean ablation must turn off more than 80 %, and zero ablation too (not so by construction: the rest may
suffice, and a TopK dictionary may pull a feature back in); and up to 20 matched features for each, under the same
ablation, must be turned off less by 0.5. Bar: "off" is four in five.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.families.designs import FamilySelection
from fra.stimuli.designs import PlantedTokens, RepeatedSets

CLAIM = Claim(
    id="D12",
    title="Ablating the induction head turns its family off, and another head's ablation of equal size does not",
    h0="share turned off by mean ablation - share turned off by another head's, at equal change of the output <= 0.5",
    condition="over other heads, at equal change",
    bar=0.5,
    bars={
        "turned off by mean ablation": 0.8,
        "turned off by zero ablation": 0.8,
        "over matched features": 0.5,
    },
    gates={"features": 10},
    statistic="turned_off/3",
    stimuli=("repeated_natural", "repeated_random"),
    n=240,
    design=(TokenInduction(), RepeatedSets(), FamilySelection(), PlantedTokens()),
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d12_turned_off import ablation_evidence

    return ablation_evidence(CLAIM, families)


def test_d12(head, evidence, verdict):
    verdict(evidence.get(head))
