"""What the claims about block-diagonal dictionaries rest on: frontiers, matches across heads, likeness within one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from scipy import stats as sps

import fra
from fra import frontiers
from fra.claim import Claim, Outcome, judge
from fra.dictionaries.blockdiag import BlockDiagonalSAE, BlockDiagonalSAEConfig
from fra.errors import FraError
from fra.measures.block_diagonal import b01_b02_blocks, b05_likeness, b06_alikeness, frontier
from fra.measures.block_diagonal.b03_b04_b07_compare import at, compare, exchange_rates, shared_l0
from fra.measures.block_diagonal.crossed import Crossed, over_runs
from fra.measures.block_diagonal.designs import ComparedArms, Study
from fra.measures.block_diagonal.frontier import Frontier, Point, study
from fra.statistics import stats
from fra.targets.target import Target
from fra.tests.claims import claim as declared
from fra.tests.models import D_MODEL, build_sae, model_folder
from fra.tests.tiny_targets import HEAD_OUTPUT, refused, write_target, write_text

HEADS, D_HEAD = 4, D_MODEL // 4
TEXTS = {f"{s}-{k}": f"{w} and {v} make more than {w}, said {v}. " * (2 + k) for k in range(3) for s, w, v in
         (("a", "one", "two"), ("b", "three", "four"), ("c", "five", "six"), ("d", "seven", "one"))}  # fmt: skip


def claim(name: str = "B03.width", **options: Any) -> Claim:
    """A claim with its bars, on few documents."""
    return declared(name, **{"min_sources": 5, **options})


def block_folder(folder: Path, seed: int = 0, **options: Any) -> Path:
    torch.manual_seed(seed)
    metadata = SAEMetadata(hook_name=HEAD_OUTPUT, model_name="tiny")
    config = {"d_in": D_MODEL, "d_sae": 2 * D_MODEL, "n_heads": HEADS, "reshape_activations": "hook_z"}
    BlockDiagonalSAE(
        BlockDiagonalSAEConfig(**config, **options, metadata=metadata, rescale_acts_by_decoder_norm=True)
    ).save_model(folder)
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A random model with a study of random dictionaries of head outputs."""
    folder = tmp_path_factory.mktemp("study")
    text = write_text(folder / "text", TEXTS)
    file = write_target(folder, model_folder("gpt2"), {}, text)
    arms = {"block-width": [block_folder(folder / f"b{k}", k=k) for k in (1, 2, 4)]}
    arms["dense"] = [
        build_sae("topk", D_MODEL, HEAD_OUTPUT, folder / f"d{k}", k=k, reshape_activations="hook_z") for k in (3, 9)
    ]
    with file.open("a") as out:
        for arm, paths in arms.items():
            for path in paths:
                out.write(f'[[study]]\narm = "{arm}"\nhook = "{HEAD_OUTPUT}"\npath = "{path.name}"\n')
    return fra.load_target(file)


def test_losses_are_those_of_the_model_with_the_reconstruction_in_place(target: Target) -> None:
    measured = study(target, Study(documents=12))
    assert measured is not None
    sae = target.study("block-width")[1]
    point = [p for p in measured.points("block-width") if p.weights][1]
    for d, tokens in enumerate(measured.measured):

        def put(z: torch.Tensor, hook: Any) -> torch.Tensor:
            return sae(z.reshape(*z.shape[:2], HEADS, D_HEAD)).reshape(z.shape)

        for replace, found in ((None, measured.clean[d]), (put, point.loss[d])):
            hooks = [] if replace is None else [(HEAD_OUTPUT, replace)]
            logits = target.model.run_with_hooks(tokens[None], fwd_hooks=hooks)[0].detach()
            expected = -sum(float(logits[t].log_softmax(-1)[tokens[t + 1]]) for t in range(len(tokens) - 1))
            assert found == pytest.approx(expected, rel=1e-5)
    acts = torch.cat([sae.encode(z[1:]) for z in measured.head_outputs(measured.selection)])
    live = (acts > 0).float().mean(0).view(HEADS, -1).sum(1)
    assert point.l0 == pytest.approx(live.numpy())
    assert {len(s) for s in (measured.selection, measured.measured)} == {6}
    assert not {*measured.selection_sources} & {*measured.sources}


