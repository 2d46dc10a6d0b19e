"""Documents to measure on: repeated passages with their deranged controls.

Every document is token ids from the start: decoding ids to text and encoding them again gives other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.errors import CannotLoad
from fra.statistics.stats import seed_of
from fra.stimuli.designs import Made
from fra.stimuli.padding import padded, unpadded

MADE = Made()
_TRIES = 2_000


@dataclass(frozen=True)
class RepeatedDocument:
    """BOS + R + R and its control BOS + derange(R) + R, R of `period` tokens.

    Rows of the second copy are `t = period + 1 + r`, r = 0..period-1; the induction key is `t - period + 1`.
    """

    tokens: Int[Tensor, " pos"]
    control: Int[Tensor, " pos"]
    period: int
    moved: Int[Tensor, " period"]
    """For each r, the position at which the control holds the token that stands at the induction key of row r."""
    source: str
    """Documents of one source are one cluster when documents are resampled."""


@dataclass(frozen=True)
class Batch:
    """Documents of unequal length, padded on the right; causal attention never lets padding reach a real row."""

    tokens: Int[Tensor, "batch pos"]
    control: Int[Tensor, "batch pos"]
    periods: Int[Tensor, " batch"]
    row_doc: Int[Tensor, " n_rows"]
    """Document of each second-copy row, over all documents."""
    row_pos: Int[Tensor, " n_rows"]
    row_key: Int[Tensor, " n_rows"]
    """Induction key of the row: `t - period + 1`."""
    row_moved: Int[Tensor, " n_rows"]
    sources: tuple[str, ...]

    @classmethod
    def of(cls, documents: Sequence[RepeatedDocument]) -> Batch:
        """Pads documents to one length and lists their second-copy rows. Raises CannotLoad where there are none."""
        if not documents:
            raise CannotLoad("no documents to measure on: the set is empty: add longer texts to text.documents")
        periods = torch.tensor([doc.period for doc in documents])
        row_doc = torch.repeat_interleave(torch.arange(len(documents)), periods)
        within = torch.cat([torch.arange(doc.period) for doc in documents])
        return cls(
            tokens=padded([doc.tokens for doc in documents]),
            control=padded([doc.control for doc in documents]),
            periods=periods,
            row_doc=row_doc,
            row_pos=periods[row_doc] + 1 + within,
            row_key=within + 2,
            row_moved=torch.cat([doc.moved for doc in documents]),
            sources=tuple(doc.source for doc in documents),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document: BOS and two copies."""
        return [1 + 2 * int(period) for period in self.periods]

    def documents(self) -> list[Int[Tensor, " _pos"]]:
        """The documents without padding."""
        return unpadded(self.tokens, self.lengths)


def collate(documents: Sequence[RepeatedDocument]) -> Batch:
    """`Batch.of`."""
    return Batch.of(documents)


def derange(passage: Int[np.ndarray, " period"], rng: np.random.Generator) -> Int[np.ndarray, " period"]:
    """An order of the passage's positions that keeps no token in place and no neighbouring pair of tokens together.

    Tokens, not positions, are compared, so a word that occurs twice cannot stand in for itself.

    Raises:
        CannotLoad: no such order was found (a passage of very few distinct tokens).
    """
    n = len(passage)
    pairs = set(zip(passage[:-1].tolist(), passage[1:].tolist(), strict=True))
    order = rng.permutation(n)
    for _ in range(_TRIES):
        moved = passage[order]
        bad = moved == passage
        together = np.fromiter(
            ((a, b) in pairs for a, b in zip(moved[:-1].tolist(), moved[1:].tolist(), strict=True)), bool, n - 1
        )
        bad[1:] |= together
        where = np.flatnonzero(bad)
        if not len(where):
            return order
        here, there = rng.choice(where), rng.integers(n)
        order[[here, there]] = order[[there, here]]
    raise CannotLoad(
        f"a passage of {n} tokens with {len(set(passage.tolist()))} "
        "distinct ones has no deranged control: use more varied text"
    )


def repeat(
    passage: Int[np.ndarray, " period"],
    bos: int | None,
    rng: np.random.Generator,
    source: str,
    second: Int[np.ndarray, " period"] | None = None,
) -> RepeatedDocument:
    """BOS + passage + passage, and its control; `second` stands for the second copy where it is given.

    A target without a BOS token starts with the passage's last token, so that positions are the same.
    """
    period = len(passage)
    again = passage if second is None else second
    order = derange(passage, rng)
    start = [passage[-1] if bos is None else bos]
    inverse = np.argsort(order)
    successor = np.arange(1, period + 1)
    # the last row's induction key is the first token of the second copy, which the control leaves in place
    moved = np.where(successor < period, inverse[np.minimum(successor, period - 1)] + 1, period + 1)
    return RepeatedDocument(
        tokens=torch.from_numpy(np.concatenate([start, passage, again]).astype(np.int64)),
        control=torch.from_numpy(np.concatenate([start, passage[order], again]).astype(np.int64)),
        period=period,
        moved=torch.from_numpy(moved.astype(np.int64)),
        source=source,
    )


