"""What the claims about heads and features count: firings on natural documents, their squares by head, and the control
in which a feature reads the heads through shuffled blocks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.attribution.head_outputs import HeadOutputs, Live, observe, padded
from fra.stimuli import natural
from fra.stimuli import sets as document_sets
from fra.stimuli.designs import RepeatedSets

if TYPE_CHECKING:
    from fra.targets.target import Target

MIN_FIRINGS = 10
"""A feature counts as alive that fires this often on discovery documents: fewer say little about its heads."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class HalvedCorpus:
    """Natural documents, half of them for choosing and half for measuring."""

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    sources: tuple[str, ...]
    """Of the measured documents."""
    discovery: Int[np.ndarray, " n_discovery"]
    measured: Int[np.ndarray, " n_measured"]
    documents: list[Tensor]

    def observe(self, target: Target, hook: str) -> CorpusFirings:
        """All of it through the model and the dictionary at `hook`."""
        o = observe(target.model, target.dictionaries[hook], self.documents)
        live = o.live.where(o.live.pos > 0)  # the first position is a sink of outlying norm in most models
        return CorpusFirings(self, o, live)


@dataclass(frozen=True)
class CorpusFirings:
    """Firings of one dictionary on a corpus, the first position left out."""

    corpus: HalvedCorpus
    outputs: HeadOutputs
    live: Live

    def half(self, documents: Int[np.ndarray, " n"]) -> Live:
        """Those on some documents."""
        chosen = torch.zeros(len(self.corpus.documents), dtype=torch.bool, device=self.live.doc.device)
        chosen[torch.as_tensor(documents, device=chosen.device)] = True
        return self.live.where(chosen[self.live.doc])

    def squares(self, documents: Int[np.ndarray, " n"]) -> Float[Tensor, "n d_sae n_heads"]:
        """Squared DFA by head, summed over the firings of each document."""
        at, o = self.half(documents), self.outputs
        place = torch.zeros(len(self.corpus.documents), dtype=torch.long, device=at.doc.device)
        place[torch.as_tensor(documents, device=at.doc.device)] = torch.arange(len(documents), device=at.doc.device)
        total = o.z.new_zeros(len(documents) * o.encoder.d_sae, o.n_heads)
        total.index_add_(0, place[at.doc] * o.encoder.d_sae + at.feature, o.entries_by_head(at).square())
        return total.view(len(documents), o.encoder.d_sae, o.n_heads)

    def count(self, documents: Int[np.ndarray, " n"]) -> Int[Tensor, " d_sae"]:
        """Firings of every feature on some documents."""
        return torch.bincount(self.half(documents).feature, minlength=self.outputs.encoder.d_sae)

    def shuffled(self, seed: int) -> CorpusFirings:
        """The control: each feature's encoder blocks trade places among the heads, each stretched to the norm of the
        block whose place it takes, and at every position as many features fire as did, those with the largest
        pre-activations. Norms, L0 and the heads' outputs survive; what a block had to do with its head does not. All
        that is chosen from firings is to be chosen anew.
        """
        o = self.outputs
        weight = shuffle_blocks(o.encoder.weight, seed)
        changed = dataclasses.replace(o, encoder=dataclasses.replace(o.encoder, weight=weight))
        pos = o.z.shape[1]
        counts = torch.bincount(self.live.doc * pos + self.live.pos, minlength=o.z.shape[0] * pos)
        rows = (o.z.flatten(2) * o.gain[..., None]).flatten(0, 1)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = counts[start : start + _ROWS_AT_ONCE]
            if not (most := int(some.max())):
                continue
            pre = rows[start : start + _ROWS_AT_ONCE] @ weight.flatten(0, 1) + o.encoder.bias
            value, feature = pre.topk(most, dim=1)
            row, rank = (torch.arange(most, device=rows.device) < some[:, None]).nonzero(as_tuple=True)
            parts.append((row + start, feature[row, rank], value[row, rank]))
        if not parts:  # nothing fired
            return CorpusFirings(self.corpus, changed, self.live)
        row, feature, value = (torch.cat(column) for column in zip(*parts, strict=True))
        live = Live(row // pos, row % pos, feature, value)
        return CorpusFirings(self.corpus, dataclasses.replace(changed, live=live), live)


def corpus(target: Target, n: int) -> HalvedCorpus:
    """n natural documents, halves drawn at random. Raises CannotLoad where the target has fewer texts."""
    documents, sources = natural.natural_with_sources(target, n)
    discovery, measured = document_sets.split(n, (1, 1), (target.name, "natural", "head outputs"))
    tokens, real = padded(documents)
    return HalvedCorpus(tokens, real, tuple(sources[k] for k in measured), discovery, measured, documents)


def repeated_corpus(target: Target) -> HalvedCorpus:
    """Repeated natural documents: the discovery set for choosing, the confirmation set for measuring. Only positions
    that the first copy foretells count as real: those of the second but its first.
    """
    sets = document_sets.documents(target, "repeated_natural", RepeatedSets())
    chosen, measured = sets["discovery"], sets["confirmation"]
    documents = [
        tokens[: 1 + 2 * int(period)]
        for batch in (chosen, measured)
        for tokens, period in zip(batch.tokens, batch.periods, strict=True)
    ]
    tokens, real = padded(documents)
    periods = torch.cat([chosen.periods, measured.periods])
    real = real & (torch.arange(tokens.shape[1]) > periods[:, None] + 1)
    order = np.arange(len(documents))
    return HalvedCorpus(tokens, real, measured.sources, order[: len(chosen)], order[len(chosen) :], documents)


def shuffle_blocks(weight: Float[Tensor, "n_heads d_head d_sae"], seed: int) -> Float[Tensor, "n_heads d_head d_sae"]:
    """Each feature's blocks in other heads' places (no block stays), stretched to the norms that stood there."""
    n_heads, _, d_sae = weight.shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(d_sae, n_heads, generator=generator).argsort(1)
    source = torch.empty_like(order)
    source.scatter_(1, order, order.roll(1, dims=1))  # along a random cycle
    norms = weight.norm(dim=1)
    index = source.T.to(weight.device)
    moved = weight.gather(0, index[:, None].expand_as(weight))
    stretch = norms / norms.gather(0, index).clamp(min=torch.finfo(weight.dtype).tiny)
    stretched: Tensor = moved * stretch[:, None]
    return stretched