@torch.no_grad()
def test_one_head_at_a_time_is_what_the_model_loses_by_it(target: Target) -> None:
    measured = study(target, Study(documents=12))
    assert measured is not None
    sae = target.study("dense")[1]
    mine, zero = measured.by_head(sae), measured.by_head(None)
    for head in (0, 2):
        lost = np.zeros(2)
        for tokens in measured.measured:

            def put(z: Any, hook: Any, whole: bool, head: int = head) -> Any:
                other = z.clone().reshape(*z.shape[:2], HEADS, -1)
                given = sae(other).reshape(other.shape) if whole else torch.zeros_like(other)
                other[:, :, head] = given[:, :, head]
                return other.reshape(z.shape)

            clean = -target.model(tokens[None])[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]).sum()
            for k, whole in enumerate((True, False)):
                hooks = [(HEAD_OUTPUT, lambda z, hook, whole=whole: put(z, hook, whole))]
                out = target.model.run_with_hooks(tokens[None], fwd_hooks=hooks)
                lost[k] += float(-out[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]).sum() - clean)
        assert [mine[head], zero[head]] == pytest.approx(lost / measured.n_tokens, abs=1e-5)
    found = frontiers.table(measured)
    assert list(found.columns) == list(frontiers.COLUMNS) and len(found) == 5 * (1 + HEADS)
    row = found[(found.arm == "dense") & (found.point == 2) & (found["head"] == "H2")].iloc[0]
    assert row["cost"] == pytest.approx(mine[2]) and row["cost at zero"] == pytest.approx(zero[2])
    assert np.isnan(row["loss recovered"]) or row["loss recovered"] == pytest.approx(1 - mine[2] / zero[2])


def test_frontiers_of_a_target_without_a_study_are_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_target(tmp_path, model_folder("gpt2"), {}, write_text(tmp_path / "text", TEXTS))
    assert frontiers.main([str(file), "-o", str(tmp_path / "x.csv"), "--documents", "6"]) == 2
    assert "no study" in capsys.readouterr().err and not (tmp_path / "x.csv").exists()


def test_no_source_is_in_both_halves() -> None:
    names = ["a", "b", "a", "c", "b", "d", "d", "a"]
    first, second = frontier.halves(names)
    assert sorted(first + second) == list(range(8))
    assert {names[k] for k in first} == {"a", "c"} and {names[k] for k in second} == {"b", "d"}


def test_training_runs_of_a_target_are_told_apart(target: Target, tmp_path: Path) -> None:
    assert target.runs("dense") == [0] and target.runs("block-l1") == []
    file = write_target(tmp_path, model_folder("gpt2"), {}, write_text(tmp_path / "text", TEXTS))
    with file.open("a") as out:
        for run in (2, 0, 1):
            for k in (1, 2, 4):
                path = block_folder(tmp_path / f"b{run}{k}", seed=run, k=k)
                out.write(f'[[study]]\narm = "block-width"\nhook = "{HEAD_OUTPUT}"\n')
                out.write(f'path = "{path.name}"\nrun = {run}\n')
    made = fra.load_target(file)
    assert made.runs("block-width") == [0, 1, 2]
    weights = [[sae.W_dec_blocks.detach() for sae in made.study("block-width", run)] for run in range(3)]
    assert [len(own) for own in weights] == [3, 3, 3]
    assert not torch.equal(weights[0][1], weights[1][1]) and not torch.equal(weights[1][1], weights[2][1])
    measured = study(made, Study(documents=12))
    assert measured is not None
    own = claim("B03.width", n=12, min_sources=2, gates={"the control arm recovers": -1e9})
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(measured, "gap", np.full(6, 100.0), raising=False)
        found = compare(own, measured, "block-width", "block-width", control="block-width")
    assert found.undecided is None and found.detail["training runs"] == 3
    assert {(row["run"], row["arm"]) for row in found.detail["frontier"]} == {(k, "block-width") for k in range(3)}
    losses = [[point.loss for point in measured.points("block-width", run)] for run in range(3)]
    assert not np.allclose(losses[0], losses[1])


