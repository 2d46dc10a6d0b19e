"""Q14. Keeping the k strongest features of a position is harmless.

Code that looks at features often keeps the strongest few of each position and says nothing of the rest. Here k is half
of the dictionary's mean L0 on selection documents, of other sources; a feature is as strong as what it adds to the
activation is long.

H0: the truncated feature-feature block loses 0.05 or more of the R2 that all features have (Q02's R2: causal entries,
    rows centred, against the head's own scores).
Control: k of the position's live features at random, drawn for every document anew, under its best slope on every
    document. The lead of the strongest over these must exceed 0.05, or it is the number that matters and not the
    strength.
Gate: all features together must have an R2 of 0.5, or there is nothing to keep: INCONCLUSIVE.
Bar: a twentieth of the variance, the order of what bias and error terms of a good dictionary leave. Beside: R2(k) for
    k = 1, 2, 4, 8, 16.
Unit: the document, sources as clusters.
"""

import pytest

from fra.claim import Claim
from fra.measures.scores.designs import Truncation
from fra.stimuli.designs import NaturalSets

DOCUMENTS = NaturalSets(measured=240)
CLAIM = Claim(
    id="Q14",
    title="Truncation to the strongest half of a position's features is harmless",
    h0="R2(all features) - R2(k strongest a position) >= 0.05, k half of the mean L0",
    bar=0.05,
    condition="loss of R2",
    above=False,
    bars={"over random k": 0.05},
    gates={"R2 of all features": 0.5},
    statistic="truncated_r2/2",
    stimuli=("natural",),
    n=DOCUMENTS.measured,
    design=(DOCUMENTS, Truncation()),
)


@pytest.fixture(scope="module")
def evidence(target, carried, progress):
    from fra.measures.scores.q02_q14_fidelity import truncation
    from fra.verdicts.samples import paired_evidence

    found = {}
    for n in range(target.n_layers):
        if (layer := carried(CLAIM.designed(NaturalSets), n)) is not None:
            progress(f"Q14: layer {n}")
            found |= truncation(layer, CLAIM.designed(Truncation), CLAIM.gates["R2 of all features"])
    return paired_evidence(CLAIM, target.name, target.heads, found)


def test_q14(head, evidence, verdict):
    verdict(evidence.get(head))
