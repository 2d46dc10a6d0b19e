"""Documents at one layer, and the model's output on the rows of either copy: what a removal is read by."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.interventions import attach, scores
from fra.interventions.downstream import Downstream, Head, Scene
from fra.stimuli.repeated import Batch

if TYPE_CHECKING:
    from fra.targets.target import Target

MEASURES = ("logit", "loss", "KL")
"""Fall of the next token's logit (less the mean of all logits, which softmax ignores); rise of its loss, nats; KL of
the output from what it was, nats.
"""
LOGIT, LOSS, KL = map(MEASURES.index, ("logit", "loss", "KL"))
COPIES = ("second copy", "first copy")
SECOND, FIRST = map(COPIES.index, ("second copy", "first copy"))


class BatchPart:
    """Some documents of a batch at one layer."""

    def __init__(self, target: Target, batch: Batch, documents: Sequence[int], layer: int) -> None:
        index = torch.tensor(documents)
        device = next(target.model.parameters()).device
        periods = batch.periods[index]
        self.tokens = batch.tokens[index, : 2 * int(periods.max()) + 1].to(device)
        self.periods: Int[Tensor, " batch"] = periods.to(device)
        _, sae = target.dictionary_for(layer)
        self.scene = Scene(target.model, sae, self.tokens, layer)
        at = torch.arange(self.tokens.shape[1], device=device)
        self.copies: Bool[Tensor, "copies batch pos"] = torch.stack(
            [
                (at > self.periods[:, None]) & (at <= 2 * self.periods[:, None]),
                (at > 0) & (at <= self.periods[:, None]),
            ]
        )
        """Which positions belong to which of COPIES: neither BOS nor padding does."""
        back = at[:, None] - at
        self.stripe: Bool[Tensor, "batch pos pos"] = (back == self.periods[:, None, None] - 1) & self.copies[SECOND][
            ..., None
        ]
        """Entries (t, s*)."""

    def share(self, head: int, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "batch pos pos"]:
        """What these channels add to the head's scores."""
        arm = self.scene.arm
        return scores.channel_share(pairs.to(arm.frozen.x.device))(arm, head)

    def mean_output(self, head: Head) -> Float[Tensor, " d_head"]:
        """The head's mean output over all positions but BOS and padding."""
        return head.z[self.copies.any(0)].mean(0)


class Reader:
    """Reads MEASURES on the rows of a part, against what the model does when nothing is changed."""

    @torch.no_grad()
    def __init__(self, part: BatchPart, copies: Sequence[str] = COPIES) -> None:
        self.down: Downstream = part.scene.down
        self.shape = (len(part.periods), len(copies), len(MEASURES))
        rows = [
            (d, c, t)
            for d, p in enumerate(part.periods.tolist())
            for c, name in enumerate(copies)
            for t in copy_rows(p, name)
        ]
        doc, copy, pos = torch.tensor(rows, device=part.tokens.device).T
        self.rows: Float[np.ndarray, "n_documents copies"] = np.zeros(self.shape[:2])
        np.add.at(self.rows, (doc.cpu().numpy(), copy.cpu().numpy()), 1.0)
        self.doc, self.pos, self.cell = doc, pos, doc * len(copies) + copy
        self.next = part.tokens[doc, pos + 1]
        logits = self.down.logits(doc, pos).float()
        self.clean = logits.log_softmax(-1)
        self.logit = self._own(logits) - logits.mean(-1)

    def _own(self, values: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
        return values.gather(1, self.next[:, None])[:, 0]

    @torch.no_grad()
    def read(self, *changes: attach.Intervention) -> Float[np.ndarray, "n_documents copies measures"]:
        """Sums by document and copy, under these interventions."""
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            logits = self.down.logits(self.doc, self.pos).float()
        after = logits.log_softmax(-1)
        fall = self.logit - (self._own(logits) - logits.mean(-1))
        rise = self._own(self.clean) - self._own(after)
        kl = (self.clean.exp() * (self.clean - after)).sum(-1)
        by_name = {"logit": fall, "loss": rise, "KL": kl}
        values = torch.stack([by_name[name] for name in MEASURES], dim=1).double()
        sums = values.new_zeros(self.shape[0] * self.shape[1], self.shape[2])
        return np.asarray(sums.index_add_(0, self.cell, values).view(self.shape).cpu())


def copy_rows(period: int, copy: str) -> range:
    """Rows of a copy of the passage that have a next token in the same copy: as many in the one as in the other."""
    return range(period + 1, 2 * period) if copy == COPIES[SECOND] else range(1, period)
