"""D16. Heads own groups of like features (a surrogate: what features mean is not measured here).

Like is what fires together. A head's features are those in which its share of squared DFA is the largest of all heads,
the forty with the largest shares at most. Of their pairs the ten are taken that fire together most, by Jaccard (the
share of positions where both fire among those where either does), on one set of documents; on another, from other
sources, the Jaccard of these ten pairs together is measured.

H0: Jaccard - the same of random heads' features <= 0.05. Control: each of the head's features is replaced by one of
another head, drawn at random among the five that fire about as often, and the ten likest pairs are chosen among these
in the same way: what any features of such density give that one may search through. Five controls are drawn for each
source of documents, so that their scatter is part of the spread over sources. Bar: one position in twenty shared beyond
that; less would hardly make a group. Directions are not asked about: a dictionary with few live features (TopK) has no
use for parallel ones, and the answer would be known beforehand; decoder cosines stand beside. Features that fire
together may do so for different reasons (what reads one head may fire wherever its output is large): it is no evidence
that a head does one thing.
"""

import pytest

from fra.claim import Claim
from fra.measures.head_outputs.designs import Alive, GroupLikeness, HeadOutputDocuments

DOCUMENTS = HeadOutputDocuments(measured=240)
CLAIM = Claim(
    id="D16",
    title="Heads own groups of like features",
    h0="activation Jaccard of a head's 10 likest pairs of features - same of random heads' features <= 0.05",
    condition="activation Jaccard over random heads",
    bar=0.05,
    gates={"features of the head": 10},
    statistic="like_features/3",
    stimuli=("natural",),
    n=DOCUMENTS.measured,
    design=(DOCUMENTS, Alive(), GroupLikeness()),
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.head_outputs.d16_groups import group_evidence

    return group_evidence(CLAIM, target, progress)


def test_d16(head, evidence, verdict):
    verdict(evidence.get(head))
