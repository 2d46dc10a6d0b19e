"""The recorder and the replay behind FAMILIES.md, on samples whose answers are known (CLAIMS M01)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as sps
from statsmodels.stats.multitest import multipletests

from fra.claim import Claim, Evidence
from fra.errors import FraError
from fra.induction import status
from fra.induction.designs import TokenInduction
from fra.statistics import stats
from fra.statistics.stats import ClusterMeans
from fra.tests import calibration, rates, replay
from fra.tests.recorder import Recorder
from fra.tests.replay import Replay, as_recorded, at_far_end
from fra.tests.samples import Decision, Sample, load, load_all, save
from fra.tests.suite.test_verdict_plugin import suite  # noqa: F401
from fra.tests.together import Together
from fra.verdicts import decide as decider
from fra.verdicts import pooled
from fra.verdicts.decide import WHOLE, Number, Sampled, means_of
from fra.verdicts.samples import ByDocument, paired_evidence

CLAIM = Claim(
    id="X01",
    title="a claim",
    h0="E <= 0.5",
    bar=0.5,
    bars={"over a control": 0.1, "loss": 0.2},
    below=("loss",),
    statistic="made/1",
    stimuli=("made",),
    n=40,
)


def family(shape: str, heads: int, n_docs: int, seed: int, *, bar: float = 0.0, share: int = 1, n: int = 1) -> Decision:
    sums, counts, _ = calibration.sample(shape, n_docs, heads * n, np.random.default_rng(seed))
    samples = {(f"L0H{h}", ""): Sample(sums[:, h * n :][:, :n], counts[:, h * n :][:, :n]) for h in range(heads)}
    return Decision("X01", "effect", bar, 0.05, share, samples, n > 1)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(replay, "N_BOOT", 400)


def replayed(decision: Decision, draws: int, seed: int = 0) -> Replay:
    made = Replay([decision], draws)
    made.run(seed)
    return made


def at_most(k: int, n: int, rate: float) -> bool:
    return bool(sps.binomtest(k, n, rate, alternative="greater").pvalue > 1e-3)


@pytest.mark.parametrize("simultaneous", [False, True])
def test_a_part_of_many_samples_is_the_sample_by_itself_moved(simultaneous):
    rng = np.random.default_rng(0)
    several = [Sample(rng.exponential(1.0, (25, n)), np.ones((25, n))) for n in (1, 3, 2)]
    several[1].counts[:24, 1] = several[1].sums[:24, 1] = 0.0  # one live document: it cannot be tested
    together = Together(several, slice(None), seed=5, n_boot=499)
    for k, sample in enumerate(several):
        moved = np.linspace(0.3, 0.4, sample.sums.shape[1])
        own = ClusterMeans(sample.sums + moved * sample.counts, sample.counts, seed=5, n_boot=499)
        part = together.part(k, moved)
        np.testing.assert_allclose(part.estimate, own.estimate)
        np.testing.assert_allclose(part.se, own.se)
        for bar in (1.0, 1.3):
            np.testing.assert_array_equal(part.p_above(bar, simultaneous), own.p_above(bar, simultaneous))
            np.testing.assert_array_equal(part.p_below(bar, simultaneous), own.p_below(bar, simultaneous))
        np.testing.assert_allclose(part.lower(0.02, simultaneous), own.lower(0.02, simultaneous))
        np.testing.assert_allclose(part.upper(0.02, simultaneous), own.upper(0.02, simultaneous))
        found, expected = (stats.detectable(m, 0.02, simultaneous=simultaneous) for m in (part, own))
        np.testing.assert_allclose(found, expected)


def test_a_symmetric_family_errs_at_about_its_level_in_both_directions():
    counts = replayed(family("normal", 1, 120, 1), 200).counts[0]
    for wrong in (int(counts.above[0]), counts.below):
        assert at_most(wrong, 200, 0.05)
        assert wrong >= 1  # not right by never rejecting
    assert counts.covered / counts.draws > 0.9


def test_a_skewed_family_is_safe_above_and_held_below():
    counts = replayed(family("exponential, 30 % zeros", 6, 120, 2), 200).counts[0]
    assert counts.above[0] <= 0.04 * 200
    assert at_most(counts.below, 200, 0.05)


def test_a_document_unlike_all_others_is_missed_by_a_third_of_the_draws_and_refutes_wrongly():
    """The known limit (CALIBRATION.md, "one in ten large"): what a draw does not hold, no test can see."""
    sums = np.concatenate([np.random.default_rng(2).normal(0.0, 0.1, 39), [20.0]])[:, None]
    decision = Decision("X01", "effect", 0.0, 0.05, 1, {("L0H0", ""): Sample(sums, np.ones((40, 1)))})
    counts = replayed(decision, 100).counts[0]
    assert counts.below == pytest.approx(100 * (1 - 1 / 40) ** 40, abs=15)
    assert counts.heads_below.tolist() == [counts.below]


def test_the_replay_sees_a_test_that_errs_too_often(monkeypatch):
    decision = family("lognormal, 30 % zeros", 1, 20, 1)
    held = replayed(decision, 400).counts[0].below
    p, bound = stats.Tail.p, stats.Tail.bound
    monkeypatch.setattr(stats, "guarded", lambda s, n: (s, n))
    monkeypatch.setattr(stats.Tail, "p", lambda tail, bars, together, margins: p(tail, bars, together))
    monkeypatch.setattr(stats.Tail, "bound", lambda tail, levels, together, margins: bound(tail, levels, together))
    bare = replayed(decision, 400).counts[0].below
    assert at_most(held, 400, 0.05)
    assert not at_most(bare, 400, 0.05)


def test_power_is_what_detectable_says_and_grows():
    decision = family("normal", 4, 120, 4)
    counts = replayed(decision, 150).counts[0]
    for said, sample in zip(counts.detectable, decision.samples.values(), strict=True):
        own = stats.detectable(ClusterMeans(sample.sums, seed=1), 0.05 / 4, simultaneous=False)  # Holm's first step
        assert said == pytest.approx(float(own[0]), rel=0.1)
    half, one, two = (counts.power(k) for k in (0.5, 1.0, 2.0))
    assert half < 0.5
    assert one == pytest.approx(0.8, abs=0.07)
    assert two > 0.99
    assert counts.strength == pytest.approx(counts.detectable, rel=0.15)


def test_the_far_end_keeps_the_range_and_puts_the_mean_at_the_bar():
    rng = np.random.default_rng(6)
    rows = np.arange(1.0, 31)[:, None]
    sample = Sample(np.where(rows % 10 == 0, 0.05, 1.0) * rows, rows)  # moved down to 0.8, some would be negative
    draws = [at_far_end(sample, rng.integers(30, size=30), 0.8, (0.0, 1.0), rng) for _ in range(3_000)]
    values = np.concatenate([d.sums / d.counts for d in draws])
    assert values.min() >= 0 and values.max() <= 1
    assert sum(d.sums.sum() for d in draws) / sum(d.counts.sum() for d in draws) == pytest.approx(0.8, abs=0.01)
    decision = Decision("X01", "effect", 0.8, 0.05, 1, {("L0H0", ""): sample}, bounded=(0.0, 1.0))
    counts = replayed(decision, 100).counts[0]
    assert counts.far
    assert at_most(int(counts.above[0]), 100, 0.05)


def test_of_several_dictionaries_one_is_at_the_bar_at_a_time():
    """All at the bar at once, the largest p would hardly ever be small: a rate that flatters."""
    rng = np.random.default_rng(7)
    samples = {(WHOLE, f"hook {k}"): Sample(rng.normal(size=(120, 1)), np.ones((120, 1))) for k in range(3)}
    decision = Decision("X01", "effect", 0.0, 0.05, 3, samples)
    assert decision.nominal == 0.05
    counts = replayed(decision, 200).counts[0]
    assert counts.above.shape == (3,)
    assert all(4 <= k <= 20 for k in counts.above)
    assert at_most(counts.below, 200, 0.05)


def measured(rng: np.random.Generator, n: int = 30) -> ByDocument:
    names = ("effect", "over a control", "loss")
    rows = rng.integers(1, 5, n).astype(float)
    sums = {name: rows * rng.exponential(1.0, n) for name in names}
    return ByDocument(sums, dict.fromkeys(names, rows), [f"source-{d // 2}" for d in range(n)])


def test_the_recorder_keeps_what_was_asked_and_changes_no_number(tmp_path):
    rng = np.random.default_rng(9)
    heads = {f"L0H{k}": measured(rng) for k in range(3)}

    def run():
        return paired_evidence(CLAIM, "made", heads, heads)

    plain, functions = run(), (decider.corrected, stats.seed_of, Evidence.__post_init__)
    recorder = Recorder()
    with recorder.recording():
        assert decider.corrected is not functions[0]
        assert run() == plain
    assert (decider.corrected, stats.seed_of, Evidence.__post_init__) == functions
    found = {d.name: d for d in recorder.decisions()}
    assert {d.name: (d.claim, d.bar, d.level, d.share, d.judged) for d in found.values()} == {
        "effect": ("X01", 0.5, 0.05, 3, True),
        "over a control": ("X01", 0.1, 0.05, 3, True),
        "loss": ("X01", -0.2, 0.05, 3, True),  # below 0.2 is asked as above -0.2
    }
    for name, d in found.items():
        d = load(save(d, tmp_path))
        sign = -1 if name == "loss" else 1
        for (h, _), sample in d.samples.items():
            clusters = [np.unique(heads[h].sources).tolist().index(s) for s in heads[h].sources]
            np.testing.assert_allclose(
                sample.sums.ravel(), sign * np.bincount(clusters, heads[h].sums[name]), rtol=1e-12
            )
        again = as_recorded(d)
        raw = [ClusterMeans(x.sums, seed=x.seed, counts=x.counts).p_below(d.bar, False)[0] for x in d.samples.values()]
        holm = multipletests(np.minimum(1, 3 * np.array(raw)), 0.05, method="holm")[0]  # one of three that may refute
        for (h, _), refuted in zip(again, holm, strict=True):
            (own,) = [c for c in plain[h].candidates["every condition"] if c.name == name]
            assert again[h, ""][0].effect == sign * own.effect
            assert again[h, ""][0].fails(0.05) == refuted
    assert set(rates.by_claim(load_all(tmp_path))) == {"X01"}


def test_the_recorder_knows_every_kind_of_sample(tmp_path):
    rng = np.random.default_rng(10)
    recorder = Recorder()
    many = replace(CLAIM, condition="overlap", bars={"loss": 0.2, "share kept": 0.25, "fixed": 0.5}, below=("loss",))
    one = replace(CLAIM, bars={}, below=())
    with recorder.recording():
        sources, seeds = [f"s{k}" for k in range(20)], (CLAIM.digest, "made", "hook", "effect")
        overlaps = means_of(CLAIM, "made", "L0H0", "overlap", rng.normal(0.6, 0.01, 12))
        means = pooled.clustered(rng.normal(size=20), np.ones(20), sources, seeds)
        pooled.evidence(one, [pooled.ByDictionary("effect", {"a": means, "b": Number(0.7)})], {})
        columns = [
            Sampled(name="overlap", samples={"L0H0": overlaps}),
            Sampled(
                name="loss",
                samples={"L0H0": [means_of(CLAIM, "made", "L0H0", "loss", rng.random(20))] * 2},
                bounded=(0.0, 1.0),
            ),
            Sampled(name="share kept", samples={"L0H0": means}, shares={"L0H0": (1.0, 2.0)}),
            Sampled(name="fixed", samples={"L0H0": Number(1.0)}),
        ]
        decider.corrected(many, columns)
        means_of_heads = ClusterMeans(rng.normal(0.5, 0.1, (60, 3)), seed=stats.seed_of("made", "natural", "status"))
        assert [found[0] for found in status.classify(means_of_heads, TokenInduction())] == ["TIH"] * 3
    found = {d.name: load(save(d, tmp_path)) for d in recorder.decisions()}
    assert {name: (d.claim, d.bar, d.share, list(d.samples), d.judged) for name, d in found.items()} == {
        "effect": ("X01", 0.5, 2, [(WHOLE, "a"), (WHOLE, "b")], True),
        "overlap": ("X01", 0.5, 5, [("L0H0", "")], False),
        "loss": ("X01", -0.2, 5, [("L0H0", "0"), ("L0H0", "1")], False),
        "share kept": ("X01", 0.0, 5, [("L0H0", "")], False),
        "a TIH, natural": ("status", 0.2, 1, [(WHOLE, "")], True),
        "not a TIH, natural": ("status", -0.05, 1, [(WHOLE, "")], True),
    }
    assert found["loss"].bounded == (-1.0, 0.0)
    assert found["effect"].samples[WHOLE, "b"].sums.item() == 0.7
    assert list(found["effect"].members) == [(WHOLE, "a")]
    assert found["overlap"].samples["L0H0", ""].sums.mean() == pytest.approx(0.6, abs=0.05)


MADE = """
    import numpy as np
    import pytest
    from fra.claim import Claim

    CLAIM = Claim(id="T01", title="Heads do it", h0="E <= 1", bar=1.0, statistic="mean/1", stimuli=("made",), n=30)

    @pytest.fixture(scope="module")
    def evidence():
        from fra.verdicts.samples import ByDocument, mean_of, paired_evidence

        draw = np.random.default_rng(0).normal(1.5, 0.5, (8, 30))
        days = [str(d) for d in range(30)]
        heads = {f"L0H{k}": ByDocument(*mean_of({"effect": x}), days) for k, x in enumerate(draw)}
        return paired_evidence(CLAIM, "tiny", heads, heads)

    def test_heads(head, evidence, verdict):
        verdict(evidence.get(head))
"""


def test_the_plugin_keeps_samples_and_leaves_the_ledger_as_it_is(suite):  # noqa: F811
    suite.claims(heads=MADE)
    original = decider.corrected
    suite.run("--ledger", "plain.json", ret=0)
    suite.run("--ledger", "kept.json", "-p", "fra.tests.record", "--samples", "kept", ret=0)
    assert suite.rows("kept.json") == suite.rows("plain.json")
    assert decider.corrected is original
    (decision,) = load_all(suite.path / "kept")
    assert (decision.claim, decision.name, decision.bar, decision.judged) == ("T01", "effect", 1.0, True)
    assert list(decision.samples) == [(f"L0H{k}", "") for k in range(8)]
    assert all(sample.sums.shape == (30, 1) for sample in decision.samples.values())


def test_what_is_no_sample_is_refused(tmp_path):
    with pytest.raises(FraError, match="no recorded samples"):
        load_all(tmp_path)
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    with pytest.raises(FraError, match="is no recorded sample"):
        load_all(tmp_path)
