"""Q09. Self channels, a feature read by itself, are over-represented among a head's strongest.

On every natural document a channel's strength is sum |F_ij(t,s)| over t > s, the first position left out, of features
that are live in 10 of 120 other documents. Statistic: the share of channels with i = j among the document's 50
strongest of a head, less the share when the coupling G is that of relabelled key features (permuted among 64 of like
frequency, another draw for every document, so that the scatter of the control is in the interval): activity, and with
it the burstiness of features, stays as it is. The mean over documents, one of each source.

H0: the excess is <= 0.10, or the share is no larger than among the document's 50 pairs of largest sum a_i a_j
    (co-activation alone), or no larger than under relabellings (one for all of 40 documents; up to 999 for a head).
    t = s, where every feature meets itself, is left out.
Bar: five of fifty; with some 10^5 live pairs of which a thousandth are self pairs, chance is nowhere near. Worth seeing
    beyond co-activation: as much, five of fifty.
"""

import pytest

from fra.claim import Claim
from fra.measures.pairs.designs import PairTexts, SelfChannels

CLAIM = Claim(
    id="Q09",
    title="Self channels (i = j) are over-represented among the strongest, t != s",
    h0="mean over documents of the share of i = j among the top 50, less that of relabelled features, <= 0.10",
    condition="share above relabelled features",
    bar=0.10,
    bars={"over co-activation alone": 0.0, "rank among relabelled features": 0.95},
    worth={"over co-activation alone": 0.10},
    statistic="self_share/2",
    stimuli=("natural",),
    n=120,
    min_sources=60,
    design=(PairTexts(), SelfChannels()),
)


@pytest.fixture(scope="module")
def evidence(layer_pairs):
    from fra.measures.pairs.q09_self_channels import self_channels

    return self_channels(CLAIM, layer_pairs(CLAIM.designed(PairTexts)))


def test_q09(head, evidence, verdict):
    verdict(evidence.get(head))
