"""Repeated documents whose second copy, or whose vocabulary, is another: surface variants, and unseen tokens.

`variant_repeat` is BOS + R + V(R): the second copy says the same words in other tokens (another case, or with and
without a leading space). Beside each document stand three with the same first copy: the plain repeat, one whose second
copy holds tokens as near in embedding cosine as the variants and no variants, and one whose second copy is unrelated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from fra.errors import CannotLoad
from fra.statistics.stats import seed_of
from fra.stimuli.repeated import Batch, RepeatedDocument, periods, repeat

ARMS = ("same", "variant", "neighbour", "unrelated")


def surface_forms(tokenizer: Any, pool: Sequence[int], shortest: int) -> dict[str, list[int]]:
    """Words that stand in the pool as two or more single tokens that differ in case or a leading space alone.

    Letters only, at least `shortest`, and at least one of the forms begins a word (a leading space), so that fragments
    are left out.
    """
    forms: dict[str, list[int]] = {}
    begins: set[str] = set()
    for token in sorted(int(t) for t in pool):
        piece = str(tokenizer.convert_ids_to_tokens(token)).replace("\u0120", " ").replace("\u2581", " ")
        word = piece.strip().lower()
        if len(word) >= shortest and word.isascii() and word.isalpha():
            forms.setdefault(word, []).append(token)
            if piece.startswith(" "):
                begins.add(word)
    return {word: tokens for word, tokens in forms.items() if len(tokens) >= 2 and word in begins}


@dataclass(frozen=True)
class Forms:
    """Ordered pairs (token, variant) with, for each, tokens that are as near to the token and are no variants."""

    word: Int[np.ndarray, " n"]
    """Number of the word that each pair is a pair of forms of."""
    token: Int[np.ndarray, " n"]
    variant: Int[np.ndarray, " n"]
    neighbours: Int[np.ndarray, "n n_choices"]
    """-1 where there are fewer."""
    gap: Float[np.ndarray, "n n_choices"]
    """|cos(neighbour, token) - cos(variant, token)|."""
    word_of: dict[int, int]

    @property
    def words(self) -> Int[np.ndarray, " n_words"]:
        """Words that have a usable pair."""
        return np.unique(self.word)


def variant_forms(
    tokenizer: Any,
    pool: Int[np.ndarray, " n_pool"],
    W_E: Float[np.ndarray, "d_vocab d_model"],
    *,
    shortest: int,
    within: float,
    choices: int,
    fewest: int,
) -> Forms:
    """Every pair of forms in the pool that has neighbours of equal cosine there.

    shortest: letters of a word, at least. within: how far a neighbour's embedding cosine may lie from the variant's.
    choices: neighbours a pair, at most, the nearest in cosine. Raises CannotLoad where the vocabulary has fewer than
    `fewest` such words.
    """
    forms = surface_forms(tokenizer, pool.tolist(), shortest)
    word_of = {token: number for number, tokens in enumerate(forms.values()) for token in tokens}
    unit = W_E / np.maximum(np.linalg.norm(W_E, axis=1, keepdims=True), 1e-12)
    words_in_pool = np.array([word_of.get(int(t), -1) for t in pool])
    rows: list[tuple[int, int, int, np.ndarray, np.ndarray]] = []
    for number, tokens in enumerate(forms.values()):
        for token in tokens:
            cosine = unit[pool] @ unit[token]
            for variant in tokens:
                if variant == token:
                    continue
                gap = np.abs(cosine - unit[variant] @ unit[token])
                gap[words_in_pool == number] = np.inf
                best = np.argsort(gap, kind="stable")[:choices]
                near = np.where(gap[best] <= within, pool[best], -1)
                if (near >= 0).any():
                    rows.append((number, token, variant, near, gap[best]))
    found = Forms(
        np.array([r[0] for r in rows], dtype=np.int64),
        np.array([r[1] for r in rows], dtype=np.int64),
        np.array([r[2] for r in rows], dtype=np.int64),
        np.array([r[3] for r in rows], dtype=np.int64).reshape(len(rows), -1),
        np.array([r[4] for r in rows]).reshape(len(rows), -1),
        word_of,
    )
    if len(found.words) < fewest:
        raise CannotLoad(
            f"the tokenizer has {len(found.words)} words whose case or leading-space variants are single tokens with "
            f"neighbours of equal cosine; {fewest} are needed"
        )
    return found


@dataclass(frozen=True)
class VariantSets:
    """Discovery documents (plain repeats of words that have variants) and the four arms of the measurement."""

    discovery: Batch
    arms: dict[str, Batch]
    """By name of ARMS; document k of each has the same first copy, control and period."""
    mean_gap: float
    """Mean |difference of embedding cosine| between neighbour and variant."""


def variant_repeat(
    n_discovery: int, n: int, forms: Forms, context: int, bos: int | None, seed_parts: Sequence[str]
) -> VariantSets:
    """Documents over words that have variants; P is drawn anew for each and every word stands once in a copy.

    Half of the words at most are used by one document, so that an unrelated second copy can be drawn from the others.
    Neighbours and unrelated words are drawn anew for every document, so that the scatter of these controls is part of
    the scatter over documents.
    """
    words = forms.words
    longest = min((context - 1) // 2, len(words) // 2)
    made: dict[str, list[RepeatedDocument]] = {name: [] for name in ("discovery", *ARMS)}
    gaps: list[float] = []
    of_word = {int(word): np.flatnonzero(forms.word == word) for word in words}
    rng = np.random.default_rng(seed_of(*seed_parts, "discovery"))
    for number, period in enumerate(periods(n_discovery, longest, rng).tolist()):
        drawn = rng.permutation(words)[:period]
        first = forms.token[np.array([rng.choice(of_word[int(word)]) for word in drawn])]
        made["discovery"].append(repeat(first, bos, rng, f"discovery-{number:04d}"))
    rng = np.random.default_rng(seed_of(*seed_parts, "measured"))
    for number, period in enumerate(periods(n, longest, rng).tolist()):
        drawn = rng.permutation(words)
        pairs = np.array([rng.choice(of_word[int(word)]) for word in drawn[: 2 * period]])
        first, other = forms.token[pairs[:period]], forms.token[pairs[period:]]
        near, gap = _neighbours(forms, pairs[:period], set(drawn[:period].tolist()), rng)
        gaps.extend(gap)
        second = {"same": first, "variant": forms.variant[pairs[:period]], "neighbour": near, "unrelated": other}
        source = f"variant-{number:04d}"
        for name in ARMS:  # one seed, so that all arms have one deranged control
            own = np.random.default_rng(seed_of(*seed_parts, source))
            made[name].append(repeat(first, bos, own, source, second[name]))
    return VariantSets(Batch.of(made["discovery"]), {name: Batch.of(made[name]) for name in ARMS}, float(np.mean(gaps)))


def _neighbours(
    forms: Forms, pairs: np.ndarray, words: set[int], rng: np.random.Generator
) -> tuple[np.ndarray, list[float]]:
    """A neighbour for each pair, drawn at random among those that are no form of a word of the document; no two alike.

    A pair whose neighbours are all taken keeps one even if it stands twice.
    """
    taken: set[int] = set()
    chosen, gaps = [], []
    for pair in pairs.tolist():
        options = [
            (int(t), float(g))
            for t, g in zip(forms.neighbours[pair], forms.gap[pair], strict=True)
            if t >= 0 and forms.word_of.get(int(t), -1) not in words
        ]
        free = [option for option in options if option[0] not in taken]
        if not options:  # every neighbour is a form of another word here: none of these may stand in the second copy
            options = [(int(forms.neighbours[pair][0]), float(forms.gap[pair][0]))]
        among = free or options
        token, gap = among[int(rng.integers(len(among)))]
        taken.add(token)
        chosen.append(token)
        gaps.append(gap)
    return np.array(chosen, dtype=np.int64), gaps


def token_matches(batch: Batch) -> float:
    """Share of second-copy rows whose token stands anywhere in the first copy: what token matching could use."""
    rows = batch.tokens[batch.row_doc, batch.row_pos]
    positions = torch.arange(batch.tokens.shape[1], device=rows.device)
    first_copy = (positions >= 1) & (positions <= batch.periods[batch.row_doc][:, None])
    found = (batch.tokens[batch.row_doc] == rows[:, None]) & first_copy
    return float(found.any(1).double().mean())


def disjoint_halves(
    n_discovery: int,
    n: int,
    pool: Int[np.ndarray, " n_pool"],
    context: int,
    bos: int | None,
    seed_parts: Sequence[str],
) -> tuple[Batch, Batch, Batch]:
    """Repeated random documents over two halves of a vocabulary: discovery and *seen* over one, *unseen* over another.

    Document k of seen and of unseen have the same period, so that the two can be compared document by document.
    """
    order = np.random.default_rng(seed_of(*seed_parts)).permutation(pool)
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    longest = min((context - 1) // 2, len(halves[0]))
    made: tuple[list[RepeatedDocument], ...] = ([], [], [])
    for what, size, into in (("discovery", n_discovery, ((0, 0),)), ("measured", n, ((1, 0), (2, 1)))):
        rng = np.random.default_rng(seed_of(*seed_parts, what))
        for number, period in enumerate(periods(size, longest, rng).tolist()):
            for batch, half in into:
                passage = rng.choice(halves[half], period, replace=False)
                made[batch].append(repeat(passage, bos, rng, f"{what}-{number:04d}"))
    return Batch.of(made[0]), Batch.of(made[1]), Batch.of(made[2])
