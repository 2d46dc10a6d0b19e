"""Whether a result survives the choice of dictionary: channels of one head in dictionaries that differ by their seed
(Q20).

A channel of one dictionary is the channel of another whose decoder directions are nearest in cosine, query and key side
each by itself. Overlap is counted (is the nearest pair among the other dictionary's own?) and measured (what does the
set do when it is said in the other dictionary's features?).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.coded import Arm, measure_arm
from fra.core.threads import each
from fra.dictionaries.codes import Codes, neuronpedia
from fra.dictionaries.hooks import attention_input_layer
from fra.induction.cih import Screen
from fra.induction.outside import outside
from fra.measures.channels.q08_q16_transfer import tihs
from fra.measures.channels.transfer_designs import ChannelSet, DictionarySeeds
from fra.search.channels import Arms, HeadOnArms, evenly, few_documents, measure_arms, on_device
from fra.search.examples import Shown, first_example
from fra.search.search import Search
from fra.statistics import stats
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch
from fra.stimuli.sets import documents
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Drawn, Sampled, decide, means_of

if TYPE_CHECKING:
    from fra.targets.target import Target

KEPT, EVERY_SEED, OVER_RANDOM = "share kept", "set of every seed", "over random matching"
RANKED, COUNTED = "rank among random matchings", "shared channels over random matching"
SETS = "the strongest channels of every seed"
NO_SEEDS = "the target declares no dictionaries of several seeds at this layer's attention input"


@dataclass(frozen=True)
class Found:
    """One head under one dictionary."""

    pairs: Int[np.ndarray, "n 2"]
    together: Float[np.ndarray, " n_documents"]
    """Nats of the head's own set, summed over all stripe rows."""
    shown: Shown | None = None
    """The strongest of the channels that is live on the stripe."""
    page: str | None = None
    """The address on Neuronpedia below which the dictionary's features have pages."""


@dataclass(frozen=True)
class AcrossSeeds:
    """One head under all dictionaries; keys of the mappings are (from, to)."""

    own: tuple[Found, ...]
    translated: Mapping[tuple[int, int], Float[np.ndarray, " n_documents"]]
    """Nats of the set of `from`, said in the features of `to`."""
    shared: Mapping[tuple[int, int], float]
    """Share of the channels of `from` whose nearest pair is among the channels of `to`."""
    random: Mapping[tuple[int, int], Float[np.ndarray, " n_documents"]]
    """As `translated`, but by a random matching of live features, drawn anew for each document."""
    draw: Callable[[int], tuple[float, float]]
    """By random matchings of that number, one an ordered pair of dictionaries and the same for all documents: nats a
    row and share of shared channels, means over the pairs.
    """
    rows: Float[np.ndarray, " n_documents"]
    sources: tuple[str, ...]

    @property
    def original(self) -> Float[np.ndarray, " n_documents"]:
        """Nats of the sets of `to`, mean over the pairs of dictionaries."""
        return np.asarray(np.mean([self.own[b].together for _, b in self.translated], axis=0))


def nearest(decoder: Float[Tensor, "n d"], other: Float[Tensor, "m d"]) -> Int[Tensor, " n"]:
    """For each decoder row the row of another dictionary with the largest cosine."""
    unit, others = (part / part.norm(dim=1, keepdim=True).clamp(min=1e-12) for part in (decoder, other))
    found: Tensor = (unit @ others.T).argmax(1)
    return found


def shared(pairs: np.ndarray, others: np.ndarray, matching: np.ndarray, d_sae: int) -> float:
    """Share of pairs whose matched pair is among `others`."""
    ids = matching[pairs[:, 0]] * d_sae + matching[pairs[:, 1]]
    return float(np.isin(ids, others[:, 0].astype(np.int64) * d_sae + others[:, 1]).mean()) if len(pairs) else 0.0


@torch.no_grad()
def measure(
    target: Target, screened: Screen, claim: Claim, progress: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, AcrossSeeds], str | None]:
    """Every TIH of a layer for which the target declares enough seeds; and why there is none, where so. Channels are
    found on discovery documents and measured on confirmation documents.
    """
    fewest = claim.designed(DictionarySeeds).fewest
    hooks = [hook for hook, n in target.seeds.items() if n >= fewest]
    if not hooks:
        most = max(target.seeds.values(), default=0)
        return {}, (
            f"the target declares {most} dictionaries that differ by their seed at one attention input; {fewest} are "
            "needed ([[seed]] in its file)"
        )
    sets = documents(target, screened.stimulus, claim.designed(RepeatedSets))
    measured = sets["confirmation"]
    measured = few_documents(measured, evenly(len(measured), claim.n, measured.periods.device))
    found: dict[str, AcrossSeeds] = {}
    for hook in hooks:
        layer = attention_input_layer(hook)
        heads = tihs(target, screened, layer)
        if not heads:
            continue
        progress(f"Q20: layer {layer}, {target.seeds[hook]} seeds")
        seeds = target.seed_dictionaries(hook)
        searches, arms = seen_through(target, seeds, sets["discovery"], measured, layer, hook)
        pages = [neuronpedia(sae) for sae in seeds]
        seed_parts = (screened.target, screened.stimulus, hook)
        found |= across(searches, arms, heads, claim.designed(ChannelSet), seed_parts, pages)
    if not found:
        return {}, "no head of the layers with dictionaries of several seeds is a TIH"
    return found, None


