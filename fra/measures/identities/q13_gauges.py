"""Which attributions move when a head's weights change and its function does not; what to quote.

What moves under one of the gauges (`key_bias`, `mean_direction`, `basis`) says nothing about the head. `fra` centres
W_K, so that its F_ij do not move; the product of decoder rows with W_K as it stands does, where decoders have a mean.
Quote F_ij of `fra.resolve`, centred along the row; effects of sets that hold everything a query feature reads; scores
and patterns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra._census.census import census
from fra.core.coded import Arm
from fra.core.frozen import FrozenLayer, Side, freeze
from fra.core.resolve import ResolvedHead
from fra.core.weights import Model, raw_weights
from fra.dictionaries.codes import Codes, codes, dictionary_hook
from fra.dictionaries.hooks import is_normalized
from fra.interventions.gauges import basis, key_bias, mean_direction, norm, parameter, rank_one, turned, why_not
from fra.measures.identities.designs import Gauges
from fra.statistics.stats import seed_of
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.conditions import exact

OTHER = "model's own scores, another direction"
_GAUGES = Gauges()
STAYS = _GAUGES.stays
"""What moves less, as a share of its size in float64, does not move."""


@dataclass(frozen=True)
class Moved:
    """How far each quantity of one head moved under one gauge, as a share of its own size."""

    gauge: str
    by_document: dict[str, list[float]]
    """One number a document for each quantity."""

    def overall(self, name: str) -> float:
        """The largest over the documents."""
        return max(self.by_document[name])


@torch.no_grad()
def measure(
    model: Model,
    sae: Any,
    documents: Sequence[Int[Tensor, " _pos"]],
    layer: int,
    seed_parts: Sequence[str],
    design: Gauges = _GAUGES,
) -> dict[str, list[Moved] | str]:
    """For every gauge how far the quantities of each head of a layer move: {gauge: a `Moved` for each head, or why it
    is none}. The first half of the documents chooses each head's strongest channels by sum |F|, the second is measured.

    Sizes of the gauges: v has the length of the head's mean key, c the root mean square length of the rows of its W_K
    (so that 1 c^T is as large as W_K), both in random directions; M is orthogonal times a diagonal.
    "without centring" is what a product of decoder rows with W_K as it stands gives (the norm's weight folded in);
    "as fra" has the mean of W_K over d_model taken out, which is the same as centring the decoders. For float64
    models: the shares of what must not move are rounding. Raises FraError as `fra.census` does.
    """
    half = len(documents) // 2
    pairs = strongest(model, sae, documents[:half], layer, design.strongest)
    hook = dictionary_hook(sae)
    generator = torch.Generator().manual_seed(seed_of(*seed_parts))
    found: dict[str, list[Moved] | str] = {}
    for gauge in ("key_bias", "mean_direction", "another direction", "basis"):
        asked = "mean_direction" if gauge == "another direction" else gauge
        drawn = draw(model, layer, gauge, generator, design.stretch)
        problem = why_not(model, layer, asked, drawn)
        if problem is None and asked == "mean_direction" and not is_normalized(hook):
            problem = "the dictionary stands before the LayerNorm, which centres every decoder: the gauge moves nothing"
        if problem is not None:
            found[gauge] = problem
            continue
        tables: list[dict[str, list[float]]] = [{} for _ in pairs]
        for tokens in documents[half:]:
            before = Seen(model, sae, tokens, layer, hook)
            with _edit(model, layer, gauge, drawn):
                after = Seen(model, sae, tokens, layer, hook, before.codes)
            for head, own in enumerate(tables):
                attributions = gauge != "another direction"
                for name, value in shares(before, after, head, pairs[head], attributions, design.seen).items():
                    own.setdefault(name, []).append(value)
        found[gauge] = [Moved(gauge, own) for own in tables]
    gauged, controls = found["mean_direction"], found["another direction"]
    if not isinstance(gauged, str) and not isinstance(controls, str):
        for moved, control in zip(gauged, controls, strict=True):
            moved.by_document[OTHER] = control.by_document["model's own scores"]
    return found


@torch.no_grad()
def strongest(
    model: Model, sae: Any, documents: Sequence[Int[Tensor, " _pos"]], layer: int, n: int
) -> list[Int[Tensor, "n 2"]]:
    """Each head's n strongest channels by sum |F| over these documents."""
    chosen = census(model, sae, documents, layer, reduce="abs").channels("abs", n)
    return [
        torch.tensor(part[["q_feature", "k_feature"]].to_numpy(copy=True))
        for _, part in sorted(chosen.groupby("head"), key=lambda item: item[0])
    ]


def evidence(claim: Claim, gauge: str, found: Mapping[str, list[Moved] | str], layer: int, head: int) -> Evidence:
    """One head's quantities under one gauge against the claim's bars, which are named like them: of what must stay the
    largest movement over the documents, of what must move the smallest. How far each moves is in the detail.
    """
    name = f"L{layer}H{head}"
    own = found[gauge]
    if isinstance(own, str):
        return Evidence(claim=claim, head=name, cannot=own)

    def condition(quantity: str) -> Condition:
        values, above = own[head].by_document.get(quantity, [float("nan")]), claim.above_of(quantity)
        value = float(np.min(values) if above else np.max(values))  # NaN stays NaN
        return exact(quantity, value, claim.bar_of(quantity), above=above)

    described = {
        by: {
            quantity: {"mean": float(np.mean(values)), "least": float(np.min(values)), "largest": float(np.max(values))}
            for quantity, values in moved[head].by_document.items()
        }
        for by, moved in found.items()
        if not isinstance(moved, str)
    }
    return Evidence(
        claim=claim,
        head=name,
        candidates={gauge: tuple(condition(quantity) for quantity in (claim.condition, *claim.bars))},
        n=len(own[head].by_document[claim.condition]),
        detail={"movement by gauge, as a share of the quantity's size, over documents": described},
    )


def draw(model: Model, layer: int, gauge: str, generator: torch.Generator, stretch: float) -> Tensor:
    """The random direction (or matrix) of a gauge, of the size that `measure` names."""
    W_K = parameter(model, layer, "W_K")
    n_kv, _, d_head = W_K.shape
    normal = torch.randn(n_kv, d_head, generator=generator, dtype=torch.float64)
    if gauge == "basis":
        n_heads = parameter(model, layer, "W_Q").shape[0]
        square = torch.randn(n_heads, d_head, d_head, generator=generator, dtype=torch.float64)
        by = stretch ** (2 * torch.rand(n_heads, d_head, generator=generator, dtype=torch.float64) - 1)
        matrix: Tensor = torch.linalg.qr(square)[0] * by[:, None]
        return matrix.to(W_K)
    w, _ = norm(model, layer)
    size = (w[:, None] * W_K).norm(dim=-1).square().mean(-1).sqrt()
    if gauge == "key_bias":
        size = size * W_K.shape[1] ** 0.5  # inputs of a norm have the length sqrt(d_model)
        normal[:, : turned(model, layer)] = 0.0  # what rotary positions turn is not constant along a row
    length = normal.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    direction: Tensor = (normal / length).to(W_K) * size[:, None]
    return direction


def _edit(model: Model, layer: int, gauge: str, draw: Tensor) -> Any:
    if gauge == "another direction":
        signs = torch.arange(int(model.cfg.d_model), device=draw.device) % 2 * 2 - 1.0
        return rank_one(model, layer, signs.to(draw), draw)
    return {"key_bias": key_bias, "mean_direction": mean_direction, "basis": basis}[gauge](model, layer, draw)


class Seen:
    """What one document shows of a layer, with the weights as they are now."""

    def __init__(
        self, model: Model, sae: Any, tokens: Tensor, layer: int, hook: str, known: Codes | None = None
    ) -> None:
        frozen = freeze(model, tokens[None], layer, hook)
        own = {name: getattr(frozen, name).clone() for name in ("W_q", "W_k", "b_q", "b_k")}  # may be the model's own
        self.frozen: FrozenLayer = replace(frozen, **own)
        self.codes = codes(sae, self.frozen.x) if known is None else known  # the edit is behind the dictionary
        self.logits: Tensor = model(tokens[None].to(self.frozen.x.device))
        w, _ = norm(model, layer)
        raw = raw_weights(model, layer)
        W_q, W_k = (w[:, None] * raw[name].detach() for name in ("W_Q", "W_K"))
        self.uncentred = replace(self.frozen, W_q=W_q, W_k=W_k)

    def channels(self, head: int, pairs: Int[Tensor, "n 2"], centred: bool) -> Float[Tensor, "n pos pos"]:
        """F_ij of each pair, zero where masked."""
        frozen = self.frozen if centred else self.uncentred
        arm = Arm(frozen, self.codes)
        sides: tuple[tuple[Side, Tensor], ...] = (("query", frozen.W_q), ("key", frozen.W_k))
        vectors = []
        for (side, W), wanted in zip(sides, pairs.T, strict=True):
            ids, at = torch.unique(wanted, return_inverse=True)
            placed = (self.codes.decoder[wanted] @ W[head])[:, None].expand(-1, frozen.x.shape[1], -1)
            if frozen.rotary is not None:
                placed = frozen.rotary.rotate(placed, torch.arange(placed.shape[1], device=placed.device))
            vectors.append(placed * arm.columns(side, head, ids)[0][:, at].T[..., None])
        found: Tensor = (frozen.scale * vectors[0] @ vectors[1].mT).masked_fill(~frozen.mask, 0.0)
        return found

    def without(self, head: int, taken: Float[Tensor, "pos pos"]) -> Float[Tensor, " pos"]:
        """Share of each row's attention that moves when `taken` is taken out of its scores."""
        scores = self.frozen.scores(head)[0]
        after = self.frozen.cap(scores - taken).masked_fill(~self.frozen.mask, -torch.inf).softmax(-1)
        moved: Tensor = (after - self.frozen.pattern[0, head]).abs().sum(-1) / 2
        return moved


def shares(
    before: Seen, after: Seen, head: int, pairs: Int[Tensor, "n 2"], attributions: bool, least: float
) -> dict[str, float]:
    """Movement of each quantity, as a share of its size before; of what the model shows alone, or of attributions
    too.
    """
    mask, A = before.frozen.mask, before.frozen.pattern[0, head]
    pairs = pairs.to(mask.device)

    def largest(old: Tensor, new: Tensor, size: Tensor | None = None) -> float:
        return float((new - old).abs().max() / (old if size is None else size).abs().max())

    def centre(F: Tensor) -> Tensor:
        return (F - (A * F).sum(-1, keepdim=True)).masked_fill(~mask, 0.0)

    found = {
        "scores": largest(before.frozen.scores(head)[0][mask], after.frozen.scores(head)[0][mask]),
        "model's own scores": largest(
            before.frozen.model_scores[0, head][mask], after.frozen.model_scores[0, head][mask]
        ),
        "pattern": largest(A, after.frozen.pattern[0, head]),
        "logits": largest(before.logits, after.logits),
    }
    if not attributions:
        return found
    for name, centred in (("without centring", False), ("as fra", True)):
        old, new = before.channels(head, pairs, centred), after.channels(head, pairs, centred)
        found[f"channels {name}"] = float((new - old).abs().sum() / old.abs().sum())
        row_old, row_new = centre(old), centre(new)
        weight = A * (row_new - row_old).abs()
        found[f"row-centred channels {name}"] = float(weight.sum() / (A * row_old.abs()).sum())
        effects = [seen.without(head, F.sum(0)) for seen, F in ((before, old), (after, new))]
        found[f"effect of removing the set {name}"] = float((effects[1] - effects[0]).abs().sum() / effects[0].sum())
    complete = [seen.without(head, _complete(seen, head, torch.unique(pairs[:, 0]))) for seen in (before, after)]
    if float(complete[0].max()) > least:  # a feature that is live on the first position alone has no row to move
        found["effect of removing a complete set"] = largest(complete[0], complete[1])
    resolved = [ResolvedHead(seen.frozen, seen.codes, head).blocks() for seen in (before, after)]
    for block in (("feature", "feature"), ("feature", "bias")):
        old, new = (each[block] for each in resolved)
        found[" x ".join(block)] = float((new - old).abs().sum() / old.abs().sum())
        found[f"row-centred {' x '.join(block)}"] = float((centre(new) - centre(old)).abs().max() / old.abs().max())
    return found


def _complete(seen: Seen, head: int, features: Int[Tensor, " n"]) -> Float[Tensor, "pos pos"]:
    """Everything that query features read: their products with every key feature, bias and error, uncentred."""
    frozen = seen.uncentred
    u = Arm(frozen, seen.codes).columns("query", head, features)[0] @ (seen.codes.decoder[features] @ frozen.W_q[head])
    if frozen.rotary is not None:
        u = frozen.rotary.rotate(u, torch.arange(len(u), device=u.device))
    read: Tensor = (frozen.scale * u @ frozen.vectors("key", head)[0].mT).masked_fill(~frozen.mask, 0.0)
    return read
