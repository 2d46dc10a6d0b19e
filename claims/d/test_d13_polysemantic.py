"""D13. An induction head is polysemantic: features need it that fail induction.

Candidates: features selected for the head by attribution (60 %, D07) that fail the behaviour test for sure (upper
bound of the hit rate below 60 %, on the half of the planted documents where families are chosen) and fire in at least
10 discovery documents on tokens that have not stood before; at most 10, the most active. Measured on natural
documents, one of each source, none of a source of the discovery documents, on rows where the feature fires and whose
token has not stood before, so that token induction has nothing to match: the change of the loss when the head's output
is replaced by its mean over discovery documents.

H0: no candidate's loss rises by more than 0.05 nat (studentised max-T over the candidates, sources resampled), or by
more than 0.02 nat beyond what another head's ablation does. The other head: of those that are no induction heads, the
one whose output varies most. Bar: 0.05 nat is 5 % of a token's probability where the feature fires. The row says of
each candidate about how many sources would decide it.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.families.designs import FamilySelection, NeedingFeatures
from fra.stimuli.designs import PlantedTokens, RepeatedSets

CLAIM = Claim(
    id="D13",
    title="Induction heads are polysemantic: features need them that are not induction features",
    h0="no feature that fails induction loses > 0.05 nat when the head is put out",
    condition="loss when the head is put out",
    bar=0.05,
    bars={
        "over another head": 0.02,
    },
    statistic="polysemantic/2",
    stimuli=("repeated_random", "natural"),
    n=120,
    design=(TokenInduction(), RepeatedSets(), FamilySelection(), PlantedTokens(), NeedingFeatures()),
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d13_polysemantic import polysemantic_evidence

    return polysemantic_evidence(CLAIM, families)


def test_d13(head, evidence, verdict):
    verdict(evidence.get(head))
