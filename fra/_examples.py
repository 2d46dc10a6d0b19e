"""What channels look like to a person: one channel on one document, and the tokens on which channels are live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra._channels import Arms, pair_couplings


@dataclass(frozen=True)
class Example:
    """One channel of one head on one repeated document, for a person to look at."""

    pair: tuple[int, int]
    tokens: Int[np.ndarray, " pos"]
    pattern: Float[np.ndarray, "pos pos"]
    contribution: Float[np.ndarray, "pos pos"]
    """F_ij in nats."""


def example(arms: Arms, head: int, pair: Int[Tensor, " 2"]) -> Example | None:
    """The channel on the shortest repeated document in which it is live on the stripe; None where there is none."""
    batch, arm = arms.batch, arms.repeated
    q, k = arm.columns("query", head, pair[:1])[..., 0], arm.columns("key", head, pair[1:])[..., 0]
    live = (q[batch.row_doc, batch.row_pos] != 0) & (k[batch.row_doc, batch.row_key] != 0)
    documents = torch.unique(batch.row_doc[live])
    if not len(documents):
        return None
    doc = int(documents[batch.periods[documents].argmin()])
    n = 1 + 2 * int(batch.periods[doc])
    ahead = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
    G = pair_couplings(arm, head, pair[None], torch.arange(n, device=q.device))[0]
    F = q[doc, :n, None] * k[doc, None, :n] * (G if len(G) == 1 else G[ahead.clamp(min=0)])
    F = F.masked_fill(~arm.frozen.mask[:n, :n], 0.0)
    pattern = arm.frozen.pattern[doc, head, :n, :n]
    i, j = pair.tolist()
    return Example((i, j), *(np.asarray(part.cpu()) for part in (batch.tokens[doc, :n], pattern, F)))


def live_tokens(arms: Arms, pairs: Tensor, top: int = 6) -> list[dict[str, Any]]:
    """What stands where each channel is live on the stripe: query tokens, key tokens, and breadth.

    Breadth is the inverse Simpson index (1 / sum of squared shares) of the tokens on rows with i live.
    """
    doc, pos, key = arms.batch.row_doc, arms.batch.row_pos, arms.batch.row_key
    tokens = arms.batch.tokens
    found = []
    q_ids, q_at = torch.unique(pairs[:, 0], return_inverse=True)
    k_ids, k_at = torch.unique(pairs[:, 1], return_inverse=True)
    q = arms.repeated.columns("query", 0, q_ids)[doc, pos] != 0
    k = arms.repeated.columns("key", 0, k_ids)[doc, key] != 0
    for number in range(len(pairs)):
        live = q[:, q_at[number]]
        both = live & k[:, k_at[number]]
        row: dict[str, Any] = {"live_pair_share": float(both.sum() / live.sum().clamp(min=1))}
        for name, at in (("query", tokens[doc[live], pos[live]]), ("key", tokens[doc[both], key[both]])):
            ids, times = torch.unique(at, return_counts=True)
            order = times.argsort(descending=True, stable=True)[:top]
            row[name] = [(int(ids[n]), int(times[n])) for n in order]
            if name == "query":
                shares = times.double() / times.sum().clamp(min=1)
                row["breadth"] = float(1 / shares.square().sum()) if len(ids) else 0.0
                row["heaviest"] = int(ids[order[0]]) if len(ids) else -1
        found.append(row)
    return found
