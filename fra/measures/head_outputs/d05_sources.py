"""Where an induction feature gets its activation from: source positions that hold its own token (D05).

Features are chosen by attribution on discovery documents (repeated natural text) and by behaviour on planted documents,
in which the tokens that they raise most stand in repeated random passages. How strongly each fires before its own token
is learnt there too. Other planted documents are measured: at every firing that is strong in those units, right or
wrong, where the own token stands in the text so far and so could be its source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.attribution.examples import FEATURE, feature_example
from fra.attribution.head_outputs import HeadOutputs, Live, observe
from fra.attribution.raised_tokens import raised_tokens
from fra.dictionaries.hooks import LayerHooks
from fra.dictionaries.texts import text_of
from fra.induction.designs import TokenInduction
from fra.induction.outside import NOT_AS_LISTED, not_in_family
from fra.induction.status import head_status
from fra.measures.head_outputs.designs import OwnTokens
from fra.measures.head_outputs.firing_sources import sources
from fra.statistics import stats
from fra.stimuli import repeated, sets
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.padding import padded
from fra.stimuli.repeated import Batch
from fra.verdicts.claim import Claim, Evidence, parse_head
from fra.verdicts.decide import Beside, Sampled, decide
from fra.verdicts.pooled import clustered

if TYPE_CHECKING:
    from fra.targets.target import Target

FEATURES = "induction features"
"""The gate: how many of them a head must have."""


def second_copy(live: Live, batch: Batch) -> Live:
    """Firings in the second copy of repeated documents."""
    return live.where(live.pos > batch.periods.to(live.doc.device)[live.doc])


def attributed(o: HeadOutputs, batch: Batch, head: int, design: OwnTokens) -> Int[Tensor, " n"]:
    """Features that a head makes fire, on discovery documents: its share of their squared DFA in second copies."""
    at = second_copy(o.live, batch)
    squares = o.z.new_zeros(o.encoder.d_sae, o.n_heads).index_add_(0, at.feature, o.entries_by_head(at).square())
    share = squares[:, head] / squares.sum(1).clamp(min=torch.finfo(squares.dtype).tiny)
    firings = torch.bincount(at.feature, minlength=o.encoder.d_sae)
    return torch.nonzero((share >= design.share) & (firings >= design.firings))[:, 0]


@dataclass(frozen=True)
class Known:
    """Induction features of one head, from discovery documents and planted ones."""

    features: Int[Tensor, " n"]
    tokens: Int[Tensor, " n"]
    """What each raises most."""
    median: Float[Tensor, " n"]
    """Of a feature's activations before its own token."""
    edges: Float[np.ndarray, "n quarters_less_1"]
    """Quantiles of a feature's activations, at all firings."""
    attributed: int
    """Features that were looked at."""


def known_features(
    o: HeadOutputs,
    planted: Sequence[repeated.PlantedDocument],
    features: Int[Tensor, " n"],
    tokens: Int[Tensor, " n"],
    design: OwnTokens,
) -> Known:
    """Of these features, those that know their token: the median activation before its second occurrence is above zero,
    and of the places before other planted tokens few are as strong as a share of it (`OwnTokens`).
    """
    column = torch.full((o.encoder.d_sae,), -1, device=o.z.device)
    column[features] = torch.arange(len(features), device=o.z.device)
    mine = o.live.where((column[o.live.feature] >= 0) & (o.live.pos > 0))
    value = o.z.new_zeros(*o.real.shape, len(features))
    value[mine.doc, mine.pos, column[mine.feature]] = mine.value.to(value)
    places = [(n, p.document.period + r, t) for n, p in enumerate(planted) for t, r in p.planted.items()]
    doc, pos, token = torch.tensor(places, device=o.z.device).reshape(-1, 3).unbind(1)
    before, own = value[doc, pos], token[:, None] == tokens
    median = before.new_zeros(len(features))
    for k in torch.nonzero(own.any(0))[:, 0].tolist():
        median[k] = before[own[:, k], k].median()
    strong = (before > design.strong * median) & ~own
    others = strong.sum(0) / (~own).sum(0).clamp(min=1)
    kept = torch.nonzero((median > 0) & (others <= design.others_at_most))[:, 0]
    cuts = torch.arange(1, design.quarters, device=o.z.device, dtype=value.dtype) / design.quarters
    edges = [value[:, :, k][value[:, :, k] > 0].quantile(cuts).cpu().numpy() for k in kept.tolist()]
    table = np.asarray(edges, dtype=np.float64).reshape(len(kept), design.quarters - 1)
    return Known(features[kept], tokens[kept], median[kept], table, len(features))