def test_a_passage_read_twice(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FraError, match="too short a context or text"):
        study(target, Study(documents=6), "repeated_natural")
    monkeypatch.setattr(target.model.cfg, "n_ctx", 64)
    measured = study(target, Study(documents=6), "repeated_natural")
    assert measured is not None
    for tokens in measured.measured:
        half = (len(tokens) - 1) // 2
        assert len(tokens) == 1 + 2 * half
        assert torch.equal(tokens[1 : 1 + half], tokens[1 + half :])
    with pytest.raises(FraError, match="no stimulus 'other'"):
        study(target, Study(documents=6), "other")


def test_a_dense_feature_counts_for_the_head_with_most_of_its_decoder(target: Target) -> None:
    sae = target.study("dense")[0]
    rows = sae.W_dec.view(-1, HEADS, D_HEAD)
    expected = [max(range(HEADS), key=lambda h: float(row[h].norm())) for row in rows.detach()]
    assert frontier.head_of(sae, HEADS).tolist() == expected
    assert frontier.head_of(target.study("block-width")[0], HEADS).tolist() == sorted(list(range(HEADS)) * 16)


class PlantedFrontier(Frontier):
    """A frontier of given points: 60 sources, zero ablation a nat a token, 10 tokens a document; training runs whose
    arms recover more or less by `between` (standard deviation).
    """

    def __init__(
        self,
        arms: dict[str, list[tuple[float, float]]],
        spread: float = 0.02,
        gap: float = 1.0,
        runs: int = 3,
        between: float = 0.002,
        seed: int = 0,
    ) -> None:
        made = {(arm, run): points for run in range(runs) for arm, points in arms.items()}
        entries = [type("E", (), {"arm": arm, "run": run})() for (arm, run), points in made.items() for _ in points]
        self.target = type("T", (), {"name": "planted", "spec": type("S", (), {"study": entries})()})()  # type: ignore[assignment]
        self.target.runs = lambda arm: list(range(runs))  # type: ignore[method-assign]
        self.n_heads, n = 8, 60
        rng = np.random.default_rng(seed)
        self.measured, self.sources = [torch.zeros(11)] * n, [str(k) for k in range(n)]
        self.clean, self.gap = np.full(n, 20.0), np.full(n, 10.0 * gap)
        shared = rng.normal(0, 1, n)  # what is hard in a document is hard for every dictionary
        self._points = {}
        for key, points in made.items():
            run = rng.normal(0, between)
            self._points[key] = [
                Point(
                    np.full(8, l0 / 8),
                    20 + 10 * (1 - recovered - run) + shared + rng.normal(0, 10 * spread, n),
                    np.zeros(8), 512, 1,
                )
                for l0, recovered in points
            ]  # fmt: skip


DENSE = [(8.0, 0.80), (16.0, 0.85), (32.0, 0.90)]


@pytest.mark.parametrize(
    ("lost", "outcome"), [(0.0, "SUPPORTED"), (0.06, "REFUTED"), (0.02, "INCONCLUSIVE"), (-0.05, "SUPPORTED")]
)
def test_arms_are_compared_at_equal_sparsity(lost: float, outcome: str) -> None:
    arms = {"dense": DENSE, "block-width": [(l0 * 1.3, r + 0.05 * np.log2(1.3) - lost) for l0, r in DENSE]}
    c = claim("B03.width")
    found = compare(c, PlantedFrontier(arms), "block-width", "dense", control="dense")
    assert judge(c, found).outcome == outcome
    (condition,) = found.candidates["block-width over dense"]
    assert condition.effect == pytest.approx(-lost, abs=0.015)
    assert condition.low < condition.effect < condition.high
    assert found.n == 60 and found.detail["training runs"] == 3
    assert outcome != "REFUTED" or (condition.power or 0) > 0.8


