"""Candidates that were chosen on other sources are tested together, and pay for each other alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fra.claim import Claim, Outcome, judge
from fra.errors import FraError
from fra.statistics import stats
from fra.statistics.unseen import sources_for
from fra.verdicts.among import Among
from fra.verdicts.decide import Beside, Number, Sampled, decide

CLAIM = Claim(
    id="T04",
    title="A claim to test with",
    h0="E <= 0.5",
    condition="effect",
    bar=0.5,
    statistic="test/1",
    stimuli=("natural",),
    n=120,
)


def sample(means: list[float], n: int = 80, live: int | None = None) -> stats.ClusterMeans:
    """One candidate a mean; live in the first `live` documents alone."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.0, 0.2, (n, len(means)))
    rows = np.ones_like(values)
    rows[n if live is None else live :] = 0
    shown = rows[:, 0] > 0
    values = (values - values[shown].mean(0) + means) * rows
    return stats.ClusterMeans(values, rows, seed=1)


def verdict(m: stats.ClusterMeans | Number, chosen: np.ndarray | None, claim: Claim = CLAIM):
    column = Sampled(
        name="effect",
        samples={"L0H0": m},
        simultaneous=True,
        chosen=None if chosen is None else {"L0H0": chosen},
    )
    names = tuple(f"c{k}" for k in range(m.n_cand))
    return judge(claim, decide(claim, [column], {"L0H0": Beside(candidates=names)})["L0H0"])


def test_those_chosen_are_tested_as_if_they_were_all_and_the_rest_cannot_hold() -> None:
    m = sample([0.9, 0.9, 0.52, 0.1])
    chosen = np.array([True, False, True, False])
    own, few = Among(m, chosen), stats.ClusterMeans(m.sums[:, [0, 2]], m.counts[:, [0, 2]], seed=m.seed)
    for together in (True, False):
        np.testing.assert_array_equal(
            own.p_above(0.5, together), [few.p_above(0.5, together)[0], 1, few.p_above(0.5, together)[1], 1]
        )
        np.testing.assert_array_equal(own.p_below(0.5, together)[[1, 3]], [1, 1])
        np.testing.assert_array_equal(own.lower(0.05, together)[[0, 2]], few.lower(0.05, together))
        np.testing.assert_array_equal(own.upper(0.05, together)[[0, 2]], few.upper(0.05, together))
        assert (own.lower(0.05, together)[[1, 3]] == -np.inf).all()
        assert (own.upper(0.05, together)[[1, 3]] == np.inf).all()


def test_a_head_passes_by_one_that_was_chosen_and_never_by_another() -> None:
    m = sample([0.9] + [0.1] * 30)
    first = np.arange(m.n_cand) == 0
    assert verdict(m, first).outcome is Outcome.SUPPORTED
    assert verdict(m, ~first).outcome is Outcome.INCONCLUSIVE, (
        "what is large and was not chosen neither holds nor fails"
    )
    assert verdict(m, np.zeros(m.n_cand, dtype=bool)).outcome is Outcome.INCONCLUSIVE
    # 80 sources are too few for the floor of p over 31 candidates at 5 %, and enough for one
    assert sources_for(0.05, 31) > 80 > sources_for(0.05, 1)
    assert verdict(m, None).outcome is Outcome.INCONCLUSIVE


def test_those_not_chosen_refute_as_any_other_and_all_must_be_short() -> None:
    none = np.zeros(3, dtype=bool)
    assert verdict(sample([0.1, 0.0, 0.2]), none).outcome is Outcome.REFUTED
    assert verdict(sample([0.1, 0.0, 0.6]), none).outcome is Outcome.INCONCLUSIVE


def test_what_is_chosen_must_be_one_truth_value_a_candidate_of_a_sample_of_documents() -> None:
    m = sample([0.9, 0.1])
    with pytest.raises(FraError, match="one truth value for each of 2 candidates"):
        Among(m, np.array([True]))
    with pytest.raises(FraError, match="chosen among samples of documents alone"):
        verdict(Number(1.0), np.array([True]))


def test_a_row_that_too_few_sources_have_live_says_how_many_of_all_would_decide() -> None:
    """Live in 20 of 80 sources: four times as many as the floor of p asks live ones."""
    claim = replace(CLAIM, n=80)
    alone = verdict(sample([0.1], live=20), None, claim).decided
    several = verdict(sample([0.1, 0.1], live=20), None, claim).decided
    assert alone is not None and several is not None
    assert alone.needed == several.needed == 4 * sources_for(0.05, 1)
    above = verdict(sample([0.9, 0.9, 0.9], live=20), np.array([True, True, False]), claim).decided
    assert above is not None
    assert above.needed == 4 * sources_for(0.05, 2), "by Bonferroni over those chosen"
