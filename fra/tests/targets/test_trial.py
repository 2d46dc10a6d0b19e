"""Measured fit decides at admission: which hook, layer and weight processing a dictionary belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fra
from fra import targets
from fra.dictionaries.fits import clearly_better, places
from fra.targets.models import load_model
from fra.targets.preflight import preflight
from fra.targets.processing import NAMED
from fra.targets.trial import best_processing
from fra.tests.models import D_MODEL, build_model, build_sae
from fra.tests.tiny_targets import HEAD_OUTPUT, NORMALIZED, edit_config, refused, write_target, write_text

RESIDUAL, FIRST, BEFORE = "blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"
KEPT = 14
TEXTS = {f"{who}-1": f"{who} said {n} and {n * 7} in {who[::-1]}, not {n + 3} more than {who}" for n, who in enumerate(
    ("red", "green", "blue", "violet", "amber", "ochre", "umber", "grey"), 11
)}  # fmt: skip


def principal_axes(folder: Path, hook: str, x: torch.Tensor) -> Path:
    """A dictionary that is right for one activation: its first principal axes in both directions, about its mean."""
    mean = x.mean(0)
    axes = torch.linalg.svd((x - mean).double(), full_matrices=False)[2][:KEPT].float()
    both = torch.cat((axes, -axes)).contiguous()
    build_sae("topk", D_MODEL, hook, folder, d_sae=2 * KEPT, k=KEPT, apply_b_dec_to_input=True)
    weights = {"W_dec": both, "W_enc": both.T.contiguous(), "b_dec": mean, "b_enc": torch.zeros(2 * KEPT)}
    assert set(weights) == set(load_file(folder / "sae_weights.safetensors"))
    save_file(weights, folder / "sae_weights.safetensors")
    return edit_config(folder, metadata={"hook_name": None, "model_from_pretrained_kwargs": {}})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers differ, whose embeddings have a mean and whose values have biases, with a dictionary for
    each of some hooks under each processing; their metadata names no hook, and processing as SAELens writes it of a
    model that it was given.
    """
    folder = tmp_path_factory.mktemp("trial")
    build_model("gpt2", folder / "model")
    file = folder / "model" / "model.safetensors"
    weights, draw = load_file(file), torch.Generator().manual_seed(1)
    for name, value in weights.items():
        if name.endswith("wte.weight"):
            weights[name] = 10 * value + torch.randn(len(value), 1, generator=draw)
        elif value.ndim == 2 and "h.0." in name:
            weights[name] = 12 * value
        elif name.endswith("h.1.attn.c_attn.bias"):
            weights[name] = torch.cat((value[: 2 * D_MODEL], torch.linspace(-3, 3, D_MODEL)))
    save_file(weights, file, metadata={"format": "pt"})
    write_text(folder / "text", TEXTS)
    tokens = fra.load_target(write_target(folder, folder / "model", {}, folder / "text"))
    documents = [tokens.tokens(document.text) for document in tokens.documents()]
    for word, way in NAMED.items():
        model = load_model(folder / "model", processing=way)
        for hook in (RESIDUAL, FIRST, NORMALIZED, HEAD_OUTPUT):
            with torch.no_grad():
                x = torch.cat([model.run_with_cache(one[None])[1][hook][0].flatten(1)[1:] for one in documents])
            principal_axes(folder / word / hook, hook, x)
    return folder


def declared(home: Path, tmp_path: Path, hook: str, sae: str, processing: str = "none", **options: bool) -> Path:
    """A target file that declares a dictionary at a hook, wherever it belongs."""
    file = write_target(
        tmp_path, home / "model", {hook: home / sae}, home / "text", model_keys=f'processing = "{processing}"'
    )
    for name, value in options.items():
        file.write_text(file.read_text().replace("[[dictionary]]", f"[[dictionary]]\n{name} = {json.dumps(value)}"))
    return file


@pytest.mark.parametrize("processing", ["none", "folded"])
@pytest.mark.parametrize("hook", [RESIDUAL, BEFORE, NORMALIZED, HEAD_OUTPUT])
def test_a_dictionary_is_admitted_where_it_belongs(home: Path, tmp_path: Path, hook: str, processing: str) -> None:
    """Folded, too, where metadata says nothing of folding; and behind a layer what was trained before the next."""
    own = RESIDUAL if hook == BEFORE else hook
    report = targets.admit(fra.load_target(declared(home, tmp_path, hook, f"{processing}/{own}", processing)))
    assert report.dictionaries[0].explained_variance > 0.7
    assert [said for said in report.remarks if "believed" in said] == [
        said for said in report.remarks if "explains" in said
    ], "of its fit nothing is said but that metadata named another processing"


