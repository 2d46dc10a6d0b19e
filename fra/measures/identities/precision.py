"""An identity holds by algebra, and a computer rounds: where a model's own precision does not reach a bar, the same is
measured in float64, and an error that falls with precision is rounding and refutes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fra.errors import FraError
from fra.measures.identities.designs import Rounding
from fra.targets.target import in_double
from fra.verdicts.claim import Evidence

if TYPE_CHECKING:
    from fra.targets.target import Target

Measured = Mapping[str | None, Evidence]
"""Evidence by head, or under None of a claim about the family."""


def settled(target: Target, measure: Callable[[Target, frozenset[int]], Measured]) -> dict[str | None, Evidence]:
    """Evidence of an identity as measured on the target; where it misses a bar, on the same target in float64. Where it
    misses one there too, by less than in the target's precision, it is undecided: limited by precision.

    measure: evidence of the heads of some layers of a target.
    """
    found = dict(measure(target, frozenset(range(target.n_layers))))
    missing = {name: missed(evidence) for name, evidence in found.items()}
    missing = {name: names for name, names in missing.items() if names}
    if not missing or target.dtype == "float64":
        return found
    layers = frozenset(int(name[1:].split("H")[0]) for name in missing if name is not None) or frozenset(
        range(target.n_layers)
    )
    try:
        double = measure(in_double(target), layers)
    except (FraError, MemoryError, torch.OutOfMemoryError) as error:
        why = f"limited by precision: {target.dtype} does not reach the bar, and float64 cannot be had here ({error})"
        return found | {name: replace(found[name], undecided=why) for name in missing}
    for name, names in missing.items():
        found[name] = _in_double(found[name], double[name], names, target.dtype)
    return found


def missed(evidence: Evidence) -> list[str]:
    """The conditions that no candidate meets."""
    own = [
        {c.name: (c.effect > c.bar) if c.above else (c.effect < c.bar) for c in cs}
        for cs in evidence.candidates.values()
    ]
    return [name for name in (own[0] if own else ()) if not any(held[name] for held in own)]


def _in_double(before: Evidence, after: Evidence, names: list[str], dtype: str) -> Evidence:
    first, then = (_effects(evidence) for evidence in (before, after))
    detail = {**after.detail, "precision": "float64", f"in {dtype}": {name: first[name] for name in names}}
    still, falls = missed(after), after.claim.designed(Rounding).falls
    rounding = bool(still) and all(abs(then[name]) < falls * abs(first[name]) for name in still)
    why = (
        f"limited by precision: {still[0]!r} is {then[still[0]]:.2g} in float64 and {first[still[0]]:.2g} in {dtype}"
        if rounding
        else None
    )
    return replace(after, detail=detail, undecided=why or after.undecided)


def _effects(evidence: Evidence) -> dict[str, float]:
    return {c.name: c.effect for conditions in evidence.candidates.values() for c in conditions}
