"""The terms F_ij(t, s) of chosen channels of one head, one by one: for what is not one matrix over a document, as
couplings that turn with the offset or a softcap.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.coded import Arm, pair_couplings
from fra.stimuli.repeated import Batch

AT_ONCE = 2**21
"""LiveTerms that are held at once."""


class LiveTerms(NamedTuple):
    """LiveTerms of some channels in the second-copy rows of one arm."""

    row: Int[Tensor, " n"]
    """Second-copy row and channel, wherever the channel's i is live."""
    channel: Int[Tensor, " n"]
    which: Int[Tensor, " m"]
    """Which of these each term belongs to."""
    key: Int[Tensor, " m"]
    F: Float[Tensor, " m"]
    """In float64."""


def terms_of(
    arm: Arm, head: int, batch: Batch, row_of: Int[Tensor, " batch_pos"], pairs: Int[Tensor, "n 2"]
) -> LiveTerms:
    """Every term of these channels at keys that their row sees. row_of: the second-copy row at each place of the
    flattened [batch * pos], -1 where there is none.
    """
    length = batch.tokens.shape[1]
    channel, entry = arm.codes.index.of(pairs[:, 0])
    row = row_of[arm.codes.row[entry]]
    on = row >= 0
    channel, entry, row = channel[on], entry[on], row[on]
    query = arm.coefficients("query", head, entry)
    which, key_entry = arm.codes.index.of(pairs[channel, 1], batch.row_doc[row])
    key = arm.codes.row[key_entry] % length
    seen = arm.frozen.mask[batch.row_pos[row[which]], key]
    which, key_entry, key = which[seen], key_entry[seen], key[seen]
    r, c = row[which], channel[which]
    G = pair_couplings(arm, head, pairs, torch.arange(length, device=key.device))
    G_here = G[c, 0] if G.shape[1] == 1 else G[c, batch.row_pos[r] - key]
    F = (query[which] * G_here * arm.coefficients("key", head, key_entry)).double()
    return LiveTerms(row, channel, which, key, F)


def few_at_once(
    arm: Arm, batch: Batch, row_of: Int[Tensor, " batch_pos"], pairs: Int[Tensor, "n 2"]
) -> Iterator[Int[Tensor, "m 2"]]:
    """The pairs in their order, as many at a time as have about AT_ONCE terms."""
    doc = arm.codes.row // batch.tokens.shape[1]
    of_row = row_of[arm.codes.row] >= 0
    live = []
    for column, entries in ((0, of_row), (1, torch.ones_like(of_row))):
        ids, at = torch.unique(pairs[:, column], return_inverse=True)
        place = torch.full((len(arm.codes.decoder),), -1, device=ids.device)
        place[ids] = torch.arange(len(ids), device=ids.device)
        slot = place[arm.codes.feature]
        some = entries & (slot >= 0)
        count = torch.bincount(slot[some] * len(batch) + doc[some], minlength=len(ids) * len(batch))
        live.append(count.view(len(ids), len(batch)).double()[at])
    group = (live[0] * live[1]).sum(1).cumsum(0) // AT_ONCE
    _, sizes = torch.unique_consecutive(group, return_counts=True)
    yield from torch.split(pairs, sizes.tolist())
