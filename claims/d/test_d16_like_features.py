"""D16. Heads own groups of like features (a surrogate: what features mean is not measured here).

A head's features are the ten alive ones in which it has its largest share of squared DFA, chosen on one half of the
documents. On the other half, the activation Jaccard of a pair is the share of positions where both fire among those
where either does; a document's number is that of all pairs together. Decoder cosine is from weights.

H0: Jaccard - the same of random heads' features <= 0.05, or mean decoder cosine - the same <= 0.05. Control: for each
of the ten a feature of another head, drawn at random, that fires about as often; 199 such groups. Bar: one position
in twenty shared beyond chance; less would hardly make a group. Likeness of ten features is no evidence that a head
does one thing: features may fire together for different reasons, and a head may have more groups than one.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="D16",
    title="Heads own groups of like features",
    h0="activation Jaccard of a head's top 10 features - same of random heads' features <= 0.05",
    bar=0.05,
    bars={"decoder cosine over random heads": 0.05},
    statistic="like_features/2",
    stimuli=("natural",),
    n=120,
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.head_outputs.d16_groups import group_evidence

    return group_evidence(CLAIM, target, progress)


def test_d16(head, evidence, verdict):
    verdict(evidence.get(head))
