"""What the claims about heads and features count: firings on natural documents, their squares by head, and the control
in which a feature reads the heads through shuffled blocks.

Documents come in two sets without a common source, which are run apart: nothing that is chosen on discovery documents
can depend on those that are measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.attribution.head_outputs import HeadOutputs, Live, observe, padded
from fra.dictionaries.encoder import Encoder
from fra.errors import CannotLoad
from fra.measures.head_outputs.designs import HeadOutputDocuments
from fra.stimuli import sets as document_sets
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch
from fra.stimuli.sources import disjoint

if TYPE_CHECKING:
    from fra.targets.target import Target

_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Documents:
    """One set of documents, padded."""

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    """Positions that count: no padding."""
    sources: tuple[str, ...]
    whole: list[Tensor]
    """Without padding."""

    @classmethod
    def of(cls, whole: Sequence[Int[Tensor, " _pos"]], sources: Sequence[str]) -> Documents:
        """All positions of these documents."""
        tokens, real = padded(list(whole))
        return cls(tokens, real, tuple(sources), list(whole))

    def __len__(self) -> int:
        return len(self.whole)

    def observe(self, target: Target, hook: str) -> HeadFirings:
        """All of it through the model and the dictionary at `hook`."""
        o = observe(target.model, target.dictionaries[hook], self.whole)
        return HeadFirings(self, o, o.live.where(o.live.pos > 0))  # the first position is a sink of outlying norm


@dataclass(frozen=True)
class HeadOutputCorpus:
    """Documents for choosing and documents for measuring."""

    discovery: Documents
    measured: Documents

    def observe(self, target: Target, hook: str) -> tuple[HeadFirings, HeadFirings]:
        """(discovery, measured) through the model and the dictionary at `hook`, one after the other."""
        return self.discovery.observe(target, hook), self.measured.observe(target, hook)


@dataclass(frozen=True)
class HeadFirings:
    """Firings of one dictionary on some documents, the first position left out."""

    documents: Documents
    outputs: HeadOutputs
    live: Live
    known: Float[Tensor, "n_live n_heads"] | None = None
    """DFA by head at every firing, where it came with the firings."""

    @property
    def by_head(self) -> Float[Tensor, "n_live n_heads"]:
        """DFA by head at every firing."""
        return self.outputs.entries_by_head(self.live) if self.known is None else self.known

    def squares(self) -> Float[Tensor, "n_docs d_sae n_heads"]:
        """Squared DFA by head, summed over the firings of each document."""
        at, o = self.live, self.outputs
        n, d_sae = len(self.documents), o.encoder.d_sae
        total = o.z.new_zeros(n * d_sae, o.n_heads)
        total.index_add_(0, at.doc * d_sae + at.feature, self.by_head.square())
        return total.view(n, d_sae, o.n_heads)

    def summed_squares(self) -> Float[Tensor, "d_sae n_heads"]:
        """The same over all documents."""
        total = self.outputs.z.new_zeros(self.outputs.encoder.d_sae, self.outputs.n_heads)
        return total.index_add_(0, self.live.feature, self.by_head.square())

    def count(self) -> Int[Tensor, " d_sae"]:
        """Firings of every feature."""
        return torch.bincount(self.live.feature, minlength=self.outputs.encoder.d_sae)

    def part(self, some: Sequence[int]) -> HeadFirings:
        """Some of the documents, in this order."""
        o, docs = self.outputs, self.documents
        index = torch.as_tensor(some, device=o.z.device)
        place = torch.full((len(docs),), -1, device=index.device)
        place[index] = torch.arange(len(index), device=index.device)

        def own(live: Live) -> Live:
            kept = live.where(place[live.doc] >= 0)
            return dataclasses.replace(kept, doc=place[kept.doc])

        tensors = {name: getattr(o, name)[index] for name in ("z", "values", "pattern", "gain", "real")}
        if o.written is not None:
            tensors["written"] = o.written[index]
        at = index.to(docs.tokens.device)
        chosen = Documents(
            docs.tokens[at], docs.real[at], tuple(docs.sources[k] for k in some), [docs.whole[k] for k in some]
        )
        return HeadFirings(chosen, dataclasses.replace(o, live=own(o.live), **tensors), own(self.live))

    def under(self, changed: Encoder) -> HeadFirings:
        """The control: what would fire under another encoder, at every position as many features as did, those with the
        largest pre-activations. L0 and the heads' outputs survive. All that is chosen from firings is to be chosen
        anew.
        """
        o = dataclasses.replace(self.outputs, encoder=changed)
        pos = o.z.shape[1]
        counts = torch.bincount(self.live.doc * pos + self.live.pos, minlength=o.z.shape[0] * pos)
        rows = (o.z * o.gain[..., None, None]).flatten(0, 1).transpose(0, 1)  # [n_heads, rows, d_head]
        fires = torch.nonzero(counts)[:, 0]
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for row in torch.split(fires, _ROWS_AT_ONCE) if len(fires) else ():
            most = int(counts[row].max())
            by_head = rows[:, row] @ changed.weight  # [n_heads, rows, d_sae]: summed, the pre-activation
            total = by_head.sum(0) + changed.bias
            if changed.b_O is not None:
                total = total + o.gain.flatten()[row, None] * changed.b_O
            value, feature = total.topk(most, dim=1)
            at, rank = (torch.arange(most, device=rows.device) < counts[row, None]).nonzero(as_tuple=True)
            chosen = feature[at, rank]
            parts.append((row[at], chosen, value[at, rank], by_head[:, at, chosen].T))
        if not parts:  # nothing fired
            return HeadFirings(self.documents, o, self.live)
        row, feature, value, known = (torch.cat(column) for column in zip(*parts, strict=True))
        live = Live(row // pos, row % pos, feature, value)
        return HeadFirings(self.documents, dataclasses.replace(o, live=live), live, known)


def shuffled(encoder: Encoder, seed: int) -> Encoder:
    """Each feature's blocks trade places among the heads (no block stays), each stretched to the norm of the block
    whose place it takes. Norms survive; what a block had to do with its head does not.
    """
    weight = encoder.weight
    n_heads, _, d_sae = weight.shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(d_sae, n_heads, generator=generator).argsort(1)
    source = torch.empty_like(order)
    source.scatter_(1, order, order.roll(1, dims=1))  # along a random cycle
    norms = weight.norm(dim=1)
    index = source.T.to(weight.device)
    moved = weight.gather(0, index[:, None].expand_as(weight))
    stretch = norms / norms.gather(0, index).clamp(min=torch.finfo(weight.dtype).tiny)
    return dataclasses.replace(encoder, weight=moved * stretch[:, None])


def corpus(target: Target, design: HeadOutputDocuments) -> HeadOutputCorpus:
    """Natural documents of the target, discovery and measured. Raises CannotLoad where it has too little text."""
    texts = target.documents()
    if len(texts) < 2:
        raise CannotLoad(f"{target.name!r} has {len(texts)} documents: too few to choose on some and measure on others")
    sizes = {"discovery": design.discovery, "measured": design.measured}
    seeds = (target.name, "natural", "head outputs")
    sets = disjoint([text.source for text in texts], sizes, ("measured",), seeds)
    made = {
        name: Documents.of(
            [target.tokens(texts[k].text, design.longest) for k in numbers],
            [texts[k].source for k in numbers],
        )
        for name, numbers in sets.items()
    }
    return HeadOutputCorpus(made["discovery"], made["measured"])


def repeated_corpus(target: Target, design: RepeatedSets) -> HeadOutputCorpus:
    """Repeated natural documents: the discovery set for choosing, the confirmation set for measuring. Only positions
    that the first copy foretells count as real: those of the second but its first.
    """
    sets = document_sets.documents(target, "repeated_natural", design)
    return HeadOutputCorpus(_second_copies(sets["discovery"]), _second_copies(sets["confirmation"]))


def _second_copies(batch: Batch) -> Documents:
    every = Documents.of(batch.documents(), batch.sources)
    foretold = torch.arange(every.tokens.shape[1]) > batch.periods[:, None] + 1
    return dataclasses.replace(every, real=every.real & foretold)
