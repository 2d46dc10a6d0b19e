"""What a reader sees beside the verdicts on CIH channels and sets: best channels, maps, curves, nulls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from fra.induction.best_effect import MIN_LIVE_DOCUMENTS
from fra.induction.channels import Effects
from fra.induction.cih import Screen
from fra.induction.examples import Shown
from fra.induction.outside import status_detail
from fra.induction.screen import HeadScreen
from fra.report.pictures import BEST, CurvesPicture, counted, features_on
from fra.verdicts import stats
from fra.verdicts.claim import Condition


def live_candidates(s: HeadScreen) -> Int[np.ndarray, " m"]:
    """Candidates live in enough documents to be measured at all."""
    return np.flatnonzero((s.effects.rows > 0).sum(0) >= MIN_LIVE_DOCUMENTS)


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
    smallest: float | None,
    top: int = 5,
) -> dict[str, Any]:
    """The best channels of a head as a reader should see them, with how many are latent and expressed."""
    s = screened.heads[h]
    rows = []
    by_effect = sorted(zip(live_candidates(s), conditions.items(), strict=True), key=lambda item: -item[1][1][0].effect)
    for c, (name, all_of) in by_effect:
        about, own = s.tokens[c], {x.name: x for x in all_of}
        latent = all(own[x].holds(level) for x in LATENT)
        survives = bool(s.without_heaviest[c] > own[EFFECT].bar)
        rows.append(
            {
                "channel": name,
                "effect (nats)": own[EFFECT].effect,
                "low": own[EFFECT].low,
                "high": own[EFFECT].high,
                "attention": own[ATTENTION].effect,
                "coverage": own[COVERAGE].effect,
                "live-pair share": about["live_pair_share"],
                "breadth": about["breadth"],
                "coupling": float(s.coupling[c]),
                "coupling rank": float(s.p_coupling[c]),
                "p other lags": float(s.p_lag[c]),
                "p scrambles": own[OVER_SCRAMBLES].p,
                "head contrast": own[CONTRAST].effect,
                "latent": latent,
                "expressed": latent and all(x.holds(level) for x in own.values()),
                "conceptual": about["breadth"] >= 3 and survives,
                "query tokens": counted(about["query"], screened.token_text),
                "key tokens": counted(about["key"], screened.token_text),
            }
            | ({"pages": features_on(page, s.pairs[c].tolist())} if (page := screened.pages.get(s.layer)) else {})
        )
    detail: dict[str, Any] = best_channel(screened, h) | {
        "channels screened": len(s.pairs),
        "channels measured": len(rows),
        "latent": sum(r["latent"] for r in rows),
        "expressed": sum(r["expressed"] for r in rows),
        "best channels": rows[:top],
        "planted channels found": f"{s.planted_found} of {s.planted}" if s.planted else "none was planted",
        "smallest detectable channel effect (nats)": smallest,
        "best effect at other lags": _spread(s.lag_best),
        "best effect of scrambled heads": _spread(s.scramble_best),
    }
    if s.marginals is not None:
        detail["all channels of the best channel's query feature"], detail["all channels of its key feature"] = map(
            _mean, s.marginals
        )
    return detail


def _mean(effects: Effects) -> float:
    return float(effects.nats.sum() / max(effects.rows.sum(), 1.0))


def _spread(values: np.ndarray) -> dict[str, float | None]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return {"median": None, "95th percentile": None, "largest": None}
    return {
        "median": float(np.median(finite)),
        "95th percentile": float(np.quantile(finite, 0.95)),
        "largest": float(finite.max()),
    }


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
        "the same set with random atoms (nats)": [_mean(e) for e in s.atom_effects],
        "the same set of scrambled heads (nats)": _spread(s.scramble_sets),
        "smallest detectable effect (nats)": float(stats.detectable(effect, level, simultaneous=False)[0]),
    }
