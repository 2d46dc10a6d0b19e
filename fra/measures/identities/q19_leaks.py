"""Does a change that is made later in a text reach an earlier logit? Every intervention tried at one head, to the last
bit, with the classic mistake (scores overwritten above the diagonal, too) beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra import interventions as iv
from fra.core.coded import Arm, measure_arm
from fra.core.weights import Model
from fra.dictionaries.codes import dictionary_hook
from fra.dictionaries.hooks import LayerHooks
from fra.errors import CannotLoad
from fra.measures.identities.designs import Cut
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.conditions import exact

CONTROL, INERT = "earlier logits changed by an unmasked patch", "interventions without any effect"


@dataclass(frozen=True)
class CutTexts:
    """Documents of one length: as they are, with everything from `cut` on exchanged, and others to patch from."""

    tokens: Int[Tensor, "batch pos"]
    changed: Int[Tensor, "batch pos"]
    other: Int[Tensor, "batch pos"]
    cut: int


def texts(documents: list[Int[Tensor, " pos"]], cut: int) -> CutTexts:
    """From three documents for each one tested, all cut to the length of the shortest: the first third is tested, the
    second gives what comes after position `cut`, the third is what is patched from.

    Raises CannotLoad where documents do not reach the cut.
    """
    length = min(len(document) for document in documents)
    if length <= cut + 1:
        raise CannotLoad(f"a document of {length} tokens has too little behind position {cut}: use longer text")
    every = torch.stack([document[:length] for document in documents])
    tokens, later, other = every.chunk(3)
    return CutTexts(tokens, torch.cat([tokens[:, :cut], later[:, cut:]], dim=1), other, cut)


def every_intervention(
    model: Model, sae: Any, arm: Arm, head: int, text: CutTexts, design: Cut
) -> dict[str, iv.Intervention]:
    """One of each kind of intervention at one head, each of them strong, by name.

    `arm`: the documents at the head's layer. Features are live before the cut and after it.
    """
    layer = arm.frozen.layer
    where: dict[str, Any] = {"layer": layer, "head": head}
    place = where | {"dictionary": sae}
    channels, features = live_channels(arm, text.cut, design.a_side)
    blocks = [("feature", "bias"), ("error", "feature"), ("bias", "error")]
    keys = [0, text.cut - 2, text.cut, text.cut + 1]
    made = {
        "remove": iv.remove(model, channels, **place),
        "remove, from a clean pass": iv.remove(model, channels, **place, clean=text.tokens),
        "scale at some keys": iv.scale(model, channels, design.scaled, **place, keys=keys),
        "keep only": iv.keep_only(model, channels, **place),
        "scale blocks": iv.scale_blocks(model, blocks, design.blocks, **place),
        "scale query features": iv.scale_features(model, features, "query", **place),
        "scale key features": iv.scale_features(model, features, "key", **place),
        "remove from the output": iv.remove_output(model, features, terms=("error", "bias"), **place),
        "scale in the output": iv.scale_output(model, features, design.output, **place),
        "zero ablation": iv.zero_ablate(model, **where),
        "mean ablation": iv.mean_ablate(model, text.other, **where),
        "patched output": iv.patch_output(model, text.other, **where),
        "patched pattern": iv.patch_pattern(model, text.other, **where),
    }
    frozen = iv.freeze_scales(model, text.other, layer=layer)
    return made | ({"frozen scales": frozen} if frozen.hooks else {})  # a model without norms has none to freeze


def live_channels(arm: Arm, cut: int, a_side: int) -> tuple[Int[Tensor, "n 2"], Int[Tensor, " m"]]:
    """Pairs of features live at the positions next to the cut and at earlier keys of one document, `a_side` of them at
    each, and all their features.

    Raises CannotLoad where no document has such a pair before the cut, or none behind it.
    """
    batch, pos = arm.codes.shape
    pairs = []
    for q_pos, k_pos in ((cut - 1, cut - 2), (cut + 1, cut // 2)):
        sides = (
            [arm.codes.feature[arm.codes.row == doc * pos + at][:a_side] for at in (q_pos, k_pos)]
            for doc in range(batch)
        )
        live = next((side for side in sides if all(map(len, side))), None)
        if live is None:
            raise CannotLoad(
                f"no document of layer {arm.frozen.layer} has live features at both positions {q_pos} and {k_pos}: "
                "there is no channel to change there"
            )
        pairs.append(torch.cartesian_prod(*live))
    channels = torch.cat(pairs)
    return channels, torch.unique(channels)


def unmasked(model: Model, layer: int, head: int) -> iv.Intervention:
    """The mistake: a head's scores overwritten above the diagonal, too."""

    def edit(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        scores[:, head] = 0.0
        return scores

    return iv.Intervention(model, [], [(LayerHooks(layer).attn_scores, edit)])


@dataclass(frozen=True)
class Leaks:
    """What was found at one head."""

    changed: dict[str, int]
    """By intervention: logits at positions before the cut that differ in any bit when what comes after it differs."""
    unmasked: int
    """The same under the unmasked patch."""
    inert: list[str]
    """Interventions under which the model does what it does without them: they could not have shown a leak."""


@torch.no_grad()
def leaks(model: Model, sae: Any, text: CutTexts, layer: int, heads: list[int], design: Cut) -> dict[int, Leaks]:
    """Every intervention at every one of these heads. Both texts are run in the same shape: products of another shape
    round differently. Raises CannotLoad where the layer has too few live features, FraError as `fra.resolve` does.
    """
    arm = measure_arm(model, sae, text.tokens, layer, dictionary_hook(sae))
    plain = _logits(model, text.tokens)
    found = {}
    for head in heads:
        changed, inert = {}, []
        for name, intervention in every_intervention(model, sae, arm, head, text, design).items():
            changed[name], here = _earlier(model, intervention, text)
            if torch.equal(here, plain):
                inert.append(name)
        found[head] = Leaks(changed, _earlier(model, unmasked(model, layer, head), text)[0], inert)
    return found


def evidence(claim: Claim, head: str, seen: Leaks) -> Evidence:
    """One head's counts against the claim's bars."""
    counts = {claim.condition: sum(seen.changed.values()), CONTROL: seen.unmasked, INERT: len(seen.inert)}
    conditions = tuple(exact(name, k, claim.bar_of(name), above=claim.above_of(name)) for name, k in counts.items())
    detail = {"earlier logits changed": seen.changed, "without any effect": seen.inert}
    return Evidence(claim=claim, head=head, candidates={"every intervention": conditions}, n=claim.n, detail=detail)


def _logits(model: Callable[..., Tensor], tokens: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
    return model(tokens)


def _earlier(model: Model, intervention: iv.Intervention, text: CutTexts) -> tuple[int, Tensor]:
    """How many logits before the cut differ between the two texts, and the logits of the first."""
    with intervention:
        one, two = _logits(model, text.tokens), _logits(model, text.changed)
    return int((one != two)[:, : text.cut].sum()), one
