"""Q13. Attribution depends on the gauge.

Other weights do the same: Q13.bias adds a vector v to a head's key bias, which adds one number to every score of a
row; Q13 adds 1 c^T to its W_K below a LayerNorm, whose output sums to zero. Both are written into the model's own
weights, of all heads of a layer at once, in float64. An identity says which numbers may not move for it: scores (or
their differences along a row), pattern and logits, the effect of removing all that the channels' query features read,
and channels as `fra` gives them, W_K centred (Q13), or feature x feature and row-centred feature x bias (Q13.bias).

H0: one of these moves by 1e-10 of its size or more. Controls: another direction of the same size in place of 1 must
    move the model's scores; channels of decoder x W_K as it stands, row-centred or not, must move (Q13), and feature x
    bias before centring (Q13.bias).
Bars: rounding of float64 is below 1e-12, and 1e-10 leaves room for sums. What must move, must move by more than 1e-6 of
    its size: that it depends on the gauge at all. By how much depends on how large a gauge one takes. It is described,
    for 1 c^T as large as W_K and v as long as the mean key, and not held against a bar.
The 50 strongest channels are chosen on one half of the documents; of what must stay the largest movement on the other
half counts, of what must move the smallest.
"""

import pytest

from fra.claim import Claim
from fra.measures.identities.designs import Gauges

DESIGN = Gauges()
MEAN = Claim(
    id="Q13",
    title="Decoder x W_K depends on a direction of W_K that the head ignores; fra's channels do not",
    h0="fra's channels move by >= 1e-10 of their size, or those of decoder x W_K by <= 1e-6",
    kind="identity",
    condition="channels as fra",
    bar=DESIGN.stays,
    above=False,
    bars={
        "model's own scores": DESIGN.stays,
        "pattern": DESIGN.stays,
        "logits": DESIGN.stays,
        "effect of removing a complete set": DESIGN.stays,
        "channels without centring": DESIGN.moves,
        "row-centred channels without centring": DESIGN.moves,
        "model's own scores, another direction": 1e-3,
    },
    below=("model's own scores", "pattern", "logits", "effect of removing a complete set"),
    statistic="gauge/4",
    stimuli=("natural",),
    n=6,
    min_sources=3,
    design=(DESIGN,),
)
BIAS = Claim(
    id="Q13.bias",
    title="A key bias moves feature x bias terms only, and row-centring removes it",
    h0="row-centred feature x bias terms move by >= 1e-10 of their size",
    kind="identity",
    condition="row-centred feature x bias",
    bar=DESIGN.stays,
    above=False,
    bars={
        "feature x feature": DESIGN.stays,
        "pattern": DESIGN.stays,
        "logits": DESIGN.stays,
        "feature x bias": DESIGN.moves,
    },
    below=("feature x feature", "pattern", "logits"),
    statistic="gauge/4",
    stimuli=("natural",),
    n=6,
    min_sources=3,
    design=(DESIGN,),
)


@pytest.fixture(scope="module")
def evidence(target, natural, progress):
    from fra.measures.identities import q13_gauges
    from fra.targets import target as target_module
    from fra.targets.target import has_dictionary

    double = target_module.in_double(target)
    found = {}
    for layer in filter(lambda layer: has_dictionary(target, layer), range(target.n_layers)):
        progress(f"Q13: layer {layer}")
        _, sae = double.dictionary_for(layer)
        documents = [tokens[: DESIGN.longest] for tokens in natural(MEAN.n)]
        moved = q13_gauges.measure(double.model, sae, documents, layer, (target.name, f"layer {layer}"), DESIGN)
        for k in range(target.n_heads):
            for claim, gauge in ((MEAN, "mean_direction"), (BIAS, "key_bias")):
                found[claim.id, f"L{layer}H{k}"] = q13_gauges.evidence(claim, gauge, moved, layer, k)
    return found


@pytest.mark.parametrize("claim", [MEAN, BIAS], ids=lambda claim: claim.id)
def test_q13(claim, head, evidence, verdict):
    verdict(evidence.get((claim.id, head)))
