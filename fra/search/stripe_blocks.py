"""Which products of features, bias and error make a head's score at the induction stripe."""

from __future__ import annotations

import torch
from torch import Tensor

from fra.core.frozen import Side
from fra.search.channels import HeadOnArms


def stripe_blocks(on_arms: HeadOnArms) -> dict[str, float]:
    """The head's row-centred stripe score, repeated less control, split into the nine blocks of features, bias and
    error.

    C(t) = S(t,s*) - sum_{u != s*} w_u S(t,u) with w the attention over the other keys: to first order the log-odds of
    the induction key.
    """
    doc, pos, head = on_arms.batch.row_doc, on_arms.batch.row_pos, on_arms.head
    total: dict[str, float] = {}
    for sign, arm, scores in zip((1, -1), on_arms.sides, on_arms.capped, strict=True):
        frozen, codes = arm.frozen, arm.codes
        weight = scores.scatter(1, on_arms.keys[:, None], -torch.inf).softmax(-1).to(frozen.x)
        parts: dict[str, list[Tensor]] = {"query": [], "key": []}
        batch, length = codes.shape
        rows = torch.arange(batch * length, device=doc.device)
        inputs = (frozen.x - codes.bias - codes.error, codes.bias, codes.error)
        sides: tuple[Side, Side] = ("query", "key")
        for side in sides:
            W, b = frozen.weights(side, head)
            for number, part in enumerate(inputs):
                placed = frozen.place(side, head, part.flatten(0, 1) @ W, rows)
                if number == 1:
                    placed = placed + frozen.place(side, head, b.expand(len(rows), -1), rows, scaled=False)
                parts[side].append(placed.view(batch, length, -1))
        for a, query in zip("fbe", parts["query"], strict=True):
            for c, key in zip("fbe", parts["key"], strict=True):
                own = key[doc, on_arms.keys]
                other = torch.cat(
                    [w @ key[n] for n, w in enumerate(torch.split(weight, on_arms.batch.periods.tolist()))]
                )
                value = frozen.scale * (query[doc, pos] * (own - other)).sum(-1)
                total[a + c] = total.get(a + c, 0.0) + sign * float(value.mean())
    return total
