"""Q16. A channel is a unit of its own: found on some tokens, it works on unseen ones.

The vocabulary of `repeated_random` is cut into two random halves. Channels of every TIH are found on documents over one
half, and measured on documents over the other, which share no token of R with them; document by document beside them
stand further documents over the first half, of the same periods.

H0: no channel has E_ij > 0.10 nat on unseen tokens, or the 50 channels removed together keep at most half of the nats a
    stripe row that they have on seen tokens, or no more than what the same search finds at other lags.
Control: the same search at 24 other lags of the same documents, measured on the unseen half, and the deranged documents
inside every difference. Bar: a dictionary of tokens would keep nothing of its effect on other tokens, a dictionary of
what tokens have in common would keep all of it; a half lies between. 0.10 nat is the bar of a CIH channel. Rows where
nothing of the set is live count as no effect.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="Q16",
    title="A channel is a unit of its own: found on some tokens, it works on unseen ones",
    h0="E_ij on unseen tokens <= 0.10 nat for every channel, or the set keeps <= half of its effect",
    bar=0.10,
    bars={"share kept": 0.5, "over other lags": 0.95},
    statistic="unseen_tokens/1",
    stimuli=("repeated_random",),
    n=60,
)


@pytest.fixture(scope="module")
def evidence(target, screens, progress):
    from fra.measures.channels import q08_q16_transfer

    screened = screens("repeated_random")
    return q08_q16_transfer.unseen_evidence(CLAIM, screened, q08_q16_transfer.unseen_tokens(target, screened, progress))


def test_q16(head, evidence, verdict):
    verdict(evidence[head])
