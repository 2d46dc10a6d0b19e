"""What features and channels of an attention-input dictionary do on a target's texts: `query_key_cards`.

Partners come from the strongest channels of each head (`Census.strongest`), never from a table of all pairs; what a
channel's page shows is found from the census's entries, for the channels that were chosen alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra._census.census import census
from fra._census.follow import Couplings, Followed, contributions
from fra._census.job import CensusReduce
from fra._census.result import Census
from fra.attribution.examples import examples_of
from fra.dictionaries.hooks import attention_input_layer
from fra.dictionaries.texts import text_of
from fra.errors import FraError
from fra.features.firings import by_feature, histogram, live_of, without_first_positions
from fra.report.card_pages import CardExample
from fra.report.channel_pages import ChannelCard, Context, FeatureCard, InHead, Partner, QueryKeyCards
from fra.stimuli.natural import natural_documents

if TYPE_CHECKING:
    from fra.targets.target import Target

DOCUMENTS = 60
"""Texts where their number is not given: what a channel does on each pair of positions takes its time."""
STRONGEST = 40
"""Channels of a head that get a page of their own: half by the mean of F, half by the sum of |F|."""
EXAMPLES = 4
CONTEXTS = 8
RANKED = 20_000
MIN_COUNT = 20
PARTNERS = 5
OFFSETS = (0, 1, 2, 4, 8, 16, 32, 64)
_HELD = 160
_BY: tuple[CensusReduce, ...] = ("mean", "abs")
"""What the channels of a head are chosen by."""
_ROWS_AT_ONCE = 2048


@torch.no_grad()
def query_key_cards(
    target: Target,
    hook: str,
    *,
    n_documents: int | None = None,
    strongest: int = STRONGEST,
    named: Sequence[tuple[int, int]] = (),
    labels: Mapping[int, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> QueryKeyCards:
    """Cards of the features of the attention-input dictionary at `hook` that fire, and pages of channels: the
    `strongest` of each head of its layer, and those that are `named` (query and key feature).

    n_documents: of the target's texts, 60 where it is not given (fewer where there are fewer). Raises FraError for a
    hook that is no attention input, features that are not there, and a target without text.
    """
    sae, layer = target.dictionaries[hook], attention_input_layer(hook)
    d_sae = len(sae.W_dec)
    for feature in {feature for pair in named for feature in pair}:
        if not 0 <= feature < d_sae:
            raise FraError(f"feature {feature} is out of range: the dictionary at {hook!r} has {d_sae} features.")
    if strongest < 2:
        raise FraError(f"strongest={strongest} is too few: give at least 2 channels a head.")
    n = n_documents or min(DOCUMENTS, len(target.documents()))
    documents = natural_documents(target, n)
    progress(f"{hook}: {n} documents through model and dictionary")
    whole = census(target.model, sae, documents, layer, reduce=("mean", "abs"))
    corpus = without_first_positions(whole.corpus)
    if not len(corpus.feature):
        raise FraError(f"no feature of {hook!r} fires behind the first position of these documents: give longer ones.")
    seen = Census(whole.layer, corpus, whole.heads, whole.reduces, whole.memory_budget, lambda: "")
    progress(f"{hook}: the strongest channels of {len(seen.heads)} heads")
    best = seen.strongest(_BY, RANKED, min_count=MIN_COUNT)
    of_head = {head: _chosen(best, head, strongest) for head in seen.heads}
    pairs = sorted({pair for own in of_head.values() for pair in own} | set(named))
    text = text_of(target.tokenizer)
    words = [[text(token) for token in document.tolist()] for document in documents]
    channels = _channels(seen, pairs, best["mean"], words, progress)
    means = {(pair, own.head): abs(own.mean) for pair, card in channels.items() for own in card.heads}
    progress(f"{hook}: cards of features")
    return QueryKeyCards(
        target=target.name,
        hook=hook,
        layer=layer,
        n_heads=len(seen.heads),
        d_sae=d_sae,
        n_documents=n,
        n_positions=sum(len(document) - 1 for document in documents),
        min_count=MIN_COUNT,
        ranked=RANKED,
        offsets=_offsets(seen),
        gains=corpus.gain_q is not None,
        features=_features(seen, best["mean"], words),
        channels=channels,
        of_head={head: _by_mean(own, head, means) for head, own in of_head.items()},
        labels=labels or {},
    )


def _chosen(best: Mapping[CensusReduce, pd.DataFrame], head: int, strongest: int) -> list[tuple[int, int]]:
    """Half the channels by the mean of F, half by the sum of |F|, each once."""
    found: dict[tuple[int, int], None] = {}
    for name in _BY:
        own = best[name]
        rows = own[own["head"] == head].head(strongest // 2)
        found |= dict.fromkeys(zip(rows["q_feature"].tolist(), rows["k_feature"].tolist(), strict=True))
    return list(found)


def _by_mean(
    pairs: Sequence[tuple[int, int]], head: int, means: Mapping[tuple[tuple[int, int], int], float]
) -> list[tuple[int, int]]:
    """Channels by the size of their mean in one head, the largest first."""
    return sorted(pairs, key=lambda pair: (-means[pair, head], pair))


def _offsets(seen: Census) -> tuple[int, ...]:
    """Distances at which G is given: none where it does not turn with them."""
    longest = int(seen.corpus.length.max())
    return () if seen.layer.rotary is None else tuple(offset for offset in OFFSETS if offset < longest)


def _channels(
    seen: Census,
    pairs: Sequence[tuple[int, int]],
    ranked: pd.DataFrame,
    words: Sequence[Sequence[str]],
    progress: Callable[[str], None],
) -> dict[tuple[int, int], ChannelCard]:
    """Every chosen channel in every head, and where it is strongest in the first of them."""
    if not pairs:
        return {}
    heads, n = list(seen.heads), len(pairs)
    every = torch.tensor([[head, *pair] for pair in pairs for head in heads])
    coupling = _couplings(seen, every)
    if seen.layer.rotary is None and seen.corpus.gain_q is None:
        # Heads differ by G alone: the pairs of positions are gone through once for all of them.
        once = _totals(seen, every[:: len(heads)], progress, of_one=True)
        count, total, largest = (column.repeat_interleave(len(heads)) for column in once)
        total, largest = total * coupling[:, 0].double(), largest * coupling[:, 0].double()
    else:
        count, total, largest = _totals(seen, every, progress)
    mean = total / count.clamp(min=1)
    rank = {
        (int(head), int(q), int(k)): place + 1
        for _, own in ranked.groupby("head")
        for place, (head, q, k) in enumerate(zip(own["head"], own["q_feature"], own["k_feature"], strict=True))
    }
    order = mean.abs().view(n, len(heads)).argsort(dim=1, descending=True, stable=True)
    first = every.view(n, len(heads), 3)[torch.arange(n), order[:, 0]]
    contexts = _contexts(seen, first, words)
    cards = {}
    for number, pair in enumerate(pairs):
        rows = [number * len(heads) + place for place in order[number].tolist()]
        own = [
            InHead(
                head=heads[row % len(heads)],
                count=int(count[row]),
                mean=float(mean[row]),
                total=float(total[row]),
                largest=float(largest[row]),
                rank=rank.get((heads[row % len(heads)], *pair)),
                coupling=coupling[row].tolist(),
            )
            for row in rows
        ]
        cards[pair] = ChannelCard(*pair, own, contexts.get(number, []))
    return cards


def _totals(
    seen: Census, channels: Int[Tensor, "channels 3"], progress: Callable[[str], None], of_one: bool = False
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Of each channel: pairs of positions, the sum of F, and the largest in size (of_one: of F over G)."""
    count, total, high, low = (torch.zeros(len(channels), dtype=torch.float64) for _ in range(4))
    for part in seen.corpus.parts(_ROWS_AT_ONCE):
        progress(f"channels: {part.stop} of {len(seen.corpus.number)} documents")
        for at, value in contributions(seen.layer, part, channels, of_one=of_one):
            channel, value = at[:, 0], value.double()
            count += torch.bincount(channel, minlength=len(channels))
            total.index_add_(0, channel, value)
            high.scatter_reduce_(0, channel, value, "amax")
            low.scatter_reduce_(0, channel, value, "amin")
    return count, total, torch.where(high >= -low, high, low)


