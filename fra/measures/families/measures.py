"""What the claims about an induction head's family of features measure on documents that chose nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from fra.measures.families.families import LayerFamilies
from fra.verdicts.stats import Floats, seed_of

PAIRS = 48
"""(Document, feature) pairs whose ablation is run through the model, for a head's family and for its matches."""
_PAIRS_AT_ONCE = 16
_DOCUMENTS_AT_ONCE = 32


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
def turned_off(layer: LayerFamilies, at: Live, head: int, value: Float[Tensor, " d_head"]) -> Bool[Tensor, " n_live"]:
    """Whether each of these entries no longer fires when the head's output is `value` at its position."""
    z = layer.observed.z
    pos = z.shape[1]
    rows, where = torch.unique(at.doc * pos + at.pos, return_inverse=True)
    changed = z.flatten(0, 1)[rows].clone()
    changed[:, head] = value
    found = []
    for start in range(0, len(rows), 1024):
        found.append(encode(layer.dictionary, changed[start : start + 1024]) == 0)
    if not found:
        return torch.zeros(0, dtype=torch.bool)
    return torch.cat(found)[where, at.feature]


def strict_induction(
    tokens: Int[Tensor, "batch pos"], wanted: Int[np.ndarray, " n"]
) -> Iterator[Bool[Tensor, "batch pos"]]:
    """For each wanted token B: the rows t whose token stood before at some u < t with B at u + 1 ("A B ... A")."""
    pos = tokens.shape[1]
    earlier = torch.ones(pos, pos, dtype=torch.bool, device=tokens.device).tril(-1)
    same = (tokens[:, :, None] == tokens[:, None, :]) & earlier  # [batch, t, u]
    following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1)
    for token in wanted.tolist():
        yield (same & (following == token)[:, None]).any(-1)


@dataclass(frozen=True)
class Specificity:
    """Activations against a proxy, by document; activations in units of the feature's 80th discovery percentile."""

    upper: Floats
    upper_right: Floats
    upper_permuted: Floats
    """Expected number of upper entries that the proxy of another document which has the position would call right."""
    mass: Floats
    mass_right: Floats
    wanted: Floats
    """Rows of the proxy."""
    missed: Floats
    """Of them, those on which the feature does not fire."""
    precision_by_fifth: list[float]
    """By fifths of the discovery activations, weakest first."""
    correlation: float
    """Mean over features of Pearson's correlation of activation and proxy over all rows."""


def specificity(
    layer: LayerFamilies, features: Int[np.ndarray, " n"], proxies: Sequence[Bool[Tensor, "batch pos"]]
) -> Specificity:
    """Each feature against its proxy, thresholds from discovery documents."""
    seen, n = layer.observed, len(layer.documents)
    cuts = _fifths(layer.found, features).to(seen.z.device)
    at, which = firing(seen, features)
    rows = seen.real.clone()
    rows[:, 0] = False
    proxy = torch.stack([p.to(rows.device) & rows for p in proxies])  # [n_features, batch, pos]
    right = proxy[which, at.doc, at.pos].double()
    elsewhere = (rows.sum(0)[at.pos] - 1).clamp(min=1)  # other documents that have this position
    others = (proxy.sum(1)[which, at.pos] - right) / elsewhere
    strength = at.value.double() / cuts[which, 3].clamp(min=1e-12)
    fifth = (at.value.double()[:, None] >= cuts[which] * (1 - 1e-6)).sum(1)  # equal activations are all upper
    upper = (fifth == 4).double()
    fires = torch.zeros_like(proxy)
    fires[which, at.doc, at.pos] = True
    missed = (proxy & ~fires).sum((0, 2)).double()
    level = [float(right[fifth == k].mean()) if bool((fifth == k).any()) else float("nan") for k in range(5)]
    every, correlations = int(rows.sum()), []
    for k in range(len(features)):
        own = which == k
        x, y = strength[own], right[own]
        wanted = float(proxy[k].sum())
        sxx = float(x.square().sum()) - float(x.sum()) ** 2 / every
        syy = wanted - wanted**2 / every
        if sxx > 0 and syy > 0:
            correlations.append((float((x * y).sum()) - float(x.sum()) * wanted / every) / (sxx * syy) ** 0.5)
    return Specificity(
        upper=by_document(upper, at.doc, n),
        upper_right=by_document(upper * right, at.doc, n),
        upper_permuted=by_document(upper * others, at.doc, n),
        mass=by_document(strength, at.doc, n),
        mass_right=by_document(strength * right, at.doc, n),
        wanted=np.asarray(proxy.sum((0, 2)).double().cpu()),
        missed=np.asarray(missed.cpu()),
        precision_by_fifth=level,
        correlation=float(np.mean(correlations)) if correlations else float("nan"),
    )


def _fifths(found: HeadOutputs, features: Int[np.ndarray, " n"]) -> Float[Tensor, "n 4"]:
    """20th to 80th percentiles of each feature's activations on discovery documents."""
    at, which = firing(found, features)
    at_share = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    rows = [at.value[which == k].double().cpu() for k in range(len(features))]
    return torch.stack([row.quantile(at_share) if len(row) else torch.zeros(4).double() for row in rows])