def quarters(known: Known, column: Int[np.ndarray, " n"], at: Live) -> Int[np.ndarray, " n"]:
    """Quarter of each firing in the activations that its feature had on the documents that chose it, 0 the weakest;
    column: of its feature in `known`.
    """
    value = at.value.double().cpu().numpy()
    return np.asarray((value[:, None] > known.edges[column]).sum(1), dtype=np.int64)


def rise(
    share: Float[np.ndarray, " n"], quarter: Int[np.ndarray, " n"], doc: Int[np.ndarray, " n"], n_docs: int, parts: int
) -> Float[np.ndarray, " n_docs"]:
    """One number a document whose mean is the rise of the share from the weakest quarter to the strongest along a
    straight line: the linear contrast of the quarters' means, each document's part in them about their mean.

    NaN where a quarter is empty. parts: how many quarters there are.
    """
    count = np.bincount(quarter, minlength=parts)
    if not count.all():
        return np.full(n_docs, np.nan)
    apart = np.arange(parts) - (parts - 1) / 2
    trend = (parts - 1) * apart / (apart @ apart)  # the least-squares line, from the first quarter to the last
    means = np.bincount(quarter, weights=share, minlength=parts) / count
    part = trend[quarter] * (share - means[quarter]) / count[quarter]
    return n_docs * np.bincount(doc, weights=part, minlength=n_docs) + float(trend @ means)


@torch.no_grad()
def source_evidence(
    claim: Claim, target: Target, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Evidence]:
    """D05 for every head: token induction heads whose layer has a dictionary of head outputs; others cannot run."""
    stimulus, _ = claim.stimuli
    batches = sets.documents(target, stimulus, claim.designed(RepeatedSets))
    status = head_status(
        target.model,
        batches["status"],
        target=target.name,
        stimulus=stimulus,
        design=claim.designed(TokenInduction),
    )
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
    passages = Passages.of(target, claim.designed(OwnTokens).longest)
    for layer in range(target.n_layers):
        heads = [h for h in range(target.n_heads) if f"L{layer}H{h}" in family]
        hook = LayerHooks(layer).z
        if heads and hook not in target.dictionaries:
            why = "the target has no dictionary of head outputs at this layer"
            found |= {f"L{layer}H{h}": Evidence(claim=claim, head=f"L{layer}H{h}", cannot=why) for h in heads}
        elif heads:
            progress(f"D05: {hook}")
            for name, own in _layer(claim, target, layer, heads, batches["discovery"], passages).items():
                if isinstance(own, Evidence):
                    found[name] = own
                else:
                    samples[name], details[name] = own
    rows = {h: Beside(candidates=("its induction features",), detail=detail) for h, detail in details.items()}
    return found | decide(claim, columns(claim, samples), rows)


def columns(claim: Claim, samples: Mapping[str, Mapping[str, stats.ClusterMeans]]) -> list[Sampled]:
    """Every condition of every head (samples: by head and condition). Shares lie in a range, so that documents that all
    agree are decided by an exact bound.
    """
    ranges = {claim.condition: (0.0, 1.0), "attention on the token": (0.0, 1.0)}
    ranges |= {"over token frequency": (-1.0, 1.0), "over another token": (-1.0, 1.0)}
    return [
        Sampled(name=name, samples={h: own[name] for h, own in samples.items()}, bounded=ranges.get(name))
        for name in (claim.condition, *claim.bars)
    ]


