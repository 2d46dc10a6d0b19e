"""Q06. More heads carry expressed CIH channels than are token induction heads (TIHs).

Two tests of every head are made to err equally often. One compares the head's stripe contrast with that of scrambled
heads of its layer (key map turned by a random rotation), the other the margin by which its best channel clears the bars
of an expressed channel (effect, attention, the head's own contrast, coverage) with what the same search finds in the
same scrambles. Both thresholds are the 95 % quantile, so that either test calls 5 % of scrambled heads positive.

H0: heads that carry channels - heads that are TIHs <= 0, or the same count by the registered bars <= 0.
Control: the count with a scramble in the place of every head; p is the share of such counts that reach the excess.
Sample size: with 16 heads and 5 % false positives, an excess of two or three heads is what scrambles reach in less
than one case of twenty (the number for the target is in the detail); a target with fewer heads that are no TIHs cannot
support the claim, and comes out INCONCLUSIVE. Power: the channels that Q05 plants. Bar: more is more than none. By the
calibrated test alone a head could carry what is above scrambles and still nothing that is expressed, so the count by
the bars must agree.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="Q06",
    title="More heads carry expressed CIH channels than are TIHs",
    h0="heads with expressed channels - TIHs <= 0, both tests at 5 % of scrambled heads",
    bar=0.0,
    bars={
        "excess by the bars": 0.0,
        "effect": 0.10,
        "head contrast": 0.10,
        "attention": 0.02,
        "coverage": 0.002,
        "false positives": 0.05,
    },
    statistic="excess/1",
    stimuli=("repeated_random",),
    n=64,
)


@pytest.fixture(scope="module")
def evidence(target, screens, progress):
    from fra.measures.channels.q06_excess import excess_evidence

    return excess_evidence(CLAIM, target, screens(CLAIM.stimuli[0]), progress)


def test_q06(evidence, verdict):
    verdict(evidence)
