"""D07: features that an induction head makes are induction features, by what they do on planted documents."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats as sps

from fra.dictionaries.codes import neuronpedia
from fra.measures.families.families import Behaviour, Families, LayerFamilies, Selection
from fra.measures.families.rows import NO_FAMILY, about, outside, shown
from fra.targets.target import text_of
from fra.verdicts import stats
from fra.verdicts.bounds import MATCHED
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.conditions import exact
from fra.verdicts.decide import Beside, Given, Sampled, decide, means_of

OTHERS = "fires before other tokens"
SHARE, SOURCE, REPEATS = "share that passes", "source is the earlier token", "repeats a feature"
_REFUTING = 3
"""Conditions of D07 any one of which may refute: the share that passes, the matches, the source."""


def behaviour_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D07: the share of the selection that passes, against the matches, with the source of what fired.

    The unit of the pass rate is the feature (Clopper-Pearson; Fisher exact against the matches); that of the source is
    the document. Bonferroni over the heads, and where a condition may refute over the three that may.
    """
    found = outside(claim, families)
    m = len(families.heads)
    level = claim.level / max(m, 1)
    sources: dict[str, stats.ClusterMeans] = {}
    given: dict[str, dict[str, list[Condition]]] = {SHARE: {}, MATCHED: {}, REPEATS: {}}
    rows: dict[str, Beside] = {}
    for head in families.heads:
        families.progress(f"{claim.id}: {head}")
        layer, number = families.of(head)
        selection = layer.selections[number]
        if number not in layer.behaviours:
            said = "no feature draws 60 % of its attribution from the head"
            found[head] = Evidence(claim=claim, head=head, undecided=said, detail=about(families, head))
            continue
        own, both, n_docs = layer.behaviours[number]
        sourced, hits = (part.sum(0)[:, None] for part in (own.sourced_by_document, own.hits_by_document))
        sources[head] = means_of(claim, families.target, head, SOURCE, sourced, hits)
        enough = own.repeats > claim.bars[REPEATS]
        k, n = int((own.passes & enough).sum()), int(enough.sum())
        matches = both.passes.reshape(-1, 2).any(1)
        k_c, n_c = int(matches.sum()), int(matches.size)
        low, high = stats.clopper_pearson(k, n, level)[0], stats.clopper_pearson(k, n, level / _REFUTING)[1]
        share = k / n if n else float("nan")
        sides = (("greater", m), ("less", m * _REFUTING))
        p_up, p_down = (
            float(min(1.0, tests * sps.binomtest(k, n, claim.bar, alternative=side).pvalue)) if n else 1.0
            for side, tests in sides
        )
        table = [[k, n - k], [k_c, n_c - k_c]]
        more, less = (min(1.0, tests * float(sps.fisher_exact(table, alternative=side)[1])) for side, tests in sides)
        over = share - (k_c / n_c if n_c else float("nan"))
        least = int(own.repeats[enough].min()) if n else 0
        given[SHARE][head] = [Condition(SHARE, share, low, high, claim.bar, p=p_up, p_refute=p_down)]
        given[MATCHED][head] = [Condition(MATCHED, over, -np.inf, np.inf, 0.0, p=more, p_refute=less)]
        given[REPEATS][head] = [exact(REPEATS, least, claim.bars[REPEATS])]
        rows[head] = Beside(
            n=min(n_docs, claim.n),
            candidates=("the selection",),
            power=fisher_power(n, n_c, k_c, claim.bar, level),
            detail=shown(layer, number)
            | {"passed": f"{k} of {n}", "matches passed": f"{k_c} of {n_c}"}
            | _behaviour_detail(layer, own, both, selection)
            | about(families, head),
        )
    columns: list[Sampled | Given] = [
        Given(SHARE, given[SHARE], refutes=True),
        Given(MATCHED, given[MATCHED], refutes=True),
        Sampled(name=SOURCE, samples=sources, bounded=(0.0, 1.0)),
        Given(REPEATS, given[REPEATS]),
    ]
    return found | decide(claim, columns, rows, q_over=())


def token_evidence(claim: Claim, families: Families) -> dict[str, Evidence]:
    """D07.token: of the features that pass, the share that fire before few second occurrences of other tokens."""
    found = outside(claim, families)
    m = len(families.heads)
    for head in families.heads:
        layer, number = families.of(head)
        passed = layer.family(number)
        if not len(passed):
            found[head] = Evidence(claim=claim, head=head, undecided=NO_FAMILY, detail=about(families, head))
            continue
        own, _, n_docs = layer.behaviours[number]
        rates = own.others[passed] / np.maximum(own.other_repeats[passed], 1)
        k, n = int((rates < claim.bars[OTHERS]).sum()), len(passed)
        p = [min(1.0, m * float(sps.binomtest(k, n, claim.bar, alternative=s).pvalue)) for s in ("greater", "less")]
        low, high = stats.clopper_pearson(k, n, claim.level / m)
        condition = Condition("share that knows its token", k / n, low, high, claim.bar, p=p[0], p_refute=p[1])
        detail = shown(layer, number) | {
            "features": f"{k} of {n}",
            "fires before other tokens' second occurrence": {
                "mean": float(rates.mean()),
                "lowest": float(rates.min()),
                "highest": float(rates.max()),
            },
        }
        found[head] = Evidence(
            claim=claim,
            head=head,
            candidates={"the family": (condition,)},
            n=min(n_docs, claim.n),
            detail=detail | about(families, head),
        )
    return found


def fisher_power(n: int, n_c: int, k_c: int, share: float, level: float) -> float:
    """The chance that Fisher's test tells a pass rate of `share` from that of the matches."""
    if not n or not n_c:
        return float("nan")
    k = np.arange(n + 1)
    p = [float(sps.fisher_exact([[i, n - i], [k_c, n_c - k_c]], alternative="greater")[1]) for i in k.tolist()]
    return float(sps.binom.pmf(k, n, share)[np.asarray(p) <= level].sum())


def _behaviour_detail(layer: LayerFamilies, own: Behaviour, both: Behaviour, selection: Selection) -> dict[str, Any]:
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
