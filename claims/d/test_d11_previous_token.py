"""D11. A previous-token head upstream is necessary for the induction family.

100 prompts "... A B ... A" of random tokens, a family feature ("B is next") for each, and the same with another token
for the first A. Metric: the feature's pre-activation at the last position. Every head upstream is patched alone at
the prompt's *own* first B, both ways: the corrupted output into the clean prompt (noising) and back (denoising).

The head tested is the one with the highest previous-token score on other documents: effects do not choose it. H0:
noising it takes at most half of what the match makes (clean less corrupted; tested as the linear form effect - half
of it > 0, in units of the pre-activation); the same for denoising. Controls: every other head upstream, of which the
strongest must do less; all attention outputs upstream against all MLP outputs upstream at that position, noised. Bar:
"necessary" is most of it; denoising asks that it is also most of what is missing. An MLP at that position reads what
the attention wrote there, so that noising it takes part of the same path; denoising, beside it, does not.
"""

import pytest

from fra.claim import Claim

CLAIM = Claim(
    id="D11",
    title="A previous-token head upstream is necessary for induction features",
    h0="noising the previous-token head takes <= half of the pre-activation that the match makes",
    bar=0.0,
    bars={
        "denoising, beyond half": 0.0,
        "over other heads": 0.0,
        "attention over MLP": 0.0,
    },
    statistic="upstream_patching/1",
    stimuli=("repeated_random",),
    n=100,
)


@pytest.fixture(scope="module")
def evidence(families):
    from fra.measures.families.d11_patching import upstream_evidence

    return upstream_evidence(CLAIM, families)


def test_d11(head, evidence, verdict):
    verdict(evidence.get(head))