def _couplings(seen: Census, channels: Int[Tensor, "channels 3"]) -> Float[Tensor, "channels offsets"]:
    """G of each channel, at each offset where it turns with them."""
    offsets = _offsets(seen) or (0,)
    head, q_feature, k_feature = channels.to(seen.corpus.device).T
    number = torch.arange(len(channels), device=head.device).repeat_interleave(len(offsets))
    offset = torch.tensor(offsets, device=head.device).repeat(len(channels))
    return Couplings(seen.layer, head, q_feature, k_feature)(number, offset).view(len(channels), -1).cpu()


def _contexts(
    seen: Census, channels: Int[Tensor, "channels 3"], words: Sequence[Sequence[str]]
) -> dict[int, list[Context]]:
    """The strongest contributions of each channel, one a document, by the channel's place."""
    held = Followed.nothing(channels, _HELD, seen.corpus.value).see(seen.layer, seen.corpus)
    found: dict[int, dict[int, Context]] = {}
    for (channel, document, q_pos, k_pos), value in zip(held.at.tolist(), held.value.tolist(), strict=True):
        own = found.setdefault(channel, {})
        if document not in own and len(own) < CONTEXTS:
            own[document] = Context(words[document], document, q_pos, k_pos, value)
    return {channel: list(own.values()) for channel, own in found.items()}


def _features(seen: Census, ranked: pd.DataFrame, words: Sequence[Sequence[str]]) -> dict[int, FeatureCard]:
    """A card of every feature that fires."""
    live = live_of(seen.corpus)
    firing = by_feature(live)
    partners = [_partners(ranked, *sides) for sides in (("q_feature", "k_feature"), ("k_feature", "q_feature"))]
    at = examples_of(live, EXAMPLES)
    examples: dict[int, list[CardExample]] = {}
    for doc, pos, feature in zip(at.doc.tolist(), at.pos.tolist(), at.feature.tolist(), strict=True):
        docs, positions, values = firing[feature]
        here = dict(zip(positions[docs == doc].tolist(), values[docs == doc].tolist(), strict=True))
        examples.setdefault(feature, []).append(CardExample(words[doc], pos, here, ()))
    n_positions = sum(len(document) - 1 for document in words)
    cards = {}
    for feature, (docs, _, values) in firing.items():
        counts, edge = histogram(values)
        cards[feature] = FeatureCard(
            feature=feature,
            density=len(values) / n_positions,
            documents=len(set(docs.tolist())),
            largest=float(values.max()),
            histogram=counts,
            edge=edge,
            examples=examples[feature],
            as_query=partners[0].get(feature, {}),
            as_key=partners[1].get(feature, {}),
        )
    return cards


def _partners(ranked: pd.DataFrame, own: str, other: str) -> dict[int, dict[int, list[Partner]]]:
    """By feature on one side and head: the strongest features on the other side."""
    found: dict[int, dict[int, list[Partner]]] = {}
    few = ranked.groupby(["head", own], sort=False).head(PARTNERS)
    for row in few.itertuples(index=False):
        partner = Partner(int(getattr(row, other)), float(row.value), int(row.count))
        found.setdefault(int(getattr(row, own)), {}).setdefault(int(row.head), []).append(partner)
    return found
