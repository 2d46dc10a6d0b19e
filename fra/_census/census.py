"""All live channels of all heads of a layer over many documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fra._census.checkpoint import Checkpoint
from fra._census.corpus import Corpus, concatenate
from fra._census.follow import Followed, channels_to_follow
from fra._census.job import CensusReduce
from fra._census.observe import Observer, documents_digest, plan, stripe_lists, token_documents
from fra._census.result import NEED_INPUTS, NEED_STRIPES, Census
from fra._census.shards import Shard, check_shard, cut, versions
from fra.architectures.architecture import Model
from fra.architectures.face import face
from fra.architectures.known import architecture_of, check_layer_and_head, layer_and_heads
from fra.checkpoints.lens import HookedTransformer
from fra.checkpoints.weights import hash_tensors
from fra.errors import FraError
from fra.targets.target import file_of, load_target
from fra.workers.cluster import Workers, check_workers, crew
from fra.workers.pool import in_order

__all__ = ["Census", "census"]

PASSES = 8
"""Of a worker's task, at most: what is asked and answered then costs little beside what is done."""


@face
@torch.no_grad()
def census(
    model: Model,
    sae: Any,
    documents: Any,
    layer: int | None = None,
    heads: Sequence[int | str] | str | None = None,
    reduce: CensusReduce | Sequence[CensusReduce] = "sum",
    stripes: Sequence[int | Sequence[int]] | None = None,
    *,
    memory_budget: int = 1 << 30,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 256,
    follow: Tensor | pd.DataFrame | None = None,
    n_examples: int = 10,
    shard: tuple[int, int] | None = None,
    workers: Workers | None = None,
) -> Census:
    """Observes documents at one attention layer, for reductions over positions of all live channels of all heads.

    documents: 1-D tensors of token ids, of any lengths up to the model's context; padding contributes nothing. heads:
    of the layer, by number or name ("L1H4", which says the layer, too); all of it where None. stripes: for each
    document its offset t - s, or a list of them. reduce: the reductions that `Census.channels` will be asked for,
    summed over attended pairs (t, s) of all documents:

    - "sum", "abs", "max", "mean", "count" of F_ij(t,s), as in `ResolvedHead.channels`;
    - "contrast" (needs stripes): sum over stripe pairs of F_ij(t,s*) less the mean of F_ij over the row's keys, by
      which CIH channels are searched;
    - "sensitivity" (needs stripes): sum over stripe pairs of A(t,s*) (F_ij(t,s*) - sum_u A(t,u) F_ij(t,u)), the
      derivative of the attention on the stripes in the channel's gain (before softcap). The rest of the row has as
      much with the other sign;
    - "mass": sum of A(t,s) |F_ij(t,s) - sum_u A(t,u) F_ij(t,u)|.

    What is kept is the live entries alone: with n = sum_d T_d * L0 entries 8 n bytes in float32, + 4 a position, +
    8 * n_heads a position with a QK-norm, + 4 * d_model a position for "sensitivity" and "mass". The reductions stream
    from these, by block of key features; no table of [d_sae, d_sae] is made. Where the n strongest are asked for, a
    feature's length and activity bound its channels' sums, absolute sums, means, largest terms and counts, and channels
    that cannot be among the n are not computed. With L live features, H heads and w = 16 MB / (4 L) columns (128 at
    least, 1 024 at most, fewer where `memory_budget` says so) sums and stripes take

        24 n + 8 H d_head L + 40 H L * (reductions) + 4 L w * (reductions, and 1 for counts) + 40 MB

    beside what is kept (stripes, where it is less: some 70 bytes for each pair of entries that meet there, at most half
    of `memory_budget`); of heads so many at a time as take a quarter of `memory_budget`. With rotation, and for "max"
    and "mass", whole tables of so many heads as a quarter of `memory_budget` holds, or blocks of one head's after
    another within all of it; and a document's projected entries, 8 * T * L0 * d_head. Observing takes one forward pass
    of about 2 048 tokens.

    checkpoint: a folder in which every `checkpoint_every` documents are saved; the same call goes on from there after
    an interruption, with the identical result; one process at a time works there, and what cannot be its beginning is
    refused. follow: channels whose `n_examples` strongest contributions are to be
    kept while documents are seen, for `Census.followed`: a tensor [n, 2] of query and key features, for every head, or
    a DataFrame with columns q_feature, k_feature and perhaps head, as `Census.channels` gives it; 40 bytes a
    contribution kept, whatever is seen. shard: (k, n) sees the k-th of n shards alone: some of the passes that one run
    makes, perhaps none; `documents` are all documents for every shard. `Census.merge` of all n, or `Census.merge_files`
    of what they saved, equals one run to the bit, on as many threads and the same kind of device. workers:
    so many processes of Ray observe ("auto": one a core, or a GPU where the model is on one), each with the model and
    one thread: the census is that of this process on one thread, to the bit, and a worker that is lost costs what it
    had at hand. A TransformerBridge must be one of `load_target`, which every worker loads again. Computed in the
    model's precision, half precisions in float32. Raises FraError for documents, stripes, heads, channels, or a
    dictionary that do not fit, for a model whose rotary angles depend on a text's length where these texts differ in
    them, for what is no shard, and for a checkpoint of something else.
    """
    if workers is not None:
        check_workers(workers)
    own, numbers = layer_and_heads(layer, heads)
    planned = prepare(
        model, sae, documents, own, numbers, reduce, stripes, follow=follow, n_examples=n_examples, shard=shard
    )
    if memory_budget < 1 or checkpoint_every < 1:
        raise FraError("memory_budget (bytes) and checkpoint_every (documents) must be positive.")
    folder = None if checkpoint is None else Path(checkpoint)
    return gather(planned, folder, checkpoint_every, memory_budget, workers=workers)


