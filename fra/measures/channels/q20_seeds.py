"""Whether a result survives the choice of dictionary: channels of one head in dictionaries that differ by their seed
(Q20).

A channel of one dictionary is the channel of another whose decoder directions are nearest in cosine, query and key side
each by itself. Overlap is counted (is the nearest pair among the other dictionary's own?) and measured (what does the
set do when it is said in the other dictionary's features?).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.coded import measure_arm
from fra.core.threads import each
from fra.dictionaries.codes import neuronpedia
from fra.dictionaries.hooks import attention_input_layer
from fra.induction.channels import Arms, HeadOnArms, measure_arms, on_device
from fra.induction.cih import Screen
from fra.induction.examples import Shown, first_example
from fra.induction.outside import outside
from fra.induction.search import SET_SIZE, Search
from fra.measures.channels.q08_q16_transfer import tihs
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.sets import documents
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Given, Sampled, decide, means_of, ranked

if TYPE_CHECKING:
    from fra.targets.target import Target

FEWEST = 3
RANDOM_MATCHINGS = 999
"""For shared channels, which are counted."""
RANDOM_EFFECTS = 199
"""For the effect, at least: shared out among the ordered pairs of dictionaries."""
KEPT, EVERY_SEED, OVER_RANDOM = "share kept", "set of every seed", "over random matching"
RANKED, COUNTED = "rank among random matchings", "shared channels over random matching"
SETS = f"the {SET_SIZE} strongest channels of every seed"


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
    random: Mapping[tuple[int, int], Float[np.ndarray, "n_draws n_documents"]]
    """The same with random matchings of live features."""
    shared: Float[np.ndarray, " n_pairs_of_seeds"]
    """Share of the channels of `from` whose nearest pair is among the channels of `to`."""
    shared_random: Float[np.ndarray, " n_counts"]
    """The mean of that share under random matchings."""
    rows: Float[np.ndarray, " n_documents"]
    sources: tuple[str, ...]


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
    target: Target, screened: Screen, progress: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, AcrossSeeds], str | None]:
    """Every TIH of a layer for which the target declares at least three seeds; and why there is none, where so."""
    hooks = [hook for hook, n in target.seeds.items() if n >= FEWEST]
    if not hooks:
        most = max(target.seeds.values(), default=0)
        return {}, (
            f"the target declares {most} dictionaries that differ by their seed at one attention input; {FEWEST} are "
            "needed ([[seed]] in its file)"
        )
    sets = documents(target, screened.stimulus, RepeatedSets())
    found: dict[str, AcrossSeeds] = {}
    for hook in hooks:
        layer = attention_input_layer(hook)
        heads = tihs(target, screened, layer)
        if not heads:
            continue
        searches, arms, pages = [], [], []
        for number, sae in enumerate(target.seed_dictionaries(hook)):
            progress(f"Q20: layer {layer}, seed {number + 1}")
            arm = measure_arm(target.model, sae, sets["discovery"].tokens, layer, hook)
            searches.append(Search(on_device(sets["discovery"], arm.frozen.x.device), arm))
            arms.append(measure_arms(target.model, sae, sets["confirmation"], layer, hook))
            pages.append(neuronpedia(sae))
        found |= across(searches, arms, heads, (screened.target, screened.stimulus, hook), pages)
    if not found:
        return {}, "no head of the layers with dictionaries of several seeds is a TIH"
    return found, None


def across(
    searches: Sequence[Search],
    arms: Sequence[Arms],
    heads: Sequence[int],
    seed_parts: Sequence[str],
    pages: Sequence[str | None] | None = None,
) -> dict[str, AcrossSeeds]:
    """Chosen heads of one layer under several dictionaries of equal documents; `pages`: theirs on Neuronpedia."""
    pages = pages or [None] * len(searches)
    stripes = [search.stripes((0,))[0] for search in searches]
    decoders = [search.arm.codes.decoder for search in searches]
    live = [torch.unique(search.arm.codes.feature).cpu().numpy() for search in searches]
    both = list(permutations(range(len(searches)), 2))
    matching = {(a, b): nearest(decoders[a], decoders[b]).cpu().numpy() for a, b in both}
    batch = arms[0].batch
    rows = np.bincount(batch.row_doc.cpu().numpy(), minlength=len(batch)).astype(float)

    def one(head: int) -> AcrossSeeds:
        rng = np.random.default_rng(stats.seed_of(*seed_parts, "seeds", str(head)))
        on = [HeadOnArms(own, head) for own in arms]

        def nats(at: int, pairs: np.ndarray) -> np.ndarray:
            unique = torch.from_numpy(np.unique(pairs, axis=0)).to(batch.row_doc.device)
            return np.asarray(on[at].removed_together(unique).nats[:, 0])

        own = []
        for at, search in enumerate(searches):
            pairs = stripes[at].strongest(search.arm, head, SET_SIZE)[0].cpu().numpy()
            own.append(Found(pairs, nats(at, pairs), first_example(arms[at], head, pairs), pages[at]))

        def random_matching(a: int, b: int) -> np.ndarray:
            """Every feature of a gets a live feature of b, no two the same as long as there are enough."""
            drawn: np.ndarray = np.resize(rng.permutation(live[b]), len(decoders[a]))
            return drawn[rng.permutation(len(drawn))]

        draws = [
            float(
                np.mean([shared(own[a].pairs, own[b].pairs, random_matching(a, b), len(decoders[b])) for a, b in both])
            )
            for _ in range(RANDOM_MATCHINGS)
        ]
        drawn = range(-(-RANDOM_EFFECTS // len(both)))
        return AcrossSeeds(
            tuple(own),
            {(a, b): nats(b, matching[a, b][own[a].pairs]) for a, b in both},
            {(a, b): np.stack([nats(b, random_matching(a, b)[own[a].pairs]) for _ in drawn]) for a, b in both},
            np.array([shared(own[a].pairs, own[b].pairs, matching[a, b], len(decoders[b])) for a, b in both]),
            np.array(draws),
            rows,
            batch.sources,
        )

    layer, device = arms[0].repeated.frozen.layer, batch.row_doc.device
    return {f"L{layer}H{h}": result for h, result in zip(heads, each(one, heads, device), strict=True)}


def seeds_evidence(
    claim: Claim, screened: Screen, found: Mapping[str, AcrossSeeds], cannot: str | None
) -> dict[str, Evidence]:
    """Q20: of every TIH of a layer with dictionaries of several seeds."""
    reason = cannot or "the target declares no dictionaries of several seeds at this layer's attention input"
    evidence = outside(claim, screened) | {
        name: Evidence(claim=claim, head=name, cannot=reason)
        for name, status in screened.status.items()
        if status.status == "TIH" and name not in found and name not in screened.controls
    }
    if not found:
        return evidence

    def means(h: str, name: str, values: np.ndarray) -> stats.ClusterMeans:
        return means_of(claim, screened.target, h, name, values, found[h].rows, found[h].sources)

    kept, every, over, ranks, counted, rows = {}, {}, {}, {}, {}, {}
    shares: dict[str, tuple[float, float]] = {}
    for h, f in found.items():
        n_rows = f.rows.sum()
        translated = np.mean(list(f.translated.values()), axis=0)
        original = np.mean([f.own[b].together for _, b in f.translated], axis=0)
        by_chance = np.mean([draws.mean(0) for draws in f.random.values()], axis=0)
        part, whole = shares[h] = translated.sum() / n_rows, original.sum() / n_rows
        kept[h] = means(h, KEPT, translated - claim.bar * original)
        every[h] = [means(h, f"set of seed {k}", own.together) for k, own in enumerate(f.own, 1)]
        over[h] = means(h, OVER_RANDOM, translated - by_chance)
        # one matching scatters more than the mean over pairs of dictionaries that it is held against
        chance = np.concatenate([draws.sum(1) for draws in f.random.values()]) / n_rows
        ranks[h] = stats.rank_p(part, chance)
        counted[h] = stats.rank_p(float(f.shared.mean()), f.shared_random)
        at_bar, level = claim.bar * max(whole, 0.0), claim.level / len(found)
        rows[h] = Beside(
            n=len(f.rows),
            candidates=(SETS,),
            power=float(stats.power_above(kept[h], 0.0, at_bar, level, simultaneous=False)[0]),
            detail=_detail(screened, f, chance),
        )
    columns: list[Sampled | Given] = [
        Sampled(name=KEPT, samples=kept, shares=shares),
        Sampled(name=EVERY_SEED, samples=every),
        Sampled(name=OVER_RANDOM, samples=over),
        ranked(claim, RANKED, ranks),
        ranked(claim, COUNTED, counted),
    ]
    return evidence | decide(claim, columns, rows, q_over=())


def _detail(screened: Screen, f: AcrossSeeds, chance: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """The sets and what they are worth; `chance`: randomly matched ones, nats a row."""
    n_rows, on = f.rows.sum(), f"{screened.stimulus}: a document of the confirmation set"
    return {
        "dictionaries": len(f.own),
        "own sets (nats a row)": [float(own.together.sum() / n_rows) for own in f.own],
        "translated sets (nats a row)": {
            f"{a + 1} in {b + 1}": float(v.sum() / n_rows) for (a, b), v in f.translated.items()
        },
        "randomly matched sets (nats a row)": {
            "matchings": len(chance),
            "mean": float(chance.mean()),
            "95th percentile": float(np.quantile(chance, 0.95)),
            "largest": float(chance.max()),
        },
        "channels whose nearest pair is in the other set": [float(v) for v in f.shared],
        "the same under random matching": float(f.shared_random.mean()),
        "strongest channel of every seed": {
            f"seed {number}": own.shown.picture(on, screened.token_text, own.page)
            for number, own in enumerate(f.own, 1)
            if own.shown is not None
        },
    }
