"""Token-level induction: stripes of an attention pattern, the contrast of every head, and which heads are TIHs.

Rows are those of the second copy of a repeated document (fra.stimuli). Keys of a row t with period P: induction `t - P
+ 1`, duplicate token `t - P`, previous token `t - 1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fra.architectures.passes import seen
from fra.core.weights import Model
from fra.dictionaries.hooks import LayerHooks
from fra.errors import FraError
from fra.induction.designs import TokenInduction
from fra.search.channels import few_documents
from fra.statistics.stats import ClusterMeans, by_source, seed_of
from fra.stimuli.repeated import Batch

STRIPES = ("induction", "duplicate", "previous", "after", "before")
_DOCUMENTS_AT_ONCE = 32
PATTERN_BYTES = 2**28
"""Of the patterns of all layers that are held at once."""


@torch.no_grad()
def patterns(model: Model, tokens: Tensor) -> Float[Tensor, "n_layers batch n_heads q_pos k_pos"]:
    """The model's own attention patterns of every layer.

    Raises FraError where the model has no hook_pattern.
    """
    names = [LayerHooks(layer).pattern for layer in range(model.cfg.n_layers)]
    missing = [name for name in names if name not in model.hook_dict]
    if missing:
        raise FraError(f"the model has no hook {missing[0]}: its attention patterns cannot be read")
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(tokens), _DOCUMENTS_AT_ONCE):
        some = tokens[start : start + _DOCUMENTS_AT_ONCE]
        got = seen(model, some, len(names) - 1, dict(zip(names, names, strict=True)))
        parts.append(torch.stack([got[name].float().to(device) for name in names]))  # layers may be on several
    return torch.cat(parts, dim=1)


def stripe_attention(
    pattern: Float[Tensor, "*heads batch q_pos k_pos"], batch: Batch
) -> dict[str, Float[Tensor, "*heads n_rows"]]:
    """Attention of every second-copy row to the keys of each of STRIPES, and what a uniform row would give (`uniform`).

    Induction is the token-level induction score of Olsson et al. (2022); `after` and `before` are the keys next to the
    induction key. A pattern that lies wholly on one stripe scores 1 there and 0 on the others.
    """
    doc, pos, key = batch.row_doc, batch.row_pos, batch.row_key
    keys = {"induction": key, "duplicate": key - 1, "previous": pos - 1, "after": key + 1, "before": key - 2}
    found = {name: pattern[..., doc, pos, at.clamp(min=0)] for name, at in keys.items()}
    found["uniform"] = (1.0 / (pos + 1)).expand(found["induction"].shape)
    return found


def contrast(
    repeated: Float[Tensor, "*heads batch q_pos k_pos"],
    control: Float[Tensor, "*heads batch q_pos k_pos"],
    batch: Batch,
) -> Float[Tensor, "*heads n_rows"]:
    """A_repeated(t, s*) less the larger of the control's attention at s* and at the key that now holds the token of
    s*.
    """
    doc, pos = batch.row_doc, batch.row_pos
    here = control[..., doc, pos, batch.row_key]
    moved = control[..., doc, pos, batch.row_moved]
    return repeated[..., doc, pos, batch.row_key] - torch.maximum(here, moved)


def row_sums(values: Float[Tensor, "*heads n_rows"], batch: Batch) -> Float[np.ndarray, "n_documents *heads"]:  # noqa: F821
    """Sums of row values by document."""
    moved = values.movedim(-1, 0).double()
    out = moved.new_zeros(len(batch), *moved.shape[1:])
    return np.asarray(out.index_add_(0, batch.row_doc.to(out.device), moved).cpu())


@dataclass(frozen=True)
class HeadStatus:
    """What a head is on one stimulus, at token level."""

    head: str
    status: str
    """'TIH', 'not a TIH' or 'undecided'."""
    contrast: float
    lower: float
    upper: float
    stripes: Mapping[str, float]
    """Mean attention on each of STRIPES and `uniform`, repeated documents."""


def classify(means: ClusterMeans, design: TokenInduction) -> list[tuple[str, float, float]]:
    """Status of every head, from the contrasts of all, with the bounds that it rests on."""
    return [
        (
            "TIH" if low >= design.tih_at_least else "not a TIH" if high <= design.not_tih_at_most else "undecided",
            low,
            high,
        )
        for low, high in zip(means.lower(design.level).tolist(), means.upper(design.level).tolist(), strict=True)
    ]


def row_values(
    model: Model, batch: Batch
) -> tuple[Float[Tensor, "heads n_rows"], dict[str, Float[Tensor, "heads n_rows"]]]:
    """(Contrast, attention on each of STRIPES and `uniform`) of every head of the model, of a few documents at a time:
    the patterns of many layers and heads do not fit beside one another.
    """
    size = model.cfg.n_layers * model.cfg.n_heads * 4 * batch.tokens.shape[1] ** 2
    at_once = max(1, min(_DOCUMENTS_AT_ONCE, PATTERN_BYTES // size))
    contrasts: list[Tensor] = []
    on_stripes: dict[str, list[Tensor]] = {}
    for some in torch.split(torch.arange(len(batch)), at_once):
        few = few_documents(batch, some)
        sides = [patterns(model, tokens).transpose(1, 2).flatten(0, 1).cpu() for tokens in (few.tokens, few.control)]
        contrasts.append(contrast(sides[0], sides[1], few))
        for name, value in stripe_attention(sides[0], few).items():
            on_stripes.setdefault(name, []).append(value)
    return torch.cat(contrasts, dim=-1), {name: torch.cat(parts, dim=-1) for name, parts in on_stripes.items()}


def head_status(
    model: Model, batch: Batch, *, target: str, stimulus: str, design: TokenInduction | None = None
) -> dict[str, HeadStatus]:
    """Status of every head by its contrast on the status documents, as `TokenInduction` says.

    Bounds are one-sided, simultaneous over all heads of the model (max-T), sources resampled.
    """
    contrasts, on_stripes = row_values(model, batch)
    n_heads = model.cfg.n_heads
    sums = row_sums(contrasts, batch)
    counts = np.repeat(batch.periods.numpy()[:, None].astype(float), sums.shape[1], axis=1)
    means = ClusterMeans(
        by_source(sums, batch.sources), by_source(counts, batch.sources), seed=seed_of(target, stimulus, "status")
    )
    stripes = {name: value.mean(-1) for name, value in on_stripes.items()}
    found = {}
    for number, (status, low, high) in enumerate(classify(means, design or TokenInduction())):
        name = f"L{number // n_heads}H{number % n_heads}"
        own = {stripe: float(value[number]) for stripe, value in stripes.items()}
        found[name] = HeadStatus(name, status, float(means.estimate[number]), low, high, own)
    return found
