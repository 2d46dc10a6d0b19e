"""B06. The features of a head are alike.

A surrogate, and no more than that: a feature is taken for what the tokens are at which it fires (their mean embedding,
weighted by activation). It is *unlike the rest* of its head where, on other documents, it leans no more towards the
other features of its own head than towards those of the other heads. One test a head of the layer with block-diagonal
dictionaries (per-head TopK, middle sparsity, equal width): does a head keep to one kind of token?

H0: a quarter or more of a head's live features are unlike the rest, or the head is no more alike than heads put
together at random. Control: 200 random heads of the same size (half of whose features are unlike); planted heads, the
features of the layer nearest to one of them, which must be found for a refutation. Bar: a quarter is half of what
chance gives.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="B06",
    title="The features of a head are alike (a surrogate)",
    h0="share of a head's live features that are unlike the rest >= 0.25",
    bar=0.25,
    above=False,
    bars={"over random heads": 0.95},
    statistic="alikeness/1",
    stimuli=("natural",),
    n=120,
    min_documents=40,
)


@pytest.fixture(scope="module")
def evidence(frontier):
    from fra.measures.block_diagonal.b06_alikeness import alikeness_evidence, outside

    study = frontier(CLAIM.n)
    found = alikeness_evidence(CLAIM, study)
    return lambda head: found.get(head) or outside(CLAIM, study, head)


def test_b06(head, evidence, verdict):
    verdict(evidence(head))
