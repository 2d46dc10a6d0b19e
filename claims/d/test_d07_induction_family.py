"""D07. An induction family exists: features of a head-output dictionary that say "{token} is next, by induction".

Selected for a token induction head: every feature with at least 60 % of its direct feature attribution (sum of squares
over the rows where it fires) from that head, on discovery documents. Its token is what its direct path to the logits
raises most. Behaviour, on planted documents that chose nothing: the token is planted in repeated random passages, 12
times a feature; the feature should fire before the second occurrence and wait for it. Hits and first-occurrence false
fires are counted separately: it passes above 60 % of hits and below 20 % of false fires.

H0: share of the selected features that pass <= 0.5 (binomial test over features). Controls: up to 20 matched features
for each, at most 10 % from any induction head, density within a factor of two, and of those the strongest on the same
token; each is tested on the tokens of the features that it stands for and on its own, and counts when it passes any (an
exact test of two shares in Fisher's order). Source: of the hits, more than half must draw most, over all heads and
positions, from the earlier occurrence of the token (planted documents resampled). Bar: "a family" is the rule and not
the exception among what the selection names. Worth of the controls' condition: what the bar itself is worth.

D07.token asks what that behaviour test, as published, does not: a feature that says "something repeats" passes it with
any token. The scale of a feature is its median activation before second occurrences of its own token, in the half of
the planted documents where the family is chosen. On the other half: it knows its token if it reaches half of its scale
before fewer than 20 % of the second occurrences of *other* planted tokens, and before more than half of those of its
own. H0: at most half of the family know theirs. A threshold in each feature's own unit, and not the chance that an own
activation exceeds another's (which stands beside): that chance is near one for a feature that is always a little
stronger on its own token and strong on every other.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.families.designs import FamilySelection, OwnScale
from fra.stimuli.designs import PlantedTokens, RepeatedSets

_SURVEYED = (TokenInduction(), RepeatedSets(), FamilySelection(), PlantedTokens())
FAMILY = Claim(
    id="D07",
    title="An induction family exists among a head's output features",
    h0="share of the selection that passes the behaviour test <= 0.5",
    condition="share that passes",
    bar=0.5,
    bars={
        "over matched features": 0.0,
        "source is the earlier token": 0.5,
    },
    gates={"features": 10},
    worth={"over matched features": 0.5},
    statistic="induction_family/4",
    stimuli=("repeated_random", "repeated_natural"),
    n=1000,
    design=_SURVEYED,
)
TOKEN = Claim(
    id="D07.token",
    title="Features of the induction family know their token",
    h0="share of the family that is strong before its own token's second occurrence and not before others' <= 0.5",
    condition="share that knows its token",
    bar=0.5,
    gates={"features": 10},
    statistic="induction_token/2",
    stimuli=("repeated_random", "repeated_natural"),
    n=1000,
    design=(*_SURVEYED, OwnScale()),
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d07_behaviour import behaviour_evidence, token_evidence

    return {FAMILY.id: behaviour_evidence(FAMILY, families), TOKEN.id: token_evidence(TOKEN, families)}


@pytest.mark.parametrize("claim", [FAMILY, TOKEN], ids=lambda claim: claim.id)
def test_d07(claim, head, evidence, verdict):
    verdict(evidence[claim.id].get(head))