def chosen_pairs(
    observed: HeadOutputs, features: Int[np.ndarray, " n"], seed_parts: Sequence[str]
) -> Int[np.ndarray, "n_pairs 2"]:
    """At most PAIRS (document, index of feature) where the feature fires: round after round one document a feature."""
    at, which = firing(observed, features)
    rng = np.random.default_rng(seed_of(*seed_parts))
    mine = [rng.permutation(np.unique(at.doc[which == k].cpu().numpy())) for k in range(len(features))]
    rounds = max((len(docs) for docs in mine), default=0)
    pairs = [(int(docs[r]), k) for r in range(rounds) for k, docs in enumerate(mine) if r < len(docs)]
    return np.asarray(pairs[:PAIRS], dtype=np.int64).reshape(-1, 2)


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
    observed: HeadOutputs,
    tokens: Int[Tensor, "batch pos"],
    pairs: Int[np.ndarray, "n_pairs 2"],
    features: Int[np.ndarray, " n"],
) -> PathChanges:
    """Each pair's feature ablated in its document: in the model, into the MLP alone, into the final residual alone.

    As `fra.patching.into_mlp` and `into_final`, for many pairs at a time: what one pass under the ablation shows
    serves both, and the direct path is taken through the final norm and the unembedding without a pass.
    """
    docs, ids = torch.as_tensor(pairs[:, 0]), torch.as_tensor(features[pairs[:, 1]])
    home = observed.z.device
    tokens = tokens.to(home)
    lengths = observed.real.sum(1)
    order = torch.argsort(lengths[docs.to(home)], stable=True).cpu()
    longest = tokens.shape[1]
    shape = (len(pairs), longest - 1)
    total, mlp, direct = (torch.zeros(shape, device=home) for _ in range(3))
    last = LayerHooks(architecture_of(model).n_layers - 1).resid_post
    mid, out = LayerHooks(layer).resid_post, LayerHooks(layer).mlp_out
    with_mlp = not getattr(model.cfg, "attn_only", False)
    names = list(dict.fromkeys([mid, last, *([out] if with_mlp else [])]))
    for some in torch.split(order, _PAIRS_AT_ONCE):
        which = docs[some].to(home)
        rows = tokens[which, : int(lengths[which].max())]
        width = rows.shape[1] - 1

        def run(hooks: Sequence[Hook], rows: Tensor = rows) -> tuple[Tensor, dict[str, Tensor]]:
            with model.hooks(fwd_hooks=list(hooks)):
                logits, cache = model.run_with_cache(rows, names_filter=names)
            return torch.as_tensor(logits), {name: cache[name] for name in names}

        clean_logits, clean = run([])
        before = losses(clean_logits, rows)
        logits, changed = run(ablate_features(model, ids[some][:, None], dictionary).hooks)
        total[some, :width] = losses(logits, rows) - before
        delta = changed[mid] - clean[mid]
        if with_mlp:
            delta = delta - (changed[out] - clean[out])
            patched = model.run_with_hooks(rows, fwd_hooks=[(out, lambda own, hook, new=changed[out]: new)])
            mlp[some, :width] = losses(patched, rows) - before
        here = delta.abs().amax(-1) > 0
        before_norm = torch.stack([clean[last][here], (clean[last] + delta)[here]])
        straight = readout(model, before_norm)
        clean_logits[here] += straight[1] - straight[0]
        direct[some, :width] = losses(clean_logits, rows) - before
    at, index = firing(observed, features)
    table = torch.zeros(len(features), *tokens.shape, dtype=torch.bool, device=home)
    table[index, at.doc, at.pos] = True
    of = torch.as_tensor(pairs[:, 1], device=home)
    real = observed.real[docs.to(home), 1:].clone()
    keep = real.to(total.dtype)
    return PathChanges(
        total * keep,
        mlp * keep,
        direct * keep,
        table[of, docs.to(home), :-1] & real,
        real,
        tokens[docs.to(home), 1:],
    )


@torch.no_grad()
def natural_losses(layer: LayerFamilies, head: int | None, value: Tensor | None) -> Float[Tensor, "batch pos_less_1"]:
    """Losses on the first copies of the measurement documents, one head's output replaced by `value`; zero beyond the
    first copy.
    """
    model, batch = layer.model, layer.documents
    longest = int(batch.periods.max()) + 1
    tokens = batch.tokens[:, :longest].to(layer.observed.z.device)
    hooks: Any = [] if head is None or value is None else set_output(model, value, layer=layer.layer, head=head).hooks
    parts = []
    for some in torch.split(tokens, _DOCUMENTS_AT_ONCE):
        with model.hooks(fwd_hooks=hooks):
            parts.append(losses(model(some), some))
    within = torch.arange(longest - 1, device=tokens.device) < batch.periods.to(tokens.device)[:, None]
    return torch.cat(parts) * within


def unseen_rows(batch_tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Rows whose token has not stood before in the document: token induction has nothing to match there."""
    pos = batch_tokens.shape[1]
    earlier = torch.ones(pos, pos, dtype=torch.bool, device=batch_tokens.device).tril(-1)
    return ~((batch_tokens[:, :, None] == batch_tokens[:, None, :]) & earlier).any(-1)
