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
from fra.measures.head_outputs.d05_sources import second_copy
from fra.measures.head_outputs.designs import Widths
from fra.statistics import stats
from fra.stimuli import sets
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Number
from fra.verdicts.pooled import NO_HEAD_OUTPUT_DICTIONARY, ByDictionary, clustered, evidence

if TYPE_CHECKING:
    from fra.targets.target import Target

RUNS = "dictionaries a width"
"""The gate: training runs of the narrowest and of the widest."""
OVER = "over equal-L0 shuffles"


def widths(target: Target) -> dict[int, dict[int, list[Any]]]:
    """{layer: {d_sae: dictionaries}} of the target's dictionaries of head outputs: where its study has an arm
    `dense-width`, whose dictionaries differ in width and training run alone, that arm; else all that it names.
    """
    study = [sae for run in target.runs("dense-width") for sae in target.study("dense-width", run)]
    found: dict[int, dict[int, list[Any]]] = {}
    for sae in study or [target.dictionaries[hook] for hook in target.dictionaries if is_head_output(hook)]:
        found.setdefault(head_output_layer(sae), {}).setdefault(int(sae.cfg.d_sae), []).append(sae)
    return found


def tokens_found(
    target: Target, sae: Any, batch: Batch, design: Widths, seeds: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, float]:
    """By document: how many different tokens features announce rightly (a feature fires in the second copy on a row
    whose induction key holds its own token), the mean of the same over deals of the own tokens among the features
    (firings, L0 and tokens stay; every source has deals of its own, so that their scatter is part of that of the
    sources), and L0 on those rows.
    """
    o = observe(target.model, sae, batch.documents())
    at = second_copy(o.live, batch)
    key = at.pos - batch.periods.to(at.doc.device)[at.doc] + 1
    follows = batch.tokens.to(at.doc.device)[at.doc, key]
    own = raised_tokens(target.model, sae)

    def count(tokens: Int[Tensor, " d_sae"], some: Int[Tensor, " n"] | slice = slice(None)) -> np.ndarray:
        hit = tokens[at.feature[some]] == follows[some]
        pairs = torch.unique(torch.stack([at.doc[some][hit], follows[some][hit]]), dim=1)
        return np.bincount(pairs[0].cpu().numpy(), minlength=len(batch)).astype(float)

    dealt = np.zeros(len(batch))
    for source in sorted(set(batch.sources)):
        mine = torch.tensor([name == source for name in batch.sources], device=at.doc.device)
        some = torch.nonzero(mine[at.doc])[:, 0]
        generator = torch.Generator().manual_seed(stats.seed_of(*seeds, source))
        for _ in range(design.deals):
            dealt += count(own[torch.randperm(len(own), generator=generator).to(own.device)], some) / design.deals
    return count(own), dealt, len(at) / float(batch.periods.sum())


@torch.no_grad()
def width_evidence(claim: Claim, target: Target, progress: Callable[[str], None] = lambda _: None) -> Evidence:
    """D18: the widest against the narrowest dictionaries of every layer that has two widths; one row. Each training run
    of the one against each of the other: all must hold, and any may refute.
    """
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
    batch = sets.documents(target, claim.stimuli[0], claim.designed(RepeatedSets))["confirmation"]
    gain: dict[str, stats.ClusterMeans | Number] = {}
    over: dict[str, stats.ClusterMeans | Number] = {}
    numbers: dict[str, Any] = {}
    ones, design = np.ones(len(batch)), claim.designed(Widths)
    for layer, of in several.items():
        found: dict[int, list[tuple[np.ndarray, np.ndarray, float]]] = {}
        for width in sorted(of):
            progress(f"D18: layer {layer}, {width} features")
            parts = (target.name, str(layer), str(width), "dealt anew")
            found[width] = [
                tokens_found(target, sae, batch, design, (*parts, str(run))) for run, sae in enumerate(of[width])
            ]
            numbers[f"layer {layer}, {width} features"] = {
                "training runs": len(of[width]),
                "tokens a document": [float(own.mean()) for own, _, _ in found[width]],
                "tokens a document, dealt anew": [float(dealt.mean()) for _, dealt, _ in found[width]],
                "L0": [l0 for _, _, l0 in found[width]],
            }
        for i, wide in enumerate(found[max(of)]):
            for j, narrow in enumerate(found[min(of)]):
                pair = f"layer {layer}, run {i} of the widest less run {j} of the narrowest"
                seeds = (claim.digest, target.name, pair)
                more, by_luck = wide[0] - narrow[0], wide[1] - narrow[1]
                gain[pair] = clustered(more, ones, batch.sources, (*seeds, "gain"))
                over[pair] = clustered(more - by_luck, ones, batch.sources, (*seeds, "over"))
    detail = {"by dictionary": numbers, "draws of the control": f"{design.deals} deals of the tokens for each source"}
    fewest, needed = min(len(of[width]) for of in several.values() for width in (min(of), max(of))), claim.gates[RUNS]
    own = evidence(claim, [ByDictionary(claim.condition, gain), ByDictionary(OVER, over)], detail)
    if fewest < needed:
        runs = "one dictionary" if fewest == 1 else f"{fewest} dictionaries"
        why = f"{runs} a width, where {needed:g} are needed: training runs differ, and one says nothing of how much"
        return Evidence(claim=claim, head=None, undecided=why, n=own.n, candidates=own.candidates, detail=detail)
    return own
