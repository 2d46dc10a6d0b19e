"""Patching that claims about head outputs need: features out of hook_z, changes led down one path, activations moved.

Whole heads are put out or replaced by `fra.interventions` (`zero_ablate`, `mean_ablate`, `set_output`); what is here
adds features of a head-output dictionary, paths, and activation patching between two versions of a prompt. `rows` is a
mask [batch, pos] wherever prompts differ: `own_positions` makes one from a position for each prompt, so that nothing is
changed at another prompt's place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.architectures.architecture import Model
from fra.architectures.face import face
from fra.architectures.known import architecture_of, check_layer_and_head, check_tokens
from fra.architectures.losses import losses
from fra.core.frozen import read_hooks
from fra.dictionaries.codes import check_kind, check_scaling, dictionary_hook, gain_and_offset
from fra.dictionaries.encoder import encode, head_output_layer
from fra.dictionaries.hooks import LayerHooks, layer_of
from fra.errors import FraError
from fra.interventions.arguments import Positions, chosen_positions
from fra.interventions.attach import Intervention, fitting, unhooked

__all__ = [
    "ablate_features",
    "effective_decoder",
    "feature_outputs",
    "into_final",
    "into_mlp",
    "losses",
    "losses_under",
    "own_positions",
    "patch_activation",
    "readout",
    "splice",
]

Features = Int[Tensor, " n"] | Int[Tensor, "batch n"] | Sequence[int]


def own_positions(positions: Sequence[int] | Int[Tensor, " batch"], pos: int) -> Bool[Tensor, "batch pos"]:
    """A mask with one position for each prompt: prompt b at positions[b], and nowhere else.

    Raises FraError for a position outside 0..pos-1.
    """
    at = torch.as_tensor(positions)
    if at.ndim != 1 or at.is_floating_point() or bool(((at < 0) | (at >= pos)).any()):
        raise FraError(f"positions are one integer in 0 to {pos - 1} for each prompt.")
    mask = torch.zeros(len(at), pos, dtype=torch.bool, device=at.device)
    mask[torch.arange(len(at), device=at.device), at.long()] = True
    return mask


def feature_outputs(
    dictionary: Any, z: Float[Tensor, "batch pos d_in"], features: Int[Tensor, "#batch n"]
) -> Float[Tensor, "batch pos d_in"]:
    """What these features (of all prompts alike, or of each prompt) put into the dictionary's reconstruction of z.

    That is sum_f gain_t a_f(t) d_f, with the activation and effective decoder row of each; bias and error are no part.
    """
    decoder = effective_decoder(dictionary)
    batch, pos, width = z.shape
    heads = z.detach().reshape(batch * pos, 1, width).to(decoder)
    acts = encode(dictionary, heads)
    gain, _ = gain_and_offset(dictionary, heads[:, 0])
    ids = features.to(decoder.device)
    if len(ids) == 1:
        total = acts[:, ids[0]] @ decoder[ids[0]]
    else:
        own = acts.view(batch, pos, -1).gather(2, ids[:, None].expand(batch, pos, -1))
        total = (own @ decoder[ids]).flatten(0, 1)
    return (gain * total).view_as(z).to(z)


def effective_decoder(dictionary: Any) -> Float[Tensor, "d_sae d_in"]:
    """The direction that a feature's activation multiplies: unit rows where the dictionary rescales by their norm."""
    decoder: Tensor = dictionary.W_dec.detach()
    if getattr(dictionary.cfg, "rescale_acts_by_decoder_norm", False):
        decoder = decoder / decoder.norm(dim=-1, keepdim=True)
    return decoder


@face
def ablate_features(
    model: Model, features: Features, dictionary: Any, *, factor: float = 0.0, rows: Positions = None
) -> Intervention:
    """Multiplies what features put into their hook by `factor` (0 takes them out).

    Only their own share moves: the other features, the bias and the dictionary's error stay as they are, so that the
    model never runs on a reconstruction. Activations are those of the pass that is changed.

    features: ids [n] for all prompts, or [batch, n], each prompt its own. dictionary: one at `blocks.L.attn.hook_z`
    or `blocks.L.hook_attn_out`.
    rows: where; a mask [batch, pos] for prompts that differ. Raises FraError for ids that the dictionary does not have
    or that are named twice, for another kind of dictionary, and in the pass where shapes do not fit.
    """
    check_kind(dictionary)
    check_scaling(dictionary)
    head_output_layer(dictionary)
    hook = dictionary_hook(dictionary)
    ids = torch.as_tensor(features)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise FraError("features are integer ids: give [n] for all prompts, or [batch, n], each prompt its own.")
    if bool(((ids < 0) | (ids >= dictionary.cfg.d_sae)).any()):
        raise FraError(f"a feature is out of range: the dictionary has {dictionary.cfg.d_sae} features.")
    if bool((ids.sort(dim=1).values.diff(dim=1) == 0).any()):
        raise FraError("a feature is named twice for one prompt: it can be taken out once.")

    def edit(z: Tensor, hook: Any) -> Tensor:
        own = z.flatten(2)
        if len(ids) not in (1, len(own)):
            raise FraError(f"features are given for {len(ids)} prompts, and this pass has {len(own)}.")
        chosen = chosen_positions("rows", rows, len(own), own.shape[1], own.device)[..., None]
        with torch.no_grad():
            share = feature_outputs(dictionary, own, ids.long())
        return torch.where(chosen, own - (1 - factor) * share, own).view_as(z)

    return Intervention(model, [], [(hook, edit)])


