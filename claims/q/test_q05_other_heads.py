"""Q05. Heads that are not token induction heads have conceptual induction (CIH) channels.

A head is not a TIH where the upper bound of its attention contrast is at most 0.05. It has a CIH channel where one and
the same candidate, of the 50 that the search puts first, passes everything on confirmation documents:

H0: no candidate has E_ij > 0.10 nat, beats the best that the same search finds at any of 40 other lags, has a coupling
    above 95 % of the head's own matched pairs and above the median of the layer's other heads, beats the same search
    on scrambled heads, and is *expressed*: on the rows where its query feature is live, the head's own contrast exceeds
    0.10, the channel's own share of attention exceeds 0.02, and such rows are more than 0.2 % of all.
Asked are the candidates that reach a quarter of the bars of effect, attention and contrast on discovery documents of
    other sources: only these are tested together. A head that has none may be refuted as any other: all 50 are short.
Controls: deranged documents, other lags; the head's own scrambles, drawn one after another while it can still pass, as
    many as Holm over the heads takes; layer-0 heads, which cannot know a key's predecessor, stand beside. Other lags,
    couplings and coverage are no draws: numbers that can deny.
Power: a refutation needs that of this very decision. 100 channels are planted in the head's own scores, each a random
    eligible pair that is live in 30 % of the documents, raised to the smallest coupling that meets every bar, and each
    must go through all of it: rank among the 50, stand on discovery documents, have effect, contrast and attention told
    from zero at the level of the decision, beat the other lags, and exceed as many scrambles of the head as its rank
    takes (`fra.search.power.count_found` says it exactly). The lower bound of the share found must reach 0.8; once it
    cannot, no more are planted.
Bar: every head has positive pairs that others cancel, so that an effect alone ("latent") is not yet a channel; 0.02 of
    attention is what a fifth of a weak induction head would give.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.search.designs import ChannelNulls, ChannelSearch, Plantings
from fra.stimuli.designs import RepeatedSets

BARS = {
    "head contrast": 0.10,
    "attention": 0.02,
    "coverage": 0.002,
    "coupling among matched pairs": 0.95,
    "coupling over other heads": 0.0,
    "over other lags": 0.0,
    "over scrambled heads": 0.95,
}
RANDOM, NATURAL = (
    Claim(
        id=f"Q05{suffix}",
        title=f"Heads that are not TIHs have CIH channels ({stimulus.replace('_', ' ')})",
        h0="no candidate has E_ij > 0.10 nat with every other condition",
        bar=0.10,
        bars=BARS,
        statistic="cih_channel/4",
        stimuli=(stimulus,),
        n=RepeatedSets().made_confirmation if stimulus == "repeated_random" else RepeatedSets().confirmation,
        design=(RepeatedSets(), TokenInduction(), ChannelSearch(), ChannelNulls(), Plantings()),
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
