"""Q04. Every token induction head (TIH) has conceptual induction (CIH) channels.

A TIH is a head whose attention contrast (repeated against deranged first copy) has a lower bound of at least 0.20 on
documents of their own. Its CIH set is the 50 channels (pairs of SAE features) that an exhaustive search over live pairs
puts first on discovery documents. Removed together on other documents, they must lower the log-odds of the induction
key:

H0: E_set <= 0.5 nat, or the set carries <= 10 % of the head's contrast, or no more than random atoms or scrambles.
Controls: deranged documents inside every difference. Scrambles: the head itself with its key map turned by a random
    rotation, the whole search repeated; drawn one after another for each head by itself, while it can still pass and
    as many as Holm over the heads takes (heads are not exchangeable: none is held against another's scrambles). Random
    atoms: 20 dictionaries of random directions of equal number and L0, each with its own search, beside the own
    dictionary on the same documents; the own effect must exceed the largest of them, a number that can deny.
Gate: the feature-feature block must carry half of the stripe contrast on this very stimulus; where bias and error
    carry it, features cannot answer for the head, and the verdict is INCONCLUSIVE.
Bar: one pair carries about a per cent of an edge at L0 32, so that 50 pairs that the head reads should carry a
    good part of it; half a nat moves an attention of 0.5 to 0.38.

"Every" is judged head by head; n TIHs of n show, at 95 %, a share above 0.05^(1/n): 0.37 for three, 0.90 for 29.

Each stimulus family is a claim of its own; there is no switching between them.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.search.designs import ChannelNulls, ChannelSearch
from fra.stimuli.designs import RepeatedSets

RANDOM, NATURAL = (
    Claim(
        id=f"Q04{suffix}",
        title=f"Every TIH has CIH channels ({stimulus.replace('_', ' ')})",
        h0="E(the 50 discovery channels removed together) <= 0.5 nat",
        condition="set effect",
        bar=0.5,
        bars={"share of contrast": 0.10, "over random atoms": 0.0, "over scrambled heads": 0.95},
        gates={"feature-feature share": 0.5},
        statistic="cih_set/2",
        stimuli=(stimulus,),
        n=RepeatedSets().sets,
        design=(RepeatedSets(), TokenInduction(), ChannelSearch(), ChannelNulls()),
    )
    for suffix, stimulus in (("", "repeated_random"), (".natural", "repeated_natural"))
)


@pytest.fixture(scope="module")
def evidence(screens):
    from fra.measures.channels.q04_q05_sets import set_evidence

    return {claim.id: set_evidence(claim, screens(claim.stimuli[0])) for claim in (RANDOM, NATURAL)}


@pytest.mark.parametrize("claim", [RANDOM, NATURAL], ids=lambda claim: claim.id)
def test_q04(claim, head, evidence, verdict):
    verdict(evidence[claim.id][head])
