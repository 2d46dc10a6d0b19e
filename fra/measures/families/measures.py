"""What the claims about an induction head's family of features measure on documents that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.architectures.known import architecture_of
from fra.attribution.head_outputs import HeadOutputs, Live
from fra.core.weights import Model
from fra.dictionaries.encoder import encode
from fra.dictionaries.hooks import LayerHooks
from fra.interventions.attach import Hook
from fra.interventions.heads import set_output
from fra.interventions.patching import ablate_features, losses, readout
from fra.statistics.stats import Floats
from fra.stimuli.padding import Texts

_PAIRS_AT_ONCE = 16
_DOCUMENTS_AT_ONCE = 32
_ROWS_AT_ONCE = 1024


def firing(observed: HeadOutputs, features: Int[np.ndarray, " n"]) -> tuple[Live, Int[Tensor, " n_live"]]:
    """Where these features fire, BOS left out, and which of them (index into `features`, which are distinct)."""
    live = observed.live.where(observed.live.pos > 0)
    of = torch.full((observed.encoder.d_sae,), -1, dtype=torch.long, device=live.feature.device)
    of[torch.as_tensor(features, device=of.device)] = torch.arange(len(features), device=of.device)
    mine = of[live.feature] >= 0
    return live.where(mine), of[live.feature[mine]]


def by_document(values: Tensor, doc: Tensor, n: int) -> Floats:
    """Sums of entry values by document."""
    out = torch.zeros(n, dtype=torch.float64, device=values.device).index_add_(0, doc, values.double())
    return np.asarray(out.cpu())


def head_means(observed: HeadOutputs) -> Float[Tensor, "n_heads d_head"]:
    """Mean output of every head over real positions but BOS."""
    return observed.z[:, 1:][observed.real[:, 1:]].mean(0)


@torch.no_grad()
def turned_off(
    dictionary: Any,
    observed: HeadOutputs,
    at: Live,
    head: int,
    value: Float[Tensor, " d_head"] | Callable[[Tensor], Tensor],
) -> Bool[Tensor, " n_live"]:
    """Whether each of these entries no longer fires when the head's output is `value` there, or what `value` makes of
    the row's head outputs [n, n_heads, d_head].
    """
    pos = observed.z.shape[1]
    rows, where = torch.unique(at.doc * pos + at.pos, return_inverse=True)
    found = []
    for some in torch.split(rows, _ROWS_AT_ONCE):
        z = observed.z.flatten(0, 1)[some].clone()
        z[:, head] = value(z) if callable(value) else value
        found.append(encode(dictionary, z) == 0)
    return torch.cat(found)[where, at.feature] if len(rows) else torch.zeros(0, dtype=torch.bool)


def equal_change(
    W_O: Float[Tensor, "n_heads d_head d_model"],
    z: Float[Tensor, "n n_heads d_head"],
    means: Float[Tensor, "n_heads d_head"],
    head: int,
    other: int,
) -> Float[Tensor, "n d_head"]:
    """What to put in place of the other head's output on each row: moved towards its mean, and past it where need be,
    until what it writes to the residual stream has changed by as much (in norm) as mean ablation changes what `head`
    writes. Nothing moves where the other head is at its mean.
    """
    ways = means[[head, other]] - z[:, [head, other]]
    sizes = torch.einsum("nhd,hdm->nhm", ways, W_O[[head, other]].to(ways)).norm(dim=-1)
    far = torch.where(sizes[:, 1] > 0, sizes[:, 0] / sizes[:, 1].clamp(min=torch.finfo(sizes.dtype).tiny), 0.0)
    return z[:, other] + far[:, None] * ways[:, 1]


@dataclass(frozen=True)
class PathChanges:
    """Changes of the next token's loss (nats) when a feature is ablated wherever it fires in a document, [n_pairs, pos
    - 1]; zero where there is no next token.
    """

    total: Float[Tensor, "n_pairs pos_less_1"]
    mlp: Float[Tensor, "n_pairs pos_less_1"]
    """Through the layer's own MLP alone."""
    direct: Float[Tensor, "n_pairs pos_less_1"]
    """Through the last residual stream alone."""
    fires: Bool[Tensor, "n_pairs pos_less_1"]
    real: Bool[Tensor, "n_pairs pos_less_1"]
    next_token: Int[Tensor, "n_pairs pos_less_1"]


@dataclass(frozen=True)
class Ablated:
    """What ablating some features did, pair by pair."""

    changes: PathChanges
    doc: Int[Tensor, " n_pairs"]
    right: Bool[Tensor, "n_pairs pos_less_1"]
    """Whether the next token is that of the pair's family feature."""
    n_docs: int

    def sums(self, values: Tensor) -> Floats:
        """Sums by document of a value of every pair and position."""
        return by_document(values.sum(1), self.doc, self.n_docs)