@face
def into_mlp(model: Model, change: Intervention, tokens: Int[Tensor, "batch pos"], *, layer: int) -> Intervention:
    """What `change`, made in attention layer `layer`, does through the MLP of that layer alone.

    The MLP's output is the one that it has under the change, and everything else that reads the attention's output sees
    the clean one; what the MLP wrote goes on freely. Where attention and MLP stand in parallel this changes nothing.
    Raises FraError for a layer without an MLP; run the model on `tokens`, or documents of their shape.
    """
    name = LayerHooks(layer).mlp_out
    if not _has_mlp(model, name):
        raise FraError(f"the model has no MLP in layer {layer}: nothing goes through it.")
    changed = _under(model, change, tokens, layer, {"mlp": name})["mlp"]
    return Intervention(model, [], [(name, lambda own, hook: fitting(changed, own))])


@face
def into_final(model: Model, change: Intervention, tokens: Int[Tensor, "batch pos"], *, layer: int) -> Intervention:
    """What `change`, made in attention layer `layer`, does through the direct path to the logits alone.

    The difference that it makes in what the attention writes is added to the last residual stream; no MLP and no other
    layer sees it. Raises FraError where the block's hooks do not add up to its output, so that the difference is not
    known (a norm between them); run the model on `tokens`, or documents of their shape.
    """
    own, hooks = architecture_of(model), LayerHooks(layer)
    names = {"post": hooks.resid_post}
    if _has_mlp(model, hooks.mlp_out):
        names["mlp"] = hooks.mlp_out
        if own.has(hooks.resid_mid):
            names["mid"] = hooks.resid_mid
    clean, changed = (_under(model, by, tokens, layer, names) for by in (None, change))

    def before_mlp(seen: dict[str, Tensor]) -> Tensor:
        return seen["mid"] if "mid" in seen else seen["post"] - seen.get("mlp", torch.zeros(()).to(seen["post"]))

    if "mid" in names and "mlp" in names:
        apart = float((clean["mid"] + clean["mlp"] - clean["post"]).abs().max())
        if not apart <= max(1e-3, own.tolerance) * float(clean["post"].abs().max()):
            raise FraError(
                f"layer {layer}: hook_resid_mid and hook_mlp_out do not add up to hook_resid_post (a norm stands "
                "between them), so the direct path cannot be told apart."
            )
    difference = before_mlp(changed) - before_mlp(clean)
    last = LayerHooks(own.n_layers - 1).resid_post
    return Intervention(model, [], [(last, lambda clean, hook: clean + fitting(difference, clean))])


@face
def patch_activation(
    model: Model, source: Int[Tensor, "batch pos"], name: str, *, rows: Positions = None
) -> Intervention:
    """Puts the activation of hook `name` ([batch, pos, ...]) on `source` in place of the pass's own, at `rows`.

    For single heads use `fra.interventions.patch_output`. Raises FraError for a hook that the model does not have.
    """
    at = layer_of(name)
    layer = architecture_of(model).n_layers - 1 if at is None else at
    value = _under(model, None, source, layer, {"it": name})["it"]

    def edit(own: Tensor, hook: Any) -> Tensor:
        chosen = chosen_positions("rows", rows, len(own), own.shape[1], own.device)
        return torch.where(chosen.view(*chosen.shape, *[1] * (own.ndim - 2)), fitting(value, own), own)

    return Intervention(model, [], [(name, edit)])


@face
def splice(model: Model, name: str, value: Tensor | Callable[[Tensor], Tensor]) -> Intervention:
    """Puts `value`, or what it makes of the pass's own activation, in place of the activation of hook `name`; heads may
    be side by side in the one and apart in the other. Raises FraError for a hook that the model does not have.
    """

    def edit(own: Tensor, hook: Any) -> Tensor:
        new = value if isinstance(value, Tensor) else value(own)
        return new.reshape(own.shape).to(own)

    return Intervention(model, [], [(name, edit)])


@face
@torch.no_grad()
def losses_under(
    model: Model, tokens: Int[Tensor, "batch pos"], *changes: Intervention
) -> Float[Tensor, "batch pos_less_1"]:
    """`losses` of one pass over these documents under interventions; of the model as it is where there are none."""
    rows = tokens.to(architecture_of(model).device)
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        return losses(model(rows), rows)


def readout(model: Model, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a final residual stream: the final norm and the softcap of logits, where the model has them, and the
    unembedding.
    """
    return architecture_of(model).readout(resid)


def _has_mlp(model: Model, name: str) -> bool:
    """HookedTransformer lists the hook in models of attention alone, too, and never fires it."""
    return architecture_of(model).has(name) and not getattr(getattr(model, "cfg", None), "attn_only", False)


def _under(
    model: Model, change: Intervention | None, tokens: Tensor, layer: int, names: dict[str, str]
) -> dict[str, Tensor]:
    """Activations on these tokens under one change and nothing else that is on the model."""
    check_layer_and_head(model, layer)
    check_tokens(model, tokens)
    home = tokens.to(architecture_of(model).device)
    with unhooked(model), torch.no_grad():
        if change is None:
            return {key: value.detach() for key, value in read_hooks(model, home, layer, names).items()}
        with change:
            return {key: value.detach() for key, value in read_hooks(model, home, layer, names).items()}
