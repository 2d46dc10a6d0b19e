"""What kind of head each is: attention to the stripes of repeated random tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fra.errors import CannotLoad
from fra.induction.status import row_values
from fra.stimuli.repeated import collate, repeated_random
from fra.targets.tokens import no_tokens

if TYPE_CHECKING:
    from fra.targets.target import Target

DOCUMENTS = 8
LONGEST = 97
SHOWN = ("induction", "previous", "duplicate")


def head_scores(target: Target) -> dict[str, dict[str, float]]:
    """Mean attention of every head of the model, by name, to the induction, previous-token and duplicate-token keys on
    a few repeated documents of random tokens. Empty where the model's context is too short to repeat anything.
    """
    model = target.model
    d_vocab, special = int(model.cfg.d_vocab), [int(i) for i in target.tokenizer.all_special_ids]
    missing = no_tokens(target.tokenizer, d_vocab)
    pool = np.setdiff1d(np.setdiff1d(np.arange(d_vocab), np.arange(d_vocab)[missing]), special)
    try:
        context = min(int(model.cfg.n_ctx), LONGEST)
        batch = collate(repeated_random(DOCUMENTS, pool, context, target.bos, (target.name, "explorer")))
    except CannotLoad:
        return {}
    stripes = row_values(model, batch)[1]
    return {
        name: {stripe: float(stripes[stripe][number].mean()) for stripe in SHOWN}
        for number, name in enumerate(target.heads)
    }
