"""Q19. No logit depends on later tokens, whatever is done to a head.

Two documents are run under every intervention of `fra.interventions` (channels removed, scaled, kept, taken from a
clean pass; blocks and features scaled; features taken out of the output; zero and mean ablation; patched output and
pattern; frozen scales), then again with all tokens from position 12 on exchanged. Logits before it must be equal to
the last bit.

H0: at least one logit at an earlier position differs, in any bit, under some intervention. Control: an *unmasked* patch
(the head's scores overwritten above the diagonal, too) must change earlier logits, or the comparison could not see a
leak; and every intervention must change something, or it was not tried. Bar: none; counts are held against one half.
"""

import pytest

from fra.claim import Claim, Evidence
from fra.measures.identities.designs import Cut

CONTROL, INERT = "earlier logits changed by an unmasked patch", "interventions without any effect"
CLAIM = Claim(
    id="Q19",
    title="Earlier logits never depend on later tokens under any intervention",
    h0="#{earlier logits that differ in any bit, over all interventions} >= 1",
    kind="identity",
    condition="earlier logits changed",
    bar=0.5,
    above=False,
    bars={CONTROL: 0.5, INERT: 0.5},
    below=(INERT,),
    statistic="leaks/1",
    stimuli=("natural",),
    n=2,
    min_sources=2,
    design=(Cut(),),
)


@pytest.fixture(scope="module")
def evidence(target, natural, progress):
    from fra.errors import CannotLoad
    from fra.measures.identities import q19_leaks
    from fra.targets.target import has_dictionary

    design = CLAIM.designed(Cut)
    text = q19_leaks.texts([document[: design.length] for document in natural(3 * CLAIM.n)], design.cut)
    found = {}
    for layer in range(target.n_layers):
        if not has_dictionary(target, layer):
            continue
        progress(f"Q19: layer {layer}")
        _, sae = target.dictionary_for(layer)
        heads = list(range(target.n_heads))
        try:
            measured = q19_leaks.leaks(target.model, sae, text, layer, heads, design)
        except CannotLoad as lacking:
            names = [f"L{layer}H{head}" for head in heads]
            found |= {name: Evidence(claim=CLAIM, head=name, cannot=str(lacking)) for name in names}
            continue
        for head, seen in measured.items():
            found[f"L{layer}H{head}"] = q19_leaks.evidence(CLAIM, f"L{layer}H{head}", seen)
    return found


def test_q19(head, evidence, verdict):
    verdict(evidence.get(head))
