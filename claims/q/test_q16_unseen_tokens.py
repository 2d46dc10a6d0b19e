"""Q16. A channel is a unit of its own: found on some tokens, it works on unseen ones.

The vocabulary of `repeated_random` is cut into two random halves. Channels of every TIH are found on documents over one
half, and measured on documents over the other, which share no token of R with them; document by document beside them
stand further documents over the first half, of the same periods.

H0: no channel has E_ij > 0.10 nat on unseen tokens, or the 50 channels removed together keep at most half of the nats a
    stripe row that they have on seen tokens, or no more than what the same search finds at other lags.
Control: the same search at 24 other lags of the same documents, measured on the unseen half: the set must be worth more
than the largest of them (an exact number, which can deny the claim and refutes nothing); and the deranged documents
inside every difference. Bar: a dictionary of tokens would keep nothing of its effect on other tokens, a dictionary of
what tokens have in common would keep all of it; a half lies between. 0.10 nat is the bar of a CIH channel. Rows where
nothing of the set is live count as no effect.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.channels.transfer_designs import ChannelSet, UnseenTokens
from fra.stimuli.designs import RepeatedSets

CLAIM = Claim(
    id="Q16",
    title="A channel is a unit of its own: found on some tokens, it works on unseen ones",
    h0="E_ij on unseen tokens <= 0.10 nat for every channel, or the set keeps <= half of its effect",
    condition="effect on unseen tokens",
    bar=0.10,
    bars={"share kept": 0.5, "over other lags": 0.0},
    statistic="unseen_tokens/2",
    stimuli=("repeated_random",),
    n=120,
    design=(UnseenTokens(), ChannelSet(), TokenInduction(), RepeatedSets()),
)


@pytest.fixture(scope="module")
def evidence(target, screens, progress):
    from fra.measures.channels.q08_q16_transfer import unseen_evidence, unseen_tokens

    screened = screens(CLAIM.stimuli[0])
    return unseen_evidence(CLAIM, screened, unseen_tokens(target, screened, CLAIM, progress))


def test_q16(head, evidence, verdict):
    verdict(evidence[head])
