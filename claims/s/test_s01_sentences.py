"""S01. Sentence-level sensitivity Phi is what it is defined to be.

Phi[a,b,i,j] (`fra.sentences`) is the derivative of a head's attention from sentence a to sentence b in the gain of
channel (i,j). Documents are cut into BOS, a prompt (their first sentence) and sentences, by the tokenizer's offsets.
The finite difference is taken in the model's own pattern: its own attention scores are changed by steps of 0.05 nat up
and down along a random mixture of the head's 20 strongest channels (four points), in float64.

H0: max |Phi - finite difference| / max |Phi| >= 1e-4, or, at 1e-10: sum_b Phi = 0, Phi adds when sentences are joined
    (over b; averages by length over a); or, at 1e-6: with one token a sentence it is A (D F - sum_u A D F) of the
    model's own pattern.
Control: the same without the row's mean sum_u A D F must miss the finite difference by more than 1e-2.
Bars: the error of the difference is of the order of the step's fourth power over thirty, 2e-7; some architectures
    compute softmax in single precision whatever the model's, which makes it 2e-5; identities hold to rounding.
"""

import pytest

from fra.claim import Claim
from fra.measures.identities.designs import Sentences

CLAIM = Claim(
    id="S01",
    title="Phi is conserved, equals the finite difference, splits and merges",
    h0="max |Phi - finite difference| / max |Phi| >= 1e-4",
    kind="identity",
    condition="finite difference",
    bar=1e-4,
    above=False,
    bars={
        "conservation": 1e-10,
        "splits and merges": 1e-10,
        "token sensitivities": 1e-6,
        "without the row's mean": 1e-2,
    },
    below=("conservation", "splits and merges", "token sensitivities"),
    statistic="sentences/3",
    stimuli=("natural",),
    n=3,
    min_sources=3,
    design=(Sentences(),),
)


@pytest.fixture(scope="module")
def evidence(target, progress):
    from fra.core.sentences import segments, sentence_starts
    from fra.measures.identities import s01_sentences
    from fra.stimuli.sources import spread
    from fra.targets.target import has_dictionary, in_double

    double, design = in_double(target), CLAIM.designed(Sentences)
    every, longest = target.documents(), min(design.longest, int(target.model.cfg.n_ctx))
    cut = []
    for text in (every[k].text for k in spread([document.source for document in every], CLAIM.n)):
        second = [*sentence_starts(text), 0][1]
        made = segments(target.tokenizer, text[second:], prompt=text[:second], bos=target.bos)
        cut.append((made.tokens[:longest], made.segment[:longest]))
    found = {}
    for layer in filter(lambda layer: has_dictionary(target, layer), range(target.n_layers)):
        progress(f"S01: layer {layer}")
        _, sae = double.dictionary_for(layer)
        seed = (target.name, f"layer {layer}")
        errors = [
            s01_sentences.identities(double.model, sae, tokens, segment, layer, seed, design) for tokens, segment in cut
        ]
        for k in range(target.n_heads):
            name = f"L{layer}H{k}"
            found[name] = s01_sentences.evidence(CLAIM, name, [document[k] for document in errors])
    return found


def test_s01(head, evidence, verdict):
    verdict(evidence.get(head))
