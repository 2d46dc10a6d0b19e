"""D10. The direct path of an induction feature to the logits matters more than its path through the MLP.

The family's features are ablated (as in D09) and the change is led down one path: added to the last residual stream
only, or seen by the MLP of the same layer only, whose output then goes on freely. Paired: the same rows (where the
feature fires), both loss changes. In the last layer there is no third path; below it, later layers are one, and the
change in the whole model stands beside.

H0: mean of |direct| - |MLP| <= 0 nats a row; or, on rows whose next token is the feature's, direct - MLP <= 0, signed,
decreases kept. Control: matched features (density, token), whose difference must be smaller. Bar: zero, "more than" as
said; documents resampled.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="D10",
    title="An induction feature's direct path to the logits matters more than its path through the MLP",
    h0="mean |loss change| by the direct path <= that through the MLP",
    bar=0.0,
    bars={
        "direct less MLP, own token": 0.0,
        "over matched features": 0.0,
    },
    statistic="path_patched_loss/1",
    stimuli=("repeated_natural",),
    n=200,
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d09_d10_paths import path_evidence

    return path_evidence(CLAIM, families)


def test_d10(head, evidence, verdict):
    verdict(evidence.get(head))
