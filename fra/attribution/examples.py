"""What a feature of head outputs looks like to a person: where it fires most, and around the source position that makes
it fire, as a row of the ledger shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.attribution.head_outputs import HeadOutputs, Live
from fra.dictionaries.codes import dictionary_hook, neuronpedia
from fra.report.pictures import FeaturePicture, Strip
from fra.report.tokens import AFTER, AROUND, BEFORE

FEATURE = "a feature where it fires most"
"""What the example is called in a row of the ledger."""


@torch.no_grad()
def feature_example(
    observed: HeadOutputs,
    sae: Any,
    tokens: Int[Tensor, "batch pos"],
    feature: int,
    text: Callable[[int], str],
    heads: Mapping[str, int | None],
    at: Live | None = None,
) -> FeaturePicture | None:
    """The feature's strongest firing on documents that were observed, as the report draws it: the tokens around it,
    shaded by activation, and, for each of `heads` (by name; None stands for all heads together), the tokens around the
    source position that contributes most through that head, shaded by contribution (direct feature attribution). None
    where it never fires behind the first position. at: the firings to choose from; all of the observed ones where None.
    """
    live = observed.live if at is None else at
    live = live.where((live.feature == feature) & (live.pos > 0))
    if not len(live):
        return None
    best = int(live.value.argmax())
    doc, pos = int(live.doc[best]), int(live.pos[best])
    length = int(observed.real[doc].sum())
    ids = [int(token) for token in tokens[doc, :length]]
    here = observed.live.where((observed.live.feature == feature) & (observed.live.doc == doc))
    activation = np.zeros(length)
    activation[here.pos.cpu().numpy()] = here.value.double().cpu().numpy()
    strips = {"fires": _strip(ids, activation, pos, BEFORE, AFTER, text)}
    one = Live(*(part[best : best + 1] for part in (live.doc, live.pos, live.feature, live.value)))
    for name, head in heads.items():
        sources = observed.sources(one, head)[0, : pos + 1].double().cpu().numpy()
        strips[f"strongest source through {name}"] = _strip(
            ids[: pos + 1], sources, int(sources.argmax()), AROUND, AROUND, text
        )
    page = neuronpedia(sae)
    picture: FeaturePicture = {
        "feature": feature,
        "dictionary": dictionary_hook(sae),
        "activation": float(live.value[best]),
        "strips": strips,
    }
    return picture if page is None else {**picture, "pages": [f"{page}/{feature}"]}


def examples_of(live: Live, n: int) -> Live:
    """The strongest firing of each feature in each document, and of these the n strongest, feature by feature."""
    order = np.lexsort((-live.value.cpu().numpy(), live.doc.cpu().numpy(), live.feature.cpu().numpy()))
    feature, doc = live.feature.cpu().numpy()[order], live.doc.cpu().numpy()[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (feature[1:] != feature[:-1]) | (doc[1:] != doc[:-1])
    order = order[first]
    order = order[np.lexsort((-live.value.cpu().numpy()[order], live.feature.cpu().numpy()[order]))]
    feature = live.feature.cpu().numpy()[order]
    starts = np.flatnonzero(np.r_[True, feature[1:] != feature[:-1]]) if len(order) else np.zeros(0, dtype=int)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    chosen = torch.from_numpy(order[rank < n]).to(live.doc.device)
    return Live(live.doc[chosen], live.pos[chosen], live.feature[chosen], live.value[chosen])


def _strip(
    ids: list[int], values: Float[np.ndarray, " pos"], at: int, before: int, after: int, text: Callable[[int], str]
) -> Strip:
    window = range(max(0, at - before), min(len(ids), at + after + 1))
    return {
        "tokens": [text(ids[k]) for k in window],
        "values": " ".join(f"{values[k]:.3g}" for k in window),
        "marked": window.index(at),
    }
