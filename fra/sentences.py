"""Documents by sentences: cutting a text, what channels do between sentences (Phi), receiver heads, suppression of a
sentence, continuations.
"""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from fra.architectures.architecture import Model
from fra.architectures.face import face
from fra.attribution.sentences import (
    answer_log_prob,
    attention_between,
    continued,
    receiver_heads,
    resample,
    vertical_scores,
)
from fra.core.sentences import Segments, Sensitivity, segments, sensitivity, sentence_starts
from fra.interventions.sentences import suppress


@face
@torch.no_grad()
def importance(model: Model, cut: Segments, answer: Int[Tensor, " n"]) -> pd.DataFrame:
    """What each sentence is worth to an answer: how much less likely it is, in nats, where the sentence is suppressed
    at all later rows. Columns segment, kind, text, nats; in the order of the document, BOS left out.
    """
    plain = answer_log_prob(model, cut.tokens, answer)
    last = len(cut)  # the answer is a segment of its own, which sees nothing of what is suppressed
    whole = Segments(
        torch.cat([cut.tokens, answer.to(cut.tokens)]),
        torch.cat([cut.segment, torch.full((len(answer),), last)]),
        (*cut.kinds, "sentence"),
        (*cut.texts, ""),
    )
    rows = []
    for number, (kind, text) in enumerate(zip(cut.kinds, cut.texts, strict=True)):
        if kind != "bos":
            with suppress(model, whole, number):
                rows.append((number, kind, text, plain - answer_log_prob(model, cut.tokens, answer)))
    return pd.DataFrame(rows, columns=["segment", "kind", "text", "nats"])


__all__ = [
    "Segments",
    "Sensitivity",
    "answer_log_prob",
    "attention_between",
    "continued",
    "importance",
    "receiver_heads",
    "resample",
    "segments",
    "sensitivity",
    "sentence_starts",
    "suppress",
    "vertical_scores",
]
