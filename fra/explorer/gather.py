"""What the page carries of one layer on one text: the live features' maps, projected once, and all that turns them into
scores. The same quantities as `fra.core.resolve`, in the form in which they are smallest: a feature's query and key
vector before norm, gain and rotation (one a feature and head), the entries' coefficients, the angles.

    entry (t, i) of the query side:  a_i(t) / sigma_t * gain_q[h, t] * R_t(U[h, i]),   U = scale * d_i W_Q
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.face import set_aside
from fra.core.coded import Arm
from fra.core.frozen import FrozenLayer, freeze
from fra.core.reductions import TERMS
from fra.core.resolve import ResolvedHead
from fra.core.weights import OVWeights
from fra.dictionaries.codes import Codes, codes, dictionary_hook, neuronpedia
from fra.dictionaries.texts import text_of
from fra.explorer.pack import Pack, Precision

if TYPE_CHECKING:
    from fra.targets.target import Target


@dataclass(frozen=True)
class LayerOnText:
    """One layer on one text, frozen, with its codes: what everything on the page is made of."""

    target: Target
    sae: Any
    ids: Int[Tensor, " pos"]
    frozen: FrozenLayer
    codes: Codes
    heads: Sequence[int]
    """Heads on the page."""
    ov: OVWeights | None = None
    """Value maps, where the target has a dictionary of these head outputs."""

    @property
    def live(self) -> Int[Tensor, " live"]:
        """Ids of the features that are live anywhere, ascending."""
        found: Tensor = torch.unique(self.codes.feature)
        return found

    @property
    def arm(self) -> Arm:
        """The layer as what fra.core.output reads."""
        return Arm(self.frozen, self.codes)


@torch.no_grad()
def measure(target: Target, ids: Int[Tensor, " pos"], layer: int, heads: Sequence[int]) -> LayerOnText:
    """Runs the text through model and dictionary. Raises FraError as `fra.resolve` does."""
    hook, sae = target.dictionary_for(layer)
    with set_aside():
        frozen = freeze(target.model, ids[None], layer, hook)
        return LayerOnText(target, sae, ids, frozen, codes(sae, frozen.x), heads)


def _punctuation(token: str) -> bool:
    stripped = token.strip()
    return not any(letter.isalnum() for letter in stripped)


def about(layer: LayerOnText, text: str) -> dict[str, Any]:
    """What the page says in words and small numbers: target, tokens, heads, dictionary."""
    target, frozen = layer.target, layer.frozen
    shown = text_of(target.tokenizer)
    tokens = [shown(token) for token in layer.ids.tolist()]
    rotary = frozen.rotary
    special = {int(i) for i in target.tokenizer.all_special_ids}
    return {
        "target": target.name,
        "hook": dictionary_hook(layer.sae),
        "layer": frozen.layer,
        "heads": list(layer.heads),
        "n_heads": frozen.n_heads,
        "text": text,
        "tokens": tokens,
        "punctuation": [_punctuation(token) for token in tokens],
        "bos": [token in special for token in layer.ids.tolist()],
        "window": int(frozen.mask.sum(1).max()),
        "softcap": frozen.softcap,
        "rotary": None if rotary is None else {"rot": rotary.cos.shape[-1], "adjacent": rotary.adjacent},
        "d_sae": len(layer.codes.decoder),
        "features": layer.live.tolist(),
        "neuronpedia": neuronpedia(layer.sae),
    }


def shared(layer: LayerOnText, pack: Pack) -> None:
    """What all heads need: entries, angles, and by head the gains and each position's sums by kind of term."""
    frozen, found = layer.frozen, layer.codes
    pos = frozen.x.shape[1]
    first = torch.searchsorted(found.row.contiguous(), torch.arange(pos + 1, device=found.row.device))
    pack.integers("first", first)
    pack.integers("slot", torch.searchsorted(layer.live, found.feature))
    pack.numbers("value", found.value)
    pack.numbers("sigma", frozen.sigma[0])
    heads = list(layer.heads)
    pack.numbers("gain_q", frozen.gain_q[0, heads])
    pack.numbers("gain_k", frozen.gain_k[0, heads])
    if frozen.rotary is not None:
        pack.numbers("cos", frozen.rotary.cos[:pos])
        pack.numbers("sin", frozen.rotary.sin[:pos])
    sides = [(resolved.query, resolved.key) for resolved in (ResolvedHead(frozen, found, head) for head in heads)]
    for number, side in enumerate(("q", "k")):
        for term in TERMS:
            pack.numbers(f"{side}_{term}", torch.stack([both[number].sum(term) for both in sides]))


def sharers(layer: LayerOnText) -> list[int]:
    """Of each head on the page: the first head with its key map (and, where outputs are shown, value map). Grouped keys
    travel once.
    """
    maps = [layer.frozen.W_k] if layer.ov is None else [layer.frozen.W_k, layer.ov.W_V]
    return [
        next(first for first in layer.heads if all(torch.equal(both[first], both[head]) for both in maps))
        for head in layer.heads
    ]


def of_head(layer: LayerOnText, head: int, pack: Pack, precision: Precision) -> None:
    """A head's query map of every live feature, the score's scale included: U."""
    _mapped(layer, "U", layer.frozen.scale * layer.frozen.W_q[head], pack, precision)


def of_keys(layer: LayerOnText, head: int, pack: Pack, precision: Precision) -> None:
    """Its key map, V; through W_V, O, where outputs are shown."""
    _mapped(layer, "V", layer.frozen.W_k[head], pack, precision)
    if layer.ov is not None:
        _mapped(layer, "O", layer.ov.W_V[head], pack, precision)


def _mapped(
    layer: LayerOnText, name: str, W: Float[Tensor, "d_model d_head"], pack: Pack, precision: Precision
) -> None:
    wide = layer.frozen.x.dtype if layer.frozen.x.device.type == "mps" else torch.float64
    pack.rows(name, layer.codes.decoder[layer.live].to(wide) @ W.to(wide), precision)