@torch.no_grad()
def seen_through(
    target: Target, dictionaries: Sequence[Any], discovery: Batch, measured: Batch, layer: int, hook: str
) -> tuple[list[Search], list[Arms]]:
    """A search on the documents for discovery and both arms of the measured ones, through each of these dictionaries or
    placed crosscoders of one hook.
    """
    searches, arms = [], []
    for sae in dictionaries:
        arm = measure_arm(target.model, sae, discovery.tokens, layer, hook)
        searches.append(Search(on_device(discovery, arm.frozen.x.device), arm))
        arms.append(measure_arms(target.model, sae, measured, layer, hook))
    return searches, arms


@torch.no_grad()
def across(
    searches: Sequence[Search],
    arms: Sequence[Arms],
    heads: Sequence[int],
    channels: ChannelSet,
    seed_parts: Sequence[str],
    pages: Sequence[str | None] | None = None,
) -> dict[str, AcrossSeeds]:
    """Chosen heads of one layer under several dictionaries of equal documents; `pages`: theirs on Neuronpedia."""
    pages = pages or [None] * len(searches)
    stripes = [search.stripes((0,), channels.floor)[0] for search in searches]
    decoders = [search.arm.codes.decoder for search in searches]
    live = [torch.unique(search.arm.codes.feature).cpu().numpy() for search in searches]
    both = list(permutations(range(len(searches)), 2))
    matching = {(a, b): nearest(decoders[a], decoders[b]).cpu().numpy() for a, b in both}
    batch = arms[0].batch
    rows = np.bincount(batch.row_doc.cpu().numpy(), minlength=len(batch)).astype(float)

    def random_matching(a: int, b: int, *what: str) -> np.ndarray:
        """Every feature of a gets a live feature of b, no two the same as long as there are enough."""
        rng = np.random.default_rng(stats.seed_of(*seed_parts, "random matching", str(a), str(b), *what))
        drawn: np.ndarray = np.resize(rng.permutation(live[b]), len(decoders[a]))
        return drawn[rng.permutation(len(drawn))]

    def one(head: int) -> AcrossSeeds:
        on = [HeadOnArms(own, head) for own in arms]
        own = []
        for at, search in enumerate(searches):
            pairs = stripes[at].strongest(search.arm, head, channels.size)[0].cpu().numpy()
            own.append(Found(pairs, nats_of(on[at], pairs), first_example(arms[at], head, pairs), pages[at]))

        anew = {pair: np.zeros(len(batch)) for pair in both}
        for b, document in product(range(len(arms)), range(len(batch))):
            alone = HeadOnArms(one_document(arms[b], document), head)
            for a in (a for a, to in both if to == b):
                matched = random_matching(a, b, str(head), "document", batch.sources[document])
                anew[a, b][document] = nats_of(alone, matched[own[a].pairs])[0]

        def draw(number: int) -> tuple[float, float]:
            nats, counts = [], []
            for a, b in both:
                drawn = random_matching(a, b, str(head), str(number))
                nats.append(nats_of(on[b], drawn[own[a].pairs]).sum() / rows.sum())
                counts.append(shared(own[a].pairs, own[b].pairs, drawn, len(decoders[b])))
            return float(np.mean(nats)), float(np.mean(counts))

        return AcrossSeeds(
            tuple(own),
            {(a, b): nats_of(on[b], matching[a, b][own[a].pairs]) for a, b in both},
            {(a, b): shared(own[a].pairs, own[b].pairs, matching[a, b], len(decoders[b])) for a, b in both},
            anew,
            torch.no_grad()(draw),
            rows,
            batch.sources,
        )

    layer, device = arms[0].repeated.frozen.layer, batch.row_doc.device
    return {f"L{layer}H{h}": result for h, result in zip(heads, each(one, heads, device), strict=True)}


def nats_of(on: HeadOnArms, pairs: Int[np.ndarray, "n 2"]) -> Float[np.ndarray, " n_documents"]:
    """Nats of a set on the stripe, summed over rows; pairs that occur twice count once."""
    unique = torch.from_numpy(np.unique(pairs, axis=0)).to(on.batch.row_doc.device)
    return np.asarray(on.removed_together(unique).nats[:, 0])


def one_document(arms: Arms, document: int) -> Arms:
    """Both arms of one document of a set, padded as they are."""
    batch, here = arms.batch, slice(document, document + 1)
    rows = batch.row_doc == document
    own = Batch(
        batch.tokens[here],
        batch.control[here],
        batch.periods[here],
        torch.zeros_like(batch.row_doc[rows]),
        batch.row_pos[rows],
        batch.row_key[rows],
        batch.row_moved[rows],
        batch.sources[here],
    )
    return Arms(own, *(_of_document(arm, document) for arm in (arms.repeated, arms.control)))


