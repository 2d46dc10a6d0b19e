"""What must hold of Phi whatever the weights: errors of its identities on one document, for every head of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.architecture import UNHEARD
from fra.architectures.known import architecture_of
from fra.core.frozen import FrozenLayer, freeze
from fra.core.resolve import ResolvedHead
from fra.core.sentences import Sensitivity
from fra.core.weights import Model
from fra.dictionaries.codes import codes, dictionary_hook
from fra.dictionaries.hooks import LayerHooks
from fra.errors import CannotLoad, FraError
from fra.measures.identities.designs import Sentences
from fra.statistics.stats import seed_of
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.conditions import exact

_SENTENCES = Sentences()
ROUNDING = "rounding of the pattern"


@torch.no_grad()
def identities(
    model: Model,
    sae: Any,
    tokens: Int[Tensor, " pos"],
    segment: Int[Tensor, " pos"],
    layer: int,
    seed_parts: Sequence[str],
    design: Sentences = _SENTENCES,
) -> list[dict[str, float]]:
    """Largest errors, as shares of the largest |Phi|, of the strongest channels of each head.

    - "conservation": sum_b Phi.
    - "splits and merges": Phi of segments joined two by two, against the sum (over b) and mean by length (over a).
    - "token sensitivities": one token a segment, against A (D F - sum_u A D F), written out.
    - "finite difference": the attention between segments in the model's own pattern, its own scores changed by steps
      up and down along a random mixture of the channels (four points), against the same mixture of Phi. "without the
      row's mean": the same against Phi without sum_u A D F, which must not agree.
    - ROUNDING, no error: what the model's own rounding of its pattern may make of "finite difference" at most.

    For a float64 model. Raises FraError as `fra.resolve` does.
    """
    frozen = freeze(model, tokens[None], layer, dictionary_hook(sae))
    found = codes(sae, frozen.x)
    generator = torch.Generator().manual_seed(seed_of(*seed_parts))
    seen = [Sensitivity(ResolvedHead(frozen, found, head), segment) for head in range(frozen.n_heads)]
    pairs = [one.resolved.channels(n=design.channels)[["q_feature", "k_feature"]] for one in seen]
    mixture = [torch.randn(len(own), generator=generator, dtype=torch.float64).to(frozen.x) for own in pairs]
    maps = [
        torch.stack([one.resolved.channel(int(i), int(j)) for i, j in own.to_numpy()])
        for one, own in zip(seen, pairs, strict=True)
    ]
    along = torch.stack([torch.einsum("n,nts->ts", r, F) for r, F in zip(mixture, maps, strict=True)])
    step = design.step / along.abs().amax((-2, -1), keepdim=True)
    at = {k: moved_patterns(model, tokens, frozen, k * step * along) for k in (-2, -1, 1, 2)}
    slopes = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
    rows = []
    for head, one in enumerate(seen):
        phi = one.phi(pairs[head])
        A = frozen.pattern[0, head]
        slope = 1.0 if frozen.softcap is None else 1 - (frozen.cap(frozen.scores(head)[0]) / frozen.softcap) ** 2
        sloped = slope * maps[head]
        by_token = A * (sloped - (A * sloped).sum(-1, keepdim=True))
        single = Sensitivity(one.resolved, torch.arange(len(tokens), device=A.device)).phi(pairs[head])
        change = one.average(slopes[head])
        mixed = phi @ mixture[head]
        # A model may take its softmax in float32 whatever its precision; differences of points divide by a step.
        rounding = (A - frozen.attention(frozen.scores(head)[0])).abs().max()
        uncentred = torch.einsum("n,nab->ab", mixture[head], one.average(A * sloped))
        rows.append(
            {
                "conservation": _share(phi.sum(1), phi),
                "splits and merges": _share(_joined(one, phi) - one.joined().phi(pairs[head]), phi),
                "token sensitivities": _share(single - by_token.movedim(0, -1), single),
                "finite difference": _share(mixed - change, change),
                "without the row's mean": _share(uncentred - change, change),
                ROUNDING: float(18 * rounding / (12 * step[head].min()) / change.abs().max()),
            }
        )
    return rows


def evidence(claim: Claim, head: str, rows: Sequence[Mapping[str, float]]) -> Evidence:
    """One head's errors against the claim's bars, from one row a document: of what must be small the largest, of what
    must not be the smallest. NaN stays NaN. Undecided where no more is off than the model's rounding makes.
    """
    conditions = []
    for name in (claim.condition, *claim.bars):
        values, above = [row[name] for row in rows], claim.above_of(name)
        value = float(np.min(values) if above else np.max(values))
        conditions.append(exact(name, value, claim.bar_of(name), above=above))
    off, most = conditions[0].effect, max(row.get(ROUNDING, 0.0) for row in rows)
    undecided = None
    if claim.bar <= off <= most:
        undecided = f"limited by precision: the model's softmax rounds, which alone may make {most:.2g} of it"
    candidates = {"strongest channels": tuple(conditions)}
    return Evidence(claim=claim, head=head, candidates=candidates, n=len(rows), undecided=undecided)


def _share(error: Tensor, of: Tensor) -> float:
    return float(error.abs().max() / of.abs().max())


def _joined(one: Sensitivity, phi: Float[Tensor, "n n m"]) -> Float[Tensor, "half half m"]:
    """Phi of segments joined two by two, from Phi of the segments."""
    length = torch.bincount(one.segment).to(phi)
    pair = torch.arange(one.n, device=phi.device) // 2
    to = torch.nn.functional.one_hot(pair).to(phi)
    rows = (to * length[:, None] / (to * length[:, None]).sum(0)).mT
    return torch.einsum("xa,abm,by->xym", rows, phi, to)


def moved_patterns(
    model: Model, tokens: Tensor, frozen: FrozenLayer, change: Float[Tensor, "n_heads pos pos"]
) -> Float[Tensor, "n_heads pos pos"]:
    """The model's own pattern with `change` added to its scores before softcap. Raises CannotLoad where an edit of
    scores is not heard.
    """
    if architecture_of(model).fires_afterwards(frozen.layer):
        raise CannotLoad(f"scores of layer {frozen.layer} cannot be changed: {UNHEARD}.")
    before = torch.stack([frozen.scores(head)[0] for head in range(frozen.n_heads)])
    kept: list[Tensor] = []

    def edit(scores: Tensor, hook: Any) -> Tensor:
        moved = frozen.cap(before + change) - frozen.cap(before)
        return torch.where(frozen.mask, scores + moved, scores)

    def keep(pattern: Tensor, hook: Any) -> None:
        kept.append(pattern[0].detach())

    points = LayerHooks(frozen.layer)
    hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]] = [
        (points.attn_scores, edit),
        (points.pattern, keep),
    ]
    model.run_with_hooks(tokens[None].to(before.device), fwd_hooks=hooks, return_type=None)
    if len(kept) != 1:
        raise FraError(f"the pattern of layer {frozen.layer} was seen {len(kept)} times in a pass: use another model.")
    return kept[0]
