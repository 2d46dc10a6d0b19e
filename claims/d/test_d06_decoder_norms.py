"""D06. Attribution to heads by decoder norm agrees with attribution by DFA.

The norm of a feature's decoder block says how much of each head's output the feature writes back: weights alone, no
text. Squared DFA by head says how much each head made it fire. For every feature that fires in a document the two are
rank-correlated over the heads of the layer (Spearman); the document's number is the mean over its features. D06.W_O
takes the norm of the block after W_O, what the feature adds to the residual stream.

H0: rank correlation <= 0.5. Controls: the heads of each feature's norms permuted (bar 0.25 above it), and the norms
of another feature that fires in the document (bar 0.1 above it: heads that are loud for every feature would make the
two agree without saying anything of this one). Both are drawn anew for each feature in each document, so that their
scatter is part of the spread over sources. Bar: at 0.5 over eight heads two heads in three are in the same order both
ways.
"""

import pytest

from fra.claim import Claim
from fra.measures.head_outputs.designs import HeadOutputDocuments

BARS = {"over permuted heads": 0.25, "over another feature's decoder": 0.1}
PLAIN, OUTPUT = (
    Claim(
        id=f"D06{suffix}",
        title=f"Decoder-norm attribution agrees with DFA attribution ({words})",
        h0="Spearman over heads of decoder norm and squared DFA <= 0.5",
        condition="rank correlation",
        bar=0.5,
        bars=BARS,
        statistic="decoder_norm_rank/2",
        stimuli=("natural",),
        n=120,
        design=(HeadOutputDocuments(),),
    )
    for suffix, words in (("", "without W_O"), (".W_O", "with W_O"))
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.head_outputs.d06_norms import norm_evidence

    return norm_evidence((PLAIN, OUTPUT), target, progress)


@pytest.mark.parametrize("claim", [PLAIN, OUTPUT], ids=lambda claim: claim.id)
def test_d06(claim, evidence, verdict):
    verdict(evidence[claim.id])
