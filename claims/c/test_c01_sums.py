"""C01. Through a crosscoder FRA sums to the attention scores, every term counted, the mean among them.

A crosscoder has one code for several hooks or models (slots); activations have a mean subtracted before it reads them,
which belongs to the bias term of every position. As Q01, at every slot that is the target's model at an attention
input: the sum of all terms against the model's own `hook_attn_scores`, over every unmasked entry of natural documents,
in the target's precision, and in float64 where that does not reach the bar.

H0: max |error| / sum |terms| >= 1e-6.
Control: each kind of term on each side, and the scale, left out in turn; and the mean left out of the bias term alone.
    The smallest error that this makes must exceed 1e-5, else the check could not have noticed the omission.
Bar: as of Q01: float32 keeps 6e-8 of a number.
"""

import pytest

from fra.claim import Claim
from fra.measures.identities.designs import Exactness, Rounding

CLAIM = Claim(
    id="C01",
    title="Through a crosscoder FRA sums to the attention scores",
    h0="max |softcap(sum of terms) - hook_attn_scores| / sum |terms| >= 1e-6",
    kind="identity",
    condition="error",
    bar=1e-6,
    above=False,
    bars={"error with a term left out": 1e-5, "error without the mean": 1e-5},
    statistic="crosscoder_exactness/1",
    stimuli=("natural",),
    n=3,
    min_sources=3,
    design=(Exactness(), Rounding()),
)


@pytest.fixture(scope="module")
def evidence(target, natural, progress):
    from fra.measures.identities import c01_crosscoders
    from fra.measures.identities.precision import settled

    documents = [tokens[: CLAIM.designed(Exactness).longest] for tokens in natural(CLAIM.n)]
    progress("C01: crosscoders")
    return settled(target, lambda own, layers: c01_crosscoders.evidence(CLAIM, own, documents, layers))


def test_c01(head, evidence, verdict):
    verdict(evidence.get(head))