@dataclass(frozen=True)
class Passages:
    """What planted documents are made of."""

    pool: Int[np.ndarray, " n_pool"]
    special: frozenset[int]
    context: int
    bos: int | None

    @classmethod
    def of(cls, target: Target, longest: int) -> Passages:
        """Random passages of a target."""
        special = frozenset(int(i) for i in target.tokenizer.all_special_ids)
        pool = repeated.token_pool(sets.mean_prediction(target.model, target), sorted(special))
        return cls(pool, special, min(int(target.model.cfg.n_ctx), longest), target.bos)

    def planted(self, tokens: Sequence[int], repeats: int, seeds: Sequence[str]) -> list[repeated.PlantedDocument]:
        """Documents in which each of the tokens, special ones left out, is planted in so many passages."""
        own = sorted(set(tokens) - self.special)
        return repeated.repeated_planted(own, self.pool, self.context, self.bos, seeds, repeats=repeats)


def _layer(
    claim: Claim, target: Target, layer: int, heads: Sequence[int], discovery: Batch, passages: Passages
) -> dict[str, Evidence | tuple[dict[str, stats.ClusterMeans], dict[str, Any]]]:
    sae, design = target.dictionaries[LayerHooks(layer).z], claim.designed(OwnTokens)
    own, seeds = raised_tokens(target.model, sae), (target.name, "repeated_planted", str(layer), claim.id)
    before = observe(target.model, sae, discovery.documents())
    looked_at = {h: attributed(before, discovery, h, design) for h in heads}
    del before
    tokens = sorted({int(own[f]) for features in looked_at.values() for f in features})
    known: dict[int, Known] = {}
    if tokens:
        learnt_on = passages.planted(tokens, design.plantings, (*seeds, "learnt"))
        seen = observe(target.model, sae, [p.document.tokens for p in learnt_on])
        known = {h: known_features(seen, learnt_on, of, own[of], design) for h, of in looked_at.items()}
        del seen
    found: dict[str, Evidence | tuple[dict[str, stats.ClusterMeans], dict[str, Any]]] = {}
    least = claim.gates[FEATURES]
    enough = [h for h, k in known.items() if len(k.features) >= least]
    for h in (h for h in heads if h not in enough):
        n = len(known[h].features) if h in known else 0
        found[f"L{layer}H{h}"] = Evidence(
            claim=claim,
            head=f"L{layer}H{h}",
            undecided=_wanting(n, len(looked_at[h]), int(least), len(own)),
        )
    if enough:
        measured_on = passages.planted(tokens, design.measured, (*seeds, "measured"))
        o = observe(target.model, sae, [p.document.tokens for p in measured_on])
        sources_of = [p.document.source for p in measured_on]
        rows = padded([p.document.tokens for p in measured_on]).to(own.device)
        for h in enough:
            name = f"L{layer}H{h}"
            values, detail = numbers(claim, target.name, name, known[h], o, rows, sources_of)
            found[name] = values, _picture(target, sae, name, known[h], o, rows) | detail
    return found


def _wanting(known: int, looked_at: int, least: int, d_sae: int) -> str:
    """Why there is nothing to measure, and what it would take."""
    said = f"{known} of {looked_at} features of this head know their token, where {least} are needed"
    if not known:
        return f"{said}: a wider dictionary, or one that separates tokens, would have to have so many"
    return f"{said}: at this rate a dictionary of about {-(-d_sae * least // known)} features would have so many"


