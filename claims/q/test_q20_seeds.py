"""Q20. The result survives the choice of dictionary.

A target may declare dictionaries of one attention input that differ by their seed alone ([[seed]]; `mini` has three
small ones, d_sae 1024, at layer 1). Under each, every TIH of the layer has its 50 discovery channels found anew. A
channel of one dictionary is translated into another by its nearest decoder directions, query and key side each by
itself, for all ordered pairs of dictionaries.

H0: sets translated into another dictionary keep <= half of the nats a row that this one's own sets have; or the set of
    some seed is worth <= 0.5 nat a row (each seed is tested, the worst decides); or translated sets do no better than
    randomly matched ones: by their mean effect, by its rank among theirs, or by how many of their channels the other
    set holds.
Controls: random matching of live features. Drawn anew for each document and ordered pair of dictionaries, the scatter
of the matchings is in the interval of the paired difference; drawn for all documents at once, one matching an ordered
pair, the mean over the pairs is a draw of the null in which the translated sets' mean effect and count are ranked (one
draw after another, as long as the head can still pass). Three dictionaries are three training runs. Bar: with less than
half kept, what was found is more the dictionary's than the head's; 0.5 nat is the bar of a CIH set (Q04). Worth seeing
beyond random matching is what both bars come to, half of 0.5 nat.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.channels.transfer_designs import ChannelSet, DictionarySeeds
from fra.stimuli.designs import RepeatedSets

CLAIM = Claim(
    id="Q20",
    title="The result survives the choice of dictionary",
    h0="nats of sets translated between dictionary seeds / nats of own sets <= 0.5",
    condition="share kept",
    bar=0.5,
    bars={
        "set of every seed": 0.5,
        "over random matching": 0.0,
        "rank among random matchings": 0.95,
        "shared channels over random matching": 0.95,
    },
    worth={"over random matching": 0.25},
    statistic="seeds/3",
    stimuli=("repeated_random",),
    n=120,
    design=(DictionarySeeds(), ChannelSet(), TokenInduction(), RepeatedSets()),
)


@pytest.fixture(scope="module")
def evidence(target, screens, progress):
    from fra.measures.channels.q20_seeds import measure, seeds_evidence

    screened = screens(CLAIM.stimuli[0])
    return seeds_evidence(CLAIM, screened, *measure(target, screened, CLAIM, progress))


def test_q20(head, evidence, verdict):
    verdict(evidence[head])