def token_pool(frequency: Float[np.ndarray, " d_vocab"], special: Sequence[int] = ()) -> Int[np.ndarray, " n"]:
    """Ids for random passages: all but special tokens, the 2.5 % most frequent and the 25 % least frequent.

    Args:
        frequency: any estimate that orders the vocabulary, such as the model's mean prediction; NaN for ids that are
            no tokens, which are never used.
        special: ids never to be used (BOS, padding).
    """
    known = np.flatnonzero(~np.isnan(frequency))
    ids = known[np.argsort(frequency[known])]
    common = ids[int(len(ids) * MADE.too_rare) : len(ids) - int(len(ids) * MADE.too_frequent)]
    pool = np.setdiff1d(common, np.asarray(special, dtype=np.int64))
    if len(pool) < 2 * MADE.shortest_period:
        raise CannotLoad(f"a vocabulary of {len(frequency)} tokens leaves {len(pool)} for random passages: too few")
    return pool


def periods(n: int, longest: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """One period a document, uniform in `Made.shortest_period`..longest: no fixed offset can pass for induction."""
    if longest < MADE.shortest_period:
        raise CannotLoad(
            f"a context that repeats at most {longest} tokens is too short: {MADE.shortest_period} are needed"
        )
    return rng.integers(MADE.shortest_period, longest + 1, n)


def repeated_random(
    n: int,
    pool: Int[np.ndarray, " n_pool"],
    context: int,
    bos: int | None,
    seed_parts: Sequence[str],
    name: str = "random",
) -> list[RepeatedDocument]:
    """BOS + R + R with R of P distinct random tokens of the pool, P anew for each document; sources are `name`-0000 and
    so on.
    """
    rng = np.random.default_rng(seed_of(*seed_parts))
    longest = min((context - 1) // 2, len(pool))
    return [
        repeat(rng.choice(pool, period, replace=False), bos, rng, source=f"{name}-{number:04d}")
        for number, period in enumerate(periods(n, longest, rng).tolist())
    ]


@dataclass(frozen=True)
class PlantedDocument:
    """A repeated document and what was planted in its passage."""

    document: RepeatedDocument
    planted: dict[int, int]
    """{token: its index r in the passage}, r at least 1: it stands at r + 1 and at period + r + 1, and is to be
    predicted from the positions before.
    """


def repeated_planted(
    tokens: Sequence[int],
    pool: Int[np.ndarray, " n_pool"],
    context: int,
    bos: int | None,
    seed_parts: Sequence[str],
    repeats: int,
) -> list[PlantedDocument]:
    """repeated_random documents in which each of `tokens` stands in the passages of `repeats` documents.

    Up to half of a passage is planted, at random places but the first (whose predecessor differs between the copies);
    the rest are tokens of the pool that are not to be planted.
    """
    rng = np.random.default_rng(seed_of(*seed_parts))
    others = np.setdiff1d(pool, np.asarray(tokens, dtype=np.int64))
    longest = min((context - 1) // 2, len(others))
    made: list[PlantedDocument] = []
    for _ in range(repeats):
        deck = rng.permutation(np.asarray(tokens, dtype=np.int64))
        while len(deck):
            period = int(periods(1, longest, rng)[0])
            mine, deck = deck[: period // 2], deck[period // 2 :]
            at = np.sort(rng.choice(np.arange(1, period), len(mine), replace=False))
            passage = rng.choice(others, period, replace=False)
            passage[at] = mine
            document = repeat(passage, bos, rng, source=f"planted-{len(made):04d}")
            made.append(PlantedDocument(document, dict(zip(mine.tolist(), at.tolist(), strict=True))))
    return made


def join(*batches: Batch) -> Batch:
    """Batches as one, in their order, padded to one length."""
    length = max(batch.tokens.shape[1] for batch in batches)
    starts = np.cumsum([0, *(len(batch) for batch in batches)])
    return Batch(
        tokens=torch.cat([padded(list(batch.tokens), length) for batch in batches]),
        control=torch.cat([padded(list(batch.control), length) for batch in batches]),
        periods=torch.cat([batch.periods for batch in batches]),
        row_doc=torch.cat([batch.row_doc + int(start) for batch, start in zip(batches, starts[:-1], strict=True)]),
        row_pos=torch.cat([batch.row_pos for batch in batches]),
        row_key=torch.cat([batch.row_key for batch in batches]),
        row_moved=torch.cat([batch.row_moved for batch in batches]),
        sources=tuple(source for batch in batches for source in batch.sources),
    )


def repeated_natural(
    texts: Sequence[tuple[str, Int[np.ndarray, " _n"]]], context: int, bos: int | None, seed_parts: Sequence[str]
) -> list[RepeatedDocument]:
    """BOS + a natural passage + the same passage, P anew for each; one document for each (source, token ids).

    Texts shorter than Made.shortest_period tokens are left out.
    """
    rng = np.random.default_rng(seed_of(*seed_parts))
    documents = []
    for source, ids in texts:
        longest = min((context - 1) // 2, len(ids))
        if longest < MADE.shortest_period:
            continue
        period = int(periods(1, longest, rng)[0])
        documents.append(repeat(ids[:period], bos, rng, source))
    return documents
