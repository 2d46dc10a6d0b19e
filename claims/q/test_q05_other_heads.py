"""Q05. Heads that are not token induction heads have conceptual induction (CIH) channels.

A head is not a TIH where the upper bound of its attention contrast is at most 0.05. It has a CIH channel where one and
the same candidate, of the 50 that the search puts first, passes everything on confirmation documents:

H0: no candidate has E_ij > 0.10 nat, beats the same search at 40 other lags, has a coupling in the top 5 % of the
    head's own matched pairs and above the median of the layer's other heads, beats the same search on scrambled heads,
    and is *expressed*: on the rows where its query feature is live, the head's own contrast exceeds 0.10, the channel's
    own share of attention exceeds 0.02, and such rows are at least 0.2 % of all.
Controls: deranged documents, other lags, scrambled heads; layer-0 heads, which cannot know a key's predecessor, stand
    beside.
Power: a refutation needs that 80 % of the channels planted in the head's own scores are found. Planted are 16 pairs of
    live features, drawn at random among those whose key feature is at least 0.6 more live at the stripe's key than
    elsewhere, each raised just to these bars (pairs that no coupling lifts there are passed over, 150 are tried);
    found is what ranks among the 50 and exceeds zero at 0.05 / 50. With fewer than 10 planted nothing is refuted. Any
    change of this is a new statistic.
Bar: every head has positive pairs that others cancel, so that an effect alone ("latent") is not yet a channel; 0.02 of
    attention is what a fifth of a weak induction head would give.
"""

import pytest

from fra.claim import Claim

BARS = {
    "effect": 0.10,
    "over other lags": 0.95,
    "coupling among matched pairs": 0.95,
    "coupling over other heads": 0.0,
    "over scrambled heads": 0.95,
    "head contrast": 0.10,
    "attention": 0.02,
    "coverage": 0.002,
}
RANDOM, NATURAL = (
    Claim(
        id=f"Q05{suffix}",
        title=f"Heads that are not TIHs have CIH channels ({stimulus.replace('_', ' ')})",
        h0="no candidate has E_ij > 0.10 nat with every other condition",
        bar=0.10,
        bars=BARS,
        statistic="cih_channel/2",
        stimuli=(stimulus,),
        n=64,
    )
    for suffix, stimulus in (("", "repeated_random"), (".natural", "repeated_natural"))
)


@pytest.fixture(scope="module")
def evidence(screens):
    from fra.measures.channels.q04_q05_sets import channel_evidence

    return {claim.id: channel_evidence(claim, screens(claim.stimuli[0])) for claim in (RANDOM, NATURAL)}


@pytest.mark.parametrize("claim", [RANDOM, NATURAL], ids=lambda claim: claim.id)
def test_q05(claim, head, evidence, verdict):
    verdict(evidence[claim.id][head])
