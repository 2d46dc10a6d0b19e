"""Evidence for the claims about induction heads' families of head-output features: a row a head; D07, D12."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fra.dictionaries.codes import dictionary_hook
from fra.induction.status import HeadStatus
from fra.measures.families.families import Families, LayerFamilies
from fra.verdicts import stats
from fra.verdicts.bounds import columns_tested, least_power
from fra.verdicts.claim import Claim, Condition, Evidence, parse_head
from fra.verdicts.stats import Floats, by_source


@dataclass(frozen=True)
class Measured:
    """One head's numbers: for each condition, sums and counts by document, [n_docs] or [n_docs, n_candidates]."""

    columns: Mapping[str, tuple[Floats, Floats]]
    sources: Sequence[str]
    n: int
    candidates: Sequence[str] = ("the family",)
    detail: Mapping[str, Any] = field(default_factory=dict)
    undecided: str | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Between what a condition's value in a document must lie, where that is known."""


def per_head(
    claim: Claim,
    families: Families,
    measure: Callable[[LayerFamilies, int], Measured],
    *,
    headline: str,
    null: float | None,
) -> dict[str, Evidence]:
    """One row a head: `measure` for induction heads with a head-output dictionary, the reason why not for the others.

    The first column is the headline, against `claim.bar`; the others have their bars by name. null: what a headline at
    its bar must be told from, for power; None where power is not at issue.
    """
    found = outside(claim, families)
    measured = {}
    for head in families.heads:
        families.progress(f"{claim.id}: {head}")
        layer, number = families.of(head)
        got = measure(layer, number)
        if got.undecided is not None or not got.candidates:
            said = got.undecided or "there is no candidate to test"
            found[head] = row(claim, head, families, undecided=said, n=min(got.n, claim.n), detail=got.detail)
        else:
            measured[head] = got
    if not measured:
        return found
    names = [headline, *claim.bars]
    table: dict[str, dict[str, list[Condition]]] = {}
    means: dict[str, dict[str, stats.ClusterMeans]] = {}
    raw: dict[str, dict[str, float]] = {}
    many = any(len(m.candidates) > 1 for m in measured.values())
    for name in names:
        columns = {h: tuple(by_source(part, m.sources) for part in m.columns[name]) for h, m in measured.items()}
        bounded = next(iter(measured.values())).ranges.get(name)
        table[name], means[name], raw[name] = columns_tested(
            claim, name, columns, families.target, len(names), many, bounded
        )
    q = stats.benjamini_hochberg([raw[headline][h] for h in measured])
    for k, (h, m) in enumerate(measured.items()):
        candidates = {c: tuple(table[name][h][n] for name in names) for n, c in enumerate(m.candidates)}
        power = None
        if null is not None:
            power = least_power(candidates, {name: means[name][h] for name in names}, null, claim.level, len(measured))
        found[h] = row(claim, h, families, candidates, min(m.n, claim.n), power, float(q[k]), m.detail)
    return found


def outside(claim: Claim, families: Families) -> dict[str, Evidence]:
    """Why each head that has no measurement has none."""
    found = {}
    for name, status in families.status.items():
        if name in families.known_tih and status.status != "TIH":
            said = f"the target lists this head as a TIH, but it is {status.status} on repeated_random"
            found[name] = row(claim, name, families, undecided=said)
        elif status.status != "TIH":
            what = "neither clearly a TIH nor clearly none" if status.status == "undecided" else status.status
            found[name] = row(claim, name, families, cannot=f"not in the family: {what}")
        elif name not in families.heads:
            hook = f"blocks.{parse_head(name)[0]}.attn.hook_z"
            found[name] = row(claim, name, families, cannot=f"the target has no dictionary of head outputs at {hook}")
    return found


def row(
    claim: Claim,
    head: str,
    families: Families,
    candidates: Mapping[str, tuple[Condition, ...]] | None = None,
    n: int = 0,
    power: float | None = None,
    q: float | None = None,
    detail: Mapping[str, Any] | None = None,
    undecided: str | None = None,
    cannot: str | None = None,
) -> Evidence:
    """A head's evidence, its status beside whatever was measured."""
    status: HeadStatus = families.status[head]
    about = {"status": {"status": status.status, "contrast": status.contrast, "low": status.lower}}
    return Evidence(
        claim=claim,
        head=head,
        candidates=candidates or {},
        n=n,
        power=power,
        q=q,
        undecided=undecided,
        cannot=cannot,
        detail={**(detail or {}), **about},
    )


def family_of(layer: LayerFamilies, head: int) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """The head's selection, indices of what passes, and a word on the sample."""
    selection, passed = layer.selections[head], layer.family(head)
    about = {"features selected": len(selection.features), "features in the family": len(passed)}
    return selection, passed, shown(layer, head) | about


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


NO_FAMILY = "no feature of the head's selection passes the behaviour test, so there is no family to measure"