def gather(
    planned: Planned,
    checkpoint: Path | None = None,
    checkpoint_every: int = 256,
    memory_budget: int = 1 << 30,
    progress: Callable[[int], None] = lambda _: None,
    workers: Workers | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Census:
    """Sees all batches, one after another, or on workers. progress: told after each how many documents are seen; say:
    what befalls workers. Raises FraError as `census` does.
    """
    fresh = followed = planned.followed
    parts: list[Corpus] = []
    with ExitStack() as stack:
        store = None
        if checkpoint is not None:
            store = stack.enter_context(Checkpoint(checkpoint, planned.checkpoint_about(), planned.order))
            for part, tensors in store.parts():
                parts.append(part.to(planned.observer.layer.decoder.device))
                held = Followed.of_tensors(tensors)
                followed = followed if followed is None or held is None else followed.merge(held)
        done, unsaved = sum(len(part.number) for part in parts), len(parts)
        waiting_followed = fresh
        seen, left, ends = 0, [], []
        for whole in planned.batches:
            batch = whole[max(0, done - seen) :]
            seen += len(whole)
            if batch:
                left.append(batch)
                ends.append(seen)
        observed: Iterator[Corpus] = map(planned.observe, left)
        if workers is not None and left:
            observed = stack.enter_context(closing(on_workers(planned, left, workers, say)))
        for seen, part in zip(ends, observed, strict=True):
            parts.append(part)
            waiting = sum(len(part.number) for part in parts[unsaved:])
            if waiting_followed is not None:
                waiting_followed = waiting_followed.see(planned.observer.layer, parts[-1])
            if store is not None and (waiting >= checkpoint_every or seen == len(planned.order)):
                more = {} if waiting_followed is None else waiting_followed.tensors()
                store.save(concatenate(parts[unsaved:], renumber=False), more)
                unsaved = len(parts)
                if followed is not None and waiting_followed is not None:
                    followed, waiting_followed = followed.merge(waiting_followed), fresh
            progress(seen)
        if followed is not None and waiting_followed is not None:
            followed = followed.merge(waiting_followed)
    return planned.census(parts, followed, memory_budget)


@dataclass(frozen=True)
class Planned:
    """What a census will see, checked, and what sees it."""

    observer: Observer
    documents: Sequence[Tensor]
    offsets: Sequence[Sequence[int]]
    heads: tuple[int, ...]
    reduces: tuple[CensusReduce, ...]
    batches: Sequence[Sequence[int]]
    """Document numbers of each pass, those of the shard alone, in order."""
    followed: Followed | None
    """Of no documents; None where nothing is followed."""
    shard: Shard | None

    @property
    def order(self) -> list[int]:
        """The documents' numbers as they are seen."""
        return [number for batch in self.batches for number in batch]

    def observe(self, batch: Sequence[int]) -> Corpus:
        """The entries of some documents, by their numbers, in one pass."""
        return self.observer.observe([self.documents[i] for i in batch], batch, [self.offsets[i] for i in batch])

    def checkpoint_about(self) -> dict[str, object]:
        """What stands in every part of its checkpoint."""
        about: dict[str, object] = {
            "fingerprint": self.observer.fingerprint(),
            "documents": documents_digest(self.documents, self.offsets),
        }
        if self.followed is not None:
            about["follow"] = [self.followed.k, self.followed.channels.tolist()]
        return about if self.shard is None else {**about, "shard": self.shard.about()}

    def census(self, parts: Sequence[Corpus], followed: Followed | None, memory_budget: int = 1 << 30) -> Census:
        """The census of what was seen of all batches, in their order. Raises FraError where nothing is live."""
        corpus = concatenate(parts, renumber=False) if parts else self.observer.nothing()
        if not len(corpus.feature) and self.shard is None:
            raise FraError("no feature of the dictionary is live on any position (L0 is zero): wrong weights or hook.")
        about_it = self.heads, self.reduces, memory_budget, self.observer.fingerprint
        return Census(self.observer.layer, corpus, *about_it, followed, self.shard)


@dataclass(frozen=True)
class Sent:
    """An observer as a worker makes it anew; what it does there is held against this one's weights first."""

    model: Model | None
    """None for one that is loaded from a target file."""
    file: Path | None
    dtype: str
    device: str
    sae: Any
    layer: int
    longest: Tensor
    keep_inputs: bool
    expected: tuple[str, str]
    """sha256 of the model's weights, and the observer's fingerprint."""

    def __call__(self) -> Callable[[list[tuple[Any, ...]]], list[dict[str, Any]]]:
        """What observes batches there, on one thread."""
        torch.set_num_threads(1)
        model = self.model
        if self.file is not None:
            model = load_target(self.file, device=self.device, dtype=self.dtype).model
        assert model is not None
        observer = Observer(model.to(self.device), self.sae.to(self.device), self.layer, self.longest, self.keep_inputs)
        if (weights_of(model), observer.fingerprint()) != self.expected:
            raise FraError(
                "a worker's model or dictionary is another than this process has: give the model as its files have it, "
                "and the same versions on every machine."
            )

        def observe(batches: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
            return [
                {name: tensor.cpu().numpy() for name, tensor in observer.observe(*batch).tensors().items()}
                for batch in batches
            ]

        return observe


def weights_of(model: Model) -> str:
    """sha256 of all of a model's weights."""
    digest = hashlib.sha256()
    hash_tensors(digest, model.state_dict())
    return digest.hexdigest()


def on_workers(
    planned: Planned, batches: Sequence[Sequence[int]], workers: Workers, say: Callable[[str], None]
) -> Generator[Corpus, None, None]:
    """What `planned` observes of each batch, in order, as processes of Ray find it. Raises FraError for a model that
    cannot be sent there, and as `fra.workers` does.
    """
    there, device = elsewhere(planned), planned.observer.layer.decoder.device
    with crew(workers, gpu=device.type == "cuda") as found:
        at_once = max(1, min(PASSES, len(batches) // (4 * found.n)))
        told = [
            ([planned.documents[i] for i in batch], list(batch), [list(planned.offsets[i]) for i in batch])
            for batch in batches
        ]
        tasks = [told[low : low + at_once] for low in range(0, len(told), at_once)]
        say(f"{found.n} workers")
        for part in chain.from_iterable(in_order(found, there, tasks, say=say)):
            # Copies are aligned as other tensors are, and the shared memory that they came in is free again.
            tensors = {name: torch.from_numpy(np.array(array)) for name, array in part.items()}
            yield Corpus(**{field.name: tensors.get(field.name) for field in fields(Corpus)}).to(device)  # type: ignore[arg-type]


def elsewhere(planned: Planned) -> Sent:
    """What makes a plan's observer in another process. Raises FraError for a model that cannot be sent there."""
    observer = planned.observer
    model, device = observer.model, observer.layer.decoder.device
    if device.type not in ("cpu", "cuda"):
        raise FraError(f"workers measure on CPUs or CUDA devices, and this model is on {device}: leave workers out.")
    file, dtype = file_of(model) or (None, "")
    if file is None and not isinstance(model, HookedTransformer):
        raise FraError(
            f"a {type(model).__name__} that was not loaded by fra.load_target cannot be sent to workers: load it from "
            "a target file, give a HookedTransformer, or take shards (shard=)."
        )
    return Sent(
        model=None if file is not None else model,
        file=file,
        dtype=dtype,
        device=device.type,
        sae=observer.sae,
        layer=observer.layer.weights.layer,
        longest=max(planned.documents, key=len),
        keep_inputs=observer.keep_inputs,
        expected=(weights_of(model), observer.fingerprint()),
    )


def prepare(
    model: Model,
    sae: Any,
    documents: Any,
    layer: int,
    heads: Sequence[int] | None = None,
    reduce: CensusReduce | Sequence[CensusReduce] = "sum",
    stripes: Sequence[int | Sequence[int]] | None = None,
    *,
    follow: Tensor | pd.DataFrame | None = None,
    n_examples: int = 10,
    shard: tuple[int, int] | None = None,
) -> Planned:
    """The arguments of `census`, checked. Raises FraError as it does."""
    documents = token_documents(documents)
    offsets = stripe_lists(documents, stripes)
    reduces = (reduce,) if isinstance(reduce, str) else tuple(reduce)
    check_reduces(reduces, stripes is not None)
    if n_examples < 1:
        raise FraError("n_examples must be positive.")
    cut_as = None if shard is None else check_shard(shard)
    longest, shortest = max(documents, key=len), min(documents, key=len)
    _check_ids(model, documents)
    observer = Observer(model, sae, layer, longest, any(name in NEED_INPUTS for name in reduces))
    observer.check_rotation(shortest)
    chosen = tuple(range(observer.layer.n_heads)) if heads is None else tuple(heads)
    if not chosen or len(set(chosen)) < len(chosen):
        raise FraError(f"heads={list(chosen)} must name at least one head, and none twice.")
    for head in chosen:
        check_layer_and_head(model, layer, head)
    followed = None
    if follow is not None:
        ids = channels_to_follow(follow, chosen, observer.layer.d_sae)
        followed = Followed.nothing(ids, n_examples, observer.layer.decoder)
    batches = list(plan([len(tokens) for tokens in documents]))
    own = None
    if cut_as is not None:
        own = Shard(
            *cut_as,
            n_documents=len(documents),
            n_batches=len(batches),
            longest=len(longest),
            documents=documents_digest(documents, offsets),
            versions=versions(observer.layer.decoder.device),
        )
        batches = cut(batches, *cut_as)
    return Planned(observer, documents, offsets, chosen, reduces, batches, followed, own)


def check_reduces(reduces: Sequence[str], with_stripes: bool) -> None:
    """Raises FraError for reductions that there are not, that need stripes, or for none."""
    for name in reduces:
        if name not in get_args(CensusReduce):
            raise FraError(f"reduce={name!r} is unknown: choose of {', '.join(get_args(CensusReduce))}.")
        if name in NEED_STRIPES and not with_stripes:
            raise FraError(f"reduce={name!r} needs stripes: give the offsets t - s of each document.")
    if not reduces:
        raise FraError("reduce names nothing: give a reduction, or several.")


def _check_ids(model: Model, documents: Sequence[Tensor]) -> None:
    own = architecture_of(model)
    n_ctx, d_vocab = own.n_ctx, own.d_vocab
    for number, tokens in enumerate(documents):
        if len(tokens) > n_ctx:
            raise FraError(f"document {number} has {len(tokens)} tokens and the model's context holds {n_ctx}.")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= d_vocab:
            raise FraError(
                f"token id {low if low < 0 else high} of document {number} is outside the vocabulary of {d_vocab}: "
                f"tokenize with this model's own tokenizer."
            )
