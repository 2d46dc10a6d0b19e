"""Is a head-output dictionary good enough to speak about (D01)? What the model loses when the dictionary's
reconstruction stands in for the head outputs, against what it loses without them, and what other reconstructions cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.dictionaries.encoder import encode
from fra.interventions.patching import losses_under, splice
from fra.measures.head_outputs.corpus import HeadOutputCorpus, corpus, repeated_corpus
from fra.measures.head_outputs.designs import DictionaryQuality, HeadOutputDocuments
from fra.statistics import stats
from fra.stimuli.designs import RepeatedSets
from fra.targets.target import head_output_hooks
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Number
from fra.verdicts.pooled import (
    NO_HEAD_OUTPUT_DICTIONARY,
    ByDictionary,
    by_dictionary,
    clustered,
    clustered_or_number,
    evidence,
)

if TYPE_CHECKING:
    from fra.targets.target import Target

_DOCUMENTS_AT_ONCE = 32
_ROWS_AT_ONCE = 1024

Losses = Float[np.ndarray, " n_documents"]


def untrained(sae: Any, seed: int, into: Any = None) -> Any:
    """A copy of the dictionary with its matrices drawn anew, at the size that each had, W_enc the transpose of W_dec
    where shapes allow, block by block where it has blocks; b_dec and thresholds stay, other biases are zero.

    into: a copy made before, which is overwritten.
    """
    other = copy.deepcopy(sae) if into is None else into
    size = {name: parameter.detach().square().mean().sqrt() for name, parameter in sae.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn: dict[str, Tensor] = {}
        for name, parameter in sorted(other.named_parameters()):
            if parameter.ndim >= 2:
                partner = drawn.get(name.replace("W_enc", "W_dec")) if name.startswith("W_enc") else None
                if partner is not None and partner.mT.shape == parameter.shape:
                    fresh = partner.mT
                else:
                    fresh = torch.randn(parameter.shape, generator=generator).to(parameter)
                drawn[name] = fresh
                parameter.copy_(fresh * size[name] / fresh.square().mean().sqrt())
            elif name not in ("b_dec", "threshold"):
                parameter.zero_()
    return other


def reconstruct(sae: Any, z: Float[Tensor, "n n_parts width"]) -> tuple[Float[Tensor, "n d_in"], Int[Tensor, " n"]]:
    """The dictionary's reconstruction of what stands at its hook, and how many features are live."""
    rows, live = [], []
    for start in range(0, len(z), _ROWS_AT_ONCE):
        part = z[start : start + _ROWS_AT_ONCE]
        acts = encode(sae, part)
        rows.append(sae.decode(acts.to(sae.W_dec)).reshape(len(part), -1).to(z))
        live.append((acts != 0).sum(-1))
    return torch.cat(rows), torch.cat(live)


def by_untrained(
    sae: Any, z: Float[Tensor, "batch pos n_parts width"], sources: Sequence[str], seeds: tuple[str, ...]
) -> tuple[Float[Tensor, "batch pos d_in"], Int[Tensor, "batch pos"]]:
    """`reconstruct` by untrained dictionaries, one drawn for each source of the documents: how much they differ is then
    part of how much the sources do.
    """
    rows = z.new_zeros(*z.shape[:2], z.shape[2] * z.shape[3])
    live = torch.zeros(z.shape[:2], dtype=torch.long, device=z.device)
    other = None
    for source in sorted(set(sources)):
        other = untrained(sae, stats.seed_of(*seeds, source), other)
        for k in (k for k, own in enumerate(sources) if own == source):
            rows[k], live[k] = reconstruct(other, z[k])
    return rows, live


def principal(z: Float[Tensor, "n d_in"], fitted_on: Float[Tensor, "m d_in"], k: int) -> Float[Tensor, "n d_in"]:
    """z in the k first principal components of `fitted_on`, about its mean."""
    mean = fitted_on.mean(0)
    apart = (fitted_on - mean).double()
    components = torch.linalg.eigh(apart.T @ apart).eigenvectors[:, -k:].to(z)  # eigenvalues ascend
    projected: Tensor = mean + (z - mean) @ components @ components.T
    return projected


