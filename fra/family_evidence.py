"""Evidence for the claims about induction heads' families of head-output features: a row a head; D07, D12."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats as sps

from fra._family_measures import by_document, firing, head_means, turned_off
from fra.dictionaries.codes import dictionary_hook, neuronpedia
from fra.family import Behaviour, Families, LayerFamilies
from fra.induction.status import HeadStatus
from fra.targets.target import text_of
from fra.verdicts import stats
from fra.verdicts.bounds import MATCHED, columns_tested, difference, least_power
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


OTHERS = "fires before other tokens"
SOURCE = "source is the earlier token"
_REFUTING = 3
"""Conditions of D07 any one of which may refute: the share that passes, the matches, the source."""
NO_FAMILY = "no feature of the head's selection passes the behaviour test, so there is no family to measure"


def behaviour_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D07: the share of the selection that passes, against the matches, with the source of what fired.

    The unit of the pass rate is the feature (Clopper-Pearson; Fisher exact against the matches); that of the source is
    the document. Bonferroni over the heads, and where a condition may refute over the three that may.
    """
    found = outside(claim, families)
    m = len(families.heads)
    columns: dict[str, tuple[Floats, ...]] = {}
    for head in families.heads:
        families.progress(f"{claim.id}: {head}")
        layer, number = families.of(head)
        if number in layer.behaviours:
            own = layer.behaviours[number][0]
            columns[head] = tuple(
                part.sum(0)[:, None].astype(float) for part in (own.sourced_by_document, own.hits_by_document)
            )
    sources, _, _ = columns_tested(claim, SOURCE, columns, families.target, _REFUTING, bounded=(0.0, 1.0))
    for head in families.heads:
        layer, number = families.of(head)
        selection = layer.selections[number]
        if number not in layer.behaviours:
            found[head] = row(claim, head, families, undecided="no feature draws 60 % of its attribution from the head")
            continue
        own, both, n_docs = layer.behaviours[number]
        enough = own.repeats > claim.bars["repeats a feature"]
        k, n = int((own.passes & enough).sum()), int(enough.sum())
        matches = both.passes.reshape(-1, 2).any(1)
        k_c, n_c = int(matches.sum()), int(matches.size)
        level = claim.level / m
        low, high = stats.clopper_pearson(k, n, level)[0], stats.clopper_pearson(k, n, level / _REFUTING)[1]
        share = k / n if n else float("nan")
        sides = (("greater", m), ("less", m * _REFUTING))
        p_up, p_down = (
            float(min(1.0, tests * sps.binomtest(k, n, claim.bar, alternative=side).pvalue)) if n else 1.0
            for side, tests in sides
        )
        table = [[k, n - k], [k_c, n_c - k_c]]
        fisher = [min(1.0, tests * float(sps.fisher_exact(table, alternative=side)[1])) for side, tests in sides]
        over = share - (k_c / n_c if n_c else float("nan"))
        least = int(own.repeats[enough].min()) if n else 0
        conditions = (
            Condition("share that passes", share, low, high, claim.bar, p=p_up, p_refute=p_down),
            Condition(MATCHED, over, -np.inf, np.inf, 0.0, p=fisher[0], p_refute=fisher[1]),
            sources[head][0],
            Condition("repeats a feature", least, least, least, claim.bars["repeats a feature"]),
        )
        found[head] = row(
            claim,
            head,
            families,
            {"the selection": conditions},
            min(n_docs, claim.n),
            _fisher_power(n, n_c, k_c, claim.bar, level),
            detail=shown(layer, number)
            | {"passed": f"{k} of {n}", "matches passed": f"{k_c} of {n_c}"}
            | _behaviour_detail(layer, own, both, selection),
        )
    return found


