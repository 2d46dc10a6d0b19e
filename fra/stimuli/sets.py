"""Documents of a target for the claims about induction, in four disjoint sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fra.core.weights import Model
from fra.errors import FraError
from fra.statistics.unseen import sources_for
from fra.stimuli import repeated
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.sources import disjoint
from fra.targets.tokens import no_tokens
from fra.verdicts.claim import Claim

if TYPE_CHECKING:
    from fra.targets.target import Target


STIMULI = ("repeated_random", "repeated_natural")


def documents(target: Target, stimulus: str, design: RepeatedSets) -> dict[str, repeated.Batch]:
    """The four disjoint sets of one stimulus family, seeded from (target, stimulus).

    The status set has as many sources as bounds that hold for all of the model's heads together need, where its share
    is too small for that: of random text further documents, of natural text more of the sources that there are.

    Raises FraError for an unknown stimulus, too little text, or too short a context.
    """
    model = target.model
    context = min(int(model.cfg.n_ctx), design.longest)
    seed_parts = (target.name, stimulus)
    numbers = design.sizes(made=stimulus == "repeated_random")
    needed = sources_for(Claim.level, model.cfg.n_layers * model.cfg.n_heads)
    further: list[repeated.RepeatedDocument] = []
    if stimulus == "repeated_random":
        pool = repeated.token_pool(mean_prediction(model, target), _special_ids(target))
        made = repeated.repeated_random(sum(numbers), pool, context, target.bos, seed_parts)
        more = design.status * -(-needed // design.status)
        further = repeated.repeated_random(more, pool, context, target.bos, (*seed_parts, "status"), "status")
    elif stimulus == "repeated_natural":
        texts = [
            (doc.source, np.asarray(target.encode(doc.text, context), dtype=np.int64)) for doc in target.documents()
        ]
        made = repeated.repeated_natural(texts, context, target.bos, seed_parts)
    else:
        raise FraError(f"there is no stimulus {stimulus!r} with a repeat: use {' or '.join(STIMULI)}")
    sizes = dict(zip(SETS, numbers, strict=True))
    least = {} if further else {"status": needed}
    parts = disjoint([doc.source for doc in made], sizes, MEASURED, (*seed_parts, "split"), least)
    found = {name: [made[n] for n in part] for name, part in parts.items()}
    while further and len(found["status"]) < needed:
        found["status"] += further[: design.status]
        further = further[design.status :]
    return {name: repeated.Batch.of(own) for name, own in found.items()}


def _special_ids(target: Target) -> list[int]:
    return [int(i) for i in target.tokenizer.all_special_ids]


@torch.no_grad()
def mean_prediction(model: Model, target: Target) -> Float[np.ndarray, " d_vocab"]:
    """The model's mean next-token distribution on some of its target's documents: a smooth estimate of token
    frequency. NaN for ids that are no tokens (an embedding may have more rows than the tokenizer has tokens).
    """
    total: Tensor | None = None
    for doc in target.documents()[:: max(1, len(target.documents()) // repeated.MADE.frequency_documents)]:
        longest = min(int(model.cfg.n_ctx), repeated.MADE.frequency_tokens)
        start = [] if target.bos is None else [target.bos]
        ids = target.encode(doc.text, longest - 1)
        tokens = torch.tensor([start + ids], device=next(model.parameters()).device)
        part = model(tokens)[0].float().softmax(-1).sum(0)
        total = part if total is None else total + part
    assert total is not None
    found = np.asarray(total.cpu().double())
    found[no_tokens(target.tokenizer, len(found))] = np.nan
    return found


SETS = ("status", "discovery", "confirmation", "sets")
"""Four disjoint sets: which heads are TIHs; choosing channels; every quoted number; the effect of sets."""
MEASURED = ("status", "confirmation", "sets")