@pytest.mark.parametrize(
    ("hook", "own"),
    [
        (HEAD_OUTPUT, RESIDUAL),
        (NORMALIZED, RESIDUAL),
        (RESIDUAL, FIRST),
        (RESIDUAL, NORMALIZED),
        (NORMALIZED, HEAD_OUTPUT),
    ],
)
def test_a_dictionary_of_another_hook_or_layer_is_refused_and_its_own_is_named(
    home: Path, tmp_path: Path, hook: str, own: str
) -> None:
    refused(declared(home, tmp_path, hook, f"none/{own}"), hook, "where it belongs", f'write hook = "{own}"')


@pytest.mark.parametrize("hook", [RESIDUAL, HEAD_OUTPUT])
@pytest.mark.parametrize(("said", "true"), [("none", "folded"), ("folded", "none")])
def test_wrong_processing_is_refused_whatever_metadata_says(
    home: Path, tmp_path: Path, hook: str, said: str, true: str
) -> None:
    refused(declared(home, tmp_path, hook, f"{true}/{hook}", said), hook, f'write processing = "{true}" in [model]')


def test_folding_is_noticed_where_the_target_file_says_nothing_and_metadata_has_defaults(
    home: Path, tmp_path: Path
) -> None:
    for hook in (RESIDUAL, HEAD_OUTPUT):
        file = declared(home, tmp_path, hook, f"folded/{hook}")
        file.write_text(file.read_text().replace('processing = "none"\n', ""))
        refused(file, "weight processing 'none'", 'write processing = "folded" in [model]')


def test_the_target_file_may_accept_a_mismatch_which_is_remarked_upon(home: Path, tmp_path: Path) -> None:
    file = declared(home, tmp_path, HEAD_OUTPUT, f"none/{RESIDUAL}", accept_mismatch=True)
    (said,) = [one for one in targets.admit(fra.load_target(file)).remarks if "accept_mismatch" in one]
    assert f'write hook = "{RESIDUAL}"' in said and "accepted, as the target file asks" in said
    named = edit_config(home / "none" / FIRST, metadata={"hook_name": FIRST})
    try:
        refused(declared(home, tmp_path, RESIDUAL, f"none/{FIRST}"), "trained at", "accept_mismatch", use=preflight)
        refused(declared(home, tmp_path, RESIDUAL, f"none/{FIRST}"), "trained at", "accept_mismatch")
        file = declared(home, tmp_path, RESIDUAL, f"none/{FIRST}", accept_mismatch=True)
        preflight(fra.load_target(file))
        target = fra.load_target(file)
        remarks = [one for one in targets.admit(target).remarks if "accept_mismatch" in one]
        assert f"was trained at {FIRST!r}" in remarks[0] and "where it belongs" in remarks[1]
        assert target.dictionaries[RESIDUAL].cfg.metadata.hook_name == RESIDUAL
    finally:
        edit_config(named, metadata={"hook_name": None})


def test_places_are_the_hook_itself_its_neighbours_and_its_point_in_every_layer() -> None:
    found = places("blocks.1.hook_resid_post", 5)
    assert found[0] == "blocks.1.hook_resid_post" and len(found) == len(set(found))
    assert "blocks.2.hook_resid_pre" not in found, "the same point"
    assert {"blocks.4.hook_resid_post", "blocks.0.attn.hook_z", "blocks.2.hook_mlp_out", "blocks.0.hook_resid_pre"} <= {
        *found
    }
    assert not any(place.startswith("blocks.5.") for place in found)


def test_better_is_half_of_what_is_unexplained() -> None:
    assert clearly_better(0.16, 0.6) and clearly_better(-1.6, 0.5) and not clearly_better(0.4, 0.69)
    assert not clearly_better(-9.0, 0.49), "it fits nowhere"
    assert best_processing({"none": {"a": 0.5, "b": 0.1}, "folded": {"a": 0.52}}) == "folded"
    assert best_processing({"none": {"a": 0.5}, "folded": {"a": 0.5005}}) is None
