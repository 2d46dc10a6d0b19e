"""D07: features that an induction head makes are induction features, by what they do on planted documents."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats as sps

from fra.dictionaries.codes import neuronpedia
from fra.measures.families.families import Behaviour, Families, LayerFamilies
from fra.measures.families.rows import NO_FAMILY, outside, row, shown
from fra.targets.target import text_of
from fra.verdicts import stats
from fra.verdicts.bounds import MATCHED, columns_tested
from fra.verdicts.claim import Claim, Condition, Evidence
from fra.verdicts.stats import Floats

OTHERS = "fires before other tokens"


SOURCE = "source is the earlier token"


_REFUTING = 3
"""Conditions of D07 any one of which may refute: the share that passes, the matches, the source."""


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
