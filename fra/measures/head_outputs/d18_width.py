"""Do wider dictionaries of head outputs find more induction tokens (D18)?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fra.attribution.head_outputs import observe
from fra.attribution.raised_tokens import raised_tokens
from fra.dictionaries.encoder import head_output_layer
from fra.dictionaries.hooks import is_head_output
from fra.measures.head_outputs.d05_sources import documents_of, second_copy
from fra.stimuli import sets
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Number
from fra.verdicts.pooled import NO_HEAD_OUTPUT_DICTIONARY, ByDictionary, clustered, evidence

if TYPE_CHECKING:
    from fra.targets.target import Target


def widths(target: Target) -> dict[int, dict[int, Any]]:
    """{layer: {d_sae: dictionary}} of the target's dictionaries of head outputs: where its study has an arm
    `dense-width`, whose dictionaries differ in width alone, that arm; else all that it names.
    """
    found: dict[int, dict[int, Any]] = {}
    for sae in target.study("dense-width"):
        found.setdefault(head_output_layer(sae), {})[int(sae.cfg.d_sae)] = sae
    if found:
        return found
    for hook in target.dictionaries:
        if is_head_output(hook):
            sae = target.dictionaries[hook]
            found.setdefault(head_output_layer(sae), {})[int(sae.cfg.d_sae)] = sae
    return found


SHUFFLES = 20
"""Deals of the own tokens, averaged by document: their scatter is then small beside that of the documents."""


def tokens_found(target: Target, sae: Any, batch: Batch, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """By document: how many different tokens features announce rightly (a feature fires in the second copy on a row
    whose induction key holds its own token), the mean of the same over SHUFFLES deals of the own tokens among the
    features (firings, L0 and tokens stay), and L0 on those rows.
    """
    o = observe(target.model, sae, documents_of(batch))
    at = second_copy(o.live, batch)
    key = at.pos - batch.periods.to(at.doc.device)[at.doc] + 1
    follows = batch.tokens.to(at.doc.device)[at.doc, key]
    own = raised_tokens(target.model, sae)
    generator = torch.Generator().manual_seed(seed)

    def count(tokens: Int[Tensor, " d_sae"]) -> np.ndarray:
        hit = tokens[at.feature] == follows
        pairs = torch.unique(torch.stack([at.doc[hit], follows[hit]]), dim=1)
        return np.bincount(pairs[0].cpu().numpy(), minlength=len(batch)).astype(float)

    dealt = [count(own[torch.randperm(len(own), generator=generator).to(own.device)]) for _ in range(SHUFFLES)]
    return count(own), np.mean(dealt, axis=0), len(at) / float(batch.periods.sum())


@torch.no_grad()
def width_evidence(claim: Claim, target: Target, progress: Callable[[str], None] = lambda _: None) -> Evidence:
    """D18: the widest against the narrowest dictionary of every layer that has two; one row."""
    given = widths(target)
    if not given:
        return Evidence(claim=claim, head=None, cannot=NO_HEAD_OUTPUT_DICTIONARY)
    several = {layer: of for layer, of in given.items() if len(of) > 1}
    if not several:
        why = (
            "the target has dictionaries of head outputs of one width only at each hook: the arm 'dense-width' of its "
            "[[study]] would name others"
        )
        return Evidence(claim=claim, head=None, cannot=why)
    (stimulus,) = claim.stimuli
    batch = sets.documents(target, stimulus, RepeatedSets())["confirmation"]
    gain: dict[str, stats.ClusterMeans | Number] = {}
    over: dict[str, stats.ClusterMeans | Number] = {}
    numbers: dict[str, Any] = {}
    ones = np.ones(len(batch))
    for layer, of in several.items():
        found: dict[int, tuple[np.ndarray, np.ndarray, float]] = {}
        for width in sorted(of):
            progress(f"D18: layer {layer}, {width} features")
            seed = stats.seed_of(target.name, str(layer), str(width), "dealt anew")
            found[width] = tokens_found(target, of[width], batch, seed)
            numbers[f"layer {layer}, {width} features"] = {
                "tokens a document": float(found[width][0].mean()),
                "tokens a document, dealt anew": float(found[width][1].mean()),
                "L0": found[width][2],
            }
        (narrow, wide), seeds = (min(of), max(of)), (claim.digest, target.name, str(layer))
        more = found[wide][0] - found[narrow][0]
        by_luck = found[wide][1] - found[narrow][1]
        gain[str(layer)] = clustered(more, ones, batch.sources, (*seeds, "gain"))
        over[str(layer)] = clustered(more - by_luck, ones, batch.sources, (*seeds, "over"))
    measured = [
        ByDictionary("tokens a document", claim.bar, gain, null=0.0),
        ByDictionary("over equal-L0 shuffles", claim.bars["over equal-L0 shuffles"], over, null=0.0),
    ]
    return evidence(claim, measured, len(batch), {"by dictionary": numbers})
