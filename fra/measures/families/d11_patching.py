"""Where a family's features come from: activation patching of what stands upstream."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fra.attribution.head_outputs import HeadOutputs
from fra.core.weights import Model
from fra.dictionaries.hooks import LayerHooks
from fra.interventions.attach import Hook
from fra.interventions.heads import set_output
from fra.interventions.patching import own_positions, patch_activation
from fra.measures.families.designs import UpstreamPrompts
from fra.measures.families.families import Families, LayerFamilies
from fra.measures.families.rows import HeadNumbers, family_of, per_head, too_few
from fra.statistics.bounds import above_share
from fra.statistics.stats import Floats, seed_of
from fra.verdicts.claim import Claim, Evidence, parse_head

NOISING, DENOISING, RIVAL, WRITES = "noising", "denoising", "over other heads", "attention over MLP"


@dataclass(frozen=True)
class Prompts:
    """BOS ... A B ... A, and the same with another token for the first A; one feature ("B is next") for each."""

    clean: Int[Tensor, "n pos"]
    corrupted: Int[Tensor, "n pos"]
    at: Int[Tensor, " n"]
    """Position of the first B."""
    feature: Int[Tensor, " n"]


def prompts(
    features: Int[np.ndarray, " n_features"],
    tokens: Int[np.ndarray, " n_features"],
    pool: Int[np.ndarray, " n_pool"],
    bos: int | None,
    n: int,
    design: UpstreamPrompts,
    seed_parts: Sequence[str],
) -> Prompts:
    """n prompts, features in turn; all other tokens distinct, none a feature's."""
    length = design.length
    rng = np.random.default_rng(seed_of(*seed_parts))
    others = np.setdiff1d(pool, tokens)
    rows, changed, at = [], [], []
    for number in range(n):
        fresh = rng.choice(others, length + 1, replace=False)
        row = fresh[:length].copy()
        row[0] = row[0] if bos is None else bos
        first = int(rng.integers(design.first_from, length - design.last_before))
        row[first + 1] = tokens[number % len(tokens)]
        row[-1] = row[first]
        other = row.copy()
        other[first] = fresh[length]
        rows.append(row)
        changed.append(other)
        at.append(first + 1)
    turn = np.arange(n) % len(features)
    return Prompts(
        torch.from_numpy(np.stack(rows)),
        torch.from_numpy(np.stack(changed)),
        torch.tensor(at),
        torch.from_numpy(np.asarray(features)[turn]),
    )


@dataclass(frozen=True)
class Patched:
    """Pre-activations of each prompt's feature at its last position; patches are made at its own first B."""

    clean: Floats
    corrupted: Floats
    noised: dict[str, Floats]
    """What is patched ("L0H5", "attention", "MLP") -> pre-activation on the clean prompt with the corrupted output."""
    denoised: dict[str, Floats]
    """The same the other way round, of what was asked for both ways."""


@torch.no_grad()
def patch_upstream(
    model: Model,
    observed: HeadOutputs,
    given: Prompts,
    both_ways: Collection[str] = (),
    noise: Collection[str] | None = None,
) -> Patched:
    """Every head upstream alone, all attention outputs together and all MLP outputs together. both_ways: what is
    denoised, too. noise: what is noised; everything where None.
    """
    encoder = observed.encoder
    home = observed.z.device
    name, layer = encoder.hook_name, encoder.layer
    arms = (given.clean.to(home), given.corrupted.to(home))
    every = torch.arange(len(given.at), device=home)
    weight = encoder.weight.permute(2, 0, 1)[given.feature.to(home)]

    def metric(tokens: Tensor, hooks: Sequence[Hook]) -> Floats:
        with model.hooks(fwd_hooks=list(hooks)):
            z = model.run_with_cache(tokens, names_filter=[name], stop_at_layer=layer + 1)[1][name]
        z = z.reshape(*tokens.shape, encoder.n_heads, -1)[every, -1].to(weight)
        value = (z * weight).sum((1, 2)) * encoder.gain(z) + encoder.bias[given.feature.to(home)]
        return np.asarray(value.double().cpu())

    def wanted(way: int, what: str) -> bool:
        return (what in both_ways) if way else (noise is None or what in noise)

    rows = own_positions(given.at.to(home), arms[0].shape[1])
    upstream = [LayerHooks(n) for n in range(layer)]
    outputs = [points.z for points in upstream]
    seen = [model.run_with_cache(tokens, names_filter=outputs, stop_at_layer=layer)[1] for tokens in arms]
    moved: tuple[dict[str, Floats], dict[str, Floats]] = ({}, {})
    for way, (own, other) in enumerate(((0, 1), (1, 0))):
        for n in range(layer):
            z = seen[other][outputs[n]]
            z = z.reshape(*arms[0].shape, int(model.cfg.n_heads), -1)
            for head in range(z.shape[2]):
                if not wanted(way, f"L{n}H{head}"):
                    continue
                patch = set_output(model, z[:, :, head], layer=n, head=head, rows=rows)
                moved[way][f"L{n}H{head}"] = metric(arms[own], patch.hooks)
        writes = {"attention": [points.attn_out for points in upstream], "MLP": [points.mlp_out for points in upstream]}
        for kind, names in writes.items():
            if not wanted(way, kind):
                continue
            if kind == "MLP" and getattr(model.cfg, "attn_only", False):
                moved[way][kind] = metric(arms[own], [])
                continue
            hooks = [h for at in names for h in patch_activation(model, arms[other], at, rows=rows).hooks]
            moved[way][kind] = metric(arms[own], hooks)
    return Patched(metric(arms[0], []), metric(arms[1], []), *moved)


