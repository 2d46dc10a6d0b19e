"""Q13. Attribution depends on the gauge.

Other weights do the same: Q13.bias adds a vector v to a head's key bias, which adds one number to every score of a
row; Q13 adds 1 c^T to its W_K below a LayerNorm, whose output sums to zero. Both are written into the model's own
weights, of all heads of a layer at once, in float64. Scores (or their differences along a row), pattern and logits must
stay, and so must the effect of removing all that the channels' query features read; asked is which attributions move.

H0: (Q13) the head's 50 strongest channels move by <= 0.10 of their size, sum |dF| / sum |F|, row-centred or not, when F
    is decoder x W_K as it stands and 1 c^T is as large as W_K. (Q13.bias) feature x bias terms move after row-centring,
    or feature x feature terms at all.
Controls: another direction of the same size in place of 1 must move the model's scores; v must move feature x bias
    before centring. Channels as `fra` gives them, W_K centred, must not move.
Bars: rounding of float64 is below 1e-12, and 1e-10 leaves room for sums; attributions that agree within a tenth would
    be quoted as the same.
Channels are chosen on one half of the documents; the interval is the range over the other half.
"""

import pytest

from fra.claim import Claim

STAYS, MOVES = 1e-10, 0.10
MEAN = Claim(
    id="Q13",
    title="Channels of decoder x W_K depend on a direction of W_K that the head ignores",
    h0="sum |dF| / sum |F| <= 0.10 for the 50 strongest channels",
    bar=MOVES,
    bars={
        "row-centred channels without centring": MOVES,
        "model's own scores": STAYS,
        "pattern": STAYS,
        "logits": STAYS,
        "channels as fra": STAYS,
        "effect of removing a complete set": STAYS,
        "model's own scores, another direction": 1e-3,
    },
    statistic="gauge/3",
    stimuli=("natural",),
    n=6,
    min_documents=3,
)
BIAS = Claim(
    id="Q13.bias",
    title="A key bias moves feature x bias terms only, and row-centring removes it",
    h0="row-centred feature x bias terms move by >= 1e-10 of their size",
    bar=STAYS,
    above=False,
    bars={
        "feature x feature": STAYS,
        "pattern": STAYS,
        "logits": STAYS,
        "feature x bias": MOVES,
    },
    statistic="gauge/3",
    stimuli=("natural",),
    n=6,
    min_documents=3,
)
CASES = (
    (MEAN, "mean_direction", "channels without centring"),
    (BIAS, "key_bias", "row-centred feature x bias"),
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
        documents = [tokens[:64] for tokens in natural(MEAN.n)]  # identities: longer ones would only take longer
        moved = q13_gauges.measure(double.model, sae, documents, layer, (target.name, f"layer {layer}"))
        for k in range(target.n_heads):
            for claim, gauge, headline in CASES:
                found[claim.id, f"L{layer}H{k}"] = q13_gauges.evidence(claim, gauge, headline, moved, layer, k)
    return found


@pytest.mark.parametrize("claim", [MEAN, BIAS], ids=lambda claim: claim.id)
def test_q13(claim, head, evidence, verdict):
    verdict(evidence.get((claim.id, head)))