@torch.no_grad()
def losses(
    target: Target,
    tokens: Int[Tensor, "batch pos"],
    real: Tensor,
    hook: str,
    value: Float[Tensor, "batch pos d_in"] | None,
) -> Losses:
    """Sum over positions of the next-token loss (nats), by document, with `value` in place of the head outputs."""
    found = []
    for start in range(0, len(tokens), _DOCUMENTS_AT_ONCE):
        some = slice(start, start + _DOCUMENTS_AT_ONCE)
        put = [] if value is None else [splice(target.model, hook, value[some])]
        each = losses_under(target.model, tokens[some], *put)
        found.append((each * real[some, 1:].to(each)).sum(1).double().cpu())
    return np.asarray(torch.cat(found))


def recovered(
    arm: Losses, ablated: Losses, clean: Losses, bar: float, sources: tuple[str, ...], seeds: tuple[str, ...]
) -> stats.ClusterMeans:
    """Loss recovered by an arm, (ablated - arm) / (ablated - clean), as a ratio mean about its bar.

    A document's own denominator can be negative (mean ablation helps it), so the ratio is tested in its linear form,
    sum of (ablated - arm) - bar (ablated - clean), in units of the mean denominator, and the bar added again.
    """
    unit = float((ablated - clean).sum()) / len(clean)
    linear = ((ablated - arm) - bar * (ablated - clean)) / unit if unit > 0 else np.full(len(clean), np.nan)
    return clustered(linear + bar, np.ones(len(clean)), sources, seeds)


@torch.no_grad()
def quality(target: Target, hook: str, documents: HeadOutputCorpus, seeds: tuple[str, ...]) -> dict[str, Any]:
    """Losses by measured document of every arm, squared errors, deviations and live features by document. Mean,
    components and their number are those of the discovery documents.
    """
    before, firings = documents.observe(target, hook)
    z, home = firings.outputs.x, firings.outputs.x.device
    inside, body = (part.documents.real.to(home).clone() for part in (before, firings))
    inside[:, 0] = body[:, 0] = False
    elsewhere = before.outputs.x[inside].flatten(1)
    counted = inside[before.live.doc, before.live.pos]
    k = max(1, round(int(counted.sum()) / int(inside.sum())))
    tokens, real = documents.measured.tokens.to(home), documents.measured.real.to(home)
    flat = z.flatten(0, 1).flatten(1)
    own, live = reconstruct(target.dictionaries[hook], z.flatten(0, 1))
    drawn, live_drawn = by_untrained(target.dictionaries[hook], z, documents.measured.sources, seeds)
    arms = {
        "zero": torch.zeros_like(flat),
        "mean": elsewhere.mean(0).expand_as(flat),
        "dictionary": own,
        "PCA": principal(flat, elsewhere, k),
        "untrained": drawn,
    }
    found = {name: losses(target, tokens, real, hook, value.reshape(*real.shape, -1)) for name, value in arms.items()}

    def by_document(values: Tensor) -> np.ndarray:
        return np.asarray((values.view(body.shape).double() * body).sum(1).cpu())

    spread = by_document((flat - elsewhere.mean(0)).square().sum(-1))
    fired = torch.zeros(len(tokens), firings.outputs.encoder.d_sae, dtype=torch.bool, device=home)
    fired[firings.live.doc, firings.live.feature] = True
    return {
        "losses": found,
        "error": by_document((flat - own).square().sum(-1)),
        "spread": spread,
        "live": by_document(live),
        "positions": np.asarray(body.sum(1).double().cpu()),
        "fired": np.asarray(fired.cpu()),
        "explained by PCA": 1 - float(by_document((flat - arms["PCA"]).square().sum(-1)).sum() / spread.sum()),
        "width": flat.shape[1],
        "k": k,
        "L0 of the untrained dictionary": float(live_drawn[body].double().mean()),
    }


def dead_share(fired: np.ndarray, level: float, seed: int, resamples: int) -> list[float]:
    """[share of features that never fire, bounds]: an upper bound of the dead, on so little text; bounds are quantiles
    over resampled documents, of which each has some 63 % of the text, so that the upper one errs on the high side.
    """
    rng = np.random.default_rng(seed)
    n = len(fired)
    drawn = [1 - fired[np.unique(rng.integers(n, size=n))].any(0).mean() for _ in range(resamples)]
    low, high = np.quantile(drawn, (level, 1 - level))
    own = 1 - float(fired.any(0).mean())
    return [own, min(own, float(low)), float(high)]


