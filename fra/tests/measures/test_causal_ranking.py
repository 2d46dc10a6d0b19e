"""Single terms taken out of a forward pass (Q12): what was drawn, what its removal does, and what is expected of it."""

from __future__ import annotations

from math import ceil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import fra
from fra.claim import Outcome, judge
from fra.measures.pairs import q12_causal_ranking as cr
from fra.measures.pairs.designs import SingleTerms
from fra.statistics.unseen import sources_for
from fra.stimuli.padding import Texts
from fra.tests.claims import claim
from fra.tests.intervening import LAYER, hook_of
from fra.tests.models import random_tokens, tiny, tiny_sae

CLAIM = claim("Q12")
DESIGN = SingleTerms()


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_a_term_is_removed_at_its_own_entry_and_nowhere_else(kind: str) -> None:
    model, sae, tokens = tiny(kind), tiny_sae(hook_of(kind)), random_tokens(18, 3)
    terms = cr.measure_terms(model, sae, tokens, LAYER, np.random.default_rng(0), DESIGN)
    assert len(terms.head) == 8 and set(terms.head) == {0, 1, 2, 3}
    assert (terms.key <= terms.row).all() and (terms.row >= DESIGN.first_row).all()
    with torch.no_grad():
        plain = model(tokens[None])[0].double()
    for number, (head, row, key) in enumerate(zip(terms.head, terms.row, terms.key, strict=True)):
        i, j = terms.channel[number]
        at = torch.zeros(18, 18, dtype=torch.bool)
        at[row, key] = True
        place = {"layer": LAYER, "head": int(head), "dictionary": sae}
        with torch.no_grad(), fra.remove(model, [[int(i), int(j)]], **place, entries=at):
            after = model(tokens[None])[0].double()
        token = int(tokens[row + 1])
        loss = abs(float(after[row].log_softmax(-1)[token] - plain[row].log_softmax(-1)[token]))
        logit = (after[row] - after[row].mean() - plain[row] + plain[row].mean())[token]
        assert terms.changed[number, 0] == pytest.approx(loss, abs=2e-5)
        assert terms.changed[number, 1] == pytest.approx(abs(float(logit)), abs=2e-5)
        resolved = fra.resolve(model, sae, tokens, LAYER, int(head))
        F = float(resolved.channel(int(i), int(j))[row, key])
        A = float(resolved.frozen.pattern[0, head, row, key])
        assert terms.expected[number, 0] == pytest.approx(A * (1 - A) * abs(F), rel=1e-3, abs=1e-7)
        assert terms.expected[number, 1] == pytest.approx(abs(F), rel=1e-4, abs=1e-6)
    assert terms.changed[:, 0].max() > 1e-3


def test_the_verdict_is_about_rank_correlations_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    target: Any = SimpleNamespace(
        model=None, name="t", n_layers=2, n_heads=4, hook_for=str, dictionary_for=lambda layer: ("", None)
    )
    n = 2 * ceil(sources_for(CLAIM.level, 3) / 2)  # any of three conditions can refute
    documents = [random_tokens(18, seed) for seed in range(n)]
    texts = Texts.of(documents, [f"s{k}" for k in range(n)])

    def judged(noise: float, weighted: bool, of: Texts = texts) -> Any:
        def terms(
            model: Any, sae: Any, tokens: Any, layer: int, rng: np.random.Generator, design: SingleTerms
        ) -> cr.Terms:
            n = 24
            A, F, a = rng.uniform(size=n) ** 3, rng.exponential(size=n), rng.exponential(size=n)
            effect = (A if weighted else 1) * F * np.exp(noise * rng.normal(size=n))
            expected = np.stack([A * F, F, a], 1)
            zeros = np.zeros(n, dtype=np.int64)
            return cr.Terms(zeros, zeros, zeros, np.zeros((n, 2), dtype=np.int64), expected, np.stack([effect] * 3, 1))

        monkeypatch.setattr(cr, "measure_terms", terms)
        return judge(CLAIM, cr.ranking_evidence(CLAIM, target, of))

    assert judged(0.5, True).outcome is Outcome.SUPPORTED
    assert judged(0.5, False).outcome is Outcome.REFUTED  # the raw score does it
    assert judged(30.0, True).outcome is Outcome.REFUTED  # nothing does
    none: Any = SimpleNamespace(name="t", n_layers=0, n_heads=0)
    assert judge(CLAIM, cr.ranking_evidence(CLAIM, none, texts)).outcome is Outcome.CANNOT_RUN
    # two documents of each source count as one, and too few sources decide nothing
    twos = judged(0.5, True, Texts.of(documents, [f"s{k // 2}" for k in range(n)]))
    assert twos.evidence.n == n // 2 < CLAIM.min_sources and twos.outcome is Outcome.INCONCLUSIVE
    assert f"{n // 2} independent sources" in twos.reason


def test_correlations_are_taken_document_by_document() -> None:
    """Ranks within a document, against scipy; and the lead over the raw score is that of the same document."""
    rng = np.random.default_rng(0)
    rho = rng.uniform(-1, 1, (5, len(cr.PREDICTORS), len(cr.CHANGES)))
    found = cr.conditions(rho)
    assert list(found) == [CLAIM.condition, *CLAIM.bars]
    np.testing.assert_allclose(found["gain over the raw score"], rho[:, 0, 0] - rho[:, 1, 0])
    np.testing.assert_allclose(found["gain over activation alone"], rho[:, 0, 0] - rho[:, 2, 0])
    zeros = np.zeros(9, dtype=np.int64)
    parts = [cr.Terms(zeros, zeros, zeros, np.zeros((9, 2), dtype=np.int64), *rng.random((2, 9, 3))) for _ in range(2)]
    own = cr.rank_correlations(parts)
    expected = spearmanr(np.concatenate([p.expected[:, 1] for p in parts]), np.concatenate([p.loss for p in parts]))
    assert own[1, 0] == pytest.approx(expected.statistic)
