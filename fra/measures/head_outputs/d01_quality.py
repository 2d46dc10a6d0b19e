"""Is a head-output dictionary good enough to speak about (D01)? What the model loses when the dictionary's
reconstruction stands in for the head outputs, against what it loses without them, and what other reconstructions cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.dictionaries.encoder import encode
from fra.interventions.patching import losses_under, splice
from fra.measures.head_outputs.corpus import HalvedCorpus, corpus, repeated_corpus
from fra.targets.target import head_output_hooks
from fra.verdicts import stats
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
_RESAMPLES = 999
RULE_OF_THUMB = {"L0": 20, "loss recovered": 0.8}
"""What Kissane et al. 2024 aimed at: context for the reader, no bar of any claim."""

CONDITIONS = ("loss recovered (mean)", "over PCA of equal L0", "over an untrained dictionary", "L0 over width")

Losses = Float[np.ndarray, " n_documents"]


def untrained(sae: Any, seed: int) -> Any:
    """A copy of the dictionary with its matrices drawn anew, at the size that each had, W_enc the transpose of W_dec
    where shapes allow, block by block where it has blocks; b_dec and thresholds stay, other biases are zero.
    """
    other = copy.deepcopy(sae)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn: dict[str, Tensor] = {}
        for name, parameter in sorted(other.named_parameters()):
            if parameter.ndim >= 2:
                fresh = torch.randn(parameter.shape, generator=generator).to(parameter)
                partner = drawn.get(name.replace("W_enc", "W_dec")) if name.startswith("W_enc") else None
                if partner is not None and partner.mT.shape == fresh.shape:
                    fresh = partner.mT
                drawn[name] = fresh
                parameter.copy_(fresh * parameter.square().mean().sqrt() / fresh.square().mean().sqrt())
            elif name not in ("b_dec", "threshold"):
                parameter.zero_()
    return other


def reconstruct(sae: Any, z: Float[Tensor, "n n_heads d_head"]) -> tuple[Float[Tensor, "n d_in"], Int[Tensor, " n"]]:
    """The dictionary's reconstruction of head outputs, and how many features are live."""
    rows, live = [], []
    for start in range(0, len(z), _ROWS_AT_ONCE):
        part = z[start : start + _ROWS_AT_ONCE]
        acts = encode(sae, part)
        rows.append(sae.decode(acts.to(sae.W_dec)).reshape(len(part), -1).to(z))
        live.append((acts != 0).sum(-1))
    return torch.cat(rows), torch.cat(live)


def principal(z: Float[Tensor, "n d_in"], fitted_on: Float[Tensor, "m d_in"], k: int) -> Float[Tensor, "n d_in"]:
    """z in the k first principal components of `fitted_on`, about its mean."""
    mean = fitted_on.mean(0)
    components = torch.linalg.svd((fitted_on - mean).double(), full_matrices=False).Vh[:k].to(z)
    projected: Tensor = mean + (z - mean) @ components.T @ components
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
def quality(target: Target, hook: str, documents: HalvedCorpus, seed: int) -> dict[str, Any]:
    """Losses by measured document of every arm, squared errors, deviations and live features by document."""
    firings = documents.observe(target, hook)
    o = firings.outputs
    chosen, other = (torch.as_tensor(part, device=o.z.device) for part in (documents.measured, documents.discovery))
    tokens, real = documents.tokens.to(o.z.device)[chosen], documents.real.to(o.z.device)[chosen]
    z = o.z[chosen]
    flat = z.flatten(0, 1)
    inside = documents.real.to(o.z.device)[other].clone()
    inside[:, 0] = False
    elsewhere = o.z[other][inside].flatten(1)
    sae = target.dictionaries[hook]
    own, live = reconstruct(sae, flat)
    l0 = live.view(real.shape).double()
    body = real.clone()
    body[:, 0] = False
    k = max(1, round(float(l0[body].mean())))
    drawn, live_drawn = reconstruct(untrained(sae, seed), flat)
    arms = {
        "zero": torch.zeros_like(flat),
        "mean": elsewhere.mean(0).expand_as(flat.flatten(1)),
        "dictionary": own,
        "PCA": principal(flat.flatten(1), elsewhere, k),
        "untrained": drawn,
    }
    found = {name: losses(target, tokens, real, hook, value.reshape(*real.shape, -1)) for name, value in arms.items()}
    error = ((flat.flatten(1) - own).square().sum(-1).view(real.shape) * body).sum(1)
    spread = ((flat.flatten(1) - elsewhere.mean(0)).square().sum(-1).view(real.shape) * body).sum(1)
    left = (flat.flatten(1) - arms["PCA"]).square().sum(-1)
    at = firings.half(documents.measured)
    place = torch.zeros(len(documents.documents), dtype=torch.long, device=at.doc.device)
    place[chosen] = torch.arange(len(chosen), device=at.doc.device)
    fired = torch.zeros(len(chosen), o.encoder.d_sae, dtype=torch.bool, device=at.doc.device)
    fired[place[at.doc], at.feature] = True
    return {
        "losses": found,
        "error": np.asarray(error.double().cpu()),
        "spread": np.asarray(spread.double().cpu()),
        "live": np.asarray((l0 * body).sum(1).cpu()),
        "positions": np.asarray(body.sum(1).double().cpu()),
        "fired": np.asarray(fired.cpu()),
        "explained by PCA": 1 - float((left.view(real.shape) * body).sum() / spread.sum()),
        "width": flat.flatten(1).shape[1],
        "k": k,
        "L0 of the untrained dictionary": float(live_drawn.view(real.shape)[body].double().mean()),
    }


