"""B06: whether the features of a head are alike, by a surrogate: the tokens at which they fire.

A feature's *profile* is the mean embedding of the tokens at which it fires, weighted by activation. A feature is
*unlike the rest* of its head where, in the measured documents, it leans no more towards the other features of its own
head than towards those of the other heads (both as mean profiles on the documents of selection). In a head put together
at random half of the features are. What a feature means, the surrogate does not know.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from fra.dictionaries.hooks import layer_of
from fra.measures.block_diagonal.b05_likeness import ALIVE, Activations, activations
from fra.measures.block_diagonal.frontier import NO_STUDY, Frontier, head_of
from fra.stimuli.padding import padded
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.conditions import rank_condition
from fra.verdicts.decide import Beside, Given, Sampled, decide
from fra.verdicts.stats import Floats, by_source

CONTROLS = 200
PLANTED = 20
_DRAWS = 1_999
OVER_RANDOM = "over random heads"
_LEAST_FEATURES = 8


@dataclass(frozen=True)
class Profiles:
    """Of the live features of a layer: where they lean."""

    direction: Float[np.ndarray, "n d_model"]
    """Unit profile on the documents of selection."""
    leaning: Float[np.ndarray, "sources n d_model"]
    """Activation times token embedding, summed over each source's measured documents."""
    owner: Int[np.ndarray, " n"]


@torch.no_grad()
def profiles(frontier: Frontier, sae: object) -> Profiles:
    """Profiles of the features that are live at `ALIVE` positions of the selection or more."""
    sel, meas = activations(frontier, sae)
    table = frontier.model.W_E.detach().float().cpu()

    def embedded(documents: list[torch.Tensor], like: Activations) -> torch.Tensor:
        return table[padded(documents)[:, 1:]] * like.valid[..., None]

    e_sel, e_meas = embedded(frontier.selection, sel), embedded(frontier.measured, meas)
    mean = e_sel.sum((0, 1)) / sel.valid.sum()  # without it every profile would lean towards the mean token
    unit = [
        torch.nn.functional.normalize(e - mean, dim=-1) * f.valid[..., None] for e, f in ((e_sel, sel), (e_meas, meas))
    ]
    alive = sel.live.sum((0, 1)) >= ALIVE
    chosen = torch.einsum("dtf,dte->fe", sel.acts[..., alive], unit[0])
    leaning = torch.einsum("dtf,dte->dfe", meas.acts[..., alive], unit[1]).double().numpy()
    return Profiles(
        torch.nn.functional.normalize(chosen, dim=-1).double().numpy(),
        by_source(leaning, meas.sources),
        head_of(sae, frontier.n_heads).cpu()[alive].numpy(),
    )


def margins(found: Profiles, members: Int[np.ndarray, " m"]) -> Float[np.ndarray, "sources m"]:
    """How far each member leans towards the other members rather than towards the rest of the layer, by source."""
    d = found.direction
    inside = d[members].sum(0)
    own = (inside - d[members]) / (len(members) - 1)
    other = (d.sum(0) - inside) / (len(d) - len(members))
    out: np.ndarray = np.einsum("sme,me->sm", found.leaning[:, members], own - other)
    return out


def unlike(margin: Float[np.ndarray, "draws m"]) -> Float[np.ndarray, " draws"]:
    """Share of features whose margin is not positive."""
    share: np.ndarray = (margin <= 0).mean(-1)
    return share


def _share(margin: Float[np.ndarray, "sources m"]) -> float:
    return float(unlike(margin.sum(0, keepdims=True))[0])


def draws(margin: Float[np.ndarray, "sources m"], seed: int) -> Float[np.ndarray, " draws"]:
    """The share of unlike features over resampled sources.

    A feature that fires rarely is noise, and noise is unlike half of the time: the share errs towards 1/2, so that
    support is conservative, and a refutation needs planted heads to be found.
    """
    n = len(margin)
    w = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_DRAWS)
    return unlike(w @ margin)


