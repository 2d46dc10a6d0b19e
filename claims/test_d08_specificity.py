"""D08. Upper activations of the induction family are specific, its sensitivity is partial.

The family (selected by attribution, passed by behaviour: D07) on documents that chose nothing. Proxy of a feature with
token B: strict induction, the row's token stood before and B followed it there. A row is in the upper fifth where the
activation exceeds the feature's 80th percentile on discovery documents.

H0: of the upper fifth, at most 80 % are strict induction; or the share of the activation *mass* (each feature in units
of that percentile) on strict induction is at most 0.5; or at most 10 % of the proxy's rows are missed. Control:
documents permuted, the proxy of another document at the same position (its expectation over permutations): precision
must exceed it by 0.5. Precision by fifth, recall and the correlation with the proxy stand beside. The mass is a share
of all activation, not each class divided by its own count. Bar: "specific" leaves one in five for fuzzy induction,
which a strict proxy calls wrong; a family that misses less than a tenth is not partial. Registered before `mini` was
measured. Version 2 of the statistic: as for D07.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="D08",
    title="Strong activations of induction features are specific, their sensitivity is partial",
    h0="precision of the upper fifth <= 0.8, or a control",
    bar=0.8,
    bars={
        "over permuted documents": 0.5,
        "activation mass": 0.5,
        "missed": 0.1,
    },
    statistic="specificity/2",
    stimuli=("repeated_natural",),
    n=200,
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.family_effects import specificity_evidence

    return specificity_evidence(CLAIM, families)


def test_d08(head, evidence, verdict):
    verdict(evidence.get(head))
