"""D14. Some induction heads need long prefixes, others fire on short ones.

The same examples for every head: BOS, filler, X_1..X_9 Y, filler, and nine tokens of which the last k = 1..9 are those
before Y. Statistic: the least-squares slope, in k, of the attention from the last position to Y, for every example.
On 40 examples the induction head with the steepest slope and the one with the flattest are chosen; 120 others give the
numbers, so that the choice does not make them.

H0: the slopes differ by at most 0.02 of attention a token; or the flat head's attention at one matching token is at
most 0.2 ("fires on short ones"); or replacing the token before the match, at the longest prefix, costs the steep head
at most 0.1 of attention more than replacing an unrelated token between the copies (the control), or at most 0.05 more
than it costs the flat head. Bar: 0.02 a token is 0.16 of attention from one to nine. Every head's slope stands in the
detail with its interval.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.families.designs import FamilySelection, Prefixes
from fra.stimuli.designs import PlantedTokens, RepeatedSets

CLAIM = Claim(
    id="D14",
    title="Some induction heads need long prefixes, others fire on short ones",
    h0="the steepest and the flattest slope of attention in prefix length differ by <= 0.02",
    condition="slope difference",
    bar=0.02,
    bars={
        "short-prefix head at one token": 0.2,
        "token before the match, over an unrelated one": 0.1,
        "the same, over the short-prefix head": 0.05,
    },
    statistic="prefix_slope/3",
    stimuli=("repeated_random",),
    n=120,
    design=(TokenInduction(), RepeatedSets(), FamilySelection(), PlantedTokens(), Prefixes()),
)


@pytest.fixture(scope="module")
def evidence(target, families):
    from fra.measures.families.d14_prefix import prefix_evidence

    return prefix_evidence(CLAIM, target, families)


def test_d14(evidence, verdict):
    verdict(evidence)
