"""Q15. The strongest channels of a head attend to content, not to sinks.

The 50 channels with the largest mass `sum A |F~|` on selection documents are measured on documents of other sources:
which share of their mass lies off the first position, where language models park attention that they have no use for?

H0: share of mass off BOS <= 0.75; or of the attention that they draw (F~ > 0) half or more goes to BOS; or the share
    off the first token is <= 0.75 where the same documents are run without BOS.
Control: BOS removed. A sink moves to whatever stands first; content does not.
Bar: deviations cancel along a row, so that no key can hold more than half of a channel's mass: the share off BOS lies
    between 0.5 (a channel of BOS against all else) and 1. 0.75 is half way. Drawn attention has no such floor (a pure
    sink: 0, pure content: 1), and 0.5 is half of it. A pure sink is what must be told from the bar before a head may be
    refuted: 0.25 away in mass, 0.5 in drawn attention.
Gate: the head gives BOS 0.1 of its attention (a uniform head of 128 rows gives 0.035). Where there is no sink the claim
    would be true by construction, of an untrained model too: INCONCLUSIVE.
Unit: the document, sources as clusters.
"""

import pytest

from fra.claim import Claim
from fra.measures.scores.designs import StrongestChannels
from fra.stimuli.designs import NaturalSets

DOCUMENTS = NaturalSets(measured=240)
CLAIM = Claim(
    id="Q15",
    title="The strongest channels attend to content, not to sinks",
    h0="share of mass off BOS <= 0.75",
    bar=0.75,
    condition="mass off BOS",
    bars={"drawn off BOS": 0.5, "mass off the first token, BOS removed": 0.75},
    worth={"mass off BOS": 0.25, "mass off the first token, BOS removed": 0.25},
    gates={"attention to BOS": 0.1},
    statistic="mass_off_first/3",
    stimuli=("natural",),
    n=DOCUMENTS.measured,
    design=(DOCUMENTS, StrongestChannels()),
)


@pytest.fixture(scope="module")
def evidence(target, carried, progress):
    from fra.claim import Evidence
    from fra.measures.scores.q03_q15_sparsity import content
    from fra.verdicts.samples import paired_evidence

    if target.bos is None:
        reason = "documents of this target begin with no BOS token"
        return {h: Evidence(claim=CLAIM, head=h, cannot=reason) for h in target.heads}
    found = {}
    for n in range(target.n_layers):
        if (layer := carried(CLAIM.designed(NaturalSets), n)) is not None:
            progress(f"Q15: layer {n}")
            found |= content(layer, CLAIM.designed(StrongestChannels), CLAIM.gates["attention to BOS"])
    return paired_evidence(CLAIM, target.name, target.heads, found)


def test_q15(head, evidence, verdict):
    verdict(evidence.get(head))
