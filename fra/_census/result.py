"""What a census saw, and the questions that it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch

from fra._census.corpus import Corpus, concatenate, read, write
from fra._census.follow import Followed
from fra._census.job import Ask, CensusReduce
from fra._census.observe import Layer, Observer, same_angles
from fra._census.scan import Scan
from fra._census.shards import Described, Shard, described, in_order, merge_files
from fra._census.tables import Tables, Where
from fra.architectures.face import face, facing
from fra.architectures.known import layer_and_heads, place_of
from fra.core.weights import Model
from fra.errors import FraError
from fra.verdicts.shown import as_html

NEED_STRIPES = ("contrast", "sensitivity")
NEED_INPUTS = ("sensitivity", "mass")


def about_of(
    fingerprint: str, heads: Sequence[int], reduces: Sequence[str], followed: Followed | None, shard: Shard | None
) -> dict[str, object]:
    """What stands in the header of a census's file."""
    about: dict[str, object] = {"fingerprint": fingerprint, "heads": list(heads), "reduces": list(reduces)}
    if shard is None:
        return about
    follow = {} if followed is None else {"follow": [followed.k, followed.channels.tolist()]}
    return {**about, **follow, "shard": shard.about()}


@facing
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
        followed: Followed | None = None,
        shard: Shard | None = None,
    ):
        self.layer, self.corpus, self.heads, self.reduces = layer, corpus, heads, reduces
        self.memory_budget = memory_budget
        self._fingerprint = fingerprint
        self._followed = followed
        self.shard = shard
        """Which one it is of how many, and of what; None for a whole census."""

    def __repr__(self) -> str:
        which = "" if self.shard is None else f"{self.shard}, "
        return (
            f"Census({which}layer {self.layer.weights.layer}, heads {list(self.heads)}, {self.n_documents} documents, "
            f"{self.n_positions} positions, {self.n_entries} live entries of {self.layer.d_sae} features; "
            f"{', '.join(self.reduces)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which stands behind the fingerprint: a census goes to other processes."""
        return vars(self) | {"_fingerprint": partial(str, str(self._fingerprint()))}

    def _repr_html_(self) -> str:
        facts = {
            "heads": ", ".join(f"L{self.layer.weights.layer}H{head}" for head in self.heads),
            "documents": f"{self.n_documents} ({self.n_positions} positions)",
            "dictionary": f"{self.layer.d_sae} features at {self.layer.weights.hook_name}",
            "live entries": f"{self.n_entries} ({self.n_entries / max(1, self.n_positions):.1f} a position)",
            "reductions": ", ".join(self.reduces),
        }
        return as_html("Census", facts)

    def plot(self, head: int | str | None = None, n: int = 15, *, reduce: CensusReduce | None = None) -> Any:
        """The n strongest channels of one head as bars (`fra.plot.census`); returns matplotlib's axes."""
        from fra.plot import census

        return census(self, head, n, reduce=reduce)

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
        heads: Sequence[int | str] | str | None = None,
        *,
        head: int | str | None = None,
        where: Where = "all",
        min_count: int = 1,
        min_documents: int = 1,
    ) -> pd.DataFrame:
        """The n strongest channels of each head (all live ones where None), exactly: columns head, q_feature,
        k_feature, value, count; strongest |value| first, ties by ids. heads: of these alone; head: of one; by number or
        name ("L1H4").

        reduce: the first that the census was asked for where None. where: pairs on the documents' "stripe"s, "off"
        them, or "all". count: attended pairs (t, s) there at which both features are live, at least `min_count`.
        min_documents: only channels that meet on the stripe in so many documents, of which the candidates for CIH
        channels are the strongest by "contrast"; for that, "sensitivity", and where="stripe".
        Raises FraError for what is not so, and where all live channels would not fit into the memory budget.
        """
        name = reduce or self.reduces[0]
        if head is not None:
            if heads is not None:
                raise FraError("give head (one) or heads (several), not both.")
            heads = [head]
        return self.strongest((name,), n, heads, where=where, min_count=min_count, min_documents=min_documents)[name]

    @torch.no_grad()
    def strongest(
        self,
        reduces: Sequence[CensusReduce],
        n: int | None,
        heads: Sequence[int | str] | str | None = None,
        *,
        where: Where = "all",
        min_count: int = 1,
        min_documents: int = 1,
    ) -> Mapping[CensusReduce, pd.DataFrame]:
        """`channels` of several reductions in one pass."""
        chosen = layer_and_heads(self.layer.weights.layer, heads)[1] or (self.heads if heads is None else ())
        self.check(reduces, n, chosen, where)
        if min_documents > 1 and where != "stripe" and not set(reduces) <= set(NEED_STRIPES):
            raise FraError(
                "min_documents counts documents on stripes: ask for contrast, sensitivity or where='stripe'."
            )
        ask = Ask(tuple(reduces), n, chosen, where, max(1, min_count), max(1, min_documents))
        scan = Scan(self.layer, self.corpus, ask, self.memory_budget)
        rows = {source: best.result() for source, best in scan.run().items()}
        left = [code for source, (_, code, _, _) in rows.items() if source[0] != "count" and not scan.job.counted]
        counts = self._counts(torch.unique(torch.cat(left)), where) if left else None
        return {
            name: self._frame(name, {head: rows[scan.job.sources[name, head]] for head in chosen}, counts)
            for name in reduces
        }

    def check(self, reduces: Sequence[str], n: int | None, heads: Sequence[int], where: str) -> None:
        if not self.n_entries:
            raise FraError(f"{self.shard} has no live entries: merge it with the others.")
        for name in reduces:
            if name not in get_args(CensusReduce):
                raise FraError(f"reduce={name!r} is unknown: choose of {', '.join(get_args(CensusReduce))}.")
            if name in NEED_INPUTS and self.corpus.inputs is None:
                raise FraError(f"{name!r} was not asked for: take the census with reduce={name!r} among others.")
            if name in NEED_STRIPES and not len(self.corpus.offset):
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

    def _counts(self, code: torch.Tensor, where: Where) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of channels, ascending, and how often each is live."""
        d_sae, home = self.layer.d_sae, self.corpus.device
        (i, at_i), (j, at_j) = (
            torch.unique(ids.to(home), return_inverse=True) for ids in (code // d_sae, code % d_sae)
        )
        few = Tables(self.layer, self.corpus, i, j).positions("count", where, None, slice(0, len(j)))
        return code, few[at_i, at_j].long().cpu()

    def _frame(
        self,
        name: CensusReduce,
        rows: Mapping[int, tuple[torch.Tensor, ...]],
        counts: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> pd.DataFrame:
        """Every head's key, code, value and count; counts: of what was not counted before."""
        head = torch.cat([torch.full_like(code, head) for head, (_, code, _, _) in rows.items()])
        _, code, value, count = (torch.cat(parts) for parts in zip(*rows.values(), strict=True))
        value = (value.abs() if name == "abs" else value).to(self.corpus.value.dtype)
        if counts is not None and name != "count":
            count = counts[1][torch.searchsorted(counts[0], code)]
        q, k = code // self.layer.d_sae, code % self.layer.d_sae
        columns = {"head": head, "q_feature": q, "k_feature": k, "value": value, "count": count}
        return pd.DataFrame({key: column.cpu().numpy() for key, column in columns.items()})

    @torch.no_grad()
    def examples(self, head: int | str, q_feature: int, k_feature: int, n: int = 10) -> pd.DataFrame:
        """Where one channel contributes most: columns document, q_pos, k_pos, value, strongest |value| first, ties by
        document and position. No more than n are held at a time.

        Found from the kept entries, for any channel, as `followed` has found them for those that were named before
        documents were seen.

        Raises FraError for a head or feature that is not there, and for n below 1.
        """
        head = place_of(self.layer.weights.layer, head)[1]
        self.check(("sum",), n, (head,), "all")
        for feature in (q_feature, k_feature):
            if not 0 <= feature < self.layer.d_sae:
                raise FraError(f"feature {feature} is out of range: the dictionary has {self.layer.d_sae} features.")
        channel = torch.tensor([[head, q_feature, k_feature]])
        found = Followed.nothing(channel, n, self.corpus.value).see(self.layer, self.corpus)
        return found.frame().drop(columns=["head", "q_feature", "k_feature"])

    def followed(self) -> pd.DataFrame:
        """Where the channels that `census` was to `follow` contribute most, `n_examples` of each at most: columns head,
        q_feature, k_feature, document, q_pos, k_pos, value; channels as they were named, the strongest |value| first,
        ties by document and position.

        Raises FraError where none were named.
        """
        if self._followed is None:
            raise FraError("no channels were followed: name them to the census (follow=), or ask for examples.")
        return self._followed.frame()

    def merge(self, *others: Census) -> Census:
        """The census of all documents of this one, then of the others; their numbers go on in that order. Of shards, in
        any order, the census that one run over all documents takes, to the bit.

        Raises FraError for censuses of other weights, dictionaries, heads, reductions or rotary angles, and where
        shards are not of one census, or some of it are missing or there twice.
        """
        if any(one.shard is not None for one in (self, *others)):
            return self._whole((self, *others))
        followed, seen = self._followed, self.n_documents
        for other in others:
            if (other.fingerprint, other.heads, other.reduces) != (self.fingerprint, self.heads, self.reduces):
                raise FraError(
                    "only censuses of the same model, dictionary, layer, heads and reductions can be merged."
                )
            if (followed is None) != (other._followed is None) or (followed and not followed.same(other._followed)):
                raise FraError("only censuses that follow the same channels, n_examples of each, can be merged.")
            if not same_angles(self.layer.rotary, other.layer.rotary):
                raise FraError(
                    "these censuses are of texts whose positions rotate by other angles (they depend on a text's "
                    "length in this model): they cannot be merged."
                )
            if followed is not None and other._followed is not None:
                followed = followed.merge(other._followed, seen)
            seen += other.n_documents
        corpora = [one.corpus for one in (self, *others)]
        longest = max((self, *others), key=lambda one: int(one.corpus.length.max()))
        joined = concatenate(corpora, renumber=True)
        return Census(
            longest.layer, joined, self.heads, self.reduces, self.memory_budget, lambda: self.fingerprint, followed
        )

    @staticmethod
    def _whole(shards: Sequence[Census]) -> Census:
        ordered = [shards[at] for at in in_order([one._described() for one in shards])]
        first, followed = ordered[0], ordered[0]._followed
        for one in ordered[1:]:
            if followed is not None and one._followed is not None:
                followed = followed.merge(one._followed)
        joined = concatenate([one.corpus for one in ordered], renumber=False)
        if not len(joined.feature):
            raise FraError("no feature of the dictionary is live on any position (L0 is zero): wrong weights or hook.")
        budget = max(one.memory_budget for one in ordered)
        return Census(first.layer, joined, first.heads, first.reduces, budget, lambda: first.fingerprint, followed)

    def _described(self) -> Described:
        name = f"a census of {self.n_documents} documents" if self.shard is None else f"the census of {self.shard}"
        return described(name, self._about())

    def _about(self) -> dict[str, object]:
        return about_of(self.fingerprint, self.heads, self.reduces, self._followed, self.shard)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, with JSON in its header; complete or absent, whatever interrupts."""
        followed = None if self._followed is None else self._followed.tensors()
        write(self.corpus, Path(path), self._about(), followed)

    merge_files = staticmethod(merge_files)

    @classmethod
    @face
    @torch.no_grad()
    def load(cls, path: str | Path, model: Model, sae: Any, layer: int, *, memory_budget: int = 1 << 30) -> Census:
        """A census that `save` wrote, with the model and dictionary that it was of.

        Raises FraError for what is no such file, and where weights or dictionary are others.
        """
        corpus, about, tensors = read(Path(path))
        try:
            shard = Shard.of_about(about.get("shard"))
        except FraError as error:
            raise FraError(f"the census {path} cannot be read: {error}") from error
        n_pos = int(corpus.length.max()) if shard is None else shard.longest
        longest = torch.zeros(n_pos, dtype=torch.long)
        observer = Observer(model, sae, layer, longest, corpus.inputs is not None)
        fingerprint = observer.fingerprint()
        if about.get("fingerprint") != fingerprint:
            raise FraError(f"the census {path} is of another model, dictionary or layer: give those that it was of.")
        corpus = corpus.to(observer.layer.decoder.device)
        heads, reduces = about.get("heads"), about.get("reduces")
        if not isinstance(heads, list) or not isinstance(reduces, list):
            raise FraError(f"{path} is a part of a checkpoint: give a file that Census.save wrote.")
        followed = Followed.of_tensors(tensors)
        about_it = tuple(heads), tuple(reduces), memory_budget
        return cls(observer.layer, corpus, *about_it, lambda: fingerprint, followed, shard)
