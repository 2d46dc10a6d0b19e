"""Q03. Feature-resolved attention is sparse.

Few of the channels that are live on a document hold most of the mass `sum A |F~|` of a head, F~ centred under the
head's own pattern. Products of sparse codes are concentrated whatever the directions mean: the controls decide.

H0: more than 10 % of the live channels are needed for 90 % of the mass; or the participation ratio is above 5 % of the
    live channels; or either share is not below 0.8 of what random atoms and what the token dictionary give on the same
    documents (log ratio, bar ln 0.8).
Controls: random atoms (equal number and L0), drawn for every document anew, so that the interval holds the scatter over
    draws; the token dictionary (mean directions of current and previous token, learnt on documents of other sources),
    which asks whether features beat tokens. Both are exactly additive.
Shares, not counts: the token dictionary has two entries a position and so fewer channels of either kind by
    construction. Counts stand beside.
Bars: nine tenths in one tenth, a stricter rule than Pareto's; an effective number of a twentieth. Evenly exponential
    masses would need 59 % and have a ratio of 50 %. A fifth less than a control: smaller differences come with any
    change of the code's norm.
Unit: the document, each a different source where the text has enough.
"""

import math

import pytest

from fra.claim import Claim
from fra.measures.scores.designs import Concentration
from fra.stimuli.designs import NaturalSets

DESIGN = Concentration()
RATIO = math.log(0.8)
CLAIM = Claim(
    id="Q03",
    title="FRA is sparse",
    h0="share of live channels that carry 90 % of the mass >= 0.1",
    bar=0.1,
    condition="share of live channels",
    above=False,
    bars={
        "participation ratio": 0.05,
        "share against random atoms": RATIO,
        "share against token dictionary": RATIO,
        "participation against random atoms": RATIO,
        "participation against token dictionary": RATIO,
    },
    below=(
        "participation ratio",
        "share against random atoms",
        "share against token dictionary",
        "participation against random atoms",
        "participation against token dictionary",
    ),
    statistic="mass_concentration/2",
    stimuli=("natural",),
    n=DESIGN.documents,
    design=(NaturalSets(), DESIGN),
)


@pytest.fixture(scope="module")
def evidence(target, carried, progress):
    from fra.measures.scores.q03_q15_sparsity import sparsity
    from fra.verdicts.samples import paired_evidence

    found = {}
    for n in range(target.n_layers):
        if (layer := carried(CLAIM.designed(NaturalSets), n)) is not None:
            progress(f"Q03: layer {n}")
            found |= sparsity(layer, CLAIM.designed(Concentration))
    return paired_evidence(CLAIM, target.name, target.heads, found)


def test_q03(head, evidence, verdict):
    verdict(evidence.get(head))
