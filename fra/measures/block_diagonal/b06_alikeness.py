"""B06: whether the features of a head are alike, by a surrogate: the tokens at which they fire.

A feature's *profile* is the mean embedding of the tokens at which it fires, weighted by activation. A feature is
*unlike the rest* of its head where, in the measured documents, it leans no more towards the other features of its own
head than towards those of the other heads (both as mean profiles on the documents of selection). In a head put together
at random half of the features are. What a feature means, the surrogate does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import stats as sps

from fra.dictionaries.hooks import layer_of
from fra.measures.block_diagonal.b05_likeness import Activations, activations
from fra.measures.block_diagonal.designs import Alikeness
from fra.measures.block_diagonal.frontier import NO_STUDY, Frontier, head_of
from fra.statistics import stats
from fra.statistics.rules import RULES
from fra.statistics.stats import Floats, by_source
from fra.stimuli.padding import padded
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import Beside, Column, Drawn, Planted, Sampled, decide

OVER_RANDOM = "over random heads"


@dataclass(frozen=True)
class Profiles:
    """Of the live features of a layer: where they lean."""

    direction: Float[np.ndarray, "n d_model"]
    """Unit profile on the documents of selection."""
    leaning: Float[np.ndarray, "sources n d_model"]
    """Activation times token embedding, summed over each source's measured documents."""
    owner: Int[np.ndarray, " n"]


@torch.no_grad()
def profiles(frontier: Frontier, sae: object, alive: int) -> Profiles:
    """Profiles of the features that are live at `alive` positions of the selection or more."""
    sel, meas = activations(frontier, sae)
    table = frontier.model.W_E.detach().float().cpu()

    def embedded(documents: list[torch.Tensor], like: Activations) -> torch.Tensor:
        return table[padded(documents)[:, 1:]] * like.valid[..., None]

    e_sel, e_meas = embedded(frontier.selection, sel), embedded(frontier.measured, meas)
    mean = e_sel.sum((0, 1)) / sel.valid.sum()  # without it every profile would lean towards the mean token
    unit = [
        torch.nn.functional.normalize(e - mean, dim=-1) * f.valid[..., None] for e, f in ((e_sel, sel), (e_meas, meas))
    ]
    live = sel.alive(alive)
    chosen = torch.einsum("dtf,dte->fe", sel.acts[..., live], unit[0])
    leaning = torch.einsum("dtf,dte->dfe", meas.acts[..., live], unit[1]).double().numpy()
    return Profiles(
        torch.nn.functional.normalize(chosen, dim=-1).double().numpy(),
        by_source(leaning, meas.sources),
        head_of(sae, frontier.n_heads).cpu()[live].numpy(),
    )


