"""The largest effect among many channels, for nulls that ask for nothing else: bounds first, and exact numbers where
the bound says that a channel may still win.

With d_u the change of a key's score when the channel is taken out, and w the attention among the other keys,
dL = d_{s*} + log(sum_u w_u exp(-d_u)). As exp is convex, d_{s*} - m <= dL with m = sum_u w_u d_u; and as 1 - exp(-d)
is concave and 0 at 0, dL <= d_{s*} + log(1 - c m) with c = (1 - exp(-x)) / x at the change x that is farthest from 0.
So m, one matrix product for all channels, bounds every effect from both sides.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.core.coded import pair_couplings
from fra.search.channels import Effects, HeadOnArms
from fra.search.designs import ChannelSearch

_FIRST_AT_ONCE = 2
_ROUNDING_OF_FLOAT32 = 1e-3
"""Of a bound's terms: many times what they are off by."""


def mean_effect(effects: Effects, least: int = ChannelSearch.least_documents) -> Float[np.ndarray, " n"]:
    """E of each channel; -inf where it is live in fewer than `least` documents."""
    rows = effects.rows.sum(0)
    enough = (effects.rows > 0).sum(0) >= least
    return np.where(enough, effects.nats.sum(0) / np.maximum(rows, 1), -np.inf)


def best_effect(
    on: HeadOnArms,
    pairs: Int[Tensor, "n 2"],
    documents: Bool[Tensor, " n_documents"] | None = None,
    *,
    least: int = ChannelSearch.least_documents,
    at_least: float = -np.inf,
) -> float:
    """max_c E_c in nats, over chosen documents where given; -inf where no channel is live in `least` of them.

    at_least: what the caller has already; where no channel reaches it, it is what comes back.
    """
    upper = upper_bounds(on, pairs, documents, least)
    order = np.argsort(-upper, kind="stable")[: int((upper > -np.inf).sum())]
    best = at_least
    order = order[upper[order] >= best]
    first = True
    while len(order):
        # the strongest few first, then at once all that may still be above them
        some = order[:_FIRST_AT_ONCE] if first else order
        found = on.channels(pairs[torch.as_tensor(some, device=pairs.device)])
        best, first = max(best, float(mean_effect(restricted(found, documents), least).max())), False
        order = order[len(some) :]
        order = order[upper[order] >= best]
    return best


def restricted(effects: Effects, documents: Tensor | None) -> Effects:
    """Effects with other documents' sums set to zero."""
    if documents is None:
        return effects
    keep = np.asarray(documents.cpu()).astype(float)[:, None]
    return Effects(*(getattr(effects, name) * keep for name in ("nats", "attention", "contrast", "rows", "covered")))


def upper_bounds(
    on: HeadOnArms, pairs: Tensor, documents: Tensor | None, least: int = ChannelSearch.least_documents
) -> Float[np.ndarray, " n"]:
    """No E is larger than its bound; inf where there is none, -inf where too few documents have the channel live."""
    doc, pos = on.batch.row_doc, on.batch.row_pos
    q_ids, q_at = torch.unique(pairs[:, 0], return_inverse=True)
    k_ids, k_at = torch.unique(pairs[:, 1], return_inverse=True)
    used = torch.ones_like(doc, dtype=torch.bool) if documents is None else documents.to(doc.device)[doc]
    live = torch.zeros(len(doc), len(q_ids), dtype=torch.bool, device=doc.device)
    total = torch.zeros(len(pairs), dtype=torch.float64, device=doc.device)
    bounded = len(pairs) > _FIRST_AT_ONCE
    for side, arm in enumerate(on.sides):
        q = arm.columns("query", on.head, q_ids)[doc, pos] * used[:, None]
        live |= q != 0
        if not (bounded := bounded and arm.frozen.rotary is None and arm.frozen.softcap is None):
            continue
        k = arm.columns("key", on.head, k_ids)
        if not (bounded := bool((k >= 0).all())):
            continue  # changes of both signs along a row: no chord
        scaled = q[:, q_at] * pair_couplings(arm, on.head, pairs, pos[:0])[:, 0]
        own = scaled * k[doc, on.keys][:, k_at]
        mean = scaled * on.against_keys(on.weight[side], k.transpose(1, 2))[:, k_at]
        if side == 0:
            farthest = scaled * k.amax(1)[doc][:, k_at]
            chord = torch.where(farthest == 0, 1.0, -torch.expm1(-farthest) / farthest)
            mean = -torch.log1p((-chord * mean).clamp(min=-1 + 1e-7))
        slack = _ROUNDING_OF_FLOAT32 * (own.abs() + mean.abs())
        total += ((own - mean if side == 0 else mean - own) + slack).sum(0, dtype=torch.float64)
    rows = live.sum(0)[q_at]
    there = torch.zeros(len(on.batch), len(q_ids), device=doc.device).index_add_(0, doc, live.float())
    enough = (there > 0).sum(0)[q_at] >= least
    bound = total / rows.clamp(min=1) if bounded else torch.full_like(total, torch.inf)
    return np.asarray(torch.where(enough, bound.nan_to_num(nan=torch.inf), -torch.inf).cpu())
