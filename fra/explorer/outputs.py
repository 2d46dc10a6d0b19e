"""The output side of the page: features of a dictionary of head outputs that fire on the text, and what makes them
fire.

pre_f(t) = gain_t sum_h sum_s A_h(t,s) v[s,h] . W_enc[h,:,f] + bias_f, and v[s,h] is a sum over the features of the
attention input at s: the page carries both maps and multiplies them with the attention it shows, changed or not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fra.attribution.head_outputs import HeadOutputs, observe
from fra.attribution.raised_tokens import direct_logits
from fra.core.output import value_terms
from fra.core.reductions import TERMS
from fra.core.weights import ov_weights
from fra.dictionaries.codes import dictionary_hook, neuronpedia
from fra.dictionaries.hooks import LayerHooks
from fra.dictionaries.texts import text_of
from fra.explorer.gather import LayerOnText
from fra.explorer.pack import Pack, Precision

if TYPE_CHECKING:
    from fra.targets.target import Target

LOGITS = 6


def outputs_of(target: Target, layer: LayerOnText) -> tuple[LayerOnText, HeadOutputs | None, Any]:
    """The layer with its value maps, its head outputs and the dictionary of these; as it was, and None, where the
    target has none.
    """
    hook = LayerHooks(layer.frozen.layer).z
    if hook not in target.dictionaries:
        return layer, None, None
    sae = target.dictionaries[hook]
    seen = observe(target.model, sae, layer.ids)
    ov = ov_weights(target.model, layer.frozen.layer, layer.frozen.hook_name)
    return replace(layer, ov=ov), seen, sae


@torch.no_grad()
def about_outputs(target: Target, seen: HeadOutputs, sae: Any) -> dict[str, Any]:
    """The dictionary, its live features, and the tokens whose logits each raises and lowers most."""
    live = torch.unique(seen.live.feature)
    text = text_of(target.tokenizer)
    words: list[dict[str, list[str]]] = []
    for some in torch.split(live, 256):
        logits = direct_logits(target.model, sae, some)
        for row in logits:
            top, bottom = row.topk(LOGITS), row.topk(LOGITS, largest=False)
            words.append(
                {
                    "raises": [text(i) for i in top.indices.tolist()],
                    "lowers": [text(i) for i in bottom.indices.tolist()],
                }
            )
    return {
        "hook": dictionary_hook(sae),
        "features": live.tolist(),
        "logits": words,
        "neuronpedia": neuronpedia(sae),
    }


@torch.no_grad()
def shared_outputs(layer: LayerOnText, seen: HeadOutputs, pack: Pack) -> None:
    """Firings with their DFA by head (all heads of the layer), gains, biases, and the values' sums by kind of term."""
    assert layer.ov is not None
    at, live = seen.live, torch.unique(seen.live.feature)
    pack.integers("z_pos", at.pos)
    pack.integers("z_slot", torch.searchsorted(live, at.feature))
    pack.numbers("z_value", at.value)
    pack.numbers("z_heads", seen.entries_by_head(at))
    pack.numbers("z_gain", seen.gain[0])
    pack.numbers("z_bias", seen.encoder.bias[live])
    for term in TERMS:
        parts = [value_terms(layer.arm, layer.ov, head, (term,))[0] for head in layer.heads]
        pack.numbers(f"v_{term}", torch.stack(parts))


def outputs_of_head(seen: HeadOutputs, head: int, pack: Pack, precision: Precision) -> None:
    """W_enc of every live feature, as it reads this head."""
    live = torch.unique(seen.live.feature)
    pack.rows("E", seen.encoder.weight[head][:, live].T.contiguous(), precision)