def test_what_separates_arms_no_more_than_runs_is_no_difference() -> None:
    """Arms that differ by the bar, and runs that differ by more: sources alone would tell them apart, either way."""
    c = claim("B07")
    said = {}
    for between, apart in ((0.002, 0.04), (0.06, c.bar)):
        arms = {"dense": DENSE, "block-width": [(l0, r + apart) for l0, r in DENSE]}
        found = [
            compare(c, PlantedFrontier(arms, between=between, seed=k), "block-width", "dense", control="block-width")
            for k in range(8)
        ]
        said[between] = [judge(c, each).outcome for each in found]
        for each in found:
            (condition,), alone = each.candidates["block-width over dense"], each.detail
            low, high = alone["interval, if sources alone varied"]
            assert condition.low < low < condition.effect < high < condition.high
            assert alone["by run"].mean() == pytest.approx(condition.effect)
    assert said[0.002] == ["SUPPORTED"] * 8
    assert said[0.06].count("INCONCLUSIVE") >= 7


def test_arms_of_one_training_run_are_not_told_apart() -> None:
    arms = {"dense": DENSE, "block-width": [(l0, r - 0.3) for l0, r in DENSE]}
    c = claim()
    for runs in (1, 2):
        found = compare(c, PlantedFrontier(arms, runs=runs), "block-width", "dense", control="dense")
        verdict = judge(c, found)
        assert verdict.outcome == "INCONCLUSIVE"
        assert f"{'one training run' if runs == 1 else '2 training runs'} an arm, where 3 are needed" in verdict.reason
        assert found.candidates["block-width over dense"][0].effect == pytest.approx(-0.3, abs=0.02)


def test_an_arm_is_no_better_than_itself_and_only_then_at_equal_sparsity() -> None:
    c = claim("B07")
    planted = PlantedFrontier({"dense": DENSE}, spread=0.0, between=0.0)
    found = compare(c, planted, "dense", "dense", control="dense")
    assert found.detail["by run"] == pytest.approx([0.0] * 3, abs=1e-12)
    denser = compare(c, planted, "dense", "dense", control="dense", b_over_a=2.0)  # 0.05 a doubling
    assert denser.detail["by run"] == pytest.approx([-0.05] * 3, abs=1e-9)
    assert np.allclose(denser.detail["compared at L0"][[0, -1]], [8.0, 16.0])


def test_the_range_of_sparsity_is_that_of_every_run() -> None:
    planted = PlantedFrontier({"dense": DENSE, "block-width": DENSE})
    curves = [[planted.points(arm, run) for run in range(3)] for arm in ("dense", "block-width")]
    curves[1][2] = curves[1][2][1:]  # one run has nothing below 16
    grid = shared_l0(*curves, ComparedArms())
    assert grid is not None
    assert grid[[0, -1]] == pytest.approx([16.0, 32.0]) and len(grid) == 5


def test_bounds_and_p_values_of_crossed_samples_agree() -> None:
    rng = np.random.default_rng(3)
    for run_sd in (0.0, 0.5):
        values = rng.gamma(2.0, 1.0, (40, 1)) + rng.normal(0, 0.3, (40, 3)) + rng.normal(0, run_sd, 3)
        counts = rng.integers(1, 9, (40, 3)).astype(float)
        crossed = Crossed(values * counts, counts, seed=1, n_boot=999)
        assert crossed.estimate == pytest.approx(crossed.by_run.mean())
        assert crossed.by_run == pytest.approx((values * counts).sum(0) / counts.sum(0))
        for bar in np.linspace(1.0, 3.0, 21):
            for level in (0.001, 0.01, 0.05, 0.3):
                assert (crossed.p_above(bar)[0] <= level) == (crossed.lower(level)[0] > bar)
                assert (crossed.p_below(bar)[0] <= level) == (crossed.upper(level)[0] < bar)
        half = crossed.estimate - crossed.lower(0.05)[0]
        run = 2.919986 * crossed.by_run.std(ddof=1) / np.sqrt(3)  # t with 2 degrees of freedom: tables
        source = crossed.estimate - crossed.sources.lower(0.05, False)[0]
        assert half == pytest.approx(np.sqrt(source**2 + run**2), rel=1e-3)
    one = Crossed(values[:, :1], np.ones((40, 1)), seed=1, n_boot=99)
    assert one.lower(0.05)[0] == -np.inf and one.p_above(0.0)[0] == one.p_below(9.0)[0] == 1.0


