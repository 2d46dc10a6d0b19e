"""D08. Strong activations of the induction family are specific, its sensitivity is partial.

The family (selected by attribution, passed by behaviour on one half of the planted documents: D07) on the other half.
Each feature is looked at in the 12 documents in which its own token B stands, once in each copy: strict induction ("A
B ... A", then B) is one row there, so that planting fixes the base rate at one in as many rows as a document has. A
feature is strong where it reaches half of its scale, its median activation on such rows of the first half.

H0: of the strong activations, at most 80 % are strict induction; or the share of the activation *mass* (each feature in
units of its scale) on strict induction is at most 0.5; or on at most 10 % of the proxy's rows the feature is not
strong. Control: documents permuted, the row of another document that holds the token (its expectation): precision must
exceed it by 0.5. Precision and recall at other strengths stand beside. Bar: "specific" leaves one in five for fuzzy
induction, which a strict proxy calls wrong; a family that misses less than a tenth is not partial.

D08.local and D08.context ask the same of context features (at most 10 % from an induction head) on first copies of
natural text: the word that at least half of a feature's firing draws on most, on discovery documents, makes the proxy:
at most 10 tokens after it up to the next punctuation, or anywhere after it where the source lies farther back. One row
each, all such features together; upper activations are those above the 80th percentile of discovery documents.
Attention reads backwards, so that the word has to stand before the firing whatever the feature means. What can be
otherwise is where: the same word's occurrences are put at other positions of the same document, 20 times, each document
its own way, and precision must exceed that by 0.2; a feature that fires anywhere gets nothing there. Permuted documents
by 0.2, as words stand in many documents. Precision itself above 0.5, since a word that attribution finds is a cruder
proxy than a pattern written for the feature.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.families.designs import ContextFeatures, FamilySelection, OwnScale
from fra.stimuli.designs import PlantedTokens, RepeatedSets

_SURVEYED = (TokenInduction(), RepeatedSets(), FamilySelection(), PlantedTokens())
INDUCTION = Claim(
    id="D08",
    title="Strong activations of induction features are specific, their sensitivity is partial",
    h0="precision of strong activations <= 0.8, or a control",
    condition="precision of strong activations",
    bar=0.8,
    bars={
        "over permuted documents": 0.5,
        "activation mass": 0.5,
        "missed": 0.1,
    },
    gates={"features": 10},
    statistic="specificity/4",
    stimuli=("repeated_random", "repeated_natural"),
    n=1000,
    design=(*_SURVEYED, OwnScale()),
)
LOCAL, CONTEXT = (
    Claim(
        id=f"D08.{name}",
        title=f"Strong activations of {kind} context features are specific, their sensitivity is partial",
        h0="precision of upper activations <= 0.5, or a control",
        condition="precision of upper activations",
        bar=0.5,
        bars={"over permuted positions": 0.2, "over permuted documents": 0.2, "activation mass": 0.5, "missed": 0.1},
        gates={"features": 10},
        statistic="context_specificity/3",
        stimuli=("repeated_natural",),
        n=240,
        design=(*_SURVEYED, ContextFeatures()),
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
