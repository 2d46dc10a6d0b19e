"""What the engine is measured against: the seeds' own way, written in good faith.

One small product for each of the n(n+1)/2 pairs of positions, added into a table (the reference function of the
project's founding document computes one such product, and proposes it for every pair). In its favour: entries are
projected once, tables hold live features alone, and the strongest are taken from a table by one topk.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fra._census.corpus import Corpus
from fra._census.observe import Layer


def channels(
    layer: Layer, corpus: Corpus, head: int, reduces: Sequence[str], n: int, offset: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Values and flat indices, into live by live features, of the n strongest channels of one head on one document."""
    live, slot = torch.unique(corpus.feature.long(), return_inverse=True)
    q = (layer.directions("query", head, live))[slot] * corpus.value[:, None]
    k = (layer.directions("key", head, live))[slot] * corpus.value[:, None]
    n_pos = int(corpus.length[0])
    if layer.rotary is not None:
        pos = torch.repeat_interleave(torch.arange(n_pos), corpus.per_row.long())
        q, k = layer.rotary.rotate(q, pos), layer.rotary.rotate(k, pos)
    bounds = corpus.entry_start.tolist()
    q_at = [q[a:b] for a, b in pairwise(bounds)]
    k_at = [k[a:b].T for a, b in pairwise(bounds)]
    slot_at = [slot[a:b] for a, b in pairwise(bounds)]
    row_at = [slots[:, None] * len(live) for slots in slot_at]
    tables = {name: torch.zeros(len(live) ** 2) for name in reduces}
    for t in range(n_pos):
        for s in range(t + 1) if offset is None else range(max(0, t - offset), t - offset + 1):
            terms = torch.mm(q_at[t], k_at[s]).view(-1)
            cells = (row_at[t] + slot_at[s]).view(-1)
            for name, table in tables.items():
                add = terms if name == "sum" else terms.abs() if name == "abs" else torch.ones_like(terms)
                table.index_add_(0, cells, add)
    found = {}
    for name, table in tables.items():
        strongest = table.abs().topk(n).indices
        found[name] = table[strongest], strongest
    return found
