"""Q06. More heads carry expressed CIH channels than are token induction heads (TIHs).

Two tests of every head are made to err equally often. One compares the head's stripe contrast with that of the head
scrambled (its own key map turned by a random rotation, 20 times), the other the margin by which its best channel clears
the bars of an expressed channel (effect, attention, the head's own contrast, coverage) with what the same search finds
in the same scrambles. A head is positive where its number is above zero and above all 20, so that either test calls one
scramble of 20 positive at most; a contrast below zero is never induction.

H0: heads that carry channels - heads that are TIHs <= 0, or the same count by the bars <= 0.
Control: the count with one of its scrambles, held against the others, in the place of every head; the excess must rank
among such counts.
Sample size: with 16 heads and 5 % false positives, an excess of two or three heads is what scrambles reach in less than
one case of twenty (the number for the target is in the detail); a target with fewer heads that are no TIHs cannot
support the claim, and comes out INCONCLUSIVE.
Power: a refutation needs that the count would pass in 100 families in which every head that is neither kind has one
channel at the bars (planted in its own scores, as in Q05), with a lower bound of 0.8. One head more than none is worth
seeing. Bar: more is more than none. By the calibrated test alone a head could carry what is above scrambles and still
nothing that is expressed, so the count by the bars must agree.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.channels.designs import HeadExcess
from fra.search.designs import ChannelNulls, ChannelSearch, Plantings
from fra.stimuli.designs import RepeatedSets

CLAIM = Claim(
    id="Q06",
    title="More heads carry expressed CIH channels than are TIHs",
    h0="heads with expressed channels - TIHs <= 0, both tests at one of 20 scrambles of the head",
    condition="excess of heads",
    bar=0.0,
    bars={"excess by the bars": 0.0, "over scrambled heads": 0.95},
    worth={"excess of heads": 1.0, "excess by the bars": 1.0},
    statistic="excess/3",
    stimuli=("repeated_random",),
    n=ChannelNulls().scramble_documents,
    design=(RepeatedSets(), TokenInduction(), ChannelSearch(), ChannelNulls(), Plantings(), HeadExcess()),
)


@pytest.fixture(scope="module")
def evidence(screens, progress):
    from fra.measures.channels.q06_excess import excess_evidence

    return excess_evidence(CLAIM, screens(CLAIM.stimuli[0]), progress)


def test_q06(evidence, verdict):
    verdict(evidence)
