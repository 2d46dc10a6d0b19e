"""Q02. Features alone, without bias and error terms, carry the attention scores.

A head's score is a sum over {feature, bias, error} of the query and of the key (Q01). Feature-resolved attention shows
one of the nine blocks. What the other eight hold is not seen by anybody who reads channels.

H0: R2 <= 0.5, R2 of the feature-feature block against the head's own scores before softcap, every row centred over its
    unmasked keys (softmax ignores what is constant along a row), pooled over all causal entries of natural documents.
Controls, each given its own best slope on every document, which the features are not: random atoms (equal number and
    L0, matching pursuit, remainder in the error) and a shuffled decoder (the same codes, directions exchanged among
    live features). Both are drawn for every document anew, so that the interval holds the scatter over draws. The lead
    over each must exceed 0.1.
Beside, without a verdict: the token dictionary; R2 without the first key, which is often a sink.
Bar: half, as in the gate of Q04, or the other terms are the larger part of the story. A tenth of the variance: any
    sparse code of this size carries something, and less of a lead would not need a trained dictionary.
Unit: the document, sources as clusters.
"""

import pytest

from fra.claim import Claim
from fra.stimuli.designs import NaturalSets

DOCUMENTS = NaturalSets()
CLAIM = Claim(
    id="Q02",
    title="Features alone carry the scores",
    h0="row-centred R2 of the feature-feature block <= 0.5",
    bar=0.5,
    condition="R2",
    bars={"over random atoms": 0.1, "over shuffled decoder": 0.1},
    statistic="carried_r2/2",
    stimuli=("natural",),
    n=DOCUMENTS.measured,
    design=(DOCUMENTS,),
)


@pytest.fixture(scope="module")
def evidence(target, carried, progress):
    from fra.measures.scores.q02_q14_fidelity import carrying
    from fra.verdicts.samples import paired_evidence

    found = {}
    for n in range(target.n_layers):
        if (layer := carried(CLAIM.designed(NaturalSets), n)) is not None:
            progress(f"Q02: layer {n}")
            found |= carrying(layer)
    return paired_evidence(CLAIM, target.name, target.heads, found)


def test_q02(head, evidence, verdict):
    verdict(evidence.get(head))