def upstream_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D11: what patching single heads upstream does to the family's pre-activation, both ways."""
    design = claim.designed(UpstreamPrompts)

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        selection, passed, detail = family_of(layer, head)
        if layer.layer == 0:
            return HeadNumbers({}, (), 0, detail=detail, undecided="nothing is upstream of layer 0")
        previous = {h: s.stripes["previous"] for h, s in families.status.items() if parse_head(h)[0] < layer.layer}
        if len(previous) < 2:
            return HeadNumbers({}, (), 0, detail=detail, undecided="one head stands upstream, and no other beside it")
        if (few := too_few(claim, layer, head)) is not None:
            return HeadNumbers({}, (), 0, detail=detail, undecided=few)

        def made(part: str, n: int) -> Prompts:
            parts = (layer.target.name, selection.head, "upstream", part)
            return prompts(
                selection.features[passed], selection.tokens[passed], layer.pool, layer.target.bos, n, design, parts
            )

        top = max(previous, key=lambda h: previous[h])
        rivals = [h for h in previous if h != top]
        first = patch_upstream(layer.model, layer.observed, made("choosing", design.chosen), noise=rivals)
        rival = max(rivals, key=lambda h: float((first.clean - first.noised[h]).sum()))
        both = (top, "attention", "MLP")
        got = patch_upstream(layer.model, layer.observed, made("measured", design.measured), both, (*both, rival))
        whole = got.clean - got.corrupted
        n = len(whole)
        noised = {name: got.clean - value for name, value in got.noised.items()}
        denoised = {name: value - got.corrupted for name, value in got.denoised.items()}
        if not whole.mean() > design.told * whole.std(ddof=1) / n**0.5:
            said = "the corrupted prompts do not lower the family's pre-activations, so nothing can be patched"
            return HeadNumbers({}, (), n, detail=detail, undecided=said)
        total = whole.sum()
        share = {h: float(noised[h].sum() / total) for h in noised}
        parts = {
            NOISING: noised[top],
            DENOISING: denoised[top],
            RIVAL: noised[top] - noised[rival],
            WRITES: noised["attention"] - noised["MLP"],
        }
        return HeadNumbers(
            {name: above_share(part, whole, claim.bar_of(name)) for name, part in parts.items()},
            [f"prompt-{k}" for k in range(n)],
            n,
            shares={name: (float(part.mean()), float(whole.mean())) for name, part in parts.items()},
            detail=detail
            | {
                "previous-token head": top,
                "its previous-token score": previous[top],
                "clean less corrupted pre-activation": float(whole.mean()),
                "the other head that does most, on other prompts": rival,
                "share by noising, on other prompts": {
                    h: float((first.clean - first.noised[h]).sum() / (first.clean - first.corrupted).sum())
                    for h in rivals
                },
                "share by noising": dict(sorted(share.items(), key=lambda item: -item[1])),
                "share by denoising": {h: float(denoised[h].sum() / total) for h in both},
            },
        )

    return per_head(claim, families, measure)
