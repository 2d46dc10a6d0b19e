"""D02. Direct feature attribution by head sums to the pre-activation.

A feature of a head-output dictionary reads the concatenated outputs linearly before its activation function, so that
its pre-activation is one dot product a head, plus a constant (b_enc, less b_dec through the encoder where the
dictionary subtracts it). The sum is compared with what the dictionary itself computes: every feature, every position
of natural documents, every dictionary of head outputs, in the target's precision (or float64, see Q01).

H0: max |error| / sum |products| >= 1e-6. Control: the bias, and each head, left out in turn; the smallest error that
this makes must exceed 1e-5, else the check could not have noticed the omission. Bar: float32 keeps 6e-8 of a number;
a sum of some hundred products in any order stays below 1e-6 of their absolute sum, and no omission does.
"""

import pytest

from fra.claim import Claim
from fra.measures.identities.designs import Exactness, Rounding

CLAIM = Claim(
    id="D02",
    title="DFA by head sums exactly to the pre-activation",
    h0="max |sum over heads + bias - pre-activation| / sum |products| >= 1e-6",
    kind="identity",
    condition="error",
    bar=1e-6,
    above=False,
    bars={"error with the bias or a head left out": 1e-5},
    statistic="dfa_by_head_error/1",
    stimuli=("natural",),
    n=3,
    min_sources=3,
    design=(Exactness(), Rounding()),
)


@pytest.fixture(scope="module")
def evidence(target, natural):
    from fra.measures.identities import d02_d03_d17_exactness

    documents = [tokens[: CLAIM.designed(Exactness).longest] for tokens in natural(CLAIM.n)]
    return d02_d03_d17_exactness.evidence(CLAIM, target, documents, d02_d03_d17_exactness.head_errors)


def test_d02(evidence, verdict):
    verdict(evidence)