def dead_share(fired: np.ndarray, level: float, seed: int) -> list[float]:
    """[share of features that never fire, bounds]: an upper bound of the dead, on so little text; bounds are quantiles
    over resampled documents, of which each has some 63 % of the text, so that the upper one errs on the high side.
    """
    rng = np.random.default_rng(seed)
    n = len(fired)
    drawn = [1 - fired[np.unique(rng.integers(n, size=n))].any(0).mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(drawn, (level, 1 - level))
    own = 1 - float(fired.any(0).mean())
    return [own, min(own, float(low)), float(high)]


def quality_evidence(claim: Claim, target: Target, progress: Callable[[str], None] = lambda _: None) -> Evidence:
    """D01: one row for every dictionary of head outputs, on natural text or on the second copies of repeated text."""
    hooks = head_output_hooks(target)
    if not hooks:
        return Evidence(claim=claim, head=None, cannot=NO_HEAD_OUTPUT_DICTIONARY)
    documents = corpus(target, claim.n) if claim.stimuli == ("natural",) else repeated_corpus(target)
    names = ("loss recovered (zero)", *CONDITIONS)
    means: dict[str, dict[str, stats.ClusterMeans | Number]] = {name: {} for name in names}
    explained: dict[str, stats.ClusterMeans] = {}
    numbers: dict[str, Mapping[str, Any]] = {}
    clean: Losses | None = None
    chosen = torch.as_tensor(documents.measured)
    tokens, real = documents.tokens[chosen], documents.real[chosen]
    for hook in hooks:
        progress(f"{claim.id}: {hook}")
        seed = stats.seed_of(target.name, hook, "untrained dictionary")
        q = quality(target, hook, documents, seed)
        clean = losses(target, tokens, real, hook, None) if clean is None else clean
        arms, sources = q["losses"] | {"clean": clean}, documents.sources

        def ratio(arm: Losses, ablated: str, name: str, hook: str = hook, arms: dict[str, Losses] = arms) -> Any:
            bar = claim.bars.get(name, claim.bar)
            seeds = (claim.digest, target.name, hook, name)
            return recovered(arm, arms[ablated], arms["clean"], bar, documents.sources, seeds)

        means["loss recovered (zero)"][hook] = ratio(arms["dictionary"], "zero", "loss recovered (zero)")
        means["loss recovered (mean)"][hook] = ratio(arms["dictionary"], "mean", "loss recovered (mean)")
        for name, control in (("over PCA of equal L0", "PCA"), ("over an untrained dictionary", "untrained")):
            # (control - dictionary) / (zero - clean): the difference of the two shares recovered
            arm = arms["zero"] - (arms[control] - arms["dictionary"])
            means[name][hook] = ratio(arm, "zero", name)
        seeds = (claim.digest, target.name, hook)
        means["L0 over width"][hook] = clustered_or_number(
            q["live"] / q["width"], q["positions"], sources, (*seeds, "L0")
        )
        explained[hook] = clustered(q["error"], q["spread"], sources, (*seeds, "explained"))
        zero = float((arms["zero"] - arms["clean"]).sum())
        numbers[hook] = {
            "L0": float(q["live"].sum() / q["positions"].sum()),
            "explained variance": [
                1 - float(x[0])
                for x in (
                    explained[hook].estimate,
                    explained[hook].upper(claim.level, False),
                    explained[hook].lower(claim.level, False),
                )
            ],
            "never fires": dead_share(q["fired"], claim.level, stats.seed_of(*seeds, "dead")),
            "loss by arm, nats a token": {
                name: float(loss.sum() / q["positions"].sum()) for name, loss in arms.items()
            },
            "loss recovered by arm": {
                name: float((arms["zero"] - arms[name]).sum() / zero) for name in ("dictionary", "PCA", "untrained")
            },
            "components of PCA": q["k"],
            "variance explained by them": q["explained by PCA"],
            "L0 of the untrained dictionary": q["L0 of the untrained dictionary"],
        }
    measured = [
        ByDictionary(name, claim.bars.get(name, claim.bar), means[name], above=name != "L0 over width")
        for name in names
    ]
    detail = {
        "by dictionary": by_dictionary(measured, claim.level),
        "numbers": numbers,
        "rule of thumb": RULE_OF_THUMB,
    }
    return evidence(claim, measured, len(documents.measured), detail)
