"""Whether a head's own features are alike (D16): a surrogate, decoder cosine and activation Jaccard, that says nothing
of what the features mean and is never to be called monosemanticity.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.attribution.examples import FEATURE, feature_example
from fra.dictionaries.hooks import layer_of
from fra.measures.head_outputs.corpus import CorpusFirings, corpus
from fra.measures.head_outputs.d04_d06_heads import Division, alive_features, divide
from fra.targets.target import head_output_hooks, text_of
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.decide import Beside, Given, Power, Sampled, decide
from fra.verdicts.pooled import NO_HEAD_OUTPUT_DICTIONARY, clustered

if TYPE_CHECKING:
    from fra.targets.target import Target

TOP = 10
"""Features of a head that are compared, as in the top-ten cards of Kissane et al. 2024."""
DRAWS = 199
"""Groups of random heads' features that the head's own are held against."""
COSINE = "decoder cosine over random heads"
NEAREST = 5
"""A control is drawn among this many features of its head that fire about as often as the one it stands for."""


def own_features(division: Division, head: int) -> Int[Tensor, " TOP"]:
    """Columns of the alive features in which the head has its largest shares."""
    return division.share[:, head].topk(min(TOP, len(division.share))).indices


def random_heads(
    division: Division,
    own: Int[Tensor, " n"],
    head: int,
    count: Int[Tensor, " n_alive"],
    rng: np.random.Generator,
    draws: int,
) -> list[Int[Tensor, " _n_drawn"]]:
    """Groups in which each of a head's features is replaced by one whose top head is another, that head drawn at
    random, and that fires about as often (Jaccard grows with density); a group is smaller where the others have not
    enough.
    """
    rate = count.double().clamp(min=1).log().cpu().numpy()
    top = division.top.cpu().numpy()
    others = [int(h) for h in np.unique(top) if h != head]
    mine = own.tolist()
    members = {h: np.setdiff1d(np.flatnonzero(top == h), mine) for h in others}
    nearest = {
        (feature, h): members[h][np.argsort(np.abs(rate[members[h]] - rate[feature]), kind="stable")].tolist()
        for feature in mine
        for h in others
    }
    found = []
    for _ in range(draws):
        chosen: list[int] = []
        for feature in mine:
            for h in rng.permutation(others).tolist():
                near = list(islice((f for f in nearest[feature, h] if f not in chosen), NEAREST))
                if near:
                    chosen.append(near[int(rng.integers(len(near)))])
                    break
        found.append(torch.tensor(chosen, device=own.device))
    return found


def together(
    live: Float[Tensor, "docs pos n_alive"], features: Int[Tensor, "n_groups n"]
) -> tuple[Float[Tensor, "n_groups docs"], Float[Tensor, "n_groups docs"]]:
    """Positions where both of two features fire, and where either does, over all pairs of a group, by document."""
    n = live[:, :, features].permute(2, 0, 1, 3).sum(-1)  # [n_groups, docs, pos] how many of the group fire
    both = (n * (n - 1) / 2).sum(-1)
    size = features.shape[1]
    either = (n * (size - 1) - n * (n - 1) / 2).sum(-1)  # pairs with the firing ones, those among them counted once
    return both, either


def cosines(decoder: Float[Tensor, "n_alive d"], features: Int[Tensor, "n_groups n"]) -> Float[np.ndarray, " n_groups"]:
    """Mean cosine over the pairs of each group."""
    unit = torch.nn.functional.normalize(decoder, dim=-1)[features].double()
    n = features.shape[1]
    return np.asarray(((unit.sum(1).square().sum(-1) - n) / (n * (n - 1))).cpu())


@torch.no_grad()
def group_evidence(
    claim: Claim, target: Target, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Evidence]:
    """D16 for every head of a layer with a dictionary of head outputs; Holm across them."""
    hooks = head_output_hooks(target)
    layers = {layer_of(hook): hook for hook in hooks}
    found: dict[str, Evidence] = {}
    excess: dict[str, stats.ClusterMeans] = {}
    cosine: dict[str, list[Condition]] = {}
    detail: dict[str, dict[str, Any]] = {}
    n = 0
    for layer, hook in layers.items():
        progress(f"D16: {hook}")
        documents = corpus(target, claim.n)
        n = len(documents.measured)
        firings = documents.observe(target, hook)
        alive = alive_features(firings)
        division, count = divide(firings, alive), firings.count(documents.discovery)[alive]
        live = _live(firings, alive)
        decoder = target.dictionaries[hook].W_dec.detach()[alive]
        for head in range(target.n_heads):
            name = f"L{layer}H{head}"
            own = own_features(division, head)
            rng = np.random.default_rng(stats.seed_of(claim.digest, target.name, name, "random heads"))
            drawn = random_heads(division, own, head, count, rng, DRAWS)
            if len(own) < TOP or any(len(group) < TOP for group in drawn):
                why = f"fewer than {TOP} features of the dictionary at {hook!r}, or of other heads, are alive"
                found[name] = Evidence(claim=claim, head=name, undecided=why)
                continue
            groups = torch.stack([own, *drawn])
            both, either = (np.asarray(part.double().cpu()) for part in together(live, groups))
            jaccard = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
            seen = (either[0] > 0).astype(float)
            seeds = (claim.digest, target.name, name)
            excess[name] = clustered((jaccard[0] - jaccard[1:].mean(0)) * seen, seen, documents.sources, seeds)
            alike = cosines(decoder, groups)
            cosine[name] = [_over_draws(COSINE, alike, claim)]
            shown = feature_example(
                firings.outputs,
                target.dictionaries[hook],
                documents.tokens,
                int(alive[own[0]]),
                text_of(target.tokenizer),
                {name: head},
                firings.half(documents.measured),
            )
            detail[name] = ({} if shown is None else {FEATURE: shown}) | {
                "features": alive[own].tolist(),
                "share of the head in them": [float(x) for x in division.share[own, head]],
                "Jaccard": float(both[0].sum() / max(either[0].sum(), 1.0)),
                "Jaccard of random heads' features": float(both[1:].sum() / max(either[1:].sum(), 1.0)),
                "decoder cosine": float(alike[0]),
                "decoder cosine of random heads' features": float(alike[1:].mean()),
            }
    columns: list[Sampled | Given] = [
        Sampled(name="activation Jaccard over random heads", samples=excess),
        Given(COSINE, cosine),
    ]
    rows = {h: Beside(n=n, candidates=(f"the head's top {TOP} features",), detail=own) for h, own in detail.items()}
    found |= decide(claim, columns, rows, power=Power("headline", 0.0))
    for name in target.heads:
        if name not in found:
            found[name] = Evidence(
                claim=claim, head=name, cannot=NO_HEAD_OUTPUT_DICTIONARY.replace("target", "target's layer")
            )
    return found


def _live(firings: CorpusFirings, alive: Int[Tensor, " n_alive"]) -> Float[Tensor, "docs pos n_alive"]:
    """One where a feature fires, on measured documents."""
    measured = firings.corpus.measured
    at, o = firings.half(measured), firings.outputs
    doc = torch.zeros(len(firings.corpus.documents), dtype=torch.long, device=o.z.device)
    doc[torch.as_tensor(measured, device=doc.device)] = torch.arange(len(measured), device=doc.device)
    column = torch.full((o.encoder.d_sae,), -1, device=doc.device)
    column[alive] = torch.arange(len(alive), device=doc.device)
    kept = column[at.feature] >= 0
    live = o.z.new_zeros(len(measured), o.z.shape[1], len(alive))
    live[doc[at.doc[kept]], at.pos[kept], column[at.feature[kept]]] = 1
    return live


def _over_draws(name: str, values: Float[np.ndarray, " n_groups"], claim: Claim) -> Condition:
    """The first value less the mean of the others; bounds and p by how the others spread. It can deny and refutes
    nothing: there are too few draws to say so for every head.
    """
    own, drawn, bar = float(values[0]), values[1:], claim.bars[name]
    effect = own - float(drawn.mean())
    spread = drawn - drawn.mean()
    low, high = (effect - float(np.quantile(spread, q)) for q in (1 - claim.level, claim.level))
    return Condition(name, effect, low, high, bar, p=stats.rank_p(effect - bar, spread), p_refute=1.0)
