"""All live channels of all heads of a layer over many documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor

from fra._census_corpus import Corpus, concatenate, read, write
from fra._census_observe import Layer, Observer, check_documents, documents_digest, plan, stripe_lists
from fra._census_tables import Kind, Tables, Where, count_dtype
from fra._heads import Model
from fra._qk import check_layer_and_head
from fra._reductions import Strongest
from fra.errors import FraError

CensusReduce = Literal["sum", "abs", "max", "mean", "count", "contrast", "sensitivity", "mass"]
_NEED_STRIPES = ("contrast", "sensitivity")
_NEED_INPUTS = ("sensitivity", "mass")
_ROW_BYTES = 2 * 40
"""Of one channel in a result: head, ids, value, count, and as much again while they are ordered."""


@torch.no_grad()
def census(
    model: Model,
    sae: Any,
    documents: Sequence[Tensor],
    layer: int,
    heads: Sequence[int] | None = None,
    reduce: CensusReduce | Sequence[CensusReduce] = "sum",
    stripes: Sequence[int | Sequence[int]] | None = None,
    *,
    memory_budget: int = 1 << 30,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 256,
) -> Census:
    """Observes documents at one attention layer, for reductions over positions of all live channels of all heads.

    documents: 1-D tensors of token ids, of any lengths up to the model's context; padding contributes nothing. heads:
    all of the layer where None. stripes: for each document its offset t - s, or a list of them. reduce: the reductions
    that `Census.channels` will be asked for, summed over attended pairs (t, s) of all documents:

    - "sum", "abs", "max", "mean", "count" of F_ij(t,s), as in `ResolvedHead.channels`;
    - "contrast" (needs stripes): sum over stripe pairs of F_ij(t,s*) less the mean of F_ij over the row's keys, by
      which CIH channels are searched;
    - "sensitivity" (needs stripes): sum over stripe pairs of A(t,s*) (F_ij(t,s*) - sum_u A(t,u) F_ij(t,u)), the
      derivative of the attention on the stripes in the channel's gain (before softcap). The rest of the row has as
      much with the other sign;
    - "mass": sum of A(t,s) |F_ij(t,s) - sum_u A(t,u) F_ij(t,u)|.

    What is kept is the live entries alone, about 8 * sum_d T_d * L0 bytes in float32, + 4 a position, + 8 * n_heads a
    position with a QK-norm, + 4 * d_model a position for "sensitivity" and "mass". The reductions stream from these by
    block of key features: tables of [live features, block] within `memory_budget` bytes, never [d_sae, d_sae], beside
    one forward pass of about 2 048 tokens (with its scores and pattern), the projected entries of one document (8 *
    T * L0 * d_head bytes), and some arrays of 8 MB.

    checkpoint: a folder in which every `checkpoint_every` documents are saved; the same call goes on from there after
    an interruption, with the identical result. Computed in the model's precision, half precisions in float32. Raises
    FraError for documents, stripes, heads, or a dictionary that do not fit, and for a checkpoint of something else.
    """
    check_documents(documents)
    offsets = stripe_lists(documents, stripes)
    reduces = (reduce,) if isinstance(reduce, str) else tuple(reduce)
    _check_reduces(reduces, stripes is not None)
    if memory_budget < 1 or checkpoint_every < 1:
        raise FraError("memory_budget (bytes) and checkpoint_every (documents) must be positive.")
    longest = max(documents, key=len)
    _check_ids(model, documents)
    observer = Observer(model, sae, layer, longest, any(name in _NEED_INPUTS for name in reduces))
    chosen = tuple(range(observer.layer.n_heads)) if heads is None else tuple(heads)
    if not chosen or len(set(chosen)) < len(chosen):
        raise FraError(f"heads={list(chosen)} must name at least one head, and none twice.")
    for head in chosen:
        check_layer_and_head(model, layer, head)
    folder = None if checkpoint is None else Path(checkpoint)
    about = {} if folder is None else _about(observer, documents, offsets)
    parts = [] if folder is None else _resume(folder, about, observer.layer.decoder.device)
    done, unsaved = sum(len(part.number) for part in parts), len(parts)
    seen = 0
    for batch in plan([len(tokens) for tokens in documents]):
        seen += len(batch)
        if seen <= done:
            continue
        parts.append(observer.observe([documents[i] for i in batch], batch, [offsets[i] for i in batch]))
        waiting = sum(len(part.number) for part in parts[unsaved:])
        if folder is not None and (waiting >= checkpoint_every or seen == len(documents)):
            write(concatenate(parts[unsaved:], renumber=False), _next_part(folder), about)
            unsaved = len(parts)
    corpus = concatenate(parts, renumber=False)
    if not len(corpus.feature):
        raise FraError("no feature of the dictionary is live on any position (L0 is zero): wrong weights or hook.")
    return Census(observer.layer, corpus, chosen, reduces, memory_budget, observer.fingerprint)


def _check_reduces(reduces: Sequence[str], with_stripes: bool) -> None:
    for name in reduces:
        if name not in get_args(CensusReduce):
            raise FraError(f"reduce={name!r} is unknown: choose of {', '.join(get_args(CensusReduce))}.")
        if name in _NEED_STRIPES and not with_stripes:
            raise FraError(f"reduce={name!r} needs stripes: give the offsets t - s of each document.")
    if not reduces:
        raise FraError("reduce names nothing: give a reduction, or several.")


def _check_ids(model: Model, documents: Sequence[Tensor]) -> None:
    n_ctx, d_vocab = int(model.cfg.n_ctx), int(model.cfg.d_vocab)
    for number, tokens in enumerate(documents):
        if len(tokens) > n_ctx:
            raise FraError(f"document {number} has {len(tokens)} tokens and the model's context holds {n_ctx}.")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= d_vocab:
            raise FraError(
                f"token id {low if low < 0 else high} of document {number} is outside the vocabulary of {d_vocab}: "
                f"tokenize with this model's own tokenizer."
            )


def _about(observer: Observer, documents: Sequence[Tensor], offsets: Sequence[Sequence[int]]) -> dict[str, object]:
    return {"fingerprint": observer.fingerprint(), "documents": documents_digest(documents, offsets)}


def _next_part(folder: Path) -> Path:
    return folder / f"part-{len(list(folder.glob('part-*.safetensors'))):06}.safetensors"


def _resume(folder: Path, about: dict[str, object], device: torch.device) -> list[Corpus]:
    parts = []
    for path in sorted(folder.glob("part-*.safetensors")):
        part, wrote = read(path)
        if wrote != about:
            raise FraError(
                f"the checkpoint {folder} is of other documents, weights or reductions: give another folder, or "
                f"delete it."
            )
        parts.append(part.to(device))
    return parts


@dataclass(frozen=True)
class _Ask:
    """One question to a census."""

    reduces: tuple[CensusReduce, ...]
    n: int | None
    heads: tuple[int, ...]
    where: Where
    least: int


class Census:
    """What `census` saw, ready to be reduced; merge parts of a larger one, save, load."""

    def __init__(
        self,
        layer: Layer,
        corpus: Corpus,
        heads: tuple[int, ...],
        reduces: tuple[CensusReduce, ...],
        memory_budget: int,
        fingerprint: Any,
    ):
        self.layer, self.corpus, self.heads, self.reduces = layer, corpus, heads, reduces
        self.memory_budget = memory_budget
        self._fingerprint = fingerprint

    @property
    def n_documents(self) -> int:
        """Documents seen."""
        return len(self.corpus.number)

    @property
    def n_positions(self) -> int:
        """Tokens seen."""
        return self.corpus.row_start[-1]

    @property
    def n_entries(self) -> int:
        """Live features over all positions."""
        return len(self.corpus.feature)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self.corpus.nbytes

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of weights, dictionary and precision; censuses of one fingerprint can be merged."""
        return str(self._fingerprint())

    @torch.no_grad()
    def channels(
        self,
        reduce: CensusReduce | None = None,
        n: int | None = None,
        heads: Sequence[int] | None = None,
        *,
        where: Where = "all",
        min_count: int = 1,
    ) -> pd.DataFrame:
        """The n strongest channels of each head (all live ones where None), exactly: columns head, q_feature,
        k_feature, value, count; strongest |value| first, ties by ids.

        reduce: the first that the census was asked for where None. where: pairs on the documents' "stripe"s, "off"
        them, or "all". count: attended pairs (t, s) there at which both features are live, at least `min_count`.
        Raises FraError for what is not so, and where all live channels would not fit into the memory budget.
        """
        name = reduce or self.reduces[0]
        return self.strongest((name,), n, heads, where=where, min_count=min_count)[name]

    @torch.no_grad()
    def strongest(
        self,
        reduces: Sequence[CensusReduce],
        n: int | None,
        heads: Sequence[int] | None = None,
        *,
        where: Where = "all",
        min_count: int = 1,
    ) -> Mapping[CensusReduce, pd.DataFrame]:
        """`channels` of several reductions in one pass."""
        chosen = self.heads if heads is None else tuple(heads)
        self._check(reduces, n, chosen, where)
        ask = _Ask(tuple(reduces), n, chosen, where, max(1, min_count))
        counted = self._counted(ask)
        sources = {(name, head): self._source(name, head, ask) for name in reduces for head in chosen}
        best = {source: Strongest(n) for source in sources.values()}
        live, n_rows = self.corpus.live, 0
        width = self._width(ask, counted)
        for keys in torch.split(live, width):
            tables = Tables(self.layer, self.corpus, live, keys)
            count = tables.positions("count", where, None) if counted else None
            if n is None and count is not None:
                n_rows += int((count >= ask.least).sum()) * len(sources)
                self._refuse(n_rows)
            for (name, head), rows in best.items():
                # With one block codes only grow, and a tie with what is kept already comes too late.
                self._offer(rows, tables, name, head, ask, count, ties=width < len(live))
        return {
            name: self._frame(name, {head: best[sources[name, head]] for head in chosen}, ask, counted)
            for name in reduces
        }

    def _source(self, name: CensusReduce, head: int, ask: _Ask) -> tuple[CensusReduce, int]:
        """Whose numbers, up to sign, are those of this reduction and head: counts are the same for every head, and
        where coefficients are positive and nothing rotates all terms of a channel have one sign.
        """
        if name == "count":
            return name, ask.heads[0]
        if name == "abs" and self.layer.rotary is None and not self.corpus.signed:
            return "sum", head
        return name, head

    def _check(self, reduces: Sequence[str], n: int | None, heads: Sequence[int], where: str) -> None:
        for name in reduces:
            if name not in get_args(CensusReduce):
                raise FraError(f"reduce={name!r} is unknown: choose of {', '.join(get_args(CensusReduce))}.")
            if name in _NEED_INPUTS and self.corpus.inputs is None:
                raise FraError(f"{name!r} was not asked for: take the census with reduce={name!r} among others.")
            if name in _NEED_STRIPES and not len(self.corpus.offset):
                raise FraError(f"{name!r} needs stripes: give the census the offsets t - s of each document.")
            if name in ("contrast", "sensitivity", "mass") and where != "all":
                raise FraError(f"where={where!r} has no meaning for {name!r}, which weighs all pairs: leave it out.")
        if where not in get_args(Where):
            raise FraError(f"where={where!r} is unknown: choose of {', '.join(get_args(Where))}.")
        if where != "all" and not len(self.corpus.offset):
            raise FraError(f"where={where!r} needs stripes: give the census the offsets t - s of each document.")
        if n is not None and n < 1:
            raise FraError(f"n={n} asks for nothing: give a positive number.")
        missing = [head for head in heads if head not in self.heads]
        if missing or not heads:
            raise FraError(f"the census has no head {missing}: it has {list(self.heads)}.")

    def _counted(self, ask: _Ask) -> bool:
        """Whether counts of all channels are needed; else those of the strongest are enough, and values that are not
        zero are live.
        """
        simple = all(name in ("sum", "abs") for name in ask.reduces) and self.layer.rotary is None
        few = ask.n is not None and ask.n * len(ask.heads) * len(ask.reduces) < len(self.corpus.live) // 4
        return not (simple and few and ask.least == 1 and not self.corpus.signed)

    def _width(self, ask: _Ask, counted: bool) -> int:
        """Key features at a time."""
        corpus = self.corpus
        # Position parts of every reduction; or a head's table, with a document's own and the cells it goes to.
        tables = len(ask.reduces) * corpus.value.itemsize
        if self.layer.rotary is not None or any(name in ("max", "mass") for name in ask.reduces):
            tables += 4 * corpus.value.itemsize + 8
        column = len(corpus.live) * (tables + counted * count_dtype(corpus).itemsize)
        if column > self.memory_budget:
            raise FraError(
                f"memory_budget={self.memory_budget:,} bytes holds not even one key feature's column of "
                f"{len(corpus.live):,} channels: give at least {column:,}."
            )
        return max(1, self.memory_budget // column)

    def _refuse(self, n_rows: int) -> None:
        if n_rows * _ROW_BYTES > self.memory_budget:
            raise FraError(
                f"more than {n_rows:,} live channels would take {n_rows * _ROW_BYTES:,} bytes and memory_budget is "
                f"{self.memory_budget:,}: pass n= for the strongest, or min_count=."
            )

    def _offer(
        self,
        best: Strongest,
        tables: Tables,
        name: CensusReduce,
        head: int,
        ask: _Ask,
        count: Tensor | None,
        ties: bool,
    ) -> None:
        kind: Kind = "sum" if name == "mean" else name
        q, k = tables.q_ids, tables.k_ids
        for tile, values in tables.rows(kind, ask.where, head):
            number = None if count is None else count[tile]
            if name == "mean" and number is not None:
                values = values / number.clamp(min=1)
            full = best.threshold > 0
            first = torch.arange(tile.start, tile.stop, device=values.device)
            if full and kind != "max":
                # After the first tiles few rows hold anything as strong: the others are looked at no further.
                highest = torch.maximum(values.amax(1), -values.amin(1))
                some = (highest >= best.threshold if ties else highest > best.threshold).nonzero()[:, 0]
                if not len(some):
                    continue
                first, values, number = first[some], values[some], None if number is None else number[some]
            size = values.abs()
            strong = size > best.threshold if full and not ties else size >= best.threshold
            strong &= (values != 0) if number is None else (number >= ask.least)
            if not full and ask.n is not None and ask.n < size.numel():
                strong &= size >= size.masked_fill(~strong, -1.0).flatten().topk(ask.n).values[-1]
            row, column = strong.nonzero(as_tuple=True)
            value = values[row, column].to(self.corpus.value.dtype)
            code = q[first[row]] * self.layer.d_sae + k[column]  # int64: d_sae**2 passes 2**31 at 46 341
            counts = torch.zeros_like(code) if number is None else number[row, column].long()
            best.offer(value.abs().double(), code, value, counts)

    def _frame(self, name: CensusReduce, best: Mapping[int, Strongest], ask: _Ask, counted: bool) -> pd.DataFrame:
        frames = []
        for head, rows in best.items():
            _, code, value, count = rows.result()
            value = value.abs() if name == "abs" else value
            frames.append(
                (torch.full_like(code, head), code // self.layer.d_sae, code % self.layer.d_sae, value, count)
            )
        every, q, k, value, count = (torch.cat(parts) for parts in zip(*frames, strict=True))
        if not counted and len(q):
            home = self.corpus.device
            (i, at_i), (j, at_j) = (torch.unique(ids.to(home), return_inverse=True) for ids in (q, k))
            few = Tables(self.layer, self.corpus, i, j).positions("count", ask.where, None)
            count = few[at_i, at_j].long().cpu()
        columns = {"head": every, "q_feature": q, "k_feature": k, "value": value, "count": count}
        return pd.DataFrame({key: column.cpu().numpy() for key, column in columns.items()})

    @torch.no_grad()
    def examples(self, head: int, q_feature: int, k_feature: int, n: int = 10) -> pd.DataFrame:
        """Where one channel contributes most: columns document, q_pos, k_pos, value, strongest |value| first, ties by
        document and position. No more than n are held at a time.

        Raises FraError for a head or feature that is not there, and for n below 1.
        """
        self._check(("sum",), n, (head,), "all")
        for feature in (q_feature, k_feature):
            if not 0 <= feature < self.layer.d_sae:
                raise FraError(f"feature {feature} is out of range: the dictionary has {self.layer.d_sae} features.")
        corpus, layer, best = self.corpus, self.layer, Strongest(n)
        q, k = (torch.tensor([feature], device=corpus.device) for feature in (q_feature, k_feature))
        u, v = layer.directions("query", head, q), layer.directions("key", head, k)
        width = int(corpus.length.max())
        for part in corpus.parts(width):
            number = corpus.number[part.first : part.stop].to(corpus.device)
            pos, sides = torch.arange(part.n_pos, device=corpus.device), []
            for feature, gain in ((q_feature, corpus.gain_q), (k_feature, corpus.gain_k)):
                dense = corpus.value.new_zeros(part.n_docs * part.n_pos)
                there = part.feature == feature
                dense[part.padded_row[there]] = part.coefficient(gain, head)[there]
                sides.append(dense.view(part.n_docs, part.n_pos))
            ahead = pos[:, None] - pos
            if layer.rotary is None:
                coupling = (u * v).sum()
            else:
                turned = layer.rotary.rotate(u.expand(part.n_pos, -1), pos)
                coupling = (turned * layer.rotary.rotate(v, pos[:1])).sum(-1)[ahead.clamp(min=0)]
            terms = sides[0][:, :, None] * sides[1][:, None, :]
            live = (terms != 0) & layer.mask(part.n_pos)
            terms = terms * coupling
            doc, t, s = (live & (terms.abs() >= best.threshold)).nonzero(as_tuple=True)
            value = terms[doc, t, s]
            best.offer(value.abs().double(), (number[doc] * width + t) * width + s, value)
        _, code, value = best.result()
        columns = {"document": code // width**2, "q_pos": code // width % width, "k_pos": code % width, "value": value}
        return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})

    def merge(self, *others: Census) -> Census:
        """The census of all documents of this one, then of the others; their numbers go on in that order.

        Raises FraError for censuses of other weights, dictionaries, heads or reductions.
        """
        for other in others:
            if (other.fingerprint, other.heads, other.reduces) != (self.fingerprint, self.heads, self.reduces):
                raise FraError(
                    "only censuses of the same model, dictionary, layer, heads and reductions can be merged."
                )
        corpora = [one.corpus for one in (self, *others)]
        longest = max((self, *others), key=lambda one: int(one.corpus.length.max()))
        joined = concatenate(corpora, renumber=True)
        return Census(longest.layer, joined, self.heads, self.reduces, self.memory_budget, lambda: self.fingerprint)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, with JSON in its header; complete or absent, whatever interrupts."""
        about: dict[str, object] = {
            "fingerprint": self.fingerprint,
            "heads": list(self.heads),
            "reduces": list(self.reduces),
        }
        write(self.corpus, Path(path), about)

    @classmethod
    @torch.no_grad()
    def load(cls, path: str | Path, model: Model, sae: Any, layer: int, *, memory_budget: int = 1 << 30) -> Census:
        """A census that `save` wrote, with the model and dictionary that it was of.

        Raises FraError for what is no such file, and where weights or dictionary are others.
        """
        corpus, about = read(Path(path))
        longest = torch.zeros(int(corpus.length.max()), dtype=torch.long)
        observer = Observer(model, sae, layer, longest, corpus.inputs is not None)
        fingerprint = observer.fingerprint()
        if about.get("fingerprint") != fingerprint:
            raise FraError(f"the census {path} is of another model, dictionary or layer: give those that it was of.")
        corpus = corpus.to(observer.layer.decoder.device)
        heads, reduces = about["heads"], about["reduces"]
        assert isinstance(heads, list) and isinstance(reduces, list)
        return cls(observer.layer, corpus, tuple(heads), tuple(reduces), memory_budget, lambda: fingerprint)
