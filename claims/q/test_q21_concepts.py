"""Q21. Conceptual induction proper, on natural text that repeats no token.

A row t counts where its token stands nowhere before in the document: token induction has nothing to go by. For a
channel (i, j) with i live at t, the keys s = u + 1 are those after a position u with i live and, by the choice of rows,
another token. They are compared with keys s' of rows where i is live too, that hold the same token, at the same lag (by
octaves) and at the same position (in runs of four), and stand after a position where i is *not* live. The effect is the
loss of log-odds of the key when the channel is removed at every key of its row, stripe keys less matched keys: what the
head reads from "what stood before s was like this", beyond the token at s, its distance and its position.

H0: no channel has an effect > 0.10 nat while the head's own log-odds differ by > 0.10 nat in the same way (a channel
    that others cancel is no more than latent), above what the same search finds at any of 20 other lags (i live at
    s - k), with any of 20 dictionaries of random atoms for features, in any layer-0 head, and on scrambles of the head.
Controls: matched keys inside every difference; other lags, random atoms and layer-0 heads, whose keys cannot know what
stands before them: numbers that can deny and never refute; scrambles of the very head, one after another (up to 999),
each with its own search. The search (20 candidates a head) is on registers of several documents, the measurement on 200
texts of other sources. Power: channels planted at twice the bars, each through every condition; a refutation needs that
80 % of them are found. Bar: that of a CIH channel, 0.10 nat.
"""

import pytest

from fra.claim import Claim
from fra.measures.concepts.designs import Concepts, ConceptTexts

CLAIM = Claim(
    id="Q21",
    title="Heads have channels of conceptual induction on text that repeats no token",
    h0="dL of every channel on keys that follow i, less keys matched in token, lag, position that do not, <= 0.10 nat",
    bar=0.10,
    bars={
        "head contrast": 0.10,
        "over layer-0 heads": 0.0,
        "over other lags": 0.0,
        "over random atoms": 0.0,
        "over scrambled heads": 0.95,
    },
    statistic="concepts/5",
    stimuli=("natural",),
    n=200,
    min_sources=60,
    design=(ConceptTexts(), Concepts()),
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.concepts.q21_concepts import concept_evidence

    return concept_evidence(CLAIM, target, progress)


def test_q21(head, evidence, verdict):
    verdict(evidence[head])
