"""Where a family's features come from: activation patching of what stands upstream."""

from __future__ import annotations

from collections.abc import Sequence
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
from fra.measures.families.families import Families, LayerFamilies
from fra.measures.families.rows import NO_FAMILY, HeadNumbers, family_of, per_head
from fra.verdicts.bounds import above_share
from fra.verdicts.claim import Claim, Evidence, parse_head
from fra.verdicts.stats import Floats, seed_of

PROMPTS = 100
LENGTH = 24


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
    seed_parts: Sequence[str],
) -> Prompts:
    """PROMPTS prompts of LENGTH tokens, features in turn; all other tokens distinct, none a feature's."""
    rng = np.random.default_rng(seed_of(*seed_parts))
    others = np.setdiff1d(pool, tokens)
    rows, changed, at = [], [], []
    for number in range(PROMPTS):
        fresh = rng.choice(others, LENGTH + 1, replace=False)
        row = fresh[:LENGTH].copy()
        row[0] = row[0] if bos is None else bos
        first = int(rng.integers(3, LENGTH - 6))
        row[first + 1] = tokens[number % len(tokens)]
        row[-1] = row[first]
        other = row.copy()
        other[first] = fresh[LENGTH]
        rows.append(row)
        changed.append(other)
        at.append(first + 1)
    turn = np.arange(PROMPTS) % len(features)
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


@torch.no_grad()
def patch_upstream(model: Model, observed: HeadOutputs, given: Prompts) -> Patched:
    """Every head upstream alone, all attention outputs together and all MLP outputs together, both ways."""
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
                patch = set_output(model, z[:, :, head], layer=n, head=head, rows=rows)
                moved[way][f"L{n}H{head}"] = metric(arms[own], patch.hooks)
        writes = {"attention": [points.attn_out for points in upstream], "MLP": [points.mlp_out for points in upstream]}
        for kind, names in writes.items():
            if kind == "MLP" and getattr(model.cfg, "attn_only", False):
                moved[way][kind] = metric(arms[own], [])
                continue
            hooks = [h for at in names for h in patch_activation(model, arms[other], at, rows=rows).hooks]
            moved[way][kind] = metric(arms[own], hooks)
    return Patched(metric(arms[0], []), metric(arms[1], []), *moved)


def upstream_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D11: what patching single heads upstream does to the family's pre-activation, both ways."""

    def measure(layer: LayerFamilies, head: int) -> HeadNumbers:
        selection, passed, detail = family_of(layer, head)
        if not len(passed):
            return HeadNumbers({}, (), 0, detail=detail, undecided=NO_FAMILY)
        if layer.layer == 0:
            return HeadNumbers({}, (), 0, detail=detail, undecided="nothing is upstream of layer 0")
        previous = {h: s.stripes["previous"] for h, s in families.status.items() if parse_head(h)[0] < layer.layer}
        if len(previous) < 2:
            return HeadNumbers({}, (), 0, detail=detail, undecided="one head stands upstream, and no other beside it")
        given = prompts(
            selection.features[passed],
            selection.tokens[passed],
            layer.pool,
            layer.target.bos,
            (layer.target.name, selection.head, "upstream"),
        )
        got = patch_upstream(layer.model, layer.observed, given)
        whole = got.clean - got.corrupted
        n = len(whole)
        top = max(previous, key=lambda h: previous[h])
        noised = {name: got.clean - value for name, value in got.noised.items()}
        denoised = {name: value - got.corrupted for name, value in got.denoised.items()}
        rivals = [h for h in previous if h != top]
        rival = max(rivals, key=lambda h: float(noised[h].sum()))
        if not whole.mean() > 2 * whole.std(ddof=1) / n**0.5:
            said = "the corrupted prompts do not lower the family's pre-activations, so nothing can be patched"
            return HeadNumbers({}, (), n, detail=detail, undecided=said)
        total = whole.sum()
        share = {h: [float(noised[h].sum() / total), float(denoised[h].sum() / total)] for h in noised}
        return HeadNumbers(
            {
                "noising, beyond half": above_share(noised[top], whole, 0.5),
                "denoising, beyond half": above_share(denoised[top], whole, 0.5),
                "over other heads": (noised[top] - noised[rival], np.ones(n)),
                "attention over MLP": (noised["attention"] - noised["MLP"], np.ones(n)),
            },
            [f"prompt-{k}" for k in range(n)],
            n,
            detail=detail
            | {
                "previous-token head": top,
                "its previous-token score": previous[top],
                "clean less corrupted pre-activation": float(whole.mean()),
                "share by noising and denoising": dict(sorted(share.items(), key=lambda item: -item[1][0])),
            },
        )

    return per_head(claim, families, measure, headline="noising, beyond half", null=None)
