"""Q09. Self channels, a feature read by itself, are over-represented among a head's strongest.

On natural text a channel's strength is sum |F_ij(t,s)| over t > s, the first position left out, for pairs jointly live
in 20 documents. Statistic: the share of channels with i = j among the 50 strongest of a head, less the mean share when
the coupling G is that of relabelled key features (permuted among features of like frequency; 40 relabellings a
layer, pooled over its heads): activity, and with it the burstiness of features, stays as it is.

H0: the excess is <= 0.10, or the share is no larger than among the 50 pairs of largest sum a_i a_j (co-activation
    alone), or not within the 5 % largest under relabelling. t = s, where every feature meets itself, is left out.
Bar: five of fifty; with some 10^6 live pairs of which a thousandth are self pairs, chance is nowhere near.
Interval: jackknife over sources of documents (Student's t), Holm over the heads.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="Q09",
    title="Self channels (i = j) are over-represented among the strongest, t != s",
    h0="share of i = j among the top 50, less that of relabelled features, <= 0.10",
    bar=0.10,
    bars={"over co-activation alone": 0.0, "rank among relabelled features": 0.95},
    statistic="self_share/1",
    stimuli=("natural",),
    n=60,
)


@pytest.fixture(scope="module")
def evidence(layer_pairs):
    from fra.measures.pairs.q09_q10_q11_evidence import self_channels

    return self_channels(CLAIM, layer_pairs(CLAIM.n))


def test_q09(head, evidence, verdict):
    verdict(evidence.get(head))
