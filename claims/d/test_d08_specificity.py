"""D08. Upper activations of the induction family are specific, its sensitivity is partial.

The family (selected by attribution, passed by behaviour: D07) on documents that chose nothing. Proxy of a feature with
token B: strict induction, the row's token stood before and B followed it there. A row is in the upper fifth where the
activation exceeds the feature's 80th percentile on discovery documents.

H0: of the upper fifth, at most 80 % are strict induction; or the share of the activation *mass* (each feature in units
of that percentile) on strict induction is at most 0.5; or at most 10 % of the proxy's rows are missed. Control:
documents permuted, the proxy of another document that has the same position (its expectation; documents too short to
have the position do not count there): precision must exceed it by 0.5. Precision by fifth, recall and the correlation
with the proxy stand beside. The mass is a share of all activation, not each class divided by its own count. An exact
bound as in D07. Bar: "specific" leaves one in five for fuzzy induction, which a strict proxy calls wrong; a family that
misses less than a tenth is not partial.

D08.local and D08.context ask the same of context features (at most 10 % from an induction head): the word that at least
half of a feature's firing draws on most, on discovery documents, makes the proxy: at most 10 tokens after it up to the
next punctuation, or anywhere after it where the source lies farther back. One row each, all such features together;
precision above 0.5, since a word that attribution finds is a cruder proxy than a pattern written for the feature; over
permuted documents by 0.2, as words stand in many documents.
"""

import pytest

from fra.claim import Claim

INDUCTION = Claim(
    id="D08",
    title="Strong activations of induction features are specific, their sensitivity is partial",
    h0="precision of the upper fifth <= 0.8, or a control",
    bar=0.8,
    bars={
        "over permuted documents": 0.5,
        "activation mass": 0.5,
        "missed": 0.1,
    },
    statistic="specificity/3",
    stimuli=("repeated_natural",),
    n=200,
)
LOCAL, CONTEXT = (
    Claim(
        id=f"D08.{name}",
        title=f"Strong activations of {kind} context features are specific, their sensitivity is partial",
        h0="precision of the upper fifth <= 0.5, or a control",
        bar=0.5,
        bars={"over permuted documents": 0.2, "activation mass": 0.5, "missed": 0.1},
        statistic="context_specificity/2",
        stimuli=("repeated_natural",),
        n=200,
    )
    for name, kind in (("local", "local"), ("context", "long-range"))
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d08_context import specificity_evidence

    return specificity_evidence(INDUCTION, families)


@pytest.fixture(scope="module")
def context(families):
    from fra.measures.families.d08_context import context_evidence

    kinds = {LOCAL.id: (LOCAL, "local"), CONTEXT.id: (CONTEXT, "long-range")}
    return {name: context_evidence(claim, families, kind) for name, (claim, kind) in kinds.items()}


@pytest.mark.claim(INDUCTION)
def test_d08(head, evidence, verdict):
    verdict(evidence.get(head))


@pytest.mark.parametrize("claim", [LOCAL, CONTEXT], ids=lambda claim: claim.id)
def test_d08_context(claim, context, verdict):
    verdict(context[claim.id])
