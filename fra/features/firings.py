"""Where features fire, gathered by feature."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fra._census.corpus import Corpus
from fra.attribution.head_outputs import Live

BINS = 16


def by_feature(live: Live) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each feature that fires: documents, positions and activations, in order of document and position."""
    feature = live.feature.cpu().numpy()
    order = np.argsort(feature, kind="stable")
    ids, starts = np.unique(feature[order], return_index=True)
    columns = [np.split(getattr(live, f).cpu().numpy()[order], starts[1:]) for f in ("doc", "pos", "value")]
    return {int(i): own for i, own in zip(ids, zip(*columns, strict=True), strict=True)}


def histogram(values: np.ndarray) -> tuple[list[int], float]:
    """Firings by activation in equal bins from 0 to the largest, and the upper end of the first bin."""
    counts, edges = np.histogram(values, bins=BINS, range=(0.0, float(values.max())))
    return counts.tolist(), float(edges[1])


def live_of(corpus: Corpus) -> Live:
    """The positive entries of a corpus, each document by its number."""
    row = torch.repeat_interleave(torch.arange(len(corpus.per_row)), corpus.per_row.cpu().long())
    doc, pos = _places(corpus)
    live = Live(corpus.number[doc][row], pos[row], corpus.feature.cpu().long(), corpus.value.cpu())
    return live.where(live.value > 0)


def without_first_positions(corpus: Corpus) -> Corpus:
    """The corpus as if nothing were live on the first position of each document, which is often a sink."""
    _, pos = _places(corpus)
    kept_row = (pos > 0).to(corpus.device)
    kept = torch.repeat_interleave(kept_row, corpus.per_row.long())
    tensors: dict[str, Tensor | None] = dict.fromkeys(("gain_q", "gain_k", "inputs"))
    tensors |= corpus.tensors()
    tensors |= {"per_row": corpus.per_row * kept_row, "feature": corpus.feature[kept], "value": corpus.value[kept]}
    return Corpus(**tensors)  # type: ignore[arg-type]


def _places(corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Document and position of each row."""
    length = corpus.length.long()
    doc = torch.arange(len(length)).repeat_interleave(length)
    return doc, torch.arange(len(doc)) - torch.tensor(corpus.row_start[:-1])[doc]