def _of_document(arm: Arm, document: int) -> Arm:
    frozen, codes, here = arm.frozen, arm.codes, slice(document, document + 1)
    length = codes.shape[1]
    ends = codes.row.new_tensor([document * length, (document + 1) * length])
    entries = slice(*torch.searchsorted(codes.row, ends).tolist())
    by_document = ("x", "sigma", "gain_q", "gain_k", "model_scores", "pattern")
    return Arm(
        replace(frozen, **{name: getattr(frozen, name)[here] for name in by_document}),
        Codes(
            codes.row[entries] - document * length,
            codes.feature[entries],
            codes.value[entries],
            codes.decoder,
            codes.bias[here],
            codes.error[here],
            (1, length),
        ),
    )


def seeds_evidence(
    claim: Claim,
    screened: Screen,
    found: Mapping[str, AcrossSeeds],
    cannot: str | None,
    *,
    every: str = EVERY_SEED,
    names: Sequence[str] | None = None,
    candidate: str = SETS,
    reason: str = NO_SEEDS,
) -> dict[str, Evidence]:
    """Q20: of every TIH of a layer with dictionaries of several seeds; C02: with a dictionary and a crosscoder.

    every: the condition on each dictionary's own set. names: what the dictionaries are called; "seed 1" and so on where
    not given. reason: why a TIH was not measured, where `cannot` does not say.
    """
    reason = cannot or reason
    evidence = outside(claim, screened) | {
        name: Evidence(claim=claim, head=name, cannot=reason)
        for name, status in screened.status.items()
        if status.status == "TIH" and name not in found and name not in screened.controls
    }
    if not found:
        return evidence

    def means(h: str, name: str, values: np.ndarray) -> stats.ClusterMeans:
        return means_of(claim, screened.target, h, name, values, found[h].rows, found[h].sources)

    called: dict[str, list[str]] = {}
    kept, each_one, over, shares = {}, {}, {}, {}
    for h, f in found.items():
        translated, original = _mean(f.translated), f.original
        shares[h] = (float(translated.sum() / f.rows.sum()), float(original.sum() / f.rows.sum()))
        kept[h] = means(h, KEPT, translated - claim.bar_of(KEPT) * original)
        called[h] = list(names or (f"seed {k}" for k in range(1, 1 + len(f.own))))
        each_one[h] = [means(h, f"set of {k}", own.together) for k, own in zip(called[h], f.own, strict=True)]
        over[h] = means(h, OVER_RANDOM, translated - _mean(f.random))
    drawn: dict[str, list[tuple[float, float]]] = {h: [] for h in found}

    def draw(head: str, number: int) -> dict[str, float]:
        drawn[head].append(found[head].draw(number))
        return dict(zip((RANKED, COUNTED), drawn[head][-1], strict=True))

    columns: list[Sampled | Drawn] = [
        Sampled(name=KEPT, samples=kept, shares=shares),
        Sampled(name=every, samples=each_one),
        Sampled(name=OVER_RANDOM, samples=over),
        Drawn(
            observed={
                RANKED: {h: part for h, (part, _) in shares.items()},
                COUNTED: {h: float(np.mean(list(f.shared.values()))) for h, f in found.items()},
            },
            draw=draw,
        ),
    ]
    rows = {h: Beside(candidates=(candidate,), detail=_detail(screened, f, called[h])) for h, f in found.items()}
    decided = decide(claim, columns, rows, q_over=())
    return evidence | {h: replace(e, detail={**e.detail, **_null(drawn[h])}) for h, e in decided.items()}


def _mean(by_pair: Mapping[tuple[int, int], Float[np.ndarray, " n_documents"]]) -> Float[np.ndarray, " n_documents"]:
    """Over ordered pairs of dictionaries."""
    return np.asarray(np.mean(list(by_pair.values()), axis=0))


def _null(drawn: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What random matchings gave, where any was drawn."""
    if not drawn:
        return {}
    nats, counts = zip(*drawn, strict=True)
    return {
        "random matchings, the same for all documents": {
            "number": len(drawn),
            "nats a row, mean": float(np.mean(nats)),
            "nats a row, largest": float(np.max(nats)),
            "shared channels, mean": float(np.mean(counts)),
            "shared channels, largest": float(np.max(counts)),
        }
    }


def _detail(screened: Screen, f: AcrossSeeds, names: Sequence[str]) -> dict[str, Any]:
    """The sets and what they are worth."""
    n_rows, on = f.rows.sum(), f"{screened.stimulus}: a document of the confirmation set"
    return {
        "dictionaries": len(f.own),
        "own sets (nats a row)": [float(own.together.sum() / n_rows) for own in f.own],
        "translated sets (nats a row)": {
            f"{a + 1} in {b + 1}": float(v.sum() / n_rows) for (a, b), v in f.translated.items()
        },
        "randomly matched sets (nats a row)": {
            "matchings": len(f.random) * len(f.rows),
            "mean": float(_mean(f.random).sum() / n_rows),
        },
        "channels whose nearest pair is in the other set": list(f.shared.values()),
        "strongest channel of each": {
            name: own.shown.picture(on, screened.token_text, own.page)
            for name, own in zip(names, f.own, strict=True)
            if own.shown is not None
        },
    }
