"""Evidence for the claims about induction heads' families of head-output features: a row a head; D07, D12."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fra.dictionaries.codes import dictionary_hook
from fra.dictionaries.hooks import LayerHooks
from fra.induction.outside import outside as outside_family
from fra.induction.status import HeadStatus
from fra.measures.families.families import Families, LayerFamilies, Selection
from fra.statistics.bounds import MATCHED
from fra.statistics.stats import Floats
from fra.verdicts.claim import Claim, Evidence, parse_head
from fra.verdicts.decide import Beside, Sampled, decide, means_of

NO_FAMILY = "no feature of the head's selection passes the behaviour test, so there is no family to measure"
FEATURES = "features"
"""The gate of claims about families: fewer features than this are none."""


@dataclass(frozen=True)
class HeadNumbers:
    """One head's numbers: for each condition, sums and counts by document, [n_docs] or [n_docs, n_candidates]."""

    columns: Mapping[str, tuple[Floats, Floats]]
    sources: Sequence[str]
    n: int
    candidates: Sequence[str] = ("the family",)
    detail: Mapping[str, Any] = field(default_factory=dict)
    undecided: str | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Between what a condition's value in a document must lie, where that is known."""
    shares: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Means of (part, whole) of conditions that are said as a share: their column is that of part - bar * whole."""


def per_head(
    claim: Claim, families: Families, measure: Callable[[LayerFamilies, int], HeadNumbers]
) -> dict[str, Evidence]:
    """One row a head: `measure` for induction heads with a head-output dictionary, else the reason why not."""
    found = outside(claim, families)
    measured: dict[str, HeadNumbers] = {}
    for head in families.heads:
        families.progress(f"{claim.id}: {head}")
        got = measure(*families.of(head))
        if got.undecided is not None or not got.candidates:
            found[head] = undecided(
                claim, families, head, got.undecided or "there is no candidate to test", got.detail, got.n
            )
        else:
            measured[head] = got
    if not measured:
        return found
    columns = [
        Sampled(
            name=name,
            samples={
                h: means_of(claim, families.target, h, name, *m.columns[name], m.sources) for h, m in measured.items()
            },
            simultaneous=any(len(m.candidates) > 1 for m in measured.values()),
            bounded=next(iter(measured.values())).ranges.get(name),
            linearised=name == MATCHED,
            shares=_shares(name, measured),
        )
        for name in (claim.condition, *claim.bars)
    ]
    rows = {
        h: Beside(n=min(m.n, claim.n), candidates=m.candidates, detail={**m.detail, **about(families, h)})
        for h, m in measured.items()
    }
    return found | decide(claim, columns, rows)


def _shares(name: str, measured: Mapping[str, HeadNumbers]) -> dict[str, tuple[float, float]] | None:
    found = {h: m.shares[name] for h, m in measured.items() if name in m.shares}
    return found or None


def undecided(
    claim: Claim, families: Families, head: str, said: str, detail: Mapping[str, Any], n: int = 0
) -> Evidence:
    """A row that cannot be asked, with the reason."""
    return Evidence(
        claim=claim, head=head, undecided=said, n=min(n, claim.n), detail={**detail, **about(families, head)}
    )


def too_few(claim: Claim, layer: LayerFamilies, head: int) -> str | None:
    """Why the head's family is too small to be asked, and what it would take; None where it is not."""
    least, passed, of = claim.gates[FEATURES], len(layer.family(head)), len(layer.selections[head].features)
    if passed >= least:
        return None
    if not passed:
        return f"{NO_FAMILY}: none of {of} passes, and {least:g} features are needed"
    would = math.ceil(least * of / passed)
    return (
        f"{passed} of {of} selected features make a family, where {least:g} are needed: at this rate a dictionary with "
        f"about {would} features that draw most from the head"
    )


def outside(claim: Claim, families: Families) -> dict[str, Evidence]:
    """Why each head that has no measurement has none. Raises FraError where the claim registers other designs."""
    families.registered_by(claim)

    def lacking(head: str) -> str:
        return f"the target has no dictionary of head outputs at {LayerHooks(parse_head(head)[0]).z}"

    return outside_family(claim, families, lacking=lacking, about=_status)


def about(families: Families, head: str) -> dict[str, Any]:
    """A head's status, which stands beside whatever was measured."""
    return {"status": _status(families.status[head])}


def _status(status: HeadStatus) -> dict[str, Any]:
    return {"status": status.status, "contrast": status.contrast, "low": status.lower}


def family_of(layer: LayerFamilies, head: int) -> tuple[Selection, np.ndarray, dict[str, Any]]:
    """The head's selection, indices of what passes, and a word on the sample."""
    selection, passed = layer.selections[head], layer.family(head)
    count = {"features selected": len(selection.features), "features in the family": len(passed)}
    return selection, passed, shown(layer, head) | count


def shown(layer: LayerFamilies, head: int) -> dict[str, Any]:
    """The dictionary, and of the features that pass (of all selected where none does) the one that draws most from the
    head, where it fires most.
    """
    selection, passed = layer.selections[head], layer.family(head)
    among = passed if len(passed) else np.arange(len(selection.features))
    dictionary = {"dictionary": dictionary_hook(layer.dictionary)}
    if not len(among):
        return dictionary
    feature = int(selection.features[among][selection.shares[among].argmax()])
    return layer.picture(feature, {selection.head: head}) | dictionary
