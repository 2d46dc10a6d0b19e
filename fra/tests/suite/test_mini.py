"""The embedded target is what its card says: files, figures, heads, twin, and the separation of its texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fixtures.heads import detector_scores
from fixtures.mini.build import recipe
from fixtures.mini.build.train_model import tensors_hash, untrained
from fixtures.mini.build.train_study import arms, folder_of
from fra.induction.status import head_status
from fra.stimuli import sets as document_sets
from fra.stimuli.designs import RepeatedSets
from fra.targets.admission import admit
from fra.targets.file import read_target
from fra.targets.target import Target, load_target

HOME = Path(__file__).parents[3] / "fixtures" / "mini"
FIGURES = json.loads((HOME / "figures.json").read_text())


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("mini")


def test_weights_are_small_half_precision_safetensors() -> None:
    files = sorted(HOME.rglob("*.safetensors"))
    study = [file for file in files if "saes_study" in file.parts]
    dictionaries = len(recipe.ATTENTION_INPUT_LAYERS) + len(recipe.HEAD_OUTPUT_LAYERS) + len(recipe.SEEDS)
    assert len(files) - len(study) == 1 + dictionaries
    declared = {Path(str(entry.path)).parts[-2:] for entry in read_target("mini")[0].study}
    assert {file.parent.parts[-2:] for file in study} == declared
    runs = {arm: range(recipe.STUDY_RUNS if arm in recipe.STUDY_REPEATED else 1) for arm, _, _ in arms()}
    assert declared <= {(folder_of(arm, run), point) for arm, point, _ in arms() for run in runs[arm]}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.float16}, file  # noqa: SIM118
    sizes = {file: file.stat().st_size for file in HOME.rglob("*") if file.is_file()}
    assert sum(size for file, size in sizes.items() if "saes_study" not in file.parts) < 25 * 2**20
    assert sum(sizes.values()) < 50 * 2**20


def test_the_untrained_twin_is_regenerated_from_its_seed() -> None:
    assert tensors_hash(untrained()) == FIGURES["twin_sha256"]
    assert FIGURES["twin_sha256"] in (HOME / "README.md").read_text()


def test_dictionaries_are_good_enough(target: Target) -> None:
    inputs = [hook for hook in FIGURES["dictionaries"] if hook.endswith("hook_normalized")]
    assert len(inputs) == target.n_layers
    for hook in inputs:
        figures = FIGURES["dictionaries"][hook]
        assert 8 <= figures["l0"] <= 40, hook
        assert figures["explained_variance"] >= 0.8, hook
        assert figures["loss_recovered_zero"] >= 0.9, hook
        assert figures["dead_share"] <= 0.4, hook
    # and they are the dictionaries that the figures are about: on other text, within reach of the card
    for quality in admit(target).dictionaries:
        figures = FIGURES["dictionaries"][quality.hook]
        assert quality.l0 == pytest.approx(figures["l0"], abs=1.0)
        assert quality.explained_variance == pytest.approx(figures["explained_variance"], abs=0.05)


def test_induction_heads_are_those_of_the_detector(target: Target) -> None:
    batch = document_sets.documents(target, "repeated_random", RepeatedSets())["status"]
    status = head_status(target.model, batch, target="mini", stimulus="repeated_random")
    tih = {name for name, s in status.items() if s.status == "TIH"}
    assert tih == set(target.known_tih)
    assert len(tih) >= 2
    assert sum(s.status == "not a TIH" for s in status.values()) >= 8
    scores = detector_scores(target, batch, n=8)
    highest = sorted(scores, key=lambda name: -scores[name]["induction"])[: len(tih)]
    assert set(highest) == tih
    for name, s in status.items():
        assert s.contrast == pytest.approx(FIGURES["heads"][name]["contrast"], abs=0.02)


def test_sets_of_documents_are_disjoint(target: Target) -> None:
    for stimulus in document_sets.STIMULI:
        sets = document_sets.documents(target, stimulus, RepeatedSets())
        rows = [tuple(doc.tolist()) for batch in sets.values() for doc in batch.tokens]
        assert len(set(rows)) == len(rows)
        again = document_sets.documents(target, stimulus, RepeatedSets())
        assert all(bool((sets[name].tokens == again[name].tokens).all()) for name in sets)


def test_texts_of_the_build_are_split_by_purpose() -> None:
    assert not set(recipe.DICTIONARY_BOOKS) & set(recipe.HELD_OUT_BOOKS)
    documents = sorted((HOME / "text").glob("*.txt"))
    assert len(documents) == 540
    assert len({file.stem.rpartition("-")[0] for file in documents}) == 270
    assert len({file.read_text() for file in documents}) == 540
