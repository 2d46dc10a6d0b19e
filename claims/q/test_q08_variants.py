"""Q08. CIH channels survive other surface forms.

`variant_repeat` is BOS + R + V(R): R holds words that the tokenizer has as two or more single tokens which differ in
case or a leading space alone, and the second copy holds another form of each. No token of the second copy stands in the
first, which is checked: token matching has nothing to match. Channels are found on plain repeats of such words and
measured, on other documents, on four second copies of one first copy: the same tokens, the variants, neighbours of
equal embedding cosine (within 0.05) that are no variants, and unrelated words.

H0: the 50 channels of a TIH removed together are worth <= 0.5 nat a row on variants; or the head's own contrast there
    is <= 0.10; or they are worth no more than on neighbours of equal cosine, or than on an unrelated copy.
Controls: neighbours (a head that follows embedding similarity would do as well on them), unrelated copy, deranged first
copy inside every difference. Neighbours and unrelated words are drawn anew for each document, a source of its own, so
that the scatter of 120 draws of either control is in the interval of the paired difference. With effect and contrast
alone the channels would be called surface-robust.
Bar: that of Q04, half a nat, which moves an attention of 0.5 to 0.38; and the contrast of an expressed channel. Worth
seeing beyond either control is what is worth seeing at all, half a nat.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.channels.transfer_designs import ChannelSet, VariantRepeat
from fra.stimuli.designs import RepeatedSets

CLAIM = Claim(
    id="Q08",
    title="CIH channels survive other surface forms",
    h0="E(the 50 channels removed together) on surface variants <= 0.5 nat a row",
    condition="effect on variants",
    bar=0.5,
    bars={"head contrast": 0.10, "over equal-cosine neighbours": 0.0, "over an unrelated copy": 0.0},
    worth={"over equal-cosine neighbours": 0.5, "over an unrelated copy": 0.5},
    statistic="variants/2",
    stimuli=("variant_repeat",),
    n=120,
    design=(VariantRepeat(), ChannelSet(), TokenInduction(), RepeatedSets()),
)


@pytest.fixture(scope="module")
def evidence(target, screens, progress):
    from fra.measures.channels.q08_q16_transfer import variant_evidence, variants

    screened = screens("repeated_random")
    return variant_evidence(CLAIM, screened, *variants(target, screened, CLAIM, progress))


def test_q08(head, evidence, verdict):
    verdict(evidence[head])
