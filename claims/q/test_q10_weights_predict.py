"""Q10. A head's weights predict where it looks.

For 4 000 pairs of features drawn evenly from those jointly live in 20 of 120 natural documents: the head's coupling
G_ij against log( sum A^{-ij}(t,s) a_i(t) a_j(s) / sum a_i(t) a_j(s) / n_keys(t) ), how much more than evenly it attends
from i to j, on 120 documents of other sources. A^{-ij} is its attention with F_ij taken out of the row's scores, so
that a channel does not vouch for itself.

H0: Spearman <= 0.30, or no larger than when G is permuted among pairs matched in co-activation, frequency and magnitude
    (up to 999 times), or the log ratios spread (interquartile range) by <= 0.10 nat: the head looks nowhere.
Bar: 0.30 is what is called a medium correlation; with less, weights would not tell a user much about attention.
Interval, of correlation and spread: the jackknife's pseudo-values, one a source, an equal part of the pairs being left
    out with each source, so that the draw of the pairs is in the interval. The first position is left out.
"""

import pytest

from fra.claim import Claim
from fra.measures.pairs.designs import PairPredictions, PairTexts

CLAIM = Claim(
    id="Q10",
    title="Weights predict where a head looks",
    h0="Spearman(G_ij, log ratio of attention without the channel) <= 0.30",
    condition="Spearman",
    bar=0.30,
    bars={"rank among matched pairs": 0.95, "spread of the log ratio": 0.10},
    statistic="prediction/3",
    stimuli=("natural",),
    n=120,
    min_sources=60,
    design=(PairTexts(), PairPredictions()),
)


@pytest.fixture(scope="module")
def evidence(layer_pairs):
    from fra.measures.pairs.q10_prediction import prediction

    return prediction(CLAIM, layer_pairs(CLAIM.designed(PairTexts)))


def test_q10(head, evidence, verdict):
    verdict(evidence.get(head))
