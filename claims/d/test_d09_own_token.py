"""D09. What an induction feature does to the loss falls on its own token.

Each feature of the family (D07) is taken out of hook_z wherever it fires in a document, the dictionary's error kept,
and the loss of every position measured: 48 pairs of document and feature a head.

H0: of the loss *increase*, at most half falls on positions whose next token is the feature's. Decreases are dropped in
this share; the share of the net change, decreases kept, stands beside it. Controls: the base rate (the share of those
rows *where the feature fires* whose next token is its token: an ablation that hurt everywhere alike would give that);
a matched feature (density, token) ablated in documents of its own, for the same token. The token's overall base rate is
reported. An exact bound as in D07. Bar: "falls on" means most of it.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="D09",
    title="An induction feature's effect on the loss falls on its own token",
    h0="share of the loss increase on the feature's own token <= 0.5",
    bar=0.5,
    bars={
        "over the base rate where it fires": 0.0,
        "over matched features": 0.0,
    },
    statistic="own_token_share/2",
    stimuli=("repeated_natural",),
    n=200,
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d09_d10_paths import own_token_evidence

    return own_token_evidence(CLAIM, families)


def test_d09(head, evidence, verdict):
    verdict(evidence.get(head))
