"""L0 against loss recovered: dictionaries of head outputs put in the model's way, and their arms compared at equal L0.

Of a document d with the loss `clean_d`, `zero_d` with the hook's activation at zero and `spliced_d` with its
reconstruction, an arm recovers sum_d (zero_d - spliced_d) / sum_d (zero_d - clean_d). Between the points of an arm the
loss is interpolated in log L0, never extrapolated. L0 is measured on documents of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.errors import CannotLoad, FraError
from fra.interventions.patching import losses_under, splice
from fra.measures.block_diagonal.designs import Study
from fra.statistics import stats
from fra.statistics.stats import by_source
from fra.stimuli.natural import natural_with_sources
from fra.stimuli.padding import padded
from fra.stimuli.repeated import repeated_natural
from fra.targets.target import Target

_AT_ONCE = 12  # documents a forward pass


NO_STUDY = "the target has no study of block-diagonal dictionaries ([[study]] of its file)"


@dataclass(frozen=True)
class Point:
    """One dictionary in the model's way."""

    l0: Float[np.ndarray, " n_heads"]
    """Live features at a position by head, on the documents of selection; a feature of a dense dictionary counts for
    the head that holds most of its decoder row.
    """
    loss: Float[np.ndarray, " n_documents"]
    """Loss of each measured document, summed over its positions."""
    explained: Float[np.ndarray, " n_heads"]
    """Explained variance by head, on the documents of selection."""
    d_sae: int
    weights: int
    """Parameters of encoder and decoder, biases apart."""

    @property
    def total(self) -> float:
        """L0."""
        return float(self.l0.sum())


class Frontier:
    """The target's study of dictionaries at one hook, measured when asked for; `study` makes one.

    Every other source of text is for selection, the rest is measured. stimulus: "natural", or "repeated_natural" (BOS,
    a passage, the same passage), where heads that copy have something to do.
    """

    def __init__(self, target: Target, design: Study, stimulus: str = "natural") -> None:
        self.target, self.hook = target, target.spec.study[0].hook
        self.model, self.n_heads = target.model, target.n_heads
        documents, sources = _documents(target, design, stimulus)
        chosen = halves(sources)
        self.selection, self.measured = ([documents[k] for k in half] for half in chosen)
        self.selection_sources, self.sources = ([sources[k] for k in half] for half in chosen)
        self._points: dict[tuple[str, int], list[Point]] = {}

    @cached_property
    def clean(self) -> Float[np.ndarray, " n_documents"]:
        """The model's own loss of each measured document, summed over positions."""
        return self._losses(None)

    @cached_property
    def gap(self) -> Float[np.ndarray, " n_documents"]:
        """What it costs each measured document to have the hook's activation at zero."""
        found: np.ndarray = self._losses(torch.zeros_like) - self.clean
        return found

    @property
    def n_tokens(self) -> int:
        """Predictions in the measured documents."""
        return sum(len(tokens) - 1 for tokens in self.measured)

    def head_outputs(self, documents: Sequence[Int[Tensor, " _pos"]]) -> list[Float[Tensor, "_pos n_heads d_head"]]:
        """The hook's activation on each document, by head."""
        found: dict[int, Tensor] = {}
        for which, tokens in _batches(documents):
            _, cache = self.model.run_with_cache(tokens.to(self.target.device), names_filter=[self.hook])
            z = cache[self.hook].reshape(*tokens.shape, self.n_heads, -1)
            found |= {d: z[k, : len(documents[d])] for k, d in enumerate(which)}
        return [found[d] for d in range(len(documents))]

    @torch.no_grad()
    def points(self, arm: str, run: int = 0) -> list[Point]:
        """The dictionaries of a training run of an arm by rising L0; none where the target's study has no such."""
        if (arm, run) not in self._points:
            self._points[arm, run] = sorted(
                (self.measure(sae) for sae in self.target.study(arm, run)), key=lambda point: point.total
            )
        return self._points[arm, run]

    @cached_property
    def outputs(self) -> tuple[list[Float[Tensor, "_pos n_heads d_head"]], list[Float[Tensor, "_pos n_heads d_head"]]]:
        """The hook's activation on the documents of selection and on the measured ones, without the first position,
        which is an attention sink of outlying norm in most models.
        """
        with torch.no_grad():
            chosen, seen = ([z[1:] for z in self.head_outputs(half)] for half in (self.selection, self.measured))
        return chosen, seen

    @torch.no_grad()
    def measure(self, sae: Any) -> Point:
        """One dictionary of head outputs in the model's way."""
        x = torch.cat(self.outputs[0])
        acts = encode(sae, x)
        rest = (x - decode(sae, acts, x)).square().sum((0, 2))
        spread = (x - x.mean(0)).square().sum((0, 2))
        owner = torch.zeros(sae.cfg.d_sae, self.n_heads, dtype=torch.float64)
        owner[torch.arange(len(owner)), head_of(sae, self.n_heads).cpu()] = 1
        return Point(
            l0=((acts > 0).double().mean(0).cpu() @ owner).numpy(),
            loss=self._losses(lambda z: decode(sae, encode(sae, z), z)),
            explained=(1 - rest / spread).double().cpu().numpy(),
            d_sae=int(sae.cfg.d_sae),
            weights=sum(p.numel() for name, p in sae.named_parameters() if name.startswith("W_")),
        )

    def by_head(self, sae: Any | None) -> Float[np.ndarray, " n_heads"]:
        """What it costs, in nats a token, to have one head's output alone as the dictionary reconstructs it (from the
        outputs of all heads), or at zero (None), for every head.
        """

        def one(head: int) -> Callable[[Tensor], Tensor]:
            def replace(z: Tensor) -> Tensor:
                out = z.clone()
                out[:, :, head] = 0 if sae is None else decode(sae, encode(sae, z), z)[:, :, head].to(z)
                return out

            return replace

        costs = [(self._losses(one(head)) - self.clean).sum() / self.n_tokens for head in range(self.n_heads)]
        return np.array(costs)

    @torch.no_grad()
    def _losses(self, replace: Callable[[Tensor], Tensor] | None) -> Float[np.ndarray, " n_documents"]:
        """Summed loss of each measured document with `replace` of the hook's activation [batch, pos, n_heads, d_head]
        in its place.
        """
        changes = []
        if replace is not None:
            by_head = replace
            changes = [splice(self.model, self.hook, lambda z: by_head(z.reshape(*z.shape[:2], self.n_heads, -1)))]
        found = np.zeros(len(self.measured))
        for which, tokens in _batches(self.measured):
            each = losses_under(self.model, tokens, *changes)
            for k, d in enumerate(which):
                found[d] = float(each[k, : len(self.measured[d]) - 1].double().sum())
        return found

    def means(self, values: Float[np.ndarray, " n_documents"], seed: int, n_boot: int) -> stats.ClusterMeans:
        """sum(values) / sum(gap), sources of documents as clusters."""
        sums, counts = by_source(values, self.sources), by_source(self.gap, self.sources)
        return stats.ClusterMeans(sums, counts, seed=seed, n_boot=n_boot)


