"""Q01. Feature-resolved attention sums to the attention scores, every term counted.

A head's score is a sum over {feature, bias, error} of the query times {feature, bias, error} of the key. The sum is
compared with the model's own `hook_attn_scores` (which fires after softcap, and so is compared with
`softcap(scores())`), over every unmasked entry of natural documents, in the target's
precision, and in float64 where that does not reach the bar: rounding refutes no identity.

H0: max |error| / sum |terms| >= 1e-6.
Control: each kind of term on each side, and the scale, left out in turn. The smallest error that this makes must exceed
    1e-5, else the check could not have noticed the omission.
Bar: float32 keeps 6e-8 of a number; a sum of some hundred terms in any order stays below 1e-6 of their absolute sum,
    and no omission does.
"""

import pytest

from fra.claim import Claim
from fra.measures.identities.designs import Exactness, Rounding

CLAIM = Claim(
    id="Q01",
    title="FRA sums to the attention scores, every term counted",
    h0="max |softcap(sum of terms) - hook_attn_scores| / sum |terms| >= 1e-6",
    kind="identity",
    condition="error",
    bar=1e-6,
    above=False,
    bars={"error with a term left out": 1e-5},
    statistic="exactness/1",
    stimuli=("natural",),
    n=3,
    min_sources=3,
    design=(Exactness(), Rounding()),
)


@pytest.fixture(scope="module")
def evidence(target, natural, progress):
    from fra.measures.identities.precision import settled
    from fra.measures.identities.q01_q18_exactness import DROPPED, errors, sums_evidence
    from fra.targets.target import has_dictionary

    longest = CLAIM.designed(Exactness).longest
    documents = [tokens[:longest] for tokens in natural(CLAIM.n)]

    def measure(target, layers):
        found = {}
        for layer in sorted(layers):
            if not has_dictionary(target, layer):
                continue
            _, sae = target.dictionary_for(layer)
            progress(f"Q01: layer {layer}")
            for head in range(target.n_heads):
                rows = [errors(target.model, sae, tokens, layer, head) for tokens in documents]
                name = f"L{layer}H{head}"
                found[name] = sums_evidence(CLAIM, name, rows, ("complete",), DROPPED, {})
        return found

    return settled(target, measure)


def test_q01(head, evidence, verdict):
    verdict(evidence.get(head))
