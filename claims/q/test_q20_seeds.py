"""Q20. The result survives the choice of dictionary.

A target may declare dictionaries of one attention input that differ by their seed alone ([[seed]]; `mini` has three
small ones, d_sae 1024, at layer 1). Under each, every TIH of the layer has its 50 discovery channels found anew. A
channel of one dictionary is translated into another by its nearest decoder directions, query and key side each by
itself, for all ordered pairs of dictionaries.

H0: sets translated into another dictionary keep <= half of the nats a row that this one's own sets have; or the set of
    some seed is worth <= 0.5 nat a row (each seed is tested, the worst decides); or translated sets do no better than
    randomly matched ones: by their mean effect, by its rank among theirs, or by how many of their channels the other
    set holds.
Control: random matching of live features, 999 for the counts, 34 an ordered pair (204) for the effect. Bar: with less
than half kept, what was found is more the dictionary's than the head's; 0.5 nat is the bar of a CIH set (Q04).
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="Q20",
    title="The result survives the choice of dictionary",
    h0="nats of sets translated between dictionary seeds / nats of own sets <= 0.5",
    bar=0.5,
    bars={
        "set of every seed": 0.5,
        "over random matching": 0.0,
        "rank among random matchings": 0.95,
        "shared channels over random matching": 0.95,
    },
    statistic="seeds/2",
    stimuli=("repeated_random",),
    n=64,
)


@pytest.fixture(scope="module")
def evidence(target, screens, progress):
    from fra.measures.channels import q20_seeds

    screened = screens(CLAIM.stimuli[0])
    return q20_seeds.seeds_evidence(CLAIM, screened, *q20_seeds.measure(target, screened, progress))


def test_q20(head, evidence, verdict):
    verdict(evidence[head])
