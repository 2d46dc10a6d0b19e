"""D05. An induction feature's sources are its own token, more so the stronger it fires.

A feature's own token is the one whose logit its decoder raises most. A token induction head's features are those of
which it has 60 % of the squared DFA, on repeated natural documents. Their tokens are then planted in repeated random
passages, where one learns how strongly each fires before its own token. A feature is an induction feature if its
median activation there is above zero and if before other planted tokens it reaches half of that at most once in ten.

Other planted documents are measured, at every firing above half of that median, right or wrong, where the token stands
in the text so far: a firing is asked for its sources where it is as strong as one that speaks of the token, not
wherever the activation is above zero, and where the token could be its source. The share of the head's squared DFA by
source position that falls on positions with the own token is the effect.

H0: share of attribution <= 0.5, or attention on the token <= 0.25, or the share is no more than 0.25 above the token's
frequency in the text so far, or above that of another token of the text, or it rises by no more than 0.05 from the
weakest quarter of the feature's firings, weak ones included, to the strongest (linear contrast; quarters from the
documents that chose). Controls: token frequency, another token (the mean over all positions that do not hold the own
one). Bar: above one half the token brings more than all other sources together; a quarter of the attention on one
token of some eighty is far from chance. What is chosen, and how strong a strong firing is, comes from other documents
than those that are measured. With fewer than five such features the head is INCONCLUSIVE, and the row says how wide a
dictionary would have so many.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.head_outputs.designs import OwnTokens
from fra.stimuli.designs import RepeatedSets

CLAIM = Claim(
    id="D05",
    title="An induction feature's sources are its own token, more so the stronger it fires",
    h0="share of squared DFA by source on the feature's own token <= 0.5",
    condition="share of attribution",
    bar=0.5,
    bars={
        "attention on the token": 0.25,
        "over token frequency": 0.25,
        "over another token": 0.25,
        "rise with activation": 0.05,
    },
    gates={"induction features": 5},
    statistic="own_token_sources/2",
    stimuli=("repeated_natural", "repeated_planted"),
    n=1000,
    design=(RepeatedSets(), TokenInduction(), OwnTokens()),
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.head_outputs.d05_sources import source_evidence

    return source_evidence(CLAIM, target, progress)


def test_d05(head, evidence, verdict):
    verdict(evidence.get(head))
