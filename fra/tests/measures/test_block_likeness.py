"""Features of block-diagonal dictionaries that are like others: matches across heads (B05), likeness in one (B06)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as sps

from fra.claim import Outcome, judge
from fra.dictionaries.blockdiag import BlockDiagonalSAE, BlockDiagonalSAEConfig
from fra.measures.block_diagonal import b05_likeness, b06_alikeness
from fra.measures.block_diagonal.crossed import over_runs
from fra.measures.block_diagonal.designs import Study
from fra.measures.block_diagonal.frontier import study
from fra.statistics import stats
from fra.targets.target import Target
from fra.tests.models import D_MODEL
from fra.tests.studies import D_HEAD, DENSE, HEADS, PlantedFrontier, claim, study_target
from fra.tests.tiny_targets import HEAD_OUTPUT


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return study_target(tmp_path_factory.mktemp("study"))


def test_jaccard_is_that_of_sets() -> None:
    live = (torch.rand(5, 7, 6, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    found = b05_likeness.jaccard(live, live)
    at_ = [{(d, t) for d in range(5) for t in range(7) if live[d, t, f]} for f in range(6)]
    for i in range(6):
        for j in range(6):
            assert float(found[i, j]) == pytest.approx(len(at_[i] & at_[j]) / len(at_[i] | at_[j]))


class Twins(PlantedFrontier):
    """Head outputs of 60 + 60 documents; head 1 fires as head 0 does, on `share` of its features. Codes are the
    signs of the axes. `measured`: the seed of the measured documents.
    """

    def __init__(self, share: float, measured: int = 1) -> None:
        super().__init__({"block-width": DENSE, "dense": DENSE})
        generator = torch.Generator().manual_seed(1)
        self.n_heads, self.hook, self.model = HEADS, HEAD_OUTPUT, None
        z = (torch.rand(120, 30, HEADS, D_HEAD, generator=generator) < 0.1).float()
        if measured != 1:
            again = torch.Generator().manual_seed(measured)
            z[60:] = (torch.rand(60, 30, HEADS, D_HEAD, generator=again) < 0.1).float()
        twins = int(share * D_HEAD)
        z[:, :, 1, :twins] = z[:, :, 0, :twins]
        self._z, self.selection_sources = z, self.sources
        self.selection, self.measured = list(torch.arange(60)), list(torch.arange(60, 120))
        sae = BlockDiagonalSAE(BlockDiagonalSAEConfig(d_in=D_MODEL, d_sae=D_MODEL, n_heads=HEADS, activation="relu"))
        with torch.no_grad():
            sae.W_enc_blocks.copy_(torch.eye(D_HEAD).expand(HEADS, -1, -1))
            sae.W_dec_blocks.copy_(torch.eye(D_HEAD).expand(HEADS, -1, -1))
        either = BlockDiagonalSAE(BlockDiagonalSAEConfig(d_in=D_MODEL, d_sae=D_MODEL, n_heads=1, activation="relu"))
        with torch.no_grad():
            either.W_enc_blocks.copy_(torch.eye(D_MODEL)[None])
            either.W_dec_blocks.copy_(torch.eye(D_MODEL)[None])
        self.target.study = lambda arm, run=0: [sae if arm == "block-width" else either]  # type: ignore[method-assign]

    def head_outputs(self, documents: Any) -> list[torch.Tensor]:
        return [self._z[int(d)] for d in documents]


def test_twins_in_other_heads_are_found_and_only_they() -> None:
    c = claim("B05")
    for share, outcome in ((1.0, "SUPPORTED"), (0.0, "REFUTED")):
        found = b05_likeness.redundancy_evidence(c, Twins(share))
        assert judge(c, found).outcome == outcome, found.candidates
        (condition,) = found.candidates["best match in another head"]
        # All features of heads 0 and 1 are twins: half of the layer matches to 1, the rest by chance.
        assert condition.effect == pytest.approx(
            0.5 * share * (1 - found.detail["the same in shuffled sequences"]), abs=0.03
        )
        assert found.detail["share with a match"]["estimate"] == 0.5 * share


def test_a_dense_feature_that_covers_a_set() -> None:
    c = claim("B05.dense")
    found = b05_likeness.covering_evidence(c, Twins(1.0))
    assert judge(c, found).outcome == "INCONCLUSIVE"  # eight sets, ten are needed
    twins = Twins(1.0)
    twins._z[:, :, 3] = twins._z[:, :, 2]
    twins._z *= torch.rand(twins._z.shape, generator=torch.Generator().manual_seed(2)) < 0.9
    found = b05_likeness.covering_evidence(c, twins)
    assert found.detail["sets"] == 2 * D_HEAD
    assert judge(c, found).outcome == "SUPPORTED"
    # One of two twins fires in 0.99 of their places, and each of the dense dictionary's features in 0.9.
    assert found.candidates["best dense feature"][0].effect == pytest.approx(0.9 / 0.99, abs=0.02)


def test_sequences_are_shuffled_between_sources() -> None:
    names = [str(k // 2) for k in range(60)]
    some = b05_likeness.Activations(torch.zeros(60, 2, 1), torch.ones(60, 2, dtype=torch.bool), names)
    for seed in range(10):
        rolls = some.rolls(seed, 20)
        assert len(set(rolls)) == 20
        assert not any(a == b for r in rolls for a, b in zip(names, np.roll(names, r), strict=True))
    assert some.rolls(0, 20) != some.rolls(1, 20)


def test_without_sources_to_shuffle_nothing_is_said() -> None:
    c, twins = claim("B05", min_sources=1), Twins(1.0)
    twins.sources = twins.selection_sources = ["one"] * 30 + ["two"] * 30
    found = b05_likeness.redundancy_evidence(c, twins)
    assert "can be paired in 1 ways, 20 are needed" in judge(c, found).reason


def test_partners_are_chosen_without_the_measured_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, ...]] = []
    whole = b05_likeness.match

    def seen(*args: Any) -> b05_likeness.Matches:
        found = whole(*args)
        chosen.append(tuple(found.partner.tolist()))
        return found

    monkeypatch.setattr(b05_likeness, "match", seen)
    twins = []
    for measured in (1, 9):
        made = Twins(0.5, measured)
        made._z[:, :, 3] = made._z[:, :, 2]  # sets enough
        made._z *= torch.rand(made._z.shape, generator=torch.Generator().manual_seed(2)) < 0.9  # none covers all
        twins.append(made)
    for search, id in ((b05_likeness.redundancy_evidence, "B05"), (b05_likeness.covering_evidence, "B05.dense")):
        c, effects = claim(id), []
        for made in twins:
            chosen.append(())
            effects.append(next(iter(search(c, made).candidates.values()))[0].effect)
        assert effects[0] != effects[1]
    parts = " ".join(str(hash(each)) if each else "|" for each in chosen).split("|")[1:]
    assert parts[0].split() == parts[1].split() and len(parts[0].split()) == 3 * 21
    assert parts[2].split() == parts[3].split() and len(parts[2].split()) == 3 * 21


def test_in_a_shuffle_documents_lie_beside_others_in_both_halves() -> None:
    sel, meas = b05_likeness.activations(twins := Twins(1.0), twins.target.study("block-width")[0])
    own = (sel.live[..., :6], meas.live[..., :6])
    allowed = torch.ones(6, sel.live.shape[-1], dtype=torch.bool)
    found = b05_likeness.shuffled(sel, meas, own, (sel.live, meas.live), allowed, 4, 3)
    rolls = sel.rolls(stats.seed_of("4", "selection"), 3), meas.rolls(4, 3)
    for each, r, q in zip(found, *rolls, strict=True):
        assert torch.equal(each.partner, b05_likeness.jaccard(own[0], sel.live.roll(r, 0)).argmax(1))
        for f, partner in enumerate(each.partner.tolist()):
            for d in (0, 7, 59):
                both = sum(float(meas.live[d, t, f] * meas.live[d - q, t, partner]) for t in range(29))
                assert each.both[d, f] == both


def test_the_excess_varies_as_both_of_its_parts_do() -> None:
    """Against resampled documents: partners stay, the Jaccards of both searches are counted anew."""
    c, twins = claim("B05"), Twins(0.0)
    run = b05_likeness.redundancy(c, twins, twins.target.study("block-width")[0], 0)
    assert run is not None and len(run.null) == 20
    run = dataclasses.replace(run, null=run.null[:1])  # as noisy as what it is taken from
    sums, counts = run.excess()
    crossed = over_runs([run.excess()], twins.sources, seed=0, n_boot=199)
    rng, drawn = np.random.default_rng(0), []

    def value(w: np.ndarray) -> float:
        own, either = w @ run.m.both, w @ run.m.either
        null = np.mean([(w @ each.both) / np.maximum(w @ each.either, 1) for each in run.null], axis=0)
        return float(((own / either - null) * either * run.m.weight).sum() / (either * run.m.weight).sum())

    assert sums.sum() / counts.sum() == pytest.approx(value(np.ones(60)))
    drawn = [value(rng.multinomial(60, np.full(60, 1 / 60))) for _ in range(4_000)]
    assert crossed.sources.se[0] == pytest.approx(np.std(drawn), rel=0.06)


def _profiles(alike: float, seed: int = 0) -> b06_alikeness.Profiles:
    """Eight heads of 40 features; those of head h lean to a direction of its own for a share `alike` of them."""
    rng = np.random.default_rng(seed)
    own = np.repeat(np.arange(8), 40)
    centres = rng.normal(size=(8, 24))
    which = np.where(rng.random(320) < alike, own, rng.integers(0, 8, 320))
    direction = centres[which] + rng.normal(size=(320, 24))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return b06_alikeness.Profiles(direction, direction + 0.1 * rng.normal(size=(30, 320, 24)), own)


@pytest.mark.parametrize(("alike", "outcome"), [(1.0, "SUPPORTED"), (0.0, "REFUTED")])
def test_heads_that_keep_to_one_kind_of_token(monkeypatch: pytest.MonkeyPatch, alike: float, outcome: str) -> None:
    monkeypatch.setattr(b06_alikeness, "profiles", lambda *_: _profiles(alike))
    planted = PlantedFrontier({})
    planted.hook, planted.target.n_heads = HEAD_OUTPUT, 8  # type: ignore[misc]
    planted.target.study = lambda arm, run: [None]  # type: ignore[method-assign]
    c = claim("B06")
    found = b06_alikeness.alikeness_evidence(c, planted)
    said = [judge(c, evidence).outcome for evidence in found.values()]
    assert len(said) == 8
    assert said.count(Outcome(outcome)) >= 7, said
    random = [evidence.detail["random heads"]["mean"] for evidence in found.values()]
    assert np.mean(random) == pytest.approx(0.5, abs=0.05)
    for evidence in found.values():
        assert evidence.n == 30 and len(evidence.detail["share unlike the rest, by training run"]) == 3
        if outcome == "SUPPORTED":  # a rank that holds needs more draws than one head alone would
            assert evidence.detail["draws of the nulls"] > 8 / 0.05
        else:
            assert int(evidence.detail["planted at the bars and found"].removesuffix(" of 100")) >= 97
            assert evidence.power is not None and 0.9 < evidence.power < 1


def test_margin_is_to_the_other_members_against_the_rest() -> None:
    found, members = _profiles(0.5), np.arange(40)
    margin = b06_alikeness.margins(found, members)
    others = [m for m in members if m != 3]
    rest = [m for m in range(320) if m not in members]
    towards = found.direction[others].mean(0) - found.direction[rest].mean(0)
    assert margin[7, 3] == pytest.approx(found.leaning[7, 3] @ towards)


def test_a_share_of_features_has_bounds_that_its_p_values_invert() -> None:
    rng = np.random.default_rng(2)
    for _ in range(6):
        margin = rng.normal(0.3, 1.0, (25, 40)) + rng.normal(0.0, 0.4, 40)
        sample = b06_alikeness.ShareDraws(margin, 7, 499)
        assert sample.estimate == (margin.sum(0) <= 0).mean()
        beyond_doubt = sps.ttest_1samp(margin, 0.0, alternative="less").pvalue * 40
        assert sample.lower(0.05)[0] == (beyond_doubt <= 0.05).mean()
        for level in (0.0001, 0.005, 0.05, 0.4):
            low, high = sample.lower(level)[0], sample.upper(level)[0]
            assert low <= sample.estimate <= high
            for bar in np.arange(41) / 40:  # where a share can be, too
                assert (sample.p_above(bar)[0] <= level) == (low > bar)
                assert (sample.p_below(bar)[0] <= level) == (high < bar)


def test_planted_heads_are_asked_every_condition() -> None:
    """Nobody is told from random heads where all heads are alike, and a share is never below an impossible bar."""
    found, names = _profiles(1.0), {h: f"L1H{h}" for h in range(8)}
    c = claim("B06")
    assert b06_alikeness.LayerFeatures(c, "planted", found, names).planted("L1H2").found >= 97
    impossible = dataclasses.replace(c, bar=-1.0)
    assert b06_alikeness.LayerFeatures(impossible, "planted", found, names).planted("L1H2").found == 0
    same = dataclasses.replace(found, direction=np.ones_like(found.direction), leaning=np.ones_like(found.leaning))
    assert b06_alikeness.LayerFeatures(c, "planted", same, names).planted("L1H2").found == 0


def test_noise_alone_refutes_no_head() -> None:
    """A quarter of the features is unlike, and most are lost in noise, which makes half of these seem unlike."""
    rng, n, level = np.random.default_rng(0), 44, 0.05
    refuted, estimates = 0, []
    for k in range(200):
        mean = np.abs(rng.normal(0, 0.3, n)) * np.repeat([-1.0, 1.0], [11, 33])
        noise = rng.normal(0, 3.0, (60, n))
        sample = b06_alikeness.ShareDraws(mean + noise, k, 99)
        estimates.append(sample.estimate)
        refuted += sample.p_above(0.25)[0] <= level
        doubt = n * np.sort(sps.ttest_1samp(mean + noise, 0, alternative="less").pvalue)
        assert sample.p_above(0.25)[0] == pytest.approx(min(1.0, doubt[11]), rel=1e-9)  # the twelfth of 44
    assert np.mean(estimates) > 0.3  # a percentile of resampled shares would refute most of them
    assert refuted / 200 <= 1.5 * level


def test_random_heads_are_drawn_anew_and_by_their_number_alone() -> None:
    names = {h: f"L1H{h}" for h in range(8)}
    layer, again = (b06_alikeness.LayerFeatures(claim("B06"), "planted", _profiles(0.5), names) for _ in range(2))
    drawn = [layer.random("L1H2", k) for k in range(40)]
    assert [again.random("L1H2", k) for k in reversed(range(40))] == drawn[::-1]
    assert len(set(drawn)) > 5 and drawn != [layer.random("L1H3", k) for k in range(40)]
    rng = np.random.default_rng(stats.seed_of(layer.claim.digest, "planted", "L1H2", "random", "5"))
    members = rng.choice(320, 40, replace=False)
    assert drawn[5] == (b06_alikeness.margins(_profiles(0.5), members).sum(0) <= 0).mean()


def test_directions_are_those_of_the_selection(target: Target) -> None:
    measured = study(target, Study(documents=12))
    assert measured is not None
    sae = target.study("block-width")[2]
    one = b06_alikeness.profiles(measured, sae, 20)
    chosen, seen = measured.outputs
    measured.__dict__["outputs"] = (chosen, [z.flip(0) for z in seen])
    other = b06_alikeness.profiles(measured, sae, 20)
    assert np.array_equal(one.direction, other.direction) and np.array_equal(one.owner, other.owner)
    assert not np.allclose(one.leaning, other.leaning)


def test_sparsity_is_that_of_the_selection(target: Target) -> None:
    measured, other = (study(target, Study(documents=12)) for _ in range(2))
    assert measured is not None and other is not None
    other.measured = [torch.cat([t[:1], t[1:].flip(0)]) for t in other.measured]
    for one, two in zip(measured.points("block-width"), other.points("block-width"), strict=True):
        assert np.array_equal(one.l0, two.l0) and np.array_equal(one.explained, two.explained)
        assert not np.allclose(one.loss, two.loss)


def test_profile_is_the_mean_embedding_where_a_feature_fires(target: Target) -> None:
    measured = study(target, Study(documents=12))
    assert measured is not None
    sae = target.study("block-width")[2]
    found = b06_alikeness.profiles(measured, sae, 20)
    table = target.model.W_E.detach()
    tokens = [t[1:] for t in measured.selection]
    mean = torch.cat([table[t] for t in tokens]).mean(0)
    acts = [sae.encode(z[1:]) for z in measured.head_outputs(measured.selection)]
    alive = [f for f in range(sae.cfg.d_sae) if sum(int((a[:, f] > 0).sum()) for a in acts) >= 20]
    f = alive[3]
    total = torch.zeros_like(mean)
    for a, t in zip(acts, tokens, strict=True):
        for pos in range(len(t)):
            e = table[t[pos]] - mean
            total += a[pos, f].detach() * e / e.norm()
    assert found.direction[3] == pytest.approx((total / total.norm()).numpy(), abs=1e-5)
    assert len(found.owner) == len(alive)