def firings_of(
    o: HeadOutputs, tokens: Int[Tensor, "batch pos"], known: Known
) -> tuple[Live, Int[Tensor, " n"], tuple[Live, Int[Tensor, " n_every"]]]:
    """All firings of these features behind the first position with the column of each in `known`, as (at, column)
    where the feature's own token stands in the text so far, and all of them.
    """
    column = torch.full((o.encoder.d_sae,), -1, device=o.z.device)
    column[known.features] = torch.arange(len(known.features), device=o.z.device)
    at = o.live.where((column[o.live.feature] >= 0) & (o.live.pos > 0))
    own = known.tokens[column[at.feature]]
    first = torch.full((len(tokens), int(tokens.max()) + 1), tokens.shape[1], device=tokens.device)
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    first.scatter_reduce_(1, tokens, place, "amin")  # padding repeats the first token, which stands at 0 anyway
    there = first[at.doc, own.clamp(max=first.shape[1] - 1)] <= at.pos
    there &= own < first.shape[1]
    could = at.where(there)
    return could, column[could.feature], (at, column[at.feature])


def _picture(
    target: Target, sae: Any, name: str, known: Known, o: HeadOutputs, tokens: Int[Tensor, "batch pos"]
) -> dict[str, Any]:
    """The firing that is strongest on measured documents."""
    at, _, _ = firings_of(o, tokens, known)
    if not len(at):
        return {}
    feature, text = int(at.feature[at.value.argmax()]), text_of(target.tokenizer)
    return {FEATURE: feature_example(o, sae, tokens, feature, text, {name: parse_head(name)[1]}, at)}


def numbers(
    claim: Claim,
    target: str,
    name: str,
    known: Known,
    o: HeadOutputs,
    tokens: Int[Tensor, "batch pos"],
    sources_of: Sequence[str],
) -> tuple[dict[str, stats.ClusterMeans], dict[str, Any]]:
    """Every condition of one head on measured documents, by document, and what stands beside."""
    design, head = claim.designed(OwnTokens), parse_head(name)[1]
    at, column, (every, of) = firings_of(o, tokens, known)
    everywhere = int((every.value > design.strong * known.median[of]).sum())
    seen = sources(o, tokens, at, known.tokens[column], head)
    strong = (at.value > design.strong * known.median[column]).cpu().numpy()
    quarter = quarters(known, column.cpu().numpy(), at)
    doc, n_docs = at.doc.cpu().numpy(), len(sources_of)
    rows = np.bincount(doc[strong], minlength=n_docs).astype(float)
    share = seen.attribution.double().cpu().numpy()
    rising = rise(share, quarter, doc, n_docs, design.quarters)

    def means(what: str, values: Tensor) -> stats.ClusterMeans:
        sums = np.bincount(doc[strong], weights=values.double().cpu().numpy()[strong], minlength=n_docs)
        return clustered(sums, rows, sources_of, (claim.digest, target, name, what))

    values = {
        claim.condition: means("share", seen.attribution),
        "attention on the token": means("attention", seen.attention),
        "over token frequency": means("frequency", seen.attribution - seen.frequency),
        "over another token": means("another", seen.attribution - seen.another),
        "rise with activation": clustered(rising, np.ones(n_docs), sources_of, (claim.digest, target, name, "rise")),
    }
    count = np.maximum(np.bincount(quarter, minlength=design.quarters), 1)
    attention = seen.attention.double().cpu().numpy()
    detail: dict[str, Any] = {
        "induction features": len(known.features),
        "features looked at": known.attributed,
        "strong firings": everywhere,
        "of these, with the own token in the text so far": int(strong.sum()),
        "share of attribution by quarter of activation": (
            np.bincount(quarter, share, design.quarters) / count
        ).tolist(),
        "attention on the token by quarter": (np.bincount(quarter, attention, design.quarters) / count).tolist(),
        "token frequency": float(seen.frequency[strong].mean()) if strong.any() else None,
        "share of attribution on another token": float(seen.another[strong].mean()) if strong.any() else None,
    }
    return values, detail
