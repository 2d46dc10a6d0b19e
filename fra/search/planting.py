"""Channels planted in a head: what a search must be able to find, or its finding nothing says nothing."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.coded import Arm, capped_scores, log_odds, pair_couplings
from fra.search.channels import HeadOnArms
from fra.search.designs import Plantings


class Planting:
    """One channel in one head, on the rows where it is live, with its coupling raised."""

    def __init__(self, head: HeadOnArms, pair: Int[Tensor, " 2"]) -> None:
        doc, pos = head.batch.row_doc, head.batch.row_pos
        q = [arm.columns("query", head.head, pair[:1])[doc, pos][:, 0] for arm in head.sides]
        rows = torch.nonzero((q[0] != 0) | (q[1] != 0))[:, 0]
        unit, own = [], []
        for side, arm in enumerate(head.sides):
            unit.append(q[side][rows][:, None] * arm.columns("key", head.head, pair[1:])[doc[rows], :, 0])
            ahead = (pos[rows][:, None] - torch.arange(arm.codes.shape[1], device=pos.device)).clamp(min=0)
            G = pair_couplings(arm, head.head, pair[None], torch.arange(arm.codes.shape[1], device=pos.device))[0]
            own.append(unit[side] * (G if len(G) == 1 else G[ahead]))
        self.pair = pair
        self._head, self.rows, self._unit = head, rows, unit
        self.covered = int((q[0] != 0).sum())
        """Rows of the repeated arm on which the query feature is live."""
        live = torch.cat([part[part != 0] for part in unit])
        self.size = max(float(live.abs().mean()), 1e-9) if len(live) else 1.0
        """Mean product of activations where both features are live: the unit in which a raise is sensible."""
        self._scores = [scores[rows] for scores in head.row_scores]
        # the raised channel taken out again leaves what the head has without its own channel, whatever the raise
        self._without = [self._odds(arm, s - f) for arm, s, f in zip(head.sides, self._scores, own, strict=True)]

    def _odds(self, arm: Arm, scores: Tensor) -> Tensor:
        return log_odds(capped_scores(arm, scores), self._head.keys[self.rows])

    @property
    def live_documents(self) -> int:
        """Documents with live rows."""
        return len(torch.unique(self._head.batch.row_doc[self.rows]))

    def effects(self, delta: float) -> tuple[Tensor, Tensor, Tensor]:
        """Row values of nats, attention and the head's own contrast with G_ij raised by `delta`."""
        head = self._head
        raised = [scores + delta * unit for scores, unit in zip(self._scores, self._unit, strict=True)]
        odds = [self._odds(arm, scores) for arm, scores in zip(head.sides, raised, strict=True)]
        nats = [after - before for after, before in zip(odds, self._without, strict=True)]
        attention = [a.sigmoid() - b.sigmoid() for a, b in zip(odds, self._without, strict=True)]
        moved = head.batch.row_moved[self.rows]
        there = capped_scores(head.sides[1], raised[1]).softmax(-1).gather(1, moved[:, None])[:, 0]
        contrast = odds[0].sigmoid() - torch.maximum(odds[1].sigmoid(), there)
        return nats[0] - nats[1], attention[0] - attention[1], contrast

    def means(self, delta: float) -> tuple[float, float, float]:
        """Means over the live rows of nats, attention and contrast."""
        nats, attention, contrast = self.effects(delta)
        return float(nats.mean()), float(attention.mean()), float(contrast.mean())

    def by_document(self, values: Float[Tensor, " n"]) -> Float[np.ndarray, " n_documents"]:
        """Sums of the live rows' values by document."""
        out = values.new_zeros(len(self._head.batch), dtype=torch.float64)
        return np.asarray(out.index_add_(0, self._head.batch.row_doc[self.rows], values.double()).cpu())

    def can_reach(self, bars: tuple[float, float, float], design: Plantings) -> bool:
        """Whether the largest of `design.raises` lifts nats, attention and contrast to these bars."""
        return all(m >= bar for m, bar in zip(self.means(max(design.raises) / self.size), bars, strict=True))

    def lowest(self, bars: tuple[float, float, float], least: float, design: Plantings) -> float | None:
        """The smallest raise, `least` or more, that lifts nats, attention and contrast to these bars (found to
        `design.precision` of itself); None where none of `design.raises` does.
        """

        def meets(delta: float) -> bool:
            return all(mean >= bar for mean, bar in zip(self.means(delta), bars, strict=True))

        low, high = least, None
        for delta in (least, *(nats / self.size for nats in design.raises if nats / self.size > least)):
            if meets(delta):
                high = delta
                break
            low = delta
        if high is None:
            return None
        while high - low > design.precision * abs(high):
            middle = (low + high) / 2
            low, high = (low, middle) if meets(middle) else (middle, high)
        return high
