"""Q11. A head's top channels are stable over documents.

The 50 channels of largest mean |F_ij(t,s)| while live (t > s, the first position left out) of one half of the documents
against those of the other, halves drawn by source, each pair jointly live in at least 10 documents of its half.

H0: Jaccard <= 0.5 (two thirds of each list in common), or at most 0.05 above that of random atoms (equal number and L0,
    matching pursuit) in place of features, or 0.05 or more below that without the minimum, or not within the 5 %
    largest when the second half's key features are relabelled among those of like frequency (40 a layer, pooled).
Random atoms decide: couplings are the same in both halves, so that any dictionary has some stability. Without the
    minimum, pairs and features that are live in one document are on the lists, too: the minimum must not be what makes
    lists differ. A tie passes there (the fifty are common pairs either way), and fails against random atoms.
Bars: with less than a half, a list of top channels is more about its documents than about the head; 0.05 is two or
    three channels of fifty, the least that is a difference.
Interval: jackknife over sources of documents (Student's t), Holm over the heads.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="Q11",
    title="Top channels are stable over halves of the documents",
    h0="Jaccard of the top 50 over halves of the sources <= 0.5",
    bar=0.5,
    bars={"over no minimum": -0.05, "over random atoms": 0.05, "rank among relabelled features": 0.95},
    statistic="stability/2",
    stimuli=("natural",),
    n=60,
)


@pytest.fixture(scope="module")
def evidence(layer_pairs):
    from fra.measures.pairs.q09_q10_q11_evidence import stability

    return stability(CLAIM, layer_pairs(CLAIM.n))


def test_q11(head, evidence, verdict):
    verdict(evidence.get(head))
