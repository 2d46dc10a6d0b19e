"""Conceptual induction on text that repeats no token: the search for its channels, and their exact effect (Q21).

Rows are positions t of natural documents whose token stands nowhere before in the document, so that token induction
has nothing to go by. For a feature i live at t, the keys s of the stripe are those with i live at s - 1, where by the
choice of rows another token stands. They are compared with keys s' that follow a position where i is not live, of rows
where i is live too, matched in the token at s', in the lag t - s' (by octaves) and in the position s' (in runs of four:
of a row t the lag fixes the position, but stripe keys and matched keys are of different rows, and a feature of the
document's end is told from others by position alone). Other stripes ask for i at s - k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from fra.core.coded import Arm, pair_couplings
from fra.core.frozen import FrozenLayer
from fra.measures.concepts.designs import Concepts
from fra.search.examples import Shown, example_on_text
from fra.statistics.stats import seed_of


@dataclass(frozen=True)
class MarkedTexts:
    """Natural documents padded to one length; which positions are text, and which rows repeat no token."""

    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    """Text: neither BOS nor padding."""
    sources: tuple[str, ...]

    @cached_property
    def first(self) -> Bool[Tensor, "batch pos"]:
        """Text whose token stands nowhere before in the document, the beginning (BOS) left out."""
        same = self.tokens[:, :, None] == self.tokens[:, None, :]
        earlier = torch.ones(self.tokens.shape[1], self.tokens.shape[1], dtype=torch.bool).tril(-1)
        first: Tensor = self.valid & ~(same & earlier & self.valid[:, None, :]).any(-1)
        return first

    @cached_property
    def token_number(self) -> Int[Tensor, "batch pos"]:
        """Tokens numbered from 0 without gaps."""
        number: Tensor = torch.unique(self.tokens, return_inverse=True)[1]
        return number

    @cached_property
    def priority(self) -> Float[Tensor, "batch pos"]:
        """A fixed random order of all rows, by which features choose theirs."""
        generator = torch.Generator().manual_seed(seed_of("rows of natural text"))
        return torch.rand(self.tokens.shape, generator=generator)


def texts(documents: Sequence[Sequence[int]], sources: Sequence[str], has_bos: bool) -> MarkedTexts:
    """Documents of token ids, BOS first where `has_bos`."""
    length = max(len(d) for d in documents)
    tokens = torch.tensor([[*d, *([d[0]] * (length - len(d)))] for d in documents])
    position = torch.arange(length)
    valid = position[None, :] < torch.tensor([len(d) for d in documents])[:, None]
    return MarkedTexts(tokens, valid & (position >= int(has_bos)), tuple(sources))


def example_of(text: MarkedTexts, arm: Arm, head: int, pair: Sequence[int]) -> Shown | None:
    """The channel where it does what is asked for: from a row that repeats no token, to a key that follows its query
    feature; None where there is no such score.
    """
    i, j = pair
    live = (arm.columns("query", head, torch.tensor([i]))[..., 0] != 0) & text.valid
    follows = torch.zeros_like(live)
    follows[:, 1:] = live[:, :-1] & text.valid[:, 1:]
    where = (live & text.first)[:, :, None] & follows[:, None, :]
    lengths = (text.valid * torch.arange(1, live.shape[1] + 1)).amax(1).tolist()
    return example_on_text(arm, head, (i, j), text.tokens, lengths, where)


class ConceptSearch:
    """M = G * sum over rows and stripe keys of a_i(t) (a_j(s) - its mean over keys with the token of s), exhaustive
    over features live in enough documents. What heads share is computed once for a stripe.
    """

    def __init__(self, text: MarkedTexts, arm: Arm, design: Concepts) -> None:
        self.text, self.arm, self.design = text, arm, design
        codes = arm.codes
        batch, pos = codes.shape
        self.shape = (batch, pos)
        row, feature = codes.row.cpu().numpy(), codes.feature.cpu().numpy()
        value = {side: arm.coefficients(side, 0).double().cpu().numpy() for side in ("query", "key")}
        real = text.valid.flatten().numpy()[row]
        self._row, self._feature = row[real], feature[real]
        self._q, self._k = value["query"][real], value["key"][real]
        self.d_sae = len(codes.decoder)
        # sums of the query side over rows that repeat no token, within a feature and document, by position
        self._order = np.lexsort((self._row, self._feature))
        weight = (self._q * text.first.flatten().numpy()[self._row])[self._order]
        self._running = np.concatenate([[0.0], np.cumsum(weight)])
        self._place = self._feature[self._order] * (batch * pos) + self._row[self._order]
        number = text.token_number.flatten().numpy()
        times = np.bincount(number[text.valid.flatten().numpy()], minlength=int(number.max()) + 1)
        often = times[number[self._row]] >= 2  # a token that stands once is its own mean: nothing is left of it
        size = (batch * pos, self.d_sae)
        self._keys = sparse.csr_matrix((self._k[often], (self._row[often], self._feature[often])), shape=size)
        self.key_features = self._live_enough(self._keys)
        token_rows = np.flatnonzero(text.valid.flatten().numpy() & (times[number] >= 2))
        kept, column = np.unique(number[token_rows], return_inverse=True)
        one = np.ones(len(token_rows))
        self._tokens = sparse.csr_matrix((one, (token_rows, column)), shape=(batch * pos, len(kept)))
        total = (self._tokens.T @ self._keys[:, self.key_features]).toarray()
        self._token_mean = np.asarray(total / times[kept][:, None], dtype=np.float32)

    def _live_enough(self, matrix: Any) -> Int[np.ndarray, " n"]:
        entries = matrix.tocoo()
        pairs = np.unique(entries.col.astype(np.int64) * self.shape[0] + entries.row // self.shape[1])
        return np.flatnonzero(np.bincount(pairs // self.shape[0], minlength=self.d_sae) >= self.design.live_in)

    def stripe(self, lag: int) -> ConceptStripe:
        """The stripe of keys with i live `lag` positions before them; 1 is induction."""
        batch, pos = self.shape
        row = self._row[self._order]  # as `_place` is sorted: what is looked up in order is found in the cache
        document, at = row // pos, row % pos + lag
        inside = at < pos
        feature, key = self._feature[self._order][inside], (document * pos + at)[inside]
        # rows t > s of the same feature and document: what the running sum gains from s to the document's end
        low = np.searchsorted(self._place, feature * (batch * pos) + key, side="right")
        high = np.searchsorted(self._place, feature * (batch * pos) + (document[inside] + 1) * pos)
        weight = self._running[high] - self._running[low]
        use = (weight > 0) & self.text.valid.flatten().numpy()[key]
        W = sparse.csr_matrix((weight[use], (key[use], feature[use])), shape=(batch * pos, self.d_sae))
        queries = self._live_enough(W)
        chosen = W[:, queries].T.tocsr()
        position_part = (chosen @ self._keys[:, self.key_features]).toarray().astype(np.float32)
        position_part -= (chosen @ self._tokens).toarray().astype(np.float32) @ self._token_mean
        return ConceptStripe(self, lag, queries, position_part, W.tocsc())


@dataclass(frozen=True)
class ConceptStripe:
    """The position part of one stripe, for features that are live in enough documents."""

    search: ConceptSearch
    lag: int
    queries: Int[np.ndarray, " n_q"]
    position_part: Float[np.ndarray, "n_q n_k"]
    weight: Any
    """[batch * pos, d_sae] sparse: where a feature's stripe has keys."""

    @cached_property
    def _keys_by_column(self) -> Any:
        return self.search._keys.tocsc()

    def documents(self, i: int, j: int) -> int:
        """Documents in which i has stripe keys with j live."""
        both = np.intersect1d(_rows(self.weight, i), _rows(self._keys_by_column, j), assume_unique=True)
        return len(np.unique(both // self.search.shape[1]))

    def strongest(self, arm: Arm, head: int) -> tuple[Int[Tensor, "m 2"], Float[np.ndarray, " m"]]:
        """The candidates of one head: pairs of largest M that are live in enough documents, strongest first, and their
        M. arm: of the discovery documents.
        """
        design, device = self.search.design, arm.codes.decoder.device
        if not self.position_part.size:
            return torch.zeros(0, 2, dtype=torch.long, device=device), np.zeros(0)
        U, V = (part.float().cpu() for part in typical_couplings(arm, head, self.search.shape[1], design.octaves))
        M = torch.from_numpy(self.position_part) * (U[self.queries] @ V[self.search.key_features].T)
        values, places = M.flatten().topk(min(design.checked, M.numel()))
        chosen: list[tuple[int, int, float]] = []
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            if len(chosen) == design.candidates or value <= 0:
                break
            i = int(self.queries[place // M.shape[1]])
            j = int(self.search.key_features[place % M.shape[1]])
            if self.documents(i, j) >= design.live_in:
                chosen.append((i, j, value))
        pairs = torch.tensor([c[:2] for c in chosen], dtype=torch.long, device=device).view(-1, 2)
        return pairs, np.array([c[2] for c in chosen])


def _rows(matrix: Any, column: int) -> np.ndarray:
    return np.asarray(matrix.indices[matrix.indptr[column] : matrix.indptr[column + 1]])


def typical_couplings(arm: Arm, head: int, pos: int, octaves: int) -> tuple[Tensor, Tensor]:
    """U, V with U_i . V_j the coupling of a pair; where the head rotates, its mean over lags of 1, 2, 4, ..."""
    U, V = arm.couplings(head)
    rotary = arm.frozen.rotary
    if rotary is None:
        return U, V
    lags = [2**k for k in range(octaves) if 2**k < pos]
    at = [rotary.rotate(U, torch.full((len(U),), lag, device=U.device)) for lag in lags]
    return torch.stack(at).mean(0), rotary.rotate(V, torch.zeros(len(V), dtype=torch.long, device=V.device))


@dataclass(frozen=True)
class ConceptEffects:
    """Sums by document over stripe keys less their matched keys; divide by `weight`. [n_documents, n_pairs] each."""

    nats: Float[np.ndarray, "n_documents n"]
    """dL of the channel."""
    contrast: Float[np.ndarray, "n_documents n"]
    """The head's own log-odds."""
    weight: Float[np.ndarray, "n_documents n"]
    documents: Int[np.ndarray, " n"]
    """Documents that have stripe keys with matched ones elsewhere."""
    least: int
    """With fewer such documents a channel has no effect."""

    def mean(self, part: str = "nats") -> Float[np.ndarray, " n"]:
        """Mean over stripe keys; -inf for channels live in too few documents."""
        sums = getattr(self, part).sum(0)
        enough = self.documents >= self.least
        return np.where(enough, sums / np.maximum(self.weight.sum(0), 1e-12), -np.inf)


class HeadOnText:
    """One head on natural documents."""

    def __init__(self, text: MarkedTexts, arm: Arm, head: int, design: Concepts) -> None:
        self.text, self.arm, self.head, self.design = text, arm, head, design
        frozen = arm.frozen
        self.scores = frozen.scores(head)
        self.pattern = _cap(frozen, self.scores).softmax(-1)

    def grid(self, pairs: Int[Tensor, "n 2"], lag: int) -> Grid:
        """Rows of every pair's query feature against all keys, with the weight of each key in the comparison."""
        return Grid(self, pairs, lag)

    def channels(self, pairs: Int[Tensor, "n 2"], lag: int = 1, contrast: bool = True) -> ConceptEffects:
        """Exact effect of removing each channel by itself at every key of the row; the head's own contrast is left at
        zero where it is not asked for.
        """
        grid = self.grid(pairs, lag)
        before = grid.odds(None)
        return grid.effects(before - grid.odds(-grid.couplings()), before if contrast else None)


def _cap(frozen: FrozenLayer, scores: Tensor) -> Tensor:
    return frozen.cap(scores).masked_fill(scores == -torch.inf, -torch.inf)


class Grid:
    """The rows of some channels, side by side: [rows, keys]."""

    def __init__(self, on: HeadOnText, pairs: Int[Tensor, "n 2"], lag: int) -> None:
        self.on, self.pairs = on, pairs
        text, arm = on.text, on.arm
        q = arm.columns("query", on.head, pairs[:, 0])
        self.k = arm.columns("key", on.head, pairs[:, 1])
        live = (q != 0) & text.valid[:, :, None]
        chosen = live & text.first[:, :, None]
        pair, doc, pos = torch.nonzero(chosen.permute(2, 0, 1), as_tuple=True)
        order = torch.argsort(pair * 2.0 + text.priority[doc, pos].double(), stable=True)
        per_pair = torch.bincount(pair, minlength=len(pairs))
        within = torch.arange(len(pair)) - torch.repeat_interleave(per_pair.cumsum(0) - per_pair, per_pair)
        keep = order[within < on.design.rows]
        self.pair, self.doc, self.pos = pair[keep], doc[keep], pos[keep]
        self.query = q[self.doc, self.pos, self.pair]
        length = text.tokens.shape[1]
        key = torch.arange(length)
        source = key - lag
        # a stripe key lies before the row, and has text both at it and where its feature is asked for
        either = text.valid & (source >= 0) & text.valid[:, source.clamp(min=0)]
        usable = (arm.frozen.mask & (key[:, None] > key))[self.pos] & either[self.doc]
        there = live.permute(2, 0, 1)[self.pair, self.doc][:, source.clamp(min=0)]
        row, at = torch.nonzero(usable, as_tuple=True)
        octave = torch.log2(torch.arange(1, length + 1).float()).long()
        n_octaves = int(octave[-1]) + 1
        n_tokens = int(text.token_number.max()) + 1
        stratum = self.pair[row] * n_tokens + text.token_number[self.doc[row], at]
        stratum = (stratum * n_octaves + octave[self.pos[row] - at - 1]) * length + at // on.design.run
        positive = there[row, at]
        # most keys are matched with nothing: strata are numbered among those of stripe keys
        with_stripe, n_pos = torch.unique(stratum[positive], return_counts=True)
        number = torch.searchsorted(with_stripe, stratum).clamp(max=max(len(with_stripe) - 1, 0))
        mixed = torch.nonzero(with_stripe[number] == stratum)[:, 0] if len(with_stripe) else number[:0]
        row, at, stratum, positive = row[mixed], at[mixed], number[mixed], positive[mixed]
        n_other = torch.bincount(stratum[~positive], minlength=len(n_pos))
        used = n_other[stratum] > 0
        self.row, self.key, stratum, positive = row[used], at[used], stratum[used], positive[used]
        self.weight = torch.where(positive, 1.0, -n_pos[stratum].double() / n_other[stratum])
        compared = n_other > 0
        self._index, self._strata = (compared.cumsum(0) - 1)[stratum], int(compared.sum())

    def couplings(self) -> Float[Tensor, "n one_or_pos"]:
        """G of every pair, by lag where the head rotates."""
        offsets = torch.arange(self.k.shape[1], device=self.k.device)
        return pair_couplings(self.on.arm, self.on.head, self.pairs, offsets)

    def odds(self, added: Float[Tensor, "n one_or_pos"] | None) -> Float[Tensor, " n_cells"]:
        """Log-odds of every compared key with `added` a_i a_j added to the row's scores (nothing where None)."""
        on, frozen = self.on, self.on.arm.frozen
        at = self.doc[self.row], self.pos[self.row], self.key
        own = on.pattern[at].double()
        total = torch.ones(len(self.row), dtype=torch.float64)
        if added is not None:
            F = self.query[:, None] * self.k.permute(2, 0, 1)[self.pair, self.doc]
            if added.shape[1] == 1:
                F = F * added[self.pair]
            else:
                lag = (self.pos[:, None] - torch.arange(self.k.shape[1])).clamp(min=0)
                F = F * added[self.pair].gather(1, lag)
            if frozen.softcap is not None:
                before = on.scores[self.doc, self.pos]
                F = torch.where(before > -torch.inf, frozen.cap(before + F) - frozen.cap(before), 0.0)
            # what the row gains in all: only keys with j live change
            gained = (on.pattern[self.doc, self.pos] * torch.expm1(F)).sum(1, dtype=torch.float64)
            own = own * F[self.row, self.key].double().exp()
            total = total + gained[self.row]
        own = own.clamp(min=1e-300)
        return own.log() - (total - own).clamp(min=1e-12).log()

    def effects(self, nats: Float[Tensor, " n_cells"], contrast: Float[Tensor, " n_cells"] | None) -> ConceptEffects:
        """Sums by document. Values are taken from the middle of their stratum, which changes no mean (weights cancel in
        a stratum) and keeps documents with only stripe keys or only matched ones comparable.
        """
        n, n_docs = len(self.pairs), len(self.on.text.tokens)
        cell = self.doc[self.row] * n + self.pair[self.row]

        def by_document(values: Tensor) -> np.ndarray:
            return np.asarray(torch.bincount(cell, weights=values, minlength=n_docs * n).double().view(n_docs, n))

        def centred(values: Tensor) -> np.ndarray:
            middle = torch.zeros(self._strata, dtype=torch.float64)
            for side in (self.weight > 0, self.weight < 0):
                total = torch.bincount(self._index[side], weights=values[side], minlength=self._strata)
                middle += 0.5 * total / torch.bincount(self._index[side], minlength=self._strata).clamp(min=1)
            return by_document(self.weight * (values - middle[self._index]))

        live = by_document((self.weight > 0).double()) > 0
        own = np.zeros(live.shape) if contrast is None else centred(contrast)
        return ConceptEffects(
            centred(nats), own, by_document(self.weight.abs() / 2), live.sum(0), self.on.design.live_in
        )