def study(target: Target, design: Study, stimulus: str = "natural") -> Frontier | None:
    """The target's study on documents of its own, as many as the design has or there are; None where its file names no
    [[study]]. Raises CannotLoad where the documents are too short, FraError for an unknown stimulus.
    """
    return Frontier(target, design, stimulus) if target.spec.study else None


def halves(sources: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of the documents of every other source, and of the sources between: no source is in both."""
    number = {source: k for k, source in enumerate(dict.fromkeys(sources))}
    first, second = ([k for k, source in enumerate(sources) if number[source] % 2 == half] for half in (0, 1))
    return first, second


def _documents(target: Target, design: Study, stimulus: str) -> tuple[list[Int[Tensor, " _pos"]], list[str]]:
    """Token ids of the documents of a stimulus, and their sources."""
    n = min(design.documents, len(target.documents()))
    natural, names = natural_with_sources(target, n, design.longest)
    sources = list(names)
    if stimulus == "natural":
        return natural, sources
    if stimulus != "repeated_natural":
        raise FraError(f"there is no stimulus {stimulus!r} for a frontier: use natural or repeated_natural.")
    start = 0 if target.bos is None else 1
    texts = [tokens[start:].numpy() for tokens in natural]
    context = min(int(target.model.cfg.n_ctx), 1 + max(map(len, texts)))
    made = repeated_natural(
        list(zip(sources, texts, strict=True)), context, target.bos, (target.name, stimulus, "frontier")
    )
    if len(made) < n:
        raise CannotLoad(
            f"{target.name!r} has too short a context or text for {n - len(made)} repeated documents of {n}."
        )
    return [document.tokens for document in made], [document.source for document in made]


def _batches(documents: Sequence[Int[Tensor, " _pos"]]) -> list[tuple[list[int], Int[Tensor, "batch pos"]]]:
    """Documents of about one length, padded; and which they are."""
    order = sorted(range(len(documents)), key=lambda d: len(documents[d]))
    parts = [order[start : start + _AT_ONCE] for start in range(0, len(order), _AT_ONCE)]
    return [(part, padded([documents[d] for d in part])) for part in parts]


def encode(sae: Any, z: Float[Tensor, "*rows n_heads d_head"]) -> Float[Tensor, "*rows d_sae"]:
    """Codes of head outputs, whichever shape the dictionary reads."""
    x = z.to(sae.b_dec.dtype)
    codes: Tensor = sae.encode(x if sae.cfg.reshape_activations == "hook_z" else x.flatten(-2))
    return codes


def decode(
    sae: Any, acts: Float[Tensor, "*rows d_sae"], like: Float[Tensor, "*rows n_heads d_head"]
) -> Float[Tensor, "*rows n_heads d_head"]:
    """Reconstructed head outputs; call it right after `encode` of the same rows."""
    out: Tensor = sae.decode(acts)
    return out.reshape(like.shape)


def head_of(sae: Any, n_heads: int) -> Int[Tensor, " d_sae"]:
    """The head that holds most of each feature's decoder row (its squared norm)."""
    rows: Tensor = sae.W_dec.detach()
    return rows.reshape(len(rows), n_heads, -1).square().sum(-1).argmax(-1)
