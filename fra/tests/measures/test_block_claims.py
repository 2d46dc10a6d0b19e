"""What the claims about block-diagonal dictionaries rest on: frontiers and their comparison, cost and belonging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fra
from fra import frontiers
from fra.claim import judge
from fra.dictionaries.blockdiag import BlockDiagonalSAE, BlockDiagonalSAEConfig
from fra.errors import FraError
from fra.measures.block_diagonal import b01_b02_blocks, frontier
from fra.measures.block_diagonal.b03_b04_b07_compare import at, compare, exchange_rates, shared_l0
from fra.measures.block_diagonal.crossed import Crossed
from fra.measures.block_diagonal.designs import ComparedArms, Study
from fra.measures.block_diagonal.frontier import study
from fra.targets.target import Target
from fra.tests.claims import claim as declared
from fra.tests.models import D_MODEL, model_folder
from fra.tests.studies import D_HEAD, DENSE, HEADS, TEXTS, PlantedFrontier, block_folder, claim, study_target
from fra.tests.tiny_targets import HEAD_OUTPUT, refused, write_target, write_text


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return study_target(tmp_path_factory.mktemp("study"))


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
