"""The third level of the circuit: what wrote, upstream, that a feature of the attention input fires at a position.

pre_j(s) = gain_s * <W_enc[:, j], x_s> + bias_j, and x_s is the residual stream behind the norm's frozen scale: a sum of
the embeddings and of what every head and MLP below wrote at s. Where the target has a dictionary of a lower layer's
head outputs, that layer's heads are given by its features, biases and errors.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.attribution.upstream import freeze_below, head_output_codes
from fra.dictionaries.encoder import Encoder, linear_encoder
from fra.dictionaries.hooks import LayerHooks, is_normalized
from fra.errors import FraError
from fra.explorer.gather import LayerOnText
from fra.explorer.pack import Pack

SHOWN = 8
"""Components of an entry that the page names; the others are one sum."""
_TOLERANCE = 1e-3

Written = list[tuple[str, Float[Tensor, "pos d_model"]]]


@torch.no_grad()
def shared_upstream(layer: LayerOnText, pack: Pack) -> dict[str, Any]:
    """Of every live entry of the attention input: its strongest upstream components and what the rest, and the
    encoder's constant, bring. Returns the components' names; or, under "why", one sentence on why they are not known.
    """
    try:
        names, index, value, rest, constant = entry_components(layer)
    except FraError as error:
        return {"why": str(error)}
    pack.integers("up_component", index)
    pack.numbers("up_value", value)
    pack.numbers("up_rest", rest)
    pack.numbers("up_constant", constant)
    return {"components": names}


def entry_components(
    layer: LayerOnText,
) -> tuple[
    list[str],
    Int[Tensor, "entries shown"],
    Float[Tensor, "entries shown"],
    Float[Tensor, " entries"],
    Float[Tensor, " entries"],
]:
    """Names of all components; and of every live entry, by size, the SHOWN largest, their contributions, the sum of all
    others, and the encoder's constant. The last three add up to the pre-activation.

    Raises FraError where the residual stream is not the sum of what is written to it, or the encoder is not linear.
    """
    frozen, found, model = layer.frozen, layer.codes, layer.target.model
    x = frozen.x[0]
    encoder = linear_encoder(layer.sae, x[:, None], frozen.layer)
    reads = _reads(layer, encoder)
    written, by_feature = _written(layer)
    total = torch.stack([vector for _, vector in written]).sum(0)
    truth = freeze_below(model, layer.ids, frozen.layer)[0][-1].before
    if float((total - truth).abs().max()) > _TOLERANCE * float(truth.abs().max()):
        raise FraError("what is written to the residual stream below does not add up to it in this architecture.")
    values = torch.stack([(reads * vector[found.row]).sum(-1) for _, vector in written], dim=1)
    names = [name for name, _ in written]
    parts, owners = [values], [torch.arange(len(names), device=values.device).expand(len(values), -1)]
    # Features of lower head outputs stand in place of what they are summed to, which keeps its bias and error.
    for prefix, at, vectors, ids, column in by_feature:
        widest = int(torch.bincount(at, minlength=len(x)).max()) if len(at) else 0
        own = values.new_zeros(len(values), widest)
        owner = torch.full((len(values), widest), -1, dtype=torch.long, device=values.device)
        start = torch.searchsorted(at.contiguous(), torch.arange(len(x) + 1, device=at.device))
        numbers = {feature: len(names) + n for n, feature in enumerate(sorted(set(ids.tolist())))}
        names += [f"{prefix} {feature}" for feature in numbers]
        for pos in range(len(x)):
            here, (low, high) = (found.row == pos).nonzero()[:, 0], (int(start[pos]), int(start[pos + 1]))
            if len(here) and high > low:
                own[here, : high - low] = reads[here] @ vectors[low:high].T
                owner[here, : high - low] = torch.tensor(
                    [numbers[i] for i in ids[low:high].tolist()], device=values.device
                )
        values[:, column] -= own.sum(1)
        parts.append(own)
        owners.append(owner)
    every, owner = torch.cat(parts, dim=1), torch.cat(owners, dim=1)
    chosen = every.abs().topk(min(SHOWN, every.shape[1]), dim=1).indices
    largest = every.gather(1, chosen)

    return names, owner.gather(1, chosen), largest, every.sum(1) - largest.sum(1), encoder.bias[found.feature]


def _reads(layer: LayerOnText, encoder: Encoder) -> Float[Tensor, "entries d_model"]:
    """What each live entry's pre-activation reads in the residual stream, the norm's scale and the dictionary's gain
    frozen.
    """
    frozen, found = layer.frozen, layer.codes
    reads = encoder.weight[0].T[found.feature] * encoder.gain(frozen.x[0][:, None])[found.row, None]
    if not is_normalized(frozen.hook_name):
        return reads
    below = freeze_below(layer.target.model, layer.ids, frozen.layer)[0][-1]
    centred = below.before - below.before.mean(-1, keepdim=True)
    for inputs, centre in ((centred, True), (below.before, False)):
        if torch.allclose(inputs / below.sigma[:, None], frozen.x[0], atol=_TOLERANCE * float(frozen.x.abs().max())):
            reads = reads - reads.mean(-1, keepdim=True) if centre else reads
            return reads / below.sigma[found.row, None]
    raise FraError("the norm before this layer is not the residual stream over a scale in this architecture.")


def _written(layer: LayerOnText) -> tuple[Written, list[tuple[str, Tensor, Tensor, Tensor, int]]]:
    """Everything that is written to the residual stream below, by name; and for each lower layer with a dictionary of
    head outputs: a prefix, and of every live feature there position, vector and id, by position, with the place in the
    list of the component that they are taken from.
    """
    target, number = layer.target, layer.frozen.layer
    below, pos_embed = freeze_below(target.model, layer.ids, number)
    embed = below[0].before if pos_embed is None else below[0].before - pos_embed
    written: Written = [("embed", embed)]
    if pos_embed is not None:
        written.append(("positions", pos_embed))
    by_feature = []
    for n in range(number):
        part, hook = below[n], LayerHooks(n).z
        heads = torch.einsum("shd,hdm->hsm", part.z, part.ov.W_O) * part.after
        if hook in target.dictionaries:
            found = head_output_codes(target.dictionaries[hook], part.z)
            out = part.ov.W_O.flatten(0, 1)
            vectors = (found.value[:, None] * found.decoder[found.feature]) @ out * part.after[found.row]
            by_feature.append((f"L{n} output", found.row, vectors, found.feature, len(written)))
            written.append((f"L{n} heads, bias and error", heads.sum(0)))
        else:
            written += [(f"L{n}H{head}", vector) for head, vector in enumerate(heads)]
        written.append((f"L{n} b_O", part.b_O * part.after))
        written.append((f"L{n} MLP", part.mlp))
    return written, by_feature