def token_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D07.token: of the features that pass, the share that fire before few second occurrences of other tokens."""
    found = outside(claim, families)
    m = len(families.heads)
    level = claim.level / max(m, 1)
    for head in families.heads:
        layer, number = families.of(head)
        passed = layer.family(number)
        if not len(passed):
            found[head] = row(claim, head, families, undecided=NO_FAMILY)
            continue
        own, _, n_docs = layer.behaviours[number]
        rates = own.others[passed] / np.maximum(own.other_repeats[passed], 1)
        k, n = int((rates < claim.bars[OTHERS]).sum()), len(passed)
        p = [min(1.0, m * float(sps.binomtest(k, n, claim.bar, alternative=s).pvalue)) for s in ("greater", "less")]
        low, high = stats.clopper_pearson(k, n, level)
        condition = Condition("share that knows its token", k / n, low, high, claim.bar, p=p[0], p_refute=p[1])
        detail = shown(layer, number) | {
            "features": f"{k} of {n}",
            "fires before other tokens' second occurrence": {
                "mean": float(rates.mean()),
                "lowest": float(rates.min()),
                "highest": float(rates.max()),
            },
        }
        found[head] = row(claim, head, families, {"the family": (condition,)}, min(n_docs, claim.n), detail=detail)
    return found


def _fisher_power(n: int, n_c: int, k_c: int, share: float, level: float) -> float:
    """The chance that Fisher's test tells a pass rate of `share` from that of the matches."""
    if not n or not n_c:
        return float("nan")
    k = np.arange(n + 1)
    p = [float(sps.fisher_exact([[i, n - i], [k_c, n_c - k_c]], alternative="greater")[1]) for i in k.tolist()]
    return float(sps.binom.pmf(k, n, share)[np.asarray(p) <= level].sum())


def _behaviour_detail(layer: LayerFamilies, own: Behaviour, both: Behaviour, selection: Any) -> dict[str, Any]:
    def rate(part: np.ndarray, of: np.ndarray) -> float | None:
        return float(part.sum() / of.sum()) if of.sum() else None

    text, page = text_of(layer.target.tokenizer), neuronpedia(layer.dictionary)
    return {
        "fires before the second occurrence": rate(own.hits, own.repeats),
        "fires before the first occurrence": rate(own.firsts, own.repeats),
        "matches: before the second": rate(both.hits, both.repeats),
        "matches: before the first": rate(both.firsts, both.repeats),
        "features": [
            {"feature": int(f), "token": int(t), "text": text(int(t)), "share": float(s)}
            | {"hits": int(h), "firsts": int(x), "of": int(n)}
            | ({} if page is None else {"page": f"{page}/{int(f)}"})
            for f, t, s, h, x, n in zip(
                own.features, own.tokens, selection.shares, own.hits, own.firsts, own.repeats, strict=True
            )
        ][:50],
    }


def ablation_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D12: how much of the family's firing a head's ablation turns off."""

    def measure(layer: LayerFamilies, head: int) -> Measured:
        selection, passed, detail = family_of(layer, head)
        n, means = len(layer.documents), head_means(layer.found)
        if len(means) < 2:
            return Measured({}, (), n, detail=detail, undecided="the layer has one head: there is no other to put out")
        at, _ = firing(layer.observed, selection.features[passed])
        controls = selection.controls[passed]
        matched, _ = firing(layer.observed, np.unique(controls[controls >= 0]))
        if not len(at) or not len(matched):
            said = "no matched feature fires" if len(at) else NO_FAMILY
            return Measured({}, (), n, detail=detail, undecided=said)
        ones = by_document(at.value * 0 + 1, at.doc, n)
        zero = means[head] * 0

        def off(entries: Any, h: int, value: Any) -> Floats:
            return by_document(turned_off(layer, entries, h, value), entries.doc, n)

        by_mean, by_zero = off(at, head, means[head]), off(at, head, zero)
        others = {h: off(at, h, means[h]) for h in range(len(means)) if h != head}
        worst = max(others, key=lambda h: float(others[h].sum()))
        theirs, count = off(matched, head, means[head]), by_document(matched.value * 0 + 1, matched.doc, n)
        rates = {f"L{layer.layer}H{h}": float(value.sum() / ones.sum()) for h, value in others.items()}
        return Measured(
            {
                "turned off by mean ablation": (by_mean, ones),
                "turned off by zero ablation": (by_zero, ones),
                "over other heads": (by_mean - others[worst], ones),
                MATCHED: difference(by_mean, ones, theirs, count),
            },
            layer.documents.sources,
            n,
            detail=detail
            | {
                "firing rows": float(ones.sum()),
                "turned off by mean ablation of other heads": rates,
                "matched features turned off": float(theirs.sum() / count.sum()),
            },
            ranges={
                "turned off by mean ablation": (0.0, 1.0),
                "turned off by zero ablation": (0.0, 1.0),
                "over other heads": (-1.0, 1.0),
                MATCHED: (-1.0, 1.0),
            },
        )

    return per_head(claim, families, measure, headline="turned off by mean ablation", null=0.0)