@dataclass(frozen=True)
class Drawn:
    """A sample of `fra.verdicts.decide`: a share, and what it is over resampled sources, whose percentiles it has for
    bounds.
    """

    estimate: float
    drawn: Float[np.ndarray, " draws"]
    n_cand: int = 1

    def p_above(self, bar: ArrayLike | float, simultaneous: bool = False) -> Floats:
        """[1] p of "share <= bar"."""
        return self._p(self.drawn <= bar)

    def p_below(self, bar: ArrayLike | float, simultaneous: bool = False) -> Floats:
        """[1] p of "share >= bar"."""
        return self._p(self.drawn >= bar)

    def lower(self, level: ArrayLike | float, simultaneous: bool = False) -> Floats:
        """[1] a percentile."""
        return np.atleast_1d(np.quantile(self.drawn, np.asarray(level, dtype=np.float64)))

    def upper(self, level: ArrayLike | float, simultaneous: bool = False) -> Floats:
        """[1] a percentile."""
        return np.atleast_1d(np.quantile(self.drawn, 1 - np.asarray(level, dtype=np.float64)))

    def _p(self, against: Bool[np.ndarray, " draws"]) -> Floats:
        return np.array([(1 + against.sum()) / (1 + len(against))])


def alikeness_evidence(claim: Claim, frontier: Frontier | None, arm: str = "block-width") -> dict[str, Evidence]:
    """Every head of the study's layer; heads of other layers have no such dictionary."""
    if frontier is None or not frontier.target.study(arm):
        return {}
    target = frontier.target
    saes = target.study(arm)
    found = profiles(frontier, saes[len(saes) // 2])
    layer, n = layer_of(frontier.hook), len(frontier.measured)
    rng = np.random.default_rng(stats.seed_of(claim.digest, target.name, "controls"))
    everything = np.arange(len(found.owner))
    heads = [h for h in range(target.n_heads) if (found.owner == h).sum() >= _LEAST_FEATURES]
    out = {}
    for h in set(range(target.n_heads)) - set(heads):
        few = f"fewer than {_LEAST_FEATURES} features of this head are live"
        out[f"L{layer}H{h}"] = Evidence(claim=claim, head=f"L{layer}H{h}", undecided=few, n=n)
    unlike_rest: dict[str, Drawn] = {}
    over_random: dict[str, list[Condition]] = {}
    rows: dict[str, Beside] = {}
    for h in heads:
        name, members = f"L{layer}H{h}", everything[found.owner == h]
        margin, size = margins(found, members), len(members)
        own = Drawn(_share(margin), draws(margin, stats.seed_of(claim.digest, target.name, str(h))))
        random = [_share(margins(found, rng.choice(everything, size, replace=False))) for _ in range(CONTROLS)]
        planted = []
        for _ in range(PLANTED):
            like = found.direction @ found.direction[rng.integers(len(everything))]
            margin = margins(found, np.sort(np.argsort(-like, kind="stable")[:size]))
            again = Drawn(_share(margin), draws(margin, int(rng.integers(2**31))))
            planted.append(float(again.p_below(claim.bar)[0]) * len(heads) <= claim.level)
        unlike_rest[name] = own
        rank = stats.rank_p(-own.estimate, [-share for share in random])
        over_random[name] = [rank_condition(OVER_RANDOM, rank, claim.level)]
        rows[name] = Beside(
            n=n,
            candidates=("all live features",),
            power=float(np.mean(planted)),
            detail={
                "live features": size,
                "random heads": {"mean": float(np.mean(random)), "5 %": float(np.quantile(random, 0.05))},
                "planted heads found": float(np.mean(planted)),
            },
        )
    columns: list[Sampled | Given] = [
        Sampled(name="share unlike the rest", samples=unlike_rest, above=False),
        Given(OVER_RANDOM, over_random),
    ]
    return out | decide(claim, columns, rows, refuting="holm")


def outside(claim: Claim, frontier: Frontier | None, head: str) -> Evidence:
    """Why a head has no evidence."""
    reason = NO_STUDY if frontier is None else f"the study's dictionaries are at {frontier.hook}, not at this layer"
    return Evidence(claim=claim, head=head, cannot=reason)