@pytest.mark.parametrize("run_sd", [0.0, 1.0, 4.0])
def test_level_and_power_of_crossed_samples_by_simulation(run_sd: float) -> None:
    """60 sources with a right tail, three runs whose scatter is `run_sd` standard errors of the sources."""
    rng = np.random.default_rng(5)
    n, tries, level, worth = 60, 300, 0.05, 6.0 / np.sqrt(60)
    wrong, found, said = np.zeros(2), 0, []
    for k in range(tries):
        x = rng.exponential(1.0, (n, 1)) - 1.0 + rng.normal(0, run_sd * np.sqrt(3 / n), 3)
        crossed = Crossed(x, np.ones_like(x), seed=k, n_boot=199)
        wrong += [crossed.p_above(0.0)[0] <= level, crossed.p_below(0.0)[0] <= level]
        found += crossed.p_above(-worth)[0] <= level
        said.append(crossed.power(worth, level)[0])
    assert (wrong / tries <= 1.5 * level).all(), wrong / tries
    assert found / tries - 0.2 < np.mean(said) < found / tries + 0.1


def test_what_keeps_arms_from_being_compared() -> None:
    def reason(arms: dict[str, Any], **options: Any) -> str:
        c = claim()
        verdict = judge(c, compare(c, PlantedFrontier(arms, **options), "block-width", "dense", control="dense"))
        return f"{verdict.outcome}: {verdict.reason}"

    assert "CANNOT_RUN" in judge(claim(), compare(claim(), None, "a", "b", control="b")).outcome
    assert "fewer than two dictionaries of the arm 'block-width'" in reason({"dense": DENSE})
    assert "INCONCLUSIVE: the hook at zero costs 0.020" in reason({"dense": DENSE, "block-width": DENSE}, gap=0.02)
    low = [(l0, r - 0.6) for l0, r in DENSE]
    assert "recovers 29% of the loss" in reason({"dense": low, "block-width": low})
    far = [(l0 * 5, r) for l0, r in DENSE]
    assert "no range of L0 in common" in reason({"dense": DENSE, "block-width": far})


def test_interpolation_stays_within_the_points() -> None:
    points = PlantedFrontier({"dense": DENSE}, spread=0).points("dense")
    assert at(points, 8.0 * 2**0.25) == pytest.approx(0.75 * points[0].loss + 0.25 * points[1].loss)
    for outside in (7.9, 32.1):
        with pytest.raises(FraError, match="lies outside"):
            at(points, outside)


@pytest.mark.parametrize(
    ("rho", "outcome"), [(1.0, "REFUTED"), (2.0, "REFUTED"), (4.5, "SUPPORTED"), (8.0, "SUPPORTED")]
)
def test_exchange_rate_of_sparsities(rho: float, outcome: str) -> None:
    def recovered(l0: float) -> float:
        return 0.5 + 0.1 * float(np.log2(l0 / 8))

    arms = {
        "dense-l1": [(x, recovered(x)) for x in (8.0, 16.0, 32.0, 64.0)],
        "block-l1": [(x, recovered(x / rho)) for x in (16.0, 32.0, 64.0, 128.0, 256.0)],
    }
    c, planted = claim("B04"), PlantedFrontier(arms)
    found = exchange_rates(c, planted, "dense-l1", "block-l1")[0]
    assert found is not None
    assert found["rho"] == pytest.approx(rho, rel=0.1)
    assert found["log rho / log n_heads"] == pytest.approx(np.log(rho) / np.log(8), abs=0.05)
    evidence = compare(c, planted, "dense-l1", "block-l1", control="dense-l1", b_over_a=8**0.5)
    assert judge(c, evidence).outcome == outcome


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


