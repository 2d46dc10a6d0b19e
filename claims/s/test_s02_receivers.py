"""S02. A few receiver heads concentrate sentence attention.

Documents of ten sentences and more, cut by the tokenizer's offsets. The vertical score of a sentence under a head is
the mean attention that sentences at least four on pay it, by token means on both sides; BOS neither pays nor receives.
A head that concentrates has scores of large kurtosis over the sentences of a document (Fisher's: 0 of a normal
distribution; of evenly spread scores it is negative). The twentieth of all heads with the largest mean kurtosis on
half of the sources are the chosen ones; they are measured on the other half.

H0: mean kurtosis of the chosen heads <= 0; or, less the same where sentence lengths stand in another order (20 other
    cuts a document), <= 0.25: what is received is received by places, whatever is a sentence there; or, less that of
    the model's median head, <= 0.5: all heads do it alike.
Bars: 0 is the kurtosis of a distribution without favourites. A head that looks at one place has the most that there can
be under every cut, and differs between cuts by rounding: hence a bar above 0. Worth seeing: half of what one favourite
among eight sentences makes (3), a sixth of it beyond other cuts.
"""

import pytest

from fra.attribution.designs import Receivers
from fra.claim import Claim

CLAIM = Claim(
    id="S02",
    title="A few receiver heads concentrate sentence attention",
    h0="mean kurtosis of the vertical scores of heads chosen on other sources <= 0",
    condition="kurtosis",
    bar=0.0,
    bars={"over other cuts": 0.25, "over the median head": 0.5},
    worth={"kurtosis": 1.5, "over other cuts": 0.5},
    statistic="receivers/1",
    stimuli=("natural",),
    n=120,
    min_sources=40,
    design=(Receivers(),),
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.sentences.s02_receivers import measure, receivers_evidence

    return receivers_evidence(CLAIM, target, *measure(target, CLAIM, progress))


def test_s02(evidence, verdict):
    verdict(evidence)
