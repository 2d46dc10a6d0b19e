"""D05. An induction feature's sources are its own token, more so the stronger it fires.

An induction feature of a token induction head: the head has 60 % of its squared DFA, and half of its activation in
second copies lies on rows whose induction key holds the feature's own token (the one whose logit its decoder raises
most). Features are chosen on one set of repeated natural documents and measured on another, at every firing there,
right or wrong. At a firing, the share of the head's squared DFA by source position that falls on positions with the
own token is the effect.

H0: share of attribution <= 0.5, or attention on the token <= 0.25, or the share is no more than 0.25 above the
token's frequency in the text so far, or above that of another token of the text, or it rises by no more than 0.05
from the weakest quarter of the feature's activations to the strongest (linear contrast; quarters from the first set).
Controls: token frequency, another token (the mean over all positions that do not hold the own one). Bar: above one
half the token brings more than all other sources together; a quarter of the attention on one token of some eighty is
far from chance.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="D05",
    title="An induction feature's sources are its own token, more so the stronger it fires",
    h0="share of squared DFA by source on the feature's own token <= 0.5",
    bar=0.5,
    bars={
        "attention on the token": 0.25,
        "over token frequency": 0.25,
        "over another token": 0.25,
        "rise with activation": 0.05,
    },
    statistic="own_token_sources/1",
    stimuli=("repeated_natural",),
    n=70,
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.head_outputs.d05_sources import source_evidence

    return source_evidence(CLAIM, target, progress)


def test_d05(head, evidence, verdict):
    verdict(evidence.get(head))
