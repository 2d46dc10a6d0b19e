"""Q12. FRA's ranking predicts which terms matter.

A term is one pair of live features (i, j) at one query row t and one key s of one head. Terms are drawn across rows,
keys and heads of every layer with a dictionary, and each is taken out of its one score inside a forward pass. FRA's
number for it is its centred contribution weighted by the softmax, |A(t,s) (F - sum_u A(t,u) F)|, with F the term at its
own entry; what it is held against is the change of the next token's loss at row t.

H0: Spearman's rho over a document's terms (two a head), averaged over 60 documents of as many sources, is <= 0.5, or
exceeds that of a control by <= 0.1.
Controls, on the same terms: the raw score |F|; activation alone, a_i a_j. Within one cell the softmax factor is a
constant and cannot reorder pairs, so that nothing but a draw across rows, keys and heads can tell FRA from the raw
score. Bar: 0.5, a quarter of the variance of ranks: below it, sorting by FRA is no guide to what to ablate; what stands
behind attention (values, later layers) is not FRA's and keeps rho below 1. A gain of 0.1 is the least that would make
anybody weight by the softmax; where attention is near uniform, as in an untrained model, the weight cannot give it.
"""

import pytest

from fra.claim import Claim
from fra.measures.pairs.designs import SingleTerms

GAINS = ("gain over the raw score", "gain over activation alone")
CLAIM = Claim(
    id="Q12",
    title="FRA's ranking predicts causal ranking",
    h0="mean over documents of Spearman(|A (F - sum A F)|, |change of loss|) <= 0.5",
    condition="rank correlation",
    bar=0.5,
    bars=dict.fromkeys(GAINS, 0.1),
    statistic="causal_ranking/2",
    stimuli=("natural",),
    n=60,
    min_sources=30,
    design=(SingleTerms(),),
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.pairs.q12_causal_ranking import ranking_evidence
    from fra.stimuli.natural import natural_texts

    texts = natural_texts(target, CLAIM.n, CLAIM.designed(SingleTerms).length)
    return ranking_evidence(CLAIM, target, texts, progress=progress)


def test_q12(evidence, verdict):
    verdict(evidence)
