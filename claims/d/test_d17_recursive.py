"""D17. Recursive attribution is exact under frozen attention and LayerNorm.

With patterns and normalisation scales held, everything between the embeddings and a head-output feature is linear but
the MLPs, which are terms of their own. Sixteen firings a document are traced three ways: down to embeddings, MLPs,
b_V and b_O; to features, bias and error of the head-output dictionaries below; to those of each attention input. The
sum of the terms is compared with what the dictionary itself computes, in the target's precision (or
float64, see Q01).

H0: max |error| / sum |terms| >= 1e-5. Control: each kind of term left out in turn; the smallest error that this makes
must exceed 1e-4. Bar: ten times that of D02, because a term is itself a product through several layers, rounded at
each.
"""

from functools import partial

import pytest

from fra.claim import Claim
from fra.measures.identities.designs import Recursion, Rounding

CLAIM = Claim(
    id="D17",
    title="Recursive DFA is exact under frozen attention and LayerNorm",
    h0="max |sum of terms - pre-activation| / sum |terms| >= 1e-5",
    kind="identity",
    condition="error",
    bar=1e-5,
    above=False,
    bars={"error with a kind of term left out": 1e-4},
    statistic="recursive_dfa_error/1",
    stimuli=("natural",),
    n=3,
    min_sources=3,
    design=(Recursion(), Rounding()),
)


@pytest.fixture(scope="module")
def evidence(target, natural):
    from fra.measures.identities import d02_d03_d17_exactness

    design = CLAIM.designed(Recursion)
    documents = [tokens[: design.longest] for tokens in natural(CLAIM.n)]
    errors = partial(d02_d03_d17_exactness.recursive_errors, design=design)
    return d02_d03_d17_exactness.evidence(CLAIM, target, documents, errors)


def test_d17(evidence, verdict):
    verdict(evidence)
