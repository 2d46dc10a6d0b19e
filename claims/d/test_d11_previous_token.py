"""D11. A previous-token head upstream is necessary for the induction family.

100 prompts "... A B ... A" of random tokens, a family feature ("B is next") for each, and the same with another token
for the first A. Metric: the feature's pre-activation at the last position. Every head upstream is patched alone at
the prompt's *own* first B, both ways: the corrupted output into the clean prompt (noising) and back (denoising).

The head tested is the one with the highest previous-token score on other documents: effects do not choose it. H0:
noising it takes at most half of what the match makes (clean less corrupted pre-activation; tested as the linear form
effect - half of it > 0, and said as a share); the same for denoising. Controls, in the same unit: every other head
upstream, of which the one that does most on 40 other prompts must do less; all attention outputs upstream against all
MLP outputs upstream at that position, noised. Bar: "necessary" is most of it; denoising asks that it is also most of
what is missing. An MLP at that position reads what the attention wrote there, so that noising it takes part of the same
path; denoising, beside it, does not. Worth: what the bar itself is worth over other heads, a tenth of what the match
makes for attention over MLP. A family of fewer than 10 features is not asked.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.families.designs import FamilySelection, UpstreamPrompts
from fra.stimuli.designs import PlantedTokens, RepeatedSets

CLAIM = Claim(
    id="D11",
    title="A previous-token head upstream is necessary for induction features",
    h0="noising the previous-token head takes <= half of the pre-activation that the match makes",
    condition="noising",
    bar=0.5,
    bars={
        "denoising": 0.5,
        "over other heads": 0.0,
        "attention over MLP": 0.0,
    },
    gates={"features": 10},
    worth={"over other heads": 0.5, "attention over MLP": 0.1},
    statistic="upstream_patching/2",
    stimuli=("repeated_random",),
    n=100,
    design=(TokenInduction(), RepeatedSets(), FamilySelection(), PlantedTokens(), UpstreamPrompts()),
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d11_patching import upstream_evidence

    return upstream_evidence(CLAIM, families)


def test_d11(head, evidence, verdict):
    verdict(evidence.get(head))
