"""Q22. Feature-resolved attention tells more than the attention map.

One token of a natural document is swapped for another and the model runs again. Who predicts the change in the rows of
the head's pattern: somebody who knows which features are live and what the new token's features are elsewhere, or
somebody who has seen many attention maps?

H0: what is told of the change in a document, features less token-pair means, <= 0.05 on average; or features less token
    dictionary, or less position only. What is told is `1 - |a - b|^2 / max(|a|^2, |b|^2)` of the true change a and the
    foretold b: R2, but where more is foretold than happens, the error counts against what was foretold. It lies between
    -3 and 1, so that no document in which a baseline foretells much and little happens decides for all others.
Baseline: token-pair means of the row-centred scores of 120 other documents, with means by lag, key token, token before
    the key, and match of either with the query's token below them, all shrunk by their own reliability; their sources
    are not those of the measured ones. It knows what
    token looks at what token, and that a token looks behind its earlier occurrence.
Controls: the token dictionary (the same bilinear form, every position told by its current and previous token alone:
    does it need features?) and means by lag (does it need tokens?). Each predictor, the features too, gets the better
    of two readings and the best of some factors, "no change" among them, on tuning documents of other sources.
Beside, judged by nobody: whole activations in the place of features. The expected features of a token decode to its
    expected activation, so that what features add here is the context of the *other* positions, and activations carry
    that as well: the claim is about FRA against maps, not about sparse features against dense ones.
Bar: a twentieth of the change, in each lead.
Unit: the document (two swaps each, and every fourth of the rows behind s + 1), sources as clusters. The old token's
    expected features are exchanged for the new one's, at s as at s + 1, so that those of the position stay: a head that
    looks one token back needs them.
"""

import pytest

from fra.claim import Claim
from fra.measures.scores.designs import Swapping
from fra.stimuli.designs import NaturalSets

DOCUMENTS = NaturalSets(measured=240)
CLAIM = Claim(
    id="Q22",
    title="FRA tells more than the attention map",
    h0="told of the change in attention, features less token-pair means, <= 0.05",
    bar=0.05,
    condition="over token-pair means",
    bars={"over token dictionary": 0.05, "over position only": 0.05},
    statistic="swap_prediction/3",
    stimuli=("natural",),
    n=DOCUMENTS.measured,
    design=(DOCUMENTS, Swapping()),
)


@pytest.fixture(scope="module")
def evidence(target, carried, progress):
    from fra.measures.scores.q22_swaps import telling
    from fra.verdicts.samples import paired_evidence

    found = {}
    for n in range(target.n_layers):
        if (layer := carried(CLAIM.designed(NaturalSets), n)) is not None:
            progress(f"Q22: layer {n}")
            found |= telling(layer, CLAIM.designed(Swapping))
    return paired_evidence(CLAIM, target.name, target.heads, found)


def test_q22(head, evidence, verdict):
    verdict(evidence.get(head))