def test_cost_counts_what_is_there(target: Target) -> None:
    c = declared("B01")
    found = b01_b02_blocks.cost_evidence(c, target)
    assert judge(c, found).outcome == "SUPPORTED"
    d_sae = 4 * D_MODEL
    assert found.detail["block-diagonal"]["weights"] == 2 * D_MODEL * d_sae // HEADS
    assert found.detail["block-diagonal"]["multiply-adds"] == 2 * D_MODEL * d_sae // HEADS
    assert found.detail["dense"]["multiply-adds"] == 2 * D_MODEL * d_sae
    assert found.detail["masked"]["multiply-adds"] == 2 * D_MODEL * d_sae


def test_belonging_and_what_breaks_it(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    c = declared("B02", n=3, min_sources=3)
    measured = study(target, Study(documents=12))
    found = b01_b02_blocks.belonging_evidence(c, target, measured)
    assert judge(c, found).outcome == "SUPPORTED"
    assert found.detail["dictionaries"] == 2
    assert found.detail["share of features that change under a global TopK, off-block weights zero"] > 0.2
    whole = BlockDiagonalSAE.pre_activations
    mixed = lambda self, x: whole(self, x) + 1e-6 * x.sum(-1, keepdim=True)  # noqa: E731
    monkeypatch.setattr(BlockDiagonalSAE, "pre_activations", mixed)
    assert judge(c, b01_b02_blocks.belonging_evidence(c, target, measured)).outcome == "REFUTED"


def test_a_dictionary_comes_back_to_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    load = b01_b02_blocks.SAE.load_from_disk

    def loaded(path: Path, device: str = "") -> Any:
        asked.append(device)
        return load(path)

    monkeypatch.setattr(b01_b02_blocks.SAE, "load_from_disk", loaded)
    sae = BlockDiagonalSAE(BlockDiagonalSAEConfig(d_in=D_MODEL, d_sae=D_MODEL, n_heads=HEADS, k=1))
    b01_b02_blocks.round_trip(sae, 0.7)
    assert asked == [str(sae.b_dec.device)] * 2


def test_off_block_weights_are_counted() -> None:
    sae = BlockDiagonalSAE(BlockDiagonalSAEConfig(d_in=D_MODEL, d_sae=D_MODEL, n_heads=HEADS, k=1))
    assert b01_b02_blocks.off_block(sae, HEADS) == 0
    assert b01_b02_blocks.off_block(sae, 2 * HEADS) == 2 * HEADS * 2 * (D_HEAD // 2) ** 2


def test_a_study_is_checked_when_it_is_read(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", TEXTS)

    def with_study(*entries: str) -> Path:
        file = write_target(tmp_path, model_folder("gpt2"), {}, text)
        file.write_text(file.read_text() + "\n".join(f"[[study]]\n{entry}" for entry in entries) + "\n")
        return file

    path = 'path = "b"'
    refused(with_study(f'arm = "mine"\nhook = "{HEAD_OUTPUT}"\n{path}'), "study.0.arm")
    refused(with_study(f'arm = "dense"\nhook = "blocks.1.hook_resid_pre"\n{path}'), "study is of head outputs")
    two = [f'arm = "dense"\nhook = "blocks.{k}.attn.hook_z"\n{path}' for k in (0, 1)]
    refused(with_study(*two), "dictionaries at one hook")
    refused(with_study(f'arm = "dense"\nhook = "blocks.7.attn.hook_z"\n{path}'), "blocks.7.attn.hook_z")
    refused(with_study(f'arm = "dense"\nhook = "{HEAD_OUTPUT}"\n{path}'), "b", "missing")
