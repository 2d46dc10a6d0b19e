"""Do a few heads concentrate what later sentences attend to (S02)? Kurtosis of vertical scores of heads that are chosen
on other sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.attribution.designs import Receivers
from fra.attribution.sentences import between, kurtosis_of, patterns_of, vertical_scores
from fra.core.sentences import Segments, segments
from fra.statistics import stats
from fra.stimuli.sources import disjoint
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import WHOLE, Beside, Sampled, decide, means_of

if TYPE_CHECKING:
    from fra.targets.target import Target

OVER_CUTS, OVER_HEADS = "over other cuts", "over the median head"


@dataclass(frozen=True)
class Text:
    """A document cut into sentences, and where it comes from."""

    cut: Segments
    source: str


def texts(target: Target, design: Receivers) -> list[Text]:
    """The target's documents that have sentences enough, cut to the model's context after a whole sentence."""
    longest = min(design.longest, int(target.model.cfg.n_ctx))
    found = []
    for document in target.documents():
        cut = whole_sentences(segments(target.tokenizer, document.text, bos=target.bos), longest)
        if cut.kinds.count("sentence") >= design.fewest:
            found.append(Text(cut, document.source))
    return found


def whole_sentences(cut: Segments, longest: int) -> Segments:
    """The document's segments that lie within `longest` tokens."""
    if len(cut.tokens) <= longest:
        return cut
    n = int(cut.segment[longest])  # the first that does not
    kept = cut.segment < n
    return Segments(cut.tokens[kept], cut.segment[kept], cut.kinds[:n], cut.texts[:n])


def other_cut(cut: Segments, rng: np.random.Generator) -> Segments:
    """As many sentences of the same lengths in another order, so that their ends fall elsewhere; tokens, BOS and prompt
    stay.
    """
    length = np.bincount(cut.segment.numpy(), minlength=len(cut))
    is_sentence = np.array([kind == "sentence" for kind in cut.kinds])
    length[is_sentence] = rng.permutation(length[is_sentence])
    return replace(cut, segment=torch.from_numpy(np.repeat(np.arange(len(cut)), length)))


def kurtoses(
    patterns: Float[Tensor, "n_layers n_heads pos pos"], cut: Segments, design: Receivers
) -> Float[np.ndarray, " heads"]:
    """Of every head of the model, layer by layer."""
    return kurtosis_of(vertical_scores(between(patterns, cut), cut, design.apart)).ravel()


@dataclass(frozen=True)
class Measured:
    """By measured document: kurtosis of the chosen heads (mean), of the model's median head, and of the chosen heads
    under other cuts (mean).
    """

    chosen: Int[np.ndarray, " n"]
    """Indices of heads, layer by layer."""
    own: Float[np.ndarray, " documents"]
    median: Float[np.ndarray, " documents"]
    cut_otherwise: Float[np.ndarray, " documents"]
    sources: tuple[str, ...]
    sentences: tuple[int, ...]


@torch.no_grad()
def measure(
    target: Target, claim: Claim, progress: Callable[[str], None] = lambda _: None
) -> tuple[Measured | None, str]:
    """Heads chosen on some sources, measured on others; None, and why, where too few documents have the sentences."""
    design = claim.designed(Receivers)
    found = texts(target, design)
    n_sources = len({one.source for one in found})
    if n_sources < 2 * claim.min_sources:
        return None, (
            f"{n_sources} sources have documents of {design.fewest} sentences within {design.longest} tokens and the "
            f"model's context of {int(target.model.cfg.n_ctx)}; {2 * claim.min_sources} are needed, half of them to "
            "choose heads on"
        )
    sizes = {"chosen on": design.documents, "measured": design.documents}
    sets = disjoint([one.source for one in found], sizes, ("chosen on", "measured"), (target.name, "S02"))
    progress(f"S02: {sum(map(len, sets.values()))} documents")
    every = [kurtoses(patterns_of(target.model, found[k].cut.tokens), found[k].cut, design) for k in sets["chosen on"]]
    chosen = strongest(np.stack(every), design.share)
    rows = [_one(target, found[k], chosen, design) for k in sets["measured"]]
    own, median, otherwise = (np.array(column) for column in zip(*rows, strict=True))
    measured = [found[k] for k in sets["measured"]]
    n = tuple(one.cut.kinds.count("sentence") for one in measured)
    return Measured(chosen, own, median, otherwise, tuple(one.source for one in measured), n), ""


def strongest(kurtosis: Float[np.ndarray, "documents heads"], share: float) -> Int[np.ndarray, " n"]:
    """The heads of largest mean kurtosis, this share of all and at least one, strongest first; one that is nowhere a
    number is never among them.
    """
    known = ~np.isnan(kurtosis)
    mean = np.where(known, kurtosis, 0).sum(0) / known.sum(0).clip(min=1)
    mean = np.where(known.any(0), mean, -np.inf)
    return np.argsort(-mean, kind="stable")[: max(1, round(share * len(mean)))]


def _one(target: Target, text: Text, chosen: np.ndarray, design: Receivers) -> tuple[float, float, float]:
    """One measured document."""
    patterns = patterns_of(target.model, text.cut.tokens)
    every = kurtoses(patterns, text.cut, design)
    rng = np.random.default_rng(stats.seed_of(target.name, "S02", text.source, *text.cut.texts[:2]))
    n_heads = patterns.shape[1]
    some = patterns[chosen // n_heads, chosen % n_heads][None]
    cuts = [kurtoses(some, other_cut(text.cut, rng), design).mean() for _ in range(design.cuts)]
    return float(every[chosen].mean()), float(np.nanmedian(every)), float(np.mean(cuts))


def receivers_evidence(claim: Claim, target: Target, measured: Measured | None, cannot: str) -> Evidence:
    """S02: one row."""
    if measured is None:
        return Evidence(claim=claim, head=None, cannot=cannot)

    def sampled(name: str, values: np.ndarray) -> Sampled:
        means = means_of(claim, target.name, WHOLE, name, values, None, measured.sources)
        return Sampled(name=name, samples={WHOLE: means})

    columns = [
        sampled(claim.condition, measured.own),
        sampled(OVER_CUTS, measured.own - measured.cut_otherwise),
        sampled(OVER_HEADS, measured.own - measured.median),
    ]
    rows = {WHOLE: Beside(candidates=("chosen heads",), detail=_detail(target, measured))}
    return decide(claim, columns, rows, q_over=())[WHOLE]


def _detail(target: Target, measured: Measured) -> dict[str, Any]:
    return {
        "chosen heads": [target.heads[k] for k in measured.chosen.tolist()],
        "kurtosis of the median head": float(measured.median.mean()),
        "kurtosis of the chosen heads, sentences cut otherwise": float(measured.cut_otherwise.mean()),
        "sentences of a document": float(np.mean(measured.sentences)),
    }
