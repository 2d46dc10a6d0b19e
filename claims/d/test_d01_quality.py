"""D01. The dictionaries of head outputs are good enough to speak about.

The reconstruction stands in for the head outputs of its layer. The loss that this costs, against the loss without
those outputs (zero ablation) or with their mean (mean ablation), is the share of loss recovered; one set of documents
gives means, components and their number, another, from other sources, every number that is quoted. D01 is on natural
text, D01.repeated on the second copies of repeated text, where induction heads have something to do.

H0, for any of them: loss recovered under zero ablation <= 0.9, or under mean ablation <= 0.9, or no more than by as
many principal components as features are live, or no more than 0.1 above a dictionary of the same kind that was never
trained, or more than a quarter of the activation's dimensions live. Bar: what is asked of every dictionary of this
project: a tenth of what the layer does may go lost. What must be seen before one of these may refute is a dictionary
that loses nothing (0.1 above the bar of 0.9), or one that is a tenth better than principal components.

The untrained dictionary has its encoder tied to its decoder, block-diagonal or dense; one is drawn for each source of
documents, so that the scatter of the control is part of the spread over sources. Explained variance and the share of
features that never fire, with intervals, stand beside: the first is negative in dictionaries that recover the loss
well, the second is an upper bound on so little text. So does the rule of thumb of the sources (L0 20, 80 %), which
decides nothing.
"""

import pytest

from fra.claim import Claim
from fra.measures.head_outputs.designs import DictionaryQuality, HeadOutputDocuments
from fra.stimuli.designs import RepeatedSets

BARS = {
    "loss recovered (mean)": 0.9,
    "over PCA of equal L0": 0.0,
    "over an untrained dictionary": 0.1,
    "L0 over width": 0.25,
}
WORTH = {"loss recovered (zero)": 0.1, "loss recovered (mean)": 0.1, "over PCA of equal L0": 0.1}
NATURAL, REPEATED = (
    Claim(
        id=f"D01{suffix}",
        title=f"The dictionaries of head outputs are good enough to speak about ({words})",
        h0="share of loss recovered, zero ablation <= 0.9",
        condition="loss recovered (zero)",
        bar=0.9,
        bars=BARS,
        below=("L0 over width",),
        worth=WORTH,
        statistic="head_output_quality/4",
        stimuli=(stimulus,),
        n=120,
        design=(documents, DictionaryQuality()),
    )
    for suffix, words, stimulus, documents in (
        ("", "natural text", "natural", HeadOutputDocuments()),
        (".repeated", "second copies", "repeated_natural", RepeatedSets(longest=64)),
    )
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.head_outputs.d01_quality import quality_evidence

    return {claim.id: quality_evidence(claim, target, progress) for claim in (NATURAL, REPEATED)}


@pytest.mark.parametrize("claim", [NATURAL, REPEATED], ids=lambda claim: claim.id)
def test_d01(claim, evidence, verdict):
    verdict(evidence[claim.id])
