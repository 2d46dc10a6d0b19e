"""Q10. A head's weights predict where it looks.

For 1 000 pairs of features drawn evenly from those jointly live in 20 natural documents: the head's coupling G_ij
against log( sum A^{-ij}(t,s) a_i(t) a_j(s) / sum a_i(t) a_j(s) / n_keys(t) ), how much more than evenly it attends from
i to j. A^{-ij} is its attention with F_ij taken out of the row's scores, so that a channel does not vouch for itself.

H0: Spearman <= 0.30, or not within the 5 % largest when G is permuted (999 times) among pairs matched in co-activation,
    frequency and magnitude, or the log ratios spread (interquartile range) by <= 0.10 nat: the head looks nowhere.
Bar: 0.30 is what is called a medium correlation; with less, weights would not tell a user much about attention.
Interval, of correlation and spread: jackknife over sources of documents (Student's t), Holm over the heads. The first
    position is left out.
Correlation and spread may refute, each at half of the level.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="Q10",
    title="Weights predict where a head looks",
    h0="Spearman(G_ij, log ratio of attention without the channel) <= 0.30",
    bar=0.30,
    bars={"rank among matched pairs": 0.95, "spread of the log ratio": 0.10},
    statistic="prediction/2",
    stimuli=("natural",),
    n=60,
)


@pytest.fixture(scope="module")
def evidence(layer_pairs):
    from fra.measures.pairs.q09_q10_q11_evidence import prediction

    return prediction(CLAIM, layer_pairs(CLAIM.n))


def test_q10(head, evidence, verdict):
    verdict(evidence.get(head))
