"""A swap that a reader can look at: what it changes in a head's attention, and what features say that it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from fra.report.pictures import SwapPicture, packed
from fra.search.examples import LONGEST

if TYPE_CHECKING:
    from fra.measures.scores.q22_scene import SwapScene

SWAP = "the swap that changes most, on a document"
"""What the picture is called in a row of the ledger."""


def swap_picture(
    scene: SwapScene,
    head: int,
    total: Float[np.ndarray, " n"],
    reading: int,
    factor: float,
    text: Callable[[int], str],
) -> SwapPicture | None:
    """The swap of largest `total` (squared change of attention, by swap) among the first LONGEST positions of a
    document, up to that position: the head's pattern, its change, and the change that features foretell in one of the
    readings, times `factor`. None where no swap lies so early, or none changes anything.
    """
    at = scene.swaps.at.cpu().numpy()
    early = np.where(at < LONGEST, total, 0.0)
    if not early.max(initial=0.0) > 0:
        return None
    best = int(early.argmax())
    one = scene.only(best)
    doc, position = int(one.swaps.doc[0]), int(at[best])
    n = min(LONGEST, int(one.swaps.lengths[0]))
    truth = one.truth(head)
    foretold = list(one.changes(truth, *one.predicted("features", head), centred=False))[reading]
    rows = one.swaps.rows[0].nonzero()[:, 0]

    def shown(values: Float[Tensor, "rows pos"]) -> list[str]:
        whole = values.new_zeros(one.swaps.rows.shape[1], values.shape[1])
        whole[rows] = values
        return packed(whole[:n, :n].cpu().numpy())

    tokens = one.swaps.before[0, :n].tolist()
    became = int(one.swaps.after[0, position])
    return {
        "swap": f"position {position}: {text(tokens[position])!r} becomes {text(became)!r}",
        "rows": "from the swapped position on: it, the next, and every fourth of the later ones",
        "tokens": [text(int(token)) for token in tokens],
        "maps": {
            "attention before": packed(scene.frozen.pattern[doc, head, :n, :n].cpu().numpy()),
            "its change": shown(truth.change),
            "its change as features foretell it": shown(factor * foretold),
        },
    }
