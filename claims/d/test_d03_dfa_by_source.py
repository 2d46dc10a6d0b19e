"""D03. Direct feature attribution by source position sums to the pre-activation.

A head's output is its pattern times its values, so that what it brings to a feature is a sum over source positions,
A(t,s) v[s] . W_enc. Values are the model's own (b_V, the norm's bias, key-value heads repeated over their groups).
Summed over heads and sources, with the bias, it is compared with what the dictionary itself computes, at every firing
on natural documents, in the target's precision (float64 where that misses the bar).

H0: max |error| / sum |products| >= 1e-6. Control: rows of the pattern mixed up, the bias left out, b_V left out, and
under grouped queries another group's values; where a model has no b_V, or no groups, that control has nothing to
leave out and is none. The smallest error that these make must exceed 1e-5. Bar: as for D02.
"""

import pytest

from fra.claim import Claim
from fra.measures.identities.designs import Exactness, Rounding

CLAIM = Claim(
    id="D03",
    title="DFA by source position sums exactly to the pre-activation",
    h0="max |sum over sources + bias - pre-activation| / sum |products| >= 1e-6",
    kind="identity",
    condition="error",
    bar=1e-6,
    above=False,
    bars={"error with rows mixed up, or a bias left out": 1e-5},
    statistic="dfa_by_source_error/1",
    stimuli=("natural",),
    n=3,
    min_sources=3,
    design=(Exactness(), Rounding()),
)


@pytest.fixture(scope="module")
def evidence(target, natural):
    from fra.measures.identities import d02_d03_d17_exactness

    documents = [tokens[: CLAIM.designed(Exactness).longest] for tokens in natural(CLAIM.n)]
    return d02_d03_d17_exactness.evidence(CLAIM, target, documents, d02_d03_d17_exactness.source_errors)


def test_d03(evidence, verdict):
    verdict(evidence)
