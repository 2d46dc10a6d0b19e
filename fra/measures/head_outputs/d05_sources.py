"""Where an induction feature gets its activation from: source positions that hold its own token (D05)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.attribution.examples import FEATURE, feature_example
from fra.attribution.head_outputs import HeadOutputs, Live, observe
from fra.attribution.raised_tokens import raised_tokens
from fra.dictionaries.hooks import LayerHooks, layer_of
from fra.induction.outside import NOT_AS_LISTED, not_in_family
from fra.induction.status import head_status
from fra.stimuli import sets
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch
from fra.targets.target import text_of
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Power, Sampled, decide
from fra.verdicts.pooled import clustered

if TYPE_CHECKING:
    from fra.targets.target import Target

SHARE, MIN_FIRINGS, MASS = 0.6, 10, 0.5
"""An induction feature of a head: at least this share of its squared DFA, firings on discovery rows, and share of its
activation there on rows whose induction key holds its own token.
"""
MIN_FEATURES = 5
QUARTERS = 4
_ENTRIES_AT_ONCE = 4096
_TREND = np.array([-0.9, -0.3, 0.3, 0.9])
"""Least-squares line through the four quarters' means, from the weakest to the strongest: sums to 0, unit for a rise of
1 from the first quarter to the last.
"""
CONDITIONS = ("attention on the token", "over token frequency", "over another token", "rise with activation")


@dataclass(frozen=True)
class Sources:
    """What stands at the sources of firings, [n] each."""

    attribution: Float[Tensor, " n"]
    """Share of squared DFA of the head on positions that hold the feature's token."""
    attention: Float[Tensor, " n"]
    """The head's attention on them."""
    frequency: Float[Tensor, " n"]
    """Their share of the positions up to the firing."""
    another: Float[Tensor, " n"]
    """Mean over the other positions of the share of squared DFA on positions that hold the token of that one."""


def documents_of(batch: Batch) -> list[Int[Tensor, " _pos"]]:
    """The documents without their padding."""
    return [tokens[: 1 + 2 * int(period)] for tokens, period in zip(batch.tokens, batch.periods, strict=True)]


