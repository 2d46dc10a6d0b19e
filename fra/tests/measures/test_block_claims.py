"""What the claims about block-diagonal dictionaries rest on: frontiers, matches across heads, likeness within one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.saes.sae import SAEMetadata

import fra
from fra import frontiers
from fra.claim import Claim, Outcome, judge
from fra.dictionaries.blockdiag import BlockDiagonalSAE, BlockDiagonalSAEConfig
from fra.errors import FraError
from fra.measures.block_diagonal import b01_b02_blocks, b05_likeness, b06_alikeness, frontier
from fra.measures.block_diagonal.b03_b04_b07_compare import at, compare, exchange_rate
from fra.measures.block_diagonal.frontier import Frontier, Point, study
from fra.targets.target import Target
from fra.tests.claims import claim as declared
from fra.tests.models import D_MODEL, build_sae, model_folder
from fra.tests.tiny_targets import HEAD_OUTPUT, refused, write_target, write_text

HEADS, D_HEAD = 4, D_MODEL // 4
TEXTS = {f"{s}-{k}": f"{w} and {v} make more than {w}, said {v}. " * (2 + k) for k in range(3) for s, w, v in
         (("a", "one", "two"), ("b", "three", "four"), ("c", "five", "six"), ("d", "seven", "one"))}  # fmt: skip


def claim(name: str = "B03.width", **options: Any) -> Claim:
    """A claim with its bars, on few documents."""
    return declared(name, **{"min_documents": 5, **options})


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
    measured = study(target, 12)
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
    assert not {id(a) for a in measured.selection} & {id(b) for b in measured.measured}


@torch.no_grad()
def test_one_head_at_a_time_is_what_the_model_loses_by_it(target: Target) -> None:
    measured = study(target, 12)
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


def test_a_passage_read_twice(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FraError, match="too short a context or text"):
        study(target, 6, "repeated_natural")
    monkeypatch.setattr(target.model.cfg, "n_ctx", 64)
    measured = study(target, 6, "repeated_natural")
    assert measured is not None
    for tokens in measured.measured:
        half = (len(tokens) - 1) // 2
        assert len(tokens) == 1 + 2 * half
        assert torch.equal(tokens[1 : 1 + half], tokens[1 + half :])
    with pytest.raises(FraError, match="no stimulus 'other'"):
        study(target, 6, "other")


def test_a_dense_feature_counts_for_the_head_with_most_of_its_decoder(target: Target) -> None:
    sae = target.study("dense")[0]
    rows = sae.W_dec.view(-1, HEADS, D_HEAD)
    expected = [max(range(HEADS), key=lambda h: float(row[h].norm())) for row in rows.detach()]
    assert frontier.head_of(sae, HEADS).tolist() == expected
    assert frontier.head_of(target.study("block-width")[0], HEADS).tolist() == sorted(list(range(HEADS)) * 16)


class PlantedFrontier(Frontier):
    """A frontier of given points: 30 sources of two documents, zero ablation a nat a token, 10 tokens a document."""

    def __init__(self, arms: dict[str, list[tuple[float, float]]], spread: float = 0.02, gap: float = 1.0) -> None:
        entries = [type("E", (), {"arm": arm})() for arm, points in arms.items() for _ in points]
        self.target = type("T", (), {"name": "planted", "spec": type("S", (), {"study": entries})()})()  # type: ignore[assignment]
        self.n_heads, n = 8, 60
        rng = np.random.default_rng(0)
        self.measured, self.sources = [torch.zeros(11)] * n, [str(k // 2) for k in range(n)]
        self.clean, self.gap = np.full(n, 20.0), np.full(n, 10.0 * gap)
        shared = rng.normal(0, 1, n)  # what is hard in a document is hard for every dictionary
        self._points = {
            arm: [
                Point(
                    np.full(8, l0 / 8),
                    20 + 10 * (1 - recovered) + shared + rng.normal(0, 10 * spread, n),
                    np.zeros(8), 512, 1,
                )
                for l0, recovered in points
            ]
            for arm, points in arms.items()
        }  # fmt: skip


DENSE = [(8.0, 0.80), (16.0, 0.85), (32.0, 0.90)]


@pytest.mark.parametrize(
    ("lost", "outcome"), [(0.0, "SUPPORTED"), (0.06, "REFUTED"), (0.02, "INCONCLUSIVE"), (-0.05, "SUPPORTED")]
)
def test_arms_are_compared_at_equal_sparsity(lost: float, outcome: str) -> None:
    arms = {"dense": DENSE, "block-width": [(l0 * 1.3, r + 0.05 * np.log2(1.3) - lost) for l0, r in DENSE]}
    c = claim("B03.width")
    found = compare(c, PlantedFrontier(arms), "block-width", "dense", control="dense", effect_of_interest=0.0)
    assert judge(c, found).outcome == outcome
    (condition,) = found.candidates["block-width over dense"]
    assert condition.effect == pytest.approx(-lost, abs=0.015)
    assert condition.low < condition.effect < condition.high
    assert found.power is not None
    assert found.power > 0.8


def test_what_keeps_arms_from_being_compared() -> None:
    def reason(arms: dict[str, Any], **options: Any) -> str:
        c = claim()
        verdict = judge(c, compare(c, PlantedFrontier(arms, **options), "block-width", "dense", control="dense"))
        return f"{verdict.outcome}: {verdict.reason}"

    assert "CANNOT_RUN" in judge(claim(), compare(claim(), None, "a", "b", control="b")).outcome
    assert "fewer than two dictionaries of the arm 'block-width'" in reason({"dense": DENSE})
    assert "INCONCLUSIVE: the hook at zero costs 0.020" in reason({"dense": DENSE, "block-width": DENSE}, gap=0.02)
    low = [(l0, r - 0.6) for l0, r in DENSE]
    assert "recovers 30% of the loss" in reason({"dense": low, "block-width": low})
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
    planted = PlantedFrontier(arms)
    found = exchange_rate(planted, "dense-l1", "block-l1")
    assert found is not None
    assert found["rho"] == pytest.approx(rho, rel=0.1)
    assert found["log rho / log n_heads"] == pytest.approx(np.log(rho) / np.log(8), abs=0.05)
    c = claim()
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
    signs of the axes.
    """

    def __init__(self, share: float) -> None:
        super().__init__({})
        generator = torch.Generator().manual_seed(1)
        self.n_heads, self.hook, self.model = HEADS, HEAD_OUTPUT, None
        z = (torch.rand(120, 30, HEADS, D_HEAD, generator=generator) < 0.1).float()
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
        self.target.study = lambda arm: [sae if arm == "block-width" else either]  # type: ignore[method-assign]

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
        assert found.detail["share of features with a match of 0.5 or more"]["estimate"] == 0.5 * share


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
    some = b05_likeness.Activations(
        torch.zeros(60, 2, 1), torch.ones(60, 2, dtype=torch.bool), [str(k // 2) for k in range(60)]
    )
    rolls = some.rolls(0)
    assert len(set(rolls)) == b05_likeness.SHUFFLES
    assert not {0, 1, 59} & set(rolls)  # neighbours share a source


def _profiles(alike: float, seed: int = 0) -> b06_alikeness.Profiles:
    """Eight heads of 40 features; those of head h lean to a direction of its own for a share `alike` of them."""
    rng = np.random.default_rng(seed)
    own = np.repeat(np.arange(8), 40)
    centres = rng.normal(size=(8, 24))
    which = np.where(rng.random(320) < alike, own, rng.integers(0, 8, 320))
    direction = centres[which] + rng.normal(size=(320, 24))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return b06_alikeness.Profiles(direction, direction + 0.3 * rng.normal(size=(30, 320, 24)), own)


@pytest.mark.parametrize(("alike", "outcome"), [(1.0, "SUPPORTED"), (0.0, "REFUTED")])
def test_heads_that_keep_to_one_kind_of_token(monkeypatch: pytest.MonkeyPatch, alike: float, outcome: str) -> None:
    monkeypatch.setattr(b06_alikeness, "profiles", lambda *_: _profiles(alike))
    planted = PlantedFrontier({})
    planted.hook, planted.target.n_heads = HEAD_OUTPUT, 8  # type: ignore[misc]
    planted.target.study = lambda arm: [None]  # type: ignore[method-assign]
    c = claim("B06")
    found = b06_alikeness.alikeness_evidence(c, planted)
    said = [judge(c, evidence).outcome for evidence in found.values()]
    assert len(said) == 8
    assert said.count(Outcome(outcome)) >= 7, said
    random = [evidence.detail["random heads"]["mean"] for evidence in found.values()]
    assert np.mean(random) == pytest.approx(0.5, abs=0.05)


def test_margin_is_to_the_other_members_against_the_rest() -> None:
    found, members = _profiles(0.5), np.arange(40)
    margin = b06_alikeness.margins(found, members)
    others = [m for m in members if m != 3]
    rest = [m for m in range(320) if m not in members]
    towards = found.direction[others].mean(0) - found.direction[rest].mean(0)
    assert margin[7, 3] == pytest.approx(found.leaning[7, 3] @ towards)


def test_profile_is_the_mean_embedding_where_a_feature_fires(target: Target) -> None:
    measured = study(target, 12)
    assert measured is not None
    sae = target.study("block-width")[2]
    found = b06_alikeness.profiles(measured, sae)
    table = target.model.W_E.detach()
    tokens = [t[1:] for t in measured.selection]
    mean = torch.cat([table[t] for t in tokens]).mean(0)
    acts = [sae.encode(z[1:]) for z in measured.head_outputs(measured.selection)]
    alive = [f for f in range(sae.cfg.d_sae) if sum(int((a[:, f] > 0).sum()) for a in acts) >= b05_likeness.ALIVE]
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
    c = declared("B02", n=3, min_documents=3)
    measured = study(target, 12)
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
    b01_b02_blocks.round_trip(sae)
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