def quality_evidence(claim: Claim, target: Target, progress: Callable[[str], None] = lambda _: None) -> Evidence:
    """D01: one row for every dictionary of head outputs, on natural text or on the second copies of repeated text."""
    hooks = head_output_hooks(target)
    if not hooks:
        return Evidence(claim=claim, head=None, cannot=NO_HEAD_OUTPUT_DICTIONARY)
    natural = claim.stimuli == ("natural",)
    documents = (
        corpus(target, claim.designed(HeadOutputDocuments))
        if natural
        else repeated_corpus(target, claim.designed(RepeatedSets))
    )
    means: dict[str, dict[str, stats.ClusterMeans | Number]] = {name: {} for name in (claim.condition, *claim.bars)}
    numbers: dict[str, Mapping[str, Any]] = {}
    sources, design = documents.measured.sources, claim.designed(DictionaryQuality)
    clean = losses(target, documents.measured.tokens, documents.measured.real, hooks[0], None)
    for hook in hooks:
        progress(f"{claim.id}: {hook}")
        q = quality(target, hook, documents, (claim.digest, target.name, hook, "untrained dictionary"))
        arms = q["losses"] | {"clean": clean}
        for name, of in ratios(claim, arms, sources, (claim.digest, target.name, hook)).items():
            means[name][hook] = of
        seeds = (claim.digest, target.name, hook)
        means["L0 over width"][hook] = clustered_or_number(
            q["live"] / q["width"], q["positions"], sources, (*seeds, "L0")
        )
        numbers[hook] = _beside(claim, q, arms, sources, seeds, design)
    measured = [ByDictionary(name, means[name]) for name in means]
    detail = {
        "by dictionary": by_dictionary(measured, claim.level),
        "numbers": numbers,
        "rule of thumb": {"L0": design.usual_l0, "loss recovered": design.usual_recovered},
        "draws of the control": f"{len(set(sources))} untrained dictionaries, one a source",
    }
    if free := [
        hook for hook, own in numbers.items() if (loss := own["loss by arm, nats a token"])["mean"] <= loss["clean"]
    ]:
        why = f"mean ablation costs nothing at {' and '.join(free)}: there is no loss to recover, and no share of it"
        return replace(evidence(claim, measured, detail), undecided=why)
    return evidence(claim, measured, detail)


def ratios(
    claim: Claim, arms: Mapping[str, Losses], sources: tuple[str, ...], seeds: tuple[str, ...]
) -> dict[str, stats.ClusterMeans]:
    """The conditions on shares of loss recovered, from the losses of every arm."""
    zero, own = arms["zero"], arms["dictionary"]
    # over a control: (control - dictionary) / (zero - clean) is the difference of the two shares recovered
    of = {
        claim.condition: (own, "zero"),
        "loss recovered (mean)": (own, "mean"),
        "over PCA of equal L0": (zero - (arms["PCA"] - own), "zero"),
        "over an untrained dictionary": (zero - (arms["untrained"] - own), "zero"),
    }
    return {
        name: recovered(arm, arms[ablated], arms["clean"], claim.bar_of(name), sources, (*seeds, name))
        for name, (arm, ablated) in of.items()
    }


def _beside(
    claim: Claim,
    q: Mapping[str, Any],
    arms: Mapping[str, Losses],
    sources: tuple[str, ...],
    seeds: tuple[str, ...],
    design: DictionaryQuality,
) -> dict[str, Any]:
    """What stands beside the conditions of one dictionary."""
    unexplained = clustered(q["error"], q["spread"], sources, (*seeds, "explained"))
    zero = float((arms["zero"] - arms["clean"]).sum())
    bounds = (unexplained.estimate, unexplained.upper(claim.level, False), unexplained.lower(claim.level, False))
    return {
        "L0": float(q["live"].sum() / q["positions"].sum()),
        "explained variance": [1 - float(x[0]) for x in bounds],
        "never fires": dead_share(q["fired"], claim.level, stats.seed_of(*seeds, "dead"), design.resamples),
        "loss by arm, nats a token": {name: float(loss.sum() / q["positions"].sum()) for name, loss in arms.items()},
        "loss recovered by arm": {
            name: float((arms["zero"] - arms[name]).sum() / zero) for name in ("dictionary", "PCA", "untrained")
        },
        "components of PCA": q["k"],
        "variance explained by them": q["explained by PCA"],
        "L0 of the untrained dictionary": q["L0 of the untrained dictionary"],
    }
