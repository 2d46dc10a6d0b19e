"""Q18. On the OV side, signed feature contributions sum to the head's output.

A head's output is written as one signed term a feature (attention times code times decoder direction through W_V), one
for biases and one for the dictionary's error. Their sum is compared with the model's own `hook_z`, and, through W_O,
with what its attention module puts out when all other heads' outputs are zero, at every position and coordinate of
natural documents, in the target's precision (float64 where that misses the bar).

H0: max |error| / sum |products| >= 1e-6. Controls: the *norm-only* version, which counts every contribution by its norm
as decoder-norm attribution does, must miss the norm of the output by more than 1 % of its own sum (median position);
each kind of term left out in turn must make an error above 1e-5. Bar: as in Q01: float32 keeps 6e-8 of a number, and a
sum of some hundred products in any order stays below 1e-6 of their absolute sum. The yardstick counts products (of
every coordinate with every weight) and not terms, each of which is itself a sum of some hundred products that cancel:
rounding alone can exceed 1e-6 of the terms. The control is held against the same yardstick.
"""

import pytest

from fra.claim import Claim
from fra.measures.identities.designs import Exactness, Rounding

NORMS, DROPPED = "what norms without signs add beyond the output", "error with a term left out"
CLAIM = Claim(
    id="Q18",
    title="Signed feature contributions sum to the head's output",
    h0="max |sum of signed terms - hook_z, or the head's result| / sum |products| >= 1e-6",
    kind="identity",
    condition="error",
    bar=1e-6,
    above=False,
    bars={NORMS: 0.01, DROPPED: 1e-5},
    statistic="output_exactness/2",
    stimuli=("natural",),
    n=3,
    min_sources=3,
    design=(Exactness(), Rounding()),
)


@pytest.fixture(scope="module")
def evidence(target, natural, progress):
    from fra.measures.identities.precision import settled
    from fra.measures.identities.q01_q18_exactness import OUTPUT_DROPPED, output_errors, sums_evidence
    from fra.targets.target import has_dictionary

    longest = CLAIM.designed(Exactness).longest
    documents = [tokens[:longest] for tokens in natural(CLAIM.n)]

    def measure(target, layers):
        found = {}
        for layer in sorted(layers):
            if not has_dictionary(target, layer):
                continue
            _, sae = target.dictionary_for(layer)
            progress(f"Q18: layer {layer}")
            measured = [output_errors(target.model, sae, tokens, layer) for tokens in documents]
            for head in range(target.n_heads):
                rows = [document[head] for document in measured]
                name = f"L{layer}H{head}"
                found[name] = sums_evidence(CLAIM, name, rows, ("z", "result"), OUTPUT_DROPPED, {NORMS: "norms"})
        return found

    return settled(target, measure)


def test_q18(head, evidence, verdict):
    verdict(evidence.get(head))
