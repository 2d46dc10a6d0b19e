"""C03. What training adds stands in channels that only the later model has.

A crosscoder over two checkpoints of one training, one before induction forms and the target's model. Every TIH of the
layer has its 50 discovery channels found through it. A feature is exclusive to the later checkpoint where its relative
decoder norm there is above 0.9; a channel stands in exclusive features where either of its two does. What the set does
together, on confirmation documents, and what its channels in exclusive features do together.

H0: these have <= half of the nats a row of the whole set; or the set is worth <= 0.5 nat a row (Q04's bar); or they
    have no more nats than the like through a crosscoder over two late checkpoints, between which induction does not
    form; or no more than most sets (rank <= 0.95) in which as many other features are called exclusive, drawn among
    features of like decoder norm and activity.
Bars: below half, most of what the set does stands in features that were there before. Worth seeing beyond the late
checkpoints is half of half a nat.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.channels.transfer_designs import ChannelSet, Exclusive
from fra.stimuli.designs import RepeatedSets

CLAIM = Claim(
    id="C03",
    title="What training adds stands in channels that only the later model has",
    h0="nats of the set's channels in exclusive features / nats of the set <= 0.5",
    condition="share",
    bar=0.5,
    bars={"set effect": 0.5, "over late checkpoints": 0.0, "over matched features": 0.95},
    worth={"over late checkpoints": 0.25},
    statistic="exclusive_channels/1",
    stimuli=("repeated_random",),
    n=120,
    design=(Exclusive(), ChannelSet(), TokenInduction(), RepeatedSets()),
)


@pytest.fixture(scope="module")
def evidence(target, screens, progress):
    from fra.measures.channels.c02_c03_crosscoders import exclusive_evidence, measure_exclusive

    screened = screens(CLAIM.stimuli[0])
    return exclusive_evidence(CLAIM, screened, *measure_exclusive(target, screened, CLAIM, progress))


def test_c03(head, evidence, verdict):
    verdict(evidence[head])
