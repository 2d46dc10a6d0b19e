"""What a reader sees beside the verdicts on CIH channels and sets: best channels, maps, curves, nulls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from fra.induction.cih import Screen
from fra.induction.outside import status_detail
from fra.report.pictures import BEST, CurvesPicture, counted, features_on
from fra.search.channels import Effects
from fra.search.designs import ChannelSearch
from fra.search.examples import Shown
from fra.search.screen import HeadScreen
from fra.statistics import stats
from fra.verdicts.claim import Condition


def live_candidates(s: HeadScreen, least: int = ChannelSearch.least_documents) -> Int[np.ndarray, " m"]:
    """Candidates live in enough documents to be measured at all."""
    return np.flatnonzero((s.effects.rows > 0).sum(0) >= least)


def best_channel(screened: Screen, h: str) -> dict[str, Any]:
    """The screen's best channel of a head as every row about the head shows it: its map beside the head's pattern,
    with live tokens and links; nothing where the head was not screened, or the channel is live on no stripe.
    """
    s = screened.heads.get(h)
    if s is None or s.example is None:
        return {}
    at = int(np.flatnonzero((s.pairs == s.example.pair).all(1))[0])
    on = f"{screened.stimulus}: a document of the confirmation set"
    shown = Shown(s.example, s.tokens[at]["query"], s.tokens[at]["key"])
    return {BEST: shown.picture(on, screened.token_text, screened.pages.get(s.layer))}


EFFECT, CONTRAST, ATTENTION, COVERAGE = "effect", "head contrast", "attention", "coverage"
OVER_LAGS, OVER_SCRAMBLES = "over other lags", "over scrambled heads"
OVER_PAIRS, OVER_HEADS = "coupling among matched pairs", "coupling over other heads"
LATENT = (EFFECT, OVER_LAGS, OVER_PAIRS, OVER_HEADS, OVER_SCRAMBLES)
"""The conditions that make a channel latent; all of them make it expressed."""


def channel_detail(
    screened: Screen,
    h: str,
    conditions: Mapping[str, tuple[Condition, ...]],
    level: float,
    smallest: float | None = None,
    top: int = 5,
) -> dict[str, Any]:
    """The best channels of a head as a reader should see them, with how many are latent and expressed where their
    conditions were tested (`conditions`, by candidate; none for a claim about sets).
    """
    s = screened.heads[h]
    live = live_candidates(s)
    E = s.effects.nats[:, live].sum(0) / np.maximum(s.effects.rows[:, live].sum(0), 1.0)
    rows = []
    for n in np.argsort(-E, kind="stable").tolist():
        c, about = live[n], s.tokens[live[n]]
        i, j = s.pairs[c].tolist()
        row = {
            "channel": f"{i} -> {j}",
            "effect (nats)": float(E[n]),
            "coverage": float(s.effects.covered[:, c].sum() / s.n_rows),
            "live-pair share": about["live_pair_share"],
            "breadth": about["breadth"],
            "coupling": float(s.coupling[c]),
            "coupling rank": float(s.coupling_rank[c]),
            "without its heaviest token (nats)": float(s.without_heaviest[c]),
            "query tokens": counted(about["query"], screened.token_text),
            "key tokens": counted(about["key"], screened.token_text),
        }
        if row["channel"] in conditions:
            own = {x.name: x for x in conditions[row["channel"]]}
            latent = all(own[x].holds(level) for x in LATENT)
            row |= {
                "low": own[EFFECT].low,
                "high": own[EFFECT].high,
                "attention": own[ATTENTION].effect,
                "head contrast": own[CONTRAST].effect,
                "p scrambles": own[OVER_SCRAMBLES].p,
                "latent": latent,
                "expressed": all(x.holds(level) for x in own.values()),
            }
        if page := screened.pages.get(s.layer):
            row["pages"] = features_on(page, (i, j))
        rows.append(row)
    detail: dict[str, Any] = best_channel(screened, h) | {
        "channels screened": len(s.pairs),
        "channels measured": len(rows),
        "best channels": rows[:top],
    }
    if conditions:
        detail |= {name: sum(r[name] for r in rows) for name in ("latent", "expressed")}
    if smallest is not None:
        detail["smallest detectable channel effect (nats)"] = smallest
    if s.marginals is not None:
        detail["all channels of the best channel's query feature"], detail["all channels of its key feature"] = map(
            _mean, s.marginals
        )
    return detail


def _mean(effects: Effects) -> float:
    return float(effects.nats.sum() / max(effects.rows.sum(), 1.0))


_BLOCK_NAMES = {"f": "feature", "b": "bias", "e": "error"}


def set_detail(screened: Screen, h: str, carried: float, effect: stats.ClusterMeans, level: float) -> dict[str, Any]:
    """What stands beside the verdict on a head's CIH set: other sizes, marginals, what its blocks carry."""
    s = screened.heads[h]
    contrast = float(s.contrast.sum() / s.set_rows.sum())
    shares = [float(e.attention.sum() / s.contrast.sum()) if contrast > 0 else None for e in s.set_effects.values()]
    sizes: CurvesPicture = {"x": list(s.set_effects), "curves": {"share of the contrast": shares}}
    return {
        "status": status_detail(screened.status[h]),
        "feature-feature share of the stripe contrast": carried,
        "stripe contrast by block (nats)": {
            f"{_BLOCK_NAMES[k[0]]} x {_BLOCK_NAMES[k[1]]}": v for k, v in s.blocks.items()
        },
        "set size and what it accounts for": sizes,
        "sets removed together": [
            {
                "channels": n,
                "effect (nats)": _mean(e),
                "attention": float(e.attention.sum() / max(e.rows.sum(), 1.0)),
                "share of contrast": float(e.attention.sum() / s.contrast.sum()) if contrast > 0 else None,
                "coverage": float(e.covered.sum() / s.set_rows.sum()),
            }
            for n, e in s.set_effects.items()
        ],
        "smallest detectable effect (nats)": float(stats.detectable(effect, level, simultaneous=False)[0]),
    }
