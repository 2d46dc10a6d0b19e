"""D07. An induction family exists: features of a head-output dictionary that say "{token} is next, by induction".

Selected for a token induction head: every feature with at least 60 % of its direct feature attribution (sum of squares
over the rows where it fires) from that head, on discovery documents. Its token is what its direct path to the logits
raises most. Behaviour, on other documents: the token is planted in repeated random passages, 12 times a feature; the
feature should fire before the second occurrence and wait for it. Hits and first-occurrence false fires are counted
separately: it passes above 60 % of hits and below 20 % of false fires.

H0: share of the selected features that pass <= 0.5 (Clopper-Pearson over features). Controls: matched features, at most
10 % from any induction head, density within a factor of two, and of those the strongest on the same token; each is
tested on that token and on its own, and counts when it passes either (Fisher exact). Source: of the hits, more than
half must draw most, over all heads and positions, from the earlier occurrence of the token (documents resampled; an
exact bound where nearly all documents agree and a bootstrap has none). Any of the three may refute, each at a third of
the level.
Bar: "a family" is the rule and not the exception among what the selection names. Few features can show little: 5 of 5
do not exceed 0.5 at three heads.

D07.token asks what that behaviour test, as published, does not: a feature that says "something repeats" passes it with
any token. Of the features that pass, H0: at most half fire before fewer than 20 % of the second occurrences of *other*
planted tokens.
"""

import pytest

from fra.claim import Claim

FAMILY = Claim(
    id="D07",
    title="An induction family exists among a head's output features",
    h0="share of the selection that passes the behaviour test <= 0.5",
    bar=0.5,
    bars={
        "over matched features": 0.0,
        "source is the earlier token": 0.5,
        "repeats a feature": 9,
    },
    statistic="induction_family/3",
    stimuli=("repeated_random", "repeated_natural"),
    n=400,
)
TOKEN = Claim(
    id="D07.token",
    title="Features of the induction family know their token",
    h0="share of the family that fires before < 20 % of other tokens' second occurrences <= 0.5",
    bar=0.5,
    bars={"fires before other tokens": 0.2},
    statistic="induction_token/1",
    stimuli=("repeated_random", "repeated_natural"),
    n=400,
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d07_behaviour import behaviour_evidence, token_evidence

    return {FAMILY.id: behaviour_evidence(FAMILY, families), TOKEN.id: token_evidence(TOKEN, families)}


@pytest.mark.parametrize("claim", [FAMILY, TOKEN], ids=lambda claim: claim.id)
def test_d07(claim, head, evidence, verdict):
    verdict(evidence[claim.id].get(head))
