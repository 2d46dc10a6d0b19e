"""Q11. A head's top channels are stable over documents.

The list: the 50 channels of largest mean |F_ij(t,s)| while live (t > s, the first position left out) on 120 documents,
jointly live in at least 20 of them. Of each of 120 documents of other sources: the channels of the list that are live
in it, against as many of the document's own strongest by the same measure, among pairs that may be on the list.
Statistic: their Jaccard index, the mean over documents, one of each source. (Lists of two halves of the documents would
not do: their overlap grows to 1 with the number of documents, whatever the head.)

H0: Jaccard <= 0.5 (two thirds in common), or at most 0.05 above that of random atoms (equal number and L0, matching
    pursuit) in place of features, or 0.05 or more below that without the minimum, or no larger than with the measured
    documents' key features relabelled among 64 of like frequency (40 documents; up to 999 for a head).
Random atoms: couplings are the same in all documents, so that any dictionary has some stability; 20 dictionaries, each
    for a twentieth of the sources, so that their scatter is in the interval; drawn where the rest holds. A tie fails
    there. Without the minimum, pairs and features that are live in one document are on the lists, too: the minimum
    must not be what makes lists differ. A tie passes there (the fifty are common pairs either way).
Bars: with less than a half, a list of top channels is more about its documents than about the head; 0.05 is two or
    three channels of fifty, the least that is a difference.
"""

import pytest

from fra.claim import Claim
from fra.measures.pairs.designs import PairTexts, Stability

CLAIM = Claim(
    id="Q11",
    title="Top channels are stable over documents",
    h0="mean over documents of the Jaccard of a list of 50 with the document's own strongest <= 0.5",
    condition="Jaccard of the list",
    bar=0.5,
    bars={"over no minimum": -0.05, "over random atoms": 0.05, "rank among relabelled features": 0.95},
    statistic="stability/3",
    stimuli=("natural",),
    n=120,
    min_sources=60,
    design=(PairTexts(), Stability()),
)


@pytest.fixture(scope="module")
def evidence(layer_pairs):
    from fra.measures.pairs.q11_stability import stability

    return stability(CLAIM, layer_pairs(CLAIM.designed(PairTexts)))


def test_q11(head, evidence, verdict):
    verdict(evidence.get(head))
