"""Which heads still stand: what a costly control is measured for."""

from __future__ import annotations

from collections.abc import Sequence

from fra.verdicts.claim import Claim
from fra.verdicts.decide import Column, corrected


def standing(claim: Claim, columns: Sequence[Column]) -> list[str]:
    """Heads of which a candidate meets all of these conditions, corrected over the heads. Further conditions only raise
    the p of a head, and with it no other head's level: a head that does not stand here is not SUPPORTED whatever they
    say.
    """
    found = corrected(claim, columns).conditions
    return [h for h, own in found.items() if any(all(c.holds(claim.level) for c in each) for each in own)]
