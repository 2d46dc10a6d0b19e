"""D18. Wider dictionaries of head outputs find more induction tokens.

A feature announces a token rightly where it fires in the second copy of a repeated document on a row whose induction
key holds the feature's own token (the one whose logit its decoder raises most). Counted are the different tokens that
a dictionary announces rightly in a document: the widest dictionary at a hook less the narrowest.

H0: the difference is <= 1 token a document, or no more than 0.5 above the control. Control: own tokens dealt anew among
the features of each dictionary (the mean of 20 deals), so that firings, L0 and the tokens stay and only their match
goes: a wider dictionary hits more tokens by luck. Bar: one of the some forty tokens of a passage. A target with one
width at each hook cannot answer.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="D18",
    title="Wider dictionaries find more induction tokens",
    h0="different tokens announced rightly in a document, widest - narrowest dictionary <= 1",
    bar=1.0,
    bars={"over equal-L0 shuffles": 0.5},
    statistic="induction_tokens_by_width/2",
    stimuli=("repeated_natural",),
    n=70,
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.head_outputs.d18_width import width_evidence

    return width_evidence(CLAIM, target, progress)


def test_d18(evidence, verdict):
    verdict(evidence)
