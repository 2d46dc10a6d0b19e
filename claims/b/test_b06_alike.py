"""B06. The features of a head are alike.

A surrogate, and no more than that: a feature is taken for what the tokens are at which it fires (their mean embedding,
weighted by activation). It is *unlike the rest* of its head where, on documents of other sources, it leans no more
towards the other features of its own head than towards those of the other heads. One test a head of the layer with
block-diagonal dictionaries (per-head TopK, middle sparsity, equal width): does a head keep to one kind of token? What
is judged is the dictionary of the first training run; the shares of the others stand beside.

H0: a quarter or more of a head's live features are unlike the rest, or the head is no more alike than heads put
together at random. Controls: random heads of the same size, drawn one after another (half of their features are
unlike); 100 planted heads, each of the features of the layer nearest to one of them, which must meet every condition
for a refutation. Noise makes a feature unlike the rest half of the time, and so drives the share towards 1/2: a head
is refuted by features alone that are unlike beyond doubt, each tested over sources. Bar: a quarter is half of what
chance gives.
"""

import pytest

from fra.claim import Claim
from fra.measures.block_diagonal.designs import Alikeness, Study

CLAIM = Claim(
    id="B06",
    title="The features of a head are alike (a surrogate)",
    h0="share of a head's live features that are unlike the rest >= 0.25",
    condition="share unlike the rest",
    bar=0.25,
    above=False,
    bars={"over random heads": 0.95},
    statistic="alikeness/3",
    stimuli=("natural",),
    n=120,
    min_sources=40,
    design=(Study(), Alikeness()),
)


@pytest.fixture(scope="module")
def evidence(frontier):
    from fra.measures.block_diagonal.b06_alikeness import alikeness_evidence, outside

    study = frontier(CLAIM.designed(Study))
    found = alikeness_evidence(CLAIM, study)
    return lambda head: found.get(head) or outside(CLAIM, study, head)


def test_b06(head, evidence, verdict):
    verdict(evidence(head))
