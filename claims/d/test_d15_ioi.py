"""D15. IOI: few features at S2 are causal, and the signal they carry rides on " and".

Prompts "Then, Mary and John went to the house. John gave a ring to" in both orders, names that are single tokens; the
logit of the indirect object less that of the subject. On 40 prompts: the head-output dictionary whose features matter
most at S2, and its three features whose zero ablation there (each prompt's own S2, the dictionary's error kept) costs
most. On 80 others:

H0: taking these three out costs at most half of what taking out every feature at S2 costs (every one that is live there
on the measured prompts). Control: three others live at S2, matched in activation, must cost less. Template edits:
" alongside" for " and" must cost more than half of what the ablation costs (recovery = 1 - cost of the edit / cost of
the ablation, against that baseline), and more than " or" and " but" do. Bar: "few" is three that carry most of it. All
is said as a share of what the ablation costs; where the bar is zero, half of that must be seen before it may refute. A
target whose names are several tokens CANNOT RUN; one that does not prefer the indirect object (by two standard errors)
has no IOI to show (INCONCLUSIVE).
"""

import pytest

from fra.claim import Claim
from fra.measures.head_outputs.designs import IndirectObjects

ZERO = ("over matched features", "' alongside' over ' or'", "' alongside' over ' but'")
CLAIM = Claim(
    id="D15",
    title='IOI: few causal features at S2, whose signal rides on " and"',
    h0="the fall of the logit difference by three features at S2 <= half of that by all of them",
    condition="few features, as a share of all",
    bar=0.5,
    bars=dict.fromkeys(ZERO, 0.0) | {"' alongside', as a share of the ablation": 0.5},
    worth=dict.fromkeys(ZERO, 0.5),
    gates={"logit difference over its standard error": 2.0},
    statistic="ioi_features/3",
    stimuli=("structured",),
    n=80,
    design=(IndirectObjects(),),
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.measures.head_outputs.d15_ioi import ioi_evidence

    return ioi_evidence(CLAIM, target, progress)


def test_d15(evidence, verdict):
    verdict(evidence)
