"""Conditions that are made and joined: ranks among nulls, exact numbers, shares, and several that must all hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fra.verdicts.claim import Condition


def rank_condition(name: str, p: float, adjusted: float, bar: float) -> Condition:
    """A condition that is a rank among draws of a null: 1 - p against 1 - level, bounded by the p that is adjusted over
    the heads. It can be missed; it refutes nothing.
    """
    return Condition(name, 1 - p, min(1 - adjusted, 1 - p), 1.0, bar, p=adjusted, p_refute=1.0, refutes=False)


def exact(name: str, value: float, bar: float, above: bool = True) -> Condition:
    """A condition on a number that is not estimated: it can be missed, and refutes identities only."""
    return Condition(name, value, value, value, bar, above=above)


def as_share(condition: Condition, part: float, whole: float, bar: float) -> Condition:
    """A condition "part - bar * whole > 0" (or < 0) said as a share of the whole; `part` and `whole` are its means.

    Without a whole there is no share: such a condition is not measured.
    """
    if not whole > 0:
        return replace(condition, effect=np.nan, low=-np.inf, high=np.inf, bar=bar, p=None, p_refute=None)
    share = part / whole
    low, high = (share + (end - condition.effect) / whole for end in (condition.low, condition.high))
    return replace(condition, effect=share, low=low, high=high, bar=bar)


def weakest(conditions: Sequence[Condition]) -> Condition:
    """Conditions of one name and bar that must all hold, said as one: it holds where the last of them does and fails
    where the first does. None is chosen by its estimate; a number that is not estimated has p 0 or 1.
    """
    first = conditions[0]
    pick = np.min if first.above else np.max  # NaN where one was not measured
    effect, low, high = (float(pick([getattr(c, x) for c in conditions])) for x in ("effect", "low", "high"))
    if all(c.p is None for c in conditions):
        return replace(first, effect=effect, low=low, high=high)
    p = max(float(not c.holds(0.5)) if c.p is None else c.p for c in conditions)
    p_refute = min(float(not c.fails(0.5)) if c.p_refute is None else c.p_refute for c in conditions)
    return replace(first, effect=effect, low=low, high=high, p=p, p_refute=p_refute)