def sources(o: HeadOutputs, tokens: Int[Tensor, "batch pos"], at: Live, own: Int[Tensor, " n"], head: int) -> Sources:
    """Of firings whose features have the tokens `own`, through one head."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("attribution", "attention", "frequency", "another")}
    same = (tokens[:, :, None] == tokens[:, None]).to(o.z).cumsum(1)  # [doc, t, s]: positions up to t like that at s
    for start in range(0, len(at), _ENTRIES_AT_ONCE):
        some = slice(start, start + _ENTRIES_AT_ONCE)
        part = Live(at.doc[some], at.pos[some], at.feature[some], at.value[some])
        squares = o.sources(part, head).square()
        total = squares.sum(1).clamp(min=torch.finfo(squares.dtype).tiny)
        seen = torch.arange(tokens.shape[1], device=tokens.device) <= part.pos[:, None]
        here = (tokens[part.doc] == own[some, None]) & seen
        others = (seen & ~here).sum(1).clamp(min=1)
        parts["attribution"].append((squares * here).sum(1) / total)
        parts["attention"].append((o.pattern[part.doc, head, part.pos] * here).sum(1))
        parts["frequency"].append(here.sum(1) / seen.sum(1))
        elsewhere = squares * ~here * same[part.doc, part.pos]
        parts["another"].append(elsewhere.sum(1) / others / total)
    return Sources(**{name: torch.cat(values) if values else o.z.new_zeros(0) for name, values in parts.items()})


def induction_features(
    o: HeadOutputs, batch: Batch, tokens: Int[Tensor, " d_sae"], head: int
) -> Bool[Tensor, " d_sae"]:
    """Which features are induction features of a head, on discovery documents (see SHARE, MIN_FIRINGS, MASS)."""
    d_sae = o.encoder.d_sae
    at = second_copy(o.live, batch)
    squares = o.z.new_zeros(d_sae, o.n_heads).index_add_(0, at.feature, o.entries_by_head(at).square())
    share = squares[:, head] / squares.sum(1).clamp(min=torch.finfo(squares.dtype).tiny)
    period = batch.periods.to(at.doc.device)[at.doc]
    follows = batch.tokens.to(at.doc.device)[at.doc, at.pos - period + 1] == tokens[at.feature]
    mass, hit = (torch.zeros(d_sae, dtype=torch.float64, device=at.doc.device) for _ in range(2))
    mass.index_add_(0, at.feature, at.value.double())
    hit.index_add_(0, at.feature, at.value.double() * follows)
    firings = torch.bincount(at.feature, minlength=d_sae)
    return (share >= SHARE) & (firings >= MIN_FIRINGS) & (hit >= MASS * mass)


def second_copy(live: Live, batch: Batch) -> Live:
    """Firings in the second copy of repeated documents."""
    return live.where(live.pos > batch.periods.to(live.doc.device)[live.doc])


def quarters(discovery: Live, at: Live, d_sae: int) -> Int[np.ndarray, " n"]:
    """Quarter of each firing in the activations that its feature had on discovery documents, 0 the weakest."""
    found = np.zeros(len(at), dtype=np.int64)
    feature, value = at.feature.cpu().numpy(), at.value.double().cpu().numpy()
    before, known = discovery.value.double().cpu().numpy(), discovery.feature.cpu().numpy()
    for f in np.unique(feature):
        edges = np.quantile(before[known == f], np.arange(1, QUARTERS) / QUARTERS)
        found[feature == f] = np.searchsorted(edges, value[feature == f])
    return found


def rise(
    share: Float[np.ndarray, " n"], quarter: Int[np.ndarray, " n"], doc: Int[np.ndarray, " n"], n_docs: int
) -> Float[np.ndarray, " n_docs"]:
    """One number a document whose mean is the rise of the share from the weakest quarter to the strongest along a
    straight line: the linear contrast of the quarters' means, each document's part in them about their mean.

    NaN where a quarter is empty.
    """
    count = np.bincount(quarter, minlength=QUARTERS)
    if not count.all():
        return np.full(n_docs, np.nan)
    means = np.bincount(quarter, weights=share, minlength=QUARTERS) / count
    part = _TREND[quarter] * (share - means[quarter]) / count[quarter]
    return n_docs * np.bincount(doc, weights=part, minlength=n_docs) + float(_TREND @ means)


@torch.no_grad()
def source_evidence(
    claim: Claim, target: Target, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Evidence]:
    """D05 for every head: token induction heads whose layer has a dictionary of head outputs; others cannot run."""
    (stimulus,) = claim.stimuli
    batches = sets.documents(target, stimulus, RepeatedSets())
    status = head_status(target.model, batches["status"], target=target.name, stimulus=stimulus)
    family = [name for name in target.heads if status[name].status == "TIH"]
    found: dict[str, Evidence] = {}
    for name in target.heads:
        if name in target.known_tih and name not in family:
            why = NOT_AS_LISTED.format(status=status[name].status, stimulus=stimulus)
            found[name] = Evidence(claim=claim, head=name, undecided=why)
        elif name not in family:
            found[name] = Evidence(claim=claim, head=name, outside=not_in_family(status[name]))
    samples: dict[str, dict[str, stats.ClusterMeans]] = {}
    details: dict[str, dict[str, Any]] = {}
    for layer in range(target.n_layers):
        heads = [h for h in range(target.n_heads) if f"L{layer}H{h}" in family]
        hook = LayerHooks(layer).z
        if heads and hook not in target.dictionaries:
            why = "the target has no dictionary of head outputs at this layer"
            found |= {f"L{layer}H{h}": Evidence(claim=claim, head=f"L{layer}H{h}", cannot=why) for h in heads}
        elif heads:
            progress(f"D05: {hook}")
            for name, own in _layer(claim, target, hook, heads, batches).items():
                if isinstance(own, Evidence):
                    found[name] = own
                else:
                    samples[name], details[name] = own
    columns = [
        Sampled(name=name, samples={h: own[name] for h, own in samples.items()})
        for name in ("share of attribution", *CONDITIONS)
    ]
    rows = {
        h: Beside(n=len(batches["confirmation"]), candidates=("its induction features",), detail=detail)
        for h, detail in details.items()
    }
    return found | decide(claim, columns, rows, power=Power("failing", 0.0))


def _layer(
    claim: Claim, target: Target, hook: str, heads: Sequence[int], batches: dict[str, Batch]
) -> dict[str, Evidence | tuple[dict[str, stats.ClusterMeans], dict[str, Any]]]:
    sae, layer = target.dictionaries[hook], layer_of(hook)
    own = raised_tokens(target.model, sae)
    chosen_on, measured_on = (
        observe(target.model, sae, documents_of(batches[name])) for name in ("discovery", "confirmation")
    )
    found: dict[str, Evidence | tuple[dict[str, stats.ClusterMeans], dict[str, Any]]] = {}
    for head in heads:
        name = f"L{layer}H{head}"
        chosen = induction_features(chosen_on, batches["discovery"], own, head)
        n = int(chosen.sum())
        if n < MIN_FEATURES:
            why = f"{n} induction features of this head are known, where {MIN_FEATURES} are needed"
            found[name] = Evidence(claim=claim, head=name, undecided=why)
            continue
        at = measured_on.live.where(chosen[measured_on.live.feature] & (measured_on.live.pos > 0))
        tokens = batches["confirmation"].tokens.to(own.device)[:, : measured_on.z.shape[1]]
        seen = sources(measured_on, tokens, at, own[at.feature], head)
        quarter = quarters(chosen_on.live, at, chosen_on.encoder.d_sae)
        values, detail = _numbers(claim, target, name, seen, at, quarter, batches["confirmation"], n)
        if len(at):
            feature, text = int(at.feature[at.value.argmax()]), text_of(target.tokenizer)
            shown = feature_example(measured_on, sae, tokens, feature, text, {name: head}, at)
            detail = {FEATURE: shown} | detail
        found[name] = values, detail
    return found


def _numbers(
    claim: Claim,
    target: Target,
    name: str,
    seen: Sources,
    at: Live,
    quarter: Int[np.ndarray, " n"],
    batch: Batch,
    n_features: int,
) -> tuple[dict[str, stats.ClusterMeans], dict[str, Any]]:
    doc, n_docs = at.doc.cpu().numpy(), len(batch)
    rows = np.bincount(doc, minlength=n_docs).astype(float)

    def means(what: str, values: Tensor) -> stats.ClusterMeans:
        sums = np.bincount(doc, weights=values.double().cpu().numpy(), minlength=n_docs)
        return clustered(sums, rows, batch.sources, (claim.digest, target.name, name, what))

    share = seen.attribution.double().cpu().numpy()
    values = {
        "share of attribution": means("share", seen.attribution),
        "attention on the token": means("attention", seen.attention),
        "over token frequency": means("frequency", seen.attribution - seen.frequency),
        "over another token": means("another", seen.attribution - seen.another),
        "rise with activation": clustered(
            rise(share, quarter, doc, n_docs), np.ones(n_docs), batch.sources, (claim.digest, target.name, name, "rise")
        ),
    }
    count = np.maximum(np.bincount(quarter, minlength=QUARTERS), 1)
    attention = seen.attention.double().cpu().numpy()
    detail = {
        "induction features": n_features,
        "firings": len(at),
        "share of attribution by quarter of activation": (np.bincount(quarter, share, QUARTERS) / count).tolist(),
        "attention on the token by quarter": (np.bincount(quarter, attention, QUARTERS) / count).tolist(),
        "token frequency": float(seen.frequency.mean()),
        "share of attribution on another token": float(seen.another.mean()),
    }
    return values, detail