def apart(direction: Float[np.ndarray, "n d_model"], members: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m d_model"]:
    """For each member the mean profile of the other members, less that of the rest of the layer."""
    inside = direction[members].sum(0)
    own = (inside - direction[members]) / (len(members) - 1)
    other = (direction.sum(0) - inside) / (len(direction) - len(members))
    found: np.ndarray = own - other
    return found


def margins(found: Profiles, members: Int[np.ndarray, " m"]) -> Float[np.ndarray, "sources m"]:
    """How far each member leans towards the other members rather than towards the rest of the layer, by source."""
    out: np.ndarray = np.einsum("sme,me->sm", found.leaning[:, members], apart(found.direction, members))
    return out


def unlike(margin: Float[np.ndarray, "draws m"]) -> Float[np.ndarray, " draws"]:
    """Share of features whose margin is not positive."""
    share: np.ndarray = (margin <= 0).mean(-1)
    return share


class ShareDraws:
    """A share of features that are unlike the rest, with sources as the sample.

    A share does not vary smoothly, and noise drives it towards 1/2, since a feature that fires rarely is unlike half of
    the time. So its two bounds are made in two ways. The upper one, by which heads are supported, comes from resampled
    sources: of the percentiles of the resampled shares and of those mirrored in the estimate (Davison and Hinkley 1997,
    Bootstrap Methods and their Application, ch. 5) whichever lies further out, each at half the level; noise can only
    raise it. The lower one, by which heads are refuted, counts the features that are unlike beyond doubt: each by a t
    test of its margins over sources, Bonferroni over the features. Noise alone makes none.
    """

    n_cand = 1

    def __init__(self, margin: Float[np.ndarray, "sources m"], seed: int, resamples: int) -> None:
        self.n_docs, n = margin.shape
        self.estimate = float(unlike(margin.sum(0, keepdims=True))[0])
        w = np.random.default_rng(seed).multinomial(self.n_docs, np.full(self.n_docs, 1 / self.n_docs), size=resamples)
        drawn = np.sort(unlike(w @ margin))
        self.draws: tuple[Floats, ...] = (drawn, 2 * self.estimate - drawn[::-1])
        """[n_draws] ascending: as they are, and mirrored."""
        error = np.maximum(margin.std(0, ddof=1), np.finfo(float).tiny) / np.sqrt(self.n_docs)
        self.doubt: Floats = np.sort(n * sps.t.cdf(margin.mean(0) / error, self.n_docs - 1))
        """[m] ascending: p of "this feature is like the rest", adjusted over the features."""

    def p_above(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "share <= bar"."""
        n = len(self.doubt)
        enough = np.flatnonzero(np.arange(1, n + 1) / n > bar)  # so many features, and one more
        return np.array([min(1.0, float(self.doubt[enough[0]])) if len(enough) else 1.0])

    def p_below(self, bar: float, simultaneous: bool = False) -> Floats:
        """[1] p of "share >= bar"."""
        worst = max(float((own >= bar).sum()) for own in self.draws)
        return np.array([1.0 if self.estimate >= bar else min(1.0, 2 * (1 + worst) / (1 + len(self.draws[0])))])

    def lower(self, level: ArrayLike | float, simultaneous: bool = False) -> Floats:
        """[1] lower bound: above a bar exactly where `p_above` is at most the level."""
        return np.array([float((self.doubt <= float(np.ravel(level)[0])).mean())])

    def upper(self, level: ArrayLike | float, simultaneous: bool = False) -> Floats:
        """[1] upper bound: below a bar exactly where `p_below` is at most the level."""
        n = len(self.draws[0])
        most = min(int(np.floor(float(np.ravel(level)[0]) / 2 * (1 + n) * (1 + 1e-12))) - 1, n - 1)
        return np.array([np.inf if most < 0 else max(self.estimate, *(own[-1 - most] for own in self.draws))])

    def power(self, worth: float, level: float, above: bool = True, simultaneous: bool = False) -> Floats:
        """[1] nothing is known of it: heads are planted instead."""
        return np.full(1, np.nan)


class LayerFeatures:
    """The heads of a layer with their live features, and heads put together at random from the same."""

    def __init__(self, claim: Claim, target: str, found: Profiles, names: dict[int, str]) -> None:
        self.claim, self.target, self.found = claim, target, found
        self.design = claim.designed(Alikeness)
        members = {h: np.flatnonzero(found.owner == h) for h in names}
        self.few = [names[h] for h, own in members.items() if len(own) < self.design.least_features]
        self.members = {names[h]: own for h, own in members.items() if names[h] not in self.few}
        self._whole: Floats = found.leaning.sum(0)

    def sample(self, head: str) -> ShareDraws:
        """The share of the head's features that are unlike the rest."""
        return self._resampled(self.members[head], head)

    def random(self, head: str, k: int) -> float:
        """The k-th random head of the head's size: the same share, without resamples."""
        rng = np.random.default_rng(stats.seed_of(self.claim.digest, self.target, head, "random", str(k)))
        drawn = rng.choice(len(self.found.owner), len(self.members[head]), replace=False)
        lean = np.einsum("me,me->m", self._whole[drawn], apart(self.found.direction, drawn))
        return float(unlike(lean[None])[0])

    def planted(self, head: str) -> Planted:
        """Heads of that size put together of the features nearest to one of the layer, so that none should be unlike
        the rest: how many meet every condition at the level of a head.
        """
        level, size = self.claim.level / max(1, len(self.members)), len(self.members[head])
        null = np.array([self.random(head, k) for k in range(int(np.ceil(RULES.draws_a_step / level)) - 1)])
        rng = np.random.default_rng(stats.seed_of(self.claim.digest, self.target, head, "planted"))
        found = 0
        for k in range(RULES.plantings):
            like = self.found.direction @ self.found.direction[rng.integers(len(self.found.owner))]
            made = self._resampled(np.sort(np.argsort(-like, kind="stable")[:size]), f"{head} planted {k}")
            rank = stats.rank_p(-made.estimate, -null)
            found += bool(made.p_below(self.claim.bar)[0] <= level and rank <= level)
        return Planted(found, RULES.plantings)

    def _resampled(self, members: Int[np.ndarray, " m"], what: str) -> ShareDraws:
        seed = stats.seed_of(self.claim.digest, self.target, what, "sources")
        return ShareDraws(margins(self.found, members), seed, self.design.resamples)


def alikeness_evidence(claim: Claim, frontier: Frontier | None, arm: str = "block-width") -> dict[str, Evidence]:
    """Every head of the study's layer; heads of other layers have no such dictionary. What is judged is the first
    training run's dictionary; the others' shares stand in the detail.
    """
    if frontier is None or not frontier.target.runs(arm):
        return {}
    target, design = frontier.target, claim.designed(Alikeness)
    prefix, n = f"L{layer_of(frontier.hook)}H", len(set(frontier.sources))
    names = {h: f"{prefix}{h}" for h in range(target.n_heads)}
    layers = []
    for run in target.runs(arm):
        saes = target.study(arm, run)
        found = profiles(frontier, saes[len(saes) // 2], design.alive)
        layers.append(LayerFeatures(claim, target.name, found, names))
    own = layers[0]
    few = f"fewer than {design.least_features} features of this head are live"
    out = {head: Evidence(claim=claim, head=head, undecided=few, n=n) for head in own.few}
    samples = {head: own.sample(head) for head in own.members}
    rows = {
        head: Beside(candidates=("all live features",), detail=_described(layers, head, design)) for head in own.members
    }
    over_random = Drawn(
        observed={OVER_RANDOM: {head: -sample.estimate for head, sample in samples.items()}},
        draw=partial(_draw, own),
    )
    columns: list[Column] = [Sampled(name=claim.condition, samples=samples), over_random]
    return out | decide(claim, columns, rows, planted=own.planted)


def _draw(own: LayerFeatures, head: str, k: int) -> dict[str, float]:
    return {OVER_RANDOM: -own.random(head, k)}


def _described(layers: Sequence[LayerFeatures], head: str, design: Alikeness) -> dict[str, object]:
    random = [layers[0].random(head, k) for k in range(design.described)]
    low = design.described_quantile
    return {
        "live features": len(layers[0].members[head]),
        "share unlike the rest, by training run": [
            each.sample(head).estimate if head in each.members else float("nan") for each in layers
        ],
        "random heads": {"mean": float(np.mean(random)), f"{low:.0%}": float(np.quantile(random, low))},
    }


def outside(claim: Claim, frontier: Frontier | None, head: str) -> Evidence:
    """Why a head has no evidence."""
    reason = NO_STUDY if frontier is None else f"the study's dictionaries are at {frontier.hook}, not at this layer"
    return Evidence(claim=claim, head=head, cannot=reason)
