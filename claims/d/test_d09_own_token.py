"""D09. What an induction feature does to the loss falls on its own token.

Each feature of the family (chosen on the other half of the planted documents: D07) is taken out of hook_z wherever it
fires in a planted document that holds its token, the dictionary's error kept, and the loss of every position measured:
120 pairs of document and feature a head, each in a document of its own as far as there are so many.

H0: of the loss *increase*, at most half falls on positions whose next token is the feature's. Decreases are dropped in
this share; the share of the net change, decreases kept, stands beside it. Controls: the base rate (the share of those
rows *where the feature fires* whose next token is its token: an ablation that hurt everywhere alike would give that); a
matched feature (density, token), drawn anew for each pair among up to 20, ablated in the same document, for the same
token. Bar: "falls on" means most of it. Worth of the controls' conditions: what the bar itself is worth. The token
occurs twice in every document; a family of fewer than 10 features is not asked.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.families.designs import AblatedPairs, FamilySelection
from fra.stimuli.designs import PlantedTokens, RepeatedSets

CLAIM = Claim(
    id="D09",
    title="An induction feature's effect on the loss falls on its own token",
    h0="share of the loss increase on the feature's own token <= 0.5",
    condition="share of the increase",
    bar=0.5,
    bars={
        "over the base rate where it fires": 0.0,
        "over matched features": 0.0,
    },
    gates={"features": 10},
    worth={"over the base rate where it fires": 0.5, "over matched features": 0.5},
    statistic="own_token_share/3",
    stimuli=("repeated_random", "repeated_natural"),
    n=1000,
    design=(TokenInduction(), RepeatedSets(), FamilySelection(), PlantedTokens(), AblatedPairs()),
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d09_d10_paths import own_token_evidence

    return own_token_evidence(CLAIM, families)


def test_d09(head, evidence, verdict):
    verdict(evidence.get(head))
