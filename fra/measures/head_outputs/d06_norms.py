"""What decoder norms say of the heads that a feature reads (D06)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.known import architecture_of
from fra.dictionaries.encoder import head_output_layer
from fra.dictionaries.hooks import is_head_output
from fra.measures.head_outputs.corpus import corpus
from fra.measures.head_outputs.d04_heads import Progress
from fra.measures.head_outputs.designs import HeadOutputDocuments
from fra.statistics import stats
from fra.targets.target import head_output_hooks
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Number
from fra.verdicts.pooled import NO_HEAD_OUTPUT_DICTIONARY, ByDictionary, by_dictionary, clustered, evidence

if TYPE_CHECKING:
    from fra.targets.target import Target

_ROWS_AT_ONCE = 2**16


def decoder_norms(target: Target, hook: str, through_output: bool) -> Float[Tensor, "d_sae n_heads"]:
    """Norm of each feature's decoder block by head, as it is, or after W_O."""
    sae = target.dictionaries[hook]
    W_O = architecture_of(target.model).read_ov(head_output_layer(sae)).W_O.detach()
    blocks = sae.W_dec.detach().to(W_O).view(len(sae.W_dec), *W_O.shape[:2])
    written = torch.einsum("fhd,hdm->fhm", blocks, W_O) if through_output else blocks
    norms: Tensor = written.norm(dim=-1)
    return norms


def ranks(values: Float[Tensor, "n n_heads"]) -> Float[Tensor, "n n_heads"]:
    """Ranks along the last dimension, from 1; equal numbers share their mean rank."""
    found = []
    for some in torch.split(values, _ROWS_AT_ONCE):
        below, same = (how(some[:, :, None], some[:, None]).sum(-1) for how in (torch.gt, torch.eq))
        found.append(below.double() + (same.double() + 1) / 2)
    return torch.cat(found) if found else values.double()


def rank_correlations(a: Float[Tensor, "n n_heads"], b: Float[Tensor, "n n_heads"]) -> Float[Tensor, " n"]:
    """Spearman's, along the last dimension; equal numbers (of a block-diagonal dictionary all heads but one are at
    zero) share their mean rank. 0 where all are equal.
    """
    centred = [own - own.mean(-1, keepdim=True) for own in (ranks(a), ranks(b))]
    spread = centred[0].square().sum(-1) * centred[1].square().sum(-1)
    half_a_rank = 0.25  # squared: what spreads has at least that, or is zero
    return (centred[0] * centred[1]).sum(-1) / spread.sqrt().clamp(min=half_a_rank)


def another(doc: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, " n"]:
    """For each of these (document, feature) pairs, sorted by document, another pair of its document, drawn at random;
    -1 where its document has no other.
    """
    size = torch.bincount(doc)[doc]
    start = torch.searchsorted(doc, doc)
    place = torch.arange(len(doc)) - start
    step = 1 + (torch.rand(len(doc), generator=generator, dtype=torch.float64) * (size - 1)).long()
    drawn = start + (place + step) % size
    return torch.where(size > 1, drawn, -1)


def correlations(
    squares: Float[Tensor, "n_docs d_sae n_heads"], norms: Float[Tensor, "d_sae n_heads"], seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """By document: rank correlations of decoder norms with squared DFA, summed over the features that fire in it, of
    the features' own norms ("own"), of the same with the heads permuted ("permuted"), and of the norms of another
    feature that fires in the document ("another"); and the number of features. Both controls are drawn anew for each
    feature in each document.
    """
    doc, feature = (index.cpu() for index in torch.nonzero(squares.sum(-1) > 0, as_tuple=True))
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.rand(len(doc), norms.shape[1], generator=generator).argsort(1)
    other = another(doc, generator)
    kept = other >= 0
    doc, feature, permutation, other = doc[kept], feature[kept], permutation[kept], feature[other[kept]]
    rows, table = squares.cpu()[doc, feature], norms.cpu()
    own = table[feature]
    n = len(squares)

    def by_document(against: Tensor) -> np.ndarray:
        return np.bincount(doc.numpy(), rank_correlations(rows, against).numpy(), n)

    sums = {
        "own": by_document(own),
        "permuted": by_document(own.gather(1, permutation)),
        "another": by_document(table[other]),
    }
    return sums, np.bincount(doc.numpy(), minlength=n).astype(float)


@torch.no_grad()
def norm_evidence(claims: tuple[Claim, Claim], target: Target, progress: Progress = lambda _: None) -> dict[str, Any]:
    """D06 without W_O and with it, by claim id: one row each for every dictionary of head outputs."""
    # what attention writes has no block of the decoder by head
    hooks = [hook for hook in head_output_hooks(target) if is_head_output(hook)]
    if not hooks or target.n_heads < 3:
        why = NO_HEAD_OUTPUT_DICTIONARY if not hooks else "ranks need at least three heads"
        return {claim.id: Evidence(claim=claim, head=None, cannot=why) for claim in claims}
    documents = corpus(target, claims[0].designed(HeadOutputDocuments)).measured
    controls = {"over permuted heads": "permuted", "over another feature's decoder": "another"}
    means: dict[str, dict[str, dict[str, stats.ClusterMeans | Number]]] = {
        claim.id: {name: {} for name in (claim.condition, *controls)} for claim in claims
    }
    for hook in hooks:
        progress(f"D06: {hook}")
        squares = documents.observe(target, hook).squares()
        for claim, through_output in zip(claims, (False, True), strict=True):
            seeds = (claim.digest, target.name, hook)
            norms = decoder_norms(target, hook, through_output).to(squares)
            sums, count = correlations(squares, norms, stats.seed_of(*seeds, "controls"))
            if not count.any():
                why = f"fewer than two features of the dictionary at {hook!r} fire in any document"
                return {c.id: Evidence(claim=c, head=None, undecided=why) for c in claims}
            for name, own in means[claim.id].items():
                values = sums["own"] - sums[controls[name]] if name in controls else sums["own"]
                own[hook] = clustered(values, count, documents.sources, (*seeds, name))
    found: dict[str, Any] = {}
    for claim in claims:
        measured = [ByDictionary(name, own) for name, own in means[claim.id].items()]
        detail = {
            "by dictionary": by_dictionary(measured, claim.level),
            "draws of the controls": "one for each feature in each document",
        }
        found[claim.id] = evidence(claim, measured, detail)
    return found
