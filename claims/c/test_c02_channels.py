"""C02. Through a crosscoder the same channels are found as through the layer's own dictionary.

Where the target has a dictionary and a crosscoder at one attention input, every TIH of the layer has its 50 discovery
channels found through each. A channel of one is translated into the other by its nearest decoder directions (the
crosscoder's are those of the slot that is this model), query and key side each by itself, both ways.

H0: translated sets keep <= half of the nats a row that the other's own sets have; or the set of either is worth <= 0.5
    nat a row (both are tested, the worse decides); or translated sets do no better than randomly matched ones: by their
    mean effect, by its rank among theirs, or by how many of their channels the other set holds.
Controls: random matching of live features, as in Q20: drawn anew for each document, whose scatter is in the interval of
the paired difference; and drawn for all documents at once, among which mean effect and count are ranked. Bars: as of
Q20. The two have other widths and were trained on other things (the crosscoder has another model to explain, too), so
less than between seeds may be shared; with less than half kept, what was found is more the dictionary's than the
head's.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.channels.transfer_designs import ChannelSet
from fra.stimuli.designs import RepeatedSets

CLAIM = Claim(
    id="C02",
    title="The same channels are found through a crosscoder",
    h0="nats of sets translated between dictionary and crosscoder / nats of own sets <= 0.5",
    condition="share kept",
    bar=0.5,
    bars={
        "set of either": 0.5,
        "over random matching": 0.0,
        "rank among random matchings": 0.95,
        "shared channels over random matching": 0.95,
    },
    worth={"over random matching": 0.25},
    statistic="crosscoder_channels/1",
    stimuli=("repeated_random",),
    n=120,
    design=(ChannelSet(), TokenInduction(), RepeatedSets()),
)


@pytest.fixture(scope="module")
def evidence(target, screens, progress):
    from fra.measures.channels.c02_c03_crosscoders import BOTH, NAMES, NO_CROSSCODER, measure_both
    from fra.measures.channels.q20_seeds import seeds_evidence

    screened = screens(CLAIM.stimuli[0])
    found, cannot = measure_both(target, screened, CLAIM, progress)
    named = {"every": BOTH, "names": NAMES, "candidate": "the strongest channels of both", "reason": NO_CROSSCODER}
    return seeds_evidence(CLAIM, screened, found, cannot, **named)


def test_c02(head, evidence, verdict):
    verdict(evidence[head])
