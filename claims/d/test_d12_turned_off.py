"""D12. Mean-ablating an induction head turns its family of features off.

Every row on which a feature of the family (D07) fires, on documents that chose nothing, with the head's output
replaced by its mean over discovery documents: does the feature still fire?

H0: at most 80 % of the firing is turned off; the same for zero ablation. Controls: the same rate for every other head
of the layer (the largest of them must be lower by 0.5) and for matched features under the same ablation (lower by
0.5). The family was selected by attribution to this very head, so that some of this is so by construction: a feature
with 60 % of its squared pre-activation from a head loses it. What is not: that the rest never suffices, that no other
head does the same, and that a TopK dictionary does not pull the feature back in. An exact bound as in D07. Bar: "off"
is four in five.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="D12",
    title="Mean-ablating the induction head turns its family off",
    h0="share of the family's firing turned off by mean ablation <= 0.8",
    bar=0.8,
    bars={
        "turned off by zero ablation": 0.8,
        "over other heads": 0.5,
        "over matched features": 0.5,
    },
    statistic="turned_off/2",
    stimuli=("repeated_natural",),
    n=200,
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d12_turned_off import ablation_evidence

    return ablation_evidence(CLAIM, families)


def test_d12(head, evidence, verdict):
    verdict(evidence.get(head))
