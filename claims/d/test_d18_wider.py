"""D18. Wider dictionaries of head outputs find more induction tokens.

A feature announces a token rightly where it fires in the second copy of a repeated document on a row whose induction
key holds the feature's own token (the one whose logit its decoder raises most). Counted are the different tokens that
a dictionary announces rightly in a document: a widest dictionary at a hook less a narrowest one, every training run of
the one against every training run of the other.

H0: the difference is <= 1 token a document, or no more than 0.5 above the control. Control: own tokens dealt anew among
the features of each dictionary (the mean of 20 deals, drawn anew for each source, so that their scatter is part of the
spread over sources), so that firings, L0 and the tokens stay and only their match goes: a wider dictionary hits more
tokens by luck. Bar: one of the some forty tokens of a passage. Three dictionaries of each width are needed: two that
differ in width alone differ in their training run as well, and one run a width cannot say by how much (INCONCLUSIVE). A
target with one width at each hook cannot answer.
"""

import pytest

from fra.claim import Claim
from fra.measures.head_outputs.designs import Widths
from fra.stimuli.designs import RepeatedSets

CLAIM = Claim(
    id="D18",
    title="Wider dictionaries find more induction tokens",
    h0="different tokens announced rightly in a document, widest - narrowest dictionary <= 1",
    condition="tokens a document",
    bar=1.0,
    bars={"over equal-L0 shuffles": 0.5},
    gates={"dictionaries a width": 3},
    statistic="induction_tokens_by_width/3",
    stimuli=("repeated_natural",),
    n=120,
    design=(RepeatedSets(), Widths()),
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.head_outputs.d18_width import width_evidence

    return width_evidence(CLAIM, target, progress)


def test_d18(evidence, verdict):
    verdict(evidence)