@torch.no_grad()
def path_changes(
    model: Model,
    dictionary: Any,
    layer: int,
    live: Live,
    texts: Texts,
    docs: Int[np.ndarray, " n_pairs"],
    features: Int[np.ndarray, "n_pairs n_arms"],
) -> list[PathChanges]:
    """One feature for each arm ablated in each pair's document: in the model, into the MLP alone, into the final
    residual alone. -1: none in this arm, which then changes nothing.

    As `fra.patching.into_mlp` and `into_final`, for many pairs at a time: the clean pass serves all arms, what one pass
    under the ablation shows serves both paths, and the direct one is taken through the final norm and the unembedding
    without a pass.
    """
    home = next(model.parameters()).device
    which, ids = torch.as_tensor(docs, device=home), torch.as_tensor(features, device=home)
    tokens, lengths = texts.tokens.to(home), torch.as_tensor(texts.lengths, device=home)
    real = texts.real.to(home)[which, 1:]
    shape = (ids.shape[1], len(ids), tokens.shape[1] - 1)
    total, mlp, direct = (torch.zeros(shape, device=home) for _ in range(3))
    last = LayerHooks(architecture_of(model).n_layers - 1).resid_post
    mid, out = LayerHooks(layer).resid_post, LayerHooks(layer).mlp_out
    with_mlp = not getattr(model.cfg, "attn_only", False)
    names = list(dict.fromkeys([mid, last, *([out] if with_mlp else [])]))

    def run(rows: Tensor, hooks: Sequence[Hook]) -> tuple[Tensor, dict[str, Tensor]]:
        with model.hooks(fwd_hooks=list(hooks)):
            logits, cache = model.run_with_cache(rows, names_filter=names)
        return torch.as_tensor(logits), {name: cache[name] for name in names}

    def behind(logits: Tensor, at_end: Tensor, delta: Tensor) -> Tensor:
        """Logits with `delta` added to the last residual stream: read out anew where it is not zero."""
        moved = delta.abs().amax(-1) > 0
        read = readout(model, torch.stack([at_end[moved], (at_end + delta)[moved]]))
        found = logits.clone()
        found[moved] += read[1] - read[0]
        return found

    for some in torch.split(torch.argsort(lengths[which], stable=True), _PAIRS_AT_ONCE):
        rows = tokens[which[some], : int(lengths[which[some]].max())]
        width = rows.shape[1] - 1
        clean_logits, clean = run(rows, [])
        before = losses(clean_logits, rows)
        for arm in range(ids.shape[1]):
            has = torch.nonzero(ids[some, arm] >= 0)[:, 0]
            if not len(has):
                continue
            here, own = some[has], rows[has]
            logits, changed = run(own, ablate_features(model, ids[here, arm][:, None], dictionary).hooks)
            total[arm, here, :width] = losses(logits, own) - before[has]
            delta = changed[mid] - clean[mid][has]
            if with_mlp:
                delta = delta - (changed[out] - clean[out][has])
                if mid == last:  # nothing stands behind this MLP but the readout
                    patched = behind(clean_logits[has], clean[last][has], changed[out] - clean[out][has])
                else:
                    patched = model.run_with_hooks(own, fwd_hooks=[(out, lambda _, hook, new=changed[out]: new)])
                mlp[arm, here, :width] = losses(patched, own) - before[has]
            straight = behind(clean_logits[has], clean[last][has], delta)
            direct[arm, here, :width] = losses(straight, own) - before[has]
    fires = torch.zeros(shape, dtype=torch.bool, device=home)
    for number, doc in enumerate(docs.tolist()):
        there = live.where(live.doc == doc)
        for arm in range(ids.shape[1]):
            pos = there.pos[there.feature == ids[number, arm].to(there.feature)]
            fires[arm, number, pos[pos < shape[2]].to(home)] = True
    keep, following = real.to(total.dtype), tokens[which, 1:]
    return [
        PathChanges(total[arm] * keep, mlp[arm] * keep, direct[arm] * keep, fires[arm] & real, real, following)
        for arm in range(ids.shape[1])
    ]


@torch.no_grad()
def losses_with(
    model: Model, texts: Texts, layer: int, head: int | None, value: Tensor | None
) -> Float[Tensor, "batch pos_less_1"]:
    """Losses on documents with one head's output replaced by `value`, or none; zero on padding."""
    hooks: Any = [] if head is None or value is None else set_output(model, value, layer=layer, head=head).hooks
    tokens = texts.tokens.to(next(model.parameters()).device)
    parts = []
    for some in torch.split(tokens, _DOCUMENTS_AT_ONCE):
        with model.hooks(fwd_hooks=hooks):
            parts.append(losses(model(some), some))
    return torch.cat(parts) * texts.real[:, 1:].to(tokens.device)


def unseen_rows(batch_tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Rows whose token has not stood before in the document: token induction has nothing to match there."""
    pos = batch_tokens.shape[1]
    earlier = torch.ones(pos, pos, dtype=torch.bool, device=batch_tokens.device).tril(-1)
    return ~((batch_tokens[:, :, None] == batch_tokens[:, None, :]) & earlier).any(-1)
