"""Every bad input of a target gets one clear sentence: what is wrong, where, what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

import fra
from fra import targets
from fra.core.frozen import freeze
from fra.errors import FraError
from fra.targets import loading
from fra.targets.preflight import preflight
from fra.tests.models import D_MODEL, D_VOCAB, build_model, build_sae
from fra.tests.tiny_targets import (
    HEAD_OUTPUT,
    NORMALIZED,
    TEXT,
    edit_config,
    one_sentence,
    refused,
    signed_axes,
    write_target,
    write_text,
)

OTHER_HOOK = "blocks.0.ln1.hook_normalized"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    build_model("gpt2", folder / "model")
    signed_axes(folder / "sae", NORMALIZED)
    write_text(folder / "text")
    return folder


@pytest.fixture
def home(parts: Path, tmp_path: Path) -> Path:
    """A sound target that the test may break: model, sae, text, tiny.toml."""
    shutil.copytree(parts, tmp_path, dirs_exist_ok=True)
    write_target(tmp_path, tmp_path / "model", {NORMALIZED: tmp_path / "sae"}, tmp_path / "text")
    return tmp_path


def test_the_sound_target_is_admitted(home: Path) -> None:
    assert targets.admit(fra.load_target(home / "tiny.toml")).dictionaries[0].explained_variance > 0.4


# Weights


def load_file(file: Path) -> dict[str, torch.Tensor]:
    """A copy in memory: the file beneath a mapped tensor must not change."""
    return load(file.read_bytes())


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _poison(file: Path, value: float) -> None:
    weights = load_file(file)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = value
    save_file(weights, file, {"format": "pt"})


def _pickle(file: Path) -> None:
    weights = load_file(file)
    file.unlink()
    torch.save(weights, file.with_name("pytorch_model.bin"))


def _disguise(file: Path) -> None:
    torch.save(load_file(file), file)


WEIGHTS = [("model", "model/model.safetensors"), ("dictionary", "sae/sae_weights.safetensors")]


@pytest.mark.parametrize(("whose", "name"), WEIGHTS)
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (Path.unlink, "does not exist"),
        (_truncate, "truncated"),
        (lambda file: file.write_bytes(b""), "truncated"),
        (_pickle, "pickles are not loaded"),
        (_disguise, "pickles are not loaded"),
        (lambda file: _poison(file, float("nan")), "NaN"),
        (lambda file: _poison(file, float("inf")), "NaN or infinity"),
        (lambda file: save_file({}, file), "no tensors"),
    ],
)
def test_broken_weights_are_refused_before_anything_is_loaded(
    home: Path, whose: str, name: str, damage: Callable[[Path], Any], word: str
) -> None:
    damage(home / name)
    refused(home / "tiny.toml", whose, word, str(home / Path(name).parent), use=lambda target: target)


@pytest.mark.parametrize("config", ["model/config.json", "sae/cfg.json"])
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (Path.unlink, "does not exist"),
        (lambda f: f.write_text("{"), "not JSON"),
        (lambda f: f.write_text("[]"), "no JSON object"),
    ],
)
def test_broken_configs(home: Path, config: str, damage: Callable[[Path], Any], word: str) -> None:
    damage(home / config)
    refused(home / "tiny.toml", Path(config).name, word, use=lambda target: target)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda weights: weights.pop("transformer.h.1.attn.c_attn.weight"), "transformer.h.1.attn.c_attn.weight"),
        (lambda weights: weights.update({"transformer.h.1.attn.c_attn.weight": torch.zeros(3, 3)}), "config.json"),
    ],
)
def test_a_model_that_its_file_does_not_fill_is_refused(home: Path, change: Callable[[Any], Any], word: str) -> None:
    file = home / "model/model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    refused(home / "tiny.toml", word)


def test_a_missing_shard_and_an_unreadable_index(home: Path) -> None:
    (home / "model/model.safetensors").rename(home / "model/model-00001-of-00002.safetensors")
    index = home / "model/model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    refused(home / "tiny.toml", "model-00002-of-00002.safetensors does not exist")
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    refused(home / "tiny.toml", "names no shards")


def test_a_missing_directory_and_a_file_in_its_place(home: Path) -> None:
    shutil.move(home / "sae", home / "moved")
    refused(home / "tiny.toml", "no directory", str(home / "sae"), use=lambda target: target)
    torch.save({}, home / "sae.pt")
    file = write_target(home, home / "model", {NORMALIZED: home / "sae.pt"}, home / "text")
    refused(file, "is a pickle", use=lambda target: target)
    file = write_target(home, home / "model/config.json", {}, home / "text")
    refused(file, "is a file", use=lambda target: target)


# Dictionaries


def use_dictionary(home: Path, hook: str = NORMALIZED, *words: str, **replace: str) -> str:
    file = write_target(home, home / "model", {hook: home / "sae"}, home / "text", **replace)
    return refused(file, *words)


def test_dictionary_of_another_width(home: Path) -> None:
    signed_axes(home / "sae", NORMALIZED, d_in=16)
    use_dictionary(home, NORMALIZED, "width 16", "another model")
    signed_axes(home / "sae", HEAD_OUTPUT, d_in=16)
    use_dictionary(home, HEAD_OUTPUT, "width 16", "another model")
    edit_config(signed_axes(home / "sae", NORMALIZED), d_in=16)
    use_dictionary(home, NORMALIZED, "does not fit its config", "(64, 32)")


def test_dictionary_trained_on_another_hook(home: Path) -> None:
    use_dictionary(home, OTHER_HOOK, f"trained at {NORMALIZED!r}", f"at {OTHER_HOOK!r}")


def test_dictionary_at_a_hook_that_is_no_attention_input(home: Path) -> None:
    for hook in ("blocks.1.hook_mlp_out", "blocks.0.hook_resid_mid"):
        signed_axes(home / "sae", hook)
        use_dictionary(home, hook, hook, "not an attention input")
    last = "blocks.1.hook_resid_post"
    signed_axes(home / "sae", last)
    use_dictionary(home, last, last, "feeds no attention layer")


def test_of_processing_metadata_advises_and_the_target_file_is_believed_where_both_fit(home: Path) -> None:
    """The axes of what stands behind the norm are the same under each processing."""
    for kwargs, keys, flag in (({"fold_ln": True}, "none", "on"), ({}, "folded", "off")):
        edit_config(home / "sae", metadata={"model_from_pretrained_kwargs": kwargs})
        file = write_target(
            home, home / "model", {NORMALIZED: home / "sae"}, home / "text", model_keys=f'processing = "{keys}"'
        )
        remarks = targets.admit(fra.load_target(file)).remarks
        (said,) = [one for one in remarks if "by its metadata" in one]
        assert f"fold_ln {flag}" in said and "no more with another: the target file is believed" in said
    edit_config(home / "sae", metadata={"model_from_pretrained_kwargs": None})
    use_dictionary(home, NORMALIZED, "neither the target nor a dictionary", model_keys="")


def test_the_hook_that_metadata_names_in_either_layout_or_leaves_unsaid(home: Path) -> None:
    def named() -> str | None:
        return fra.load_target(home / "tiny.toml").named_hook(NORMALIZED)

    assert named() == NORMALIZED
    edit_config(home / "sae", metadata={"hook_name": None})
    assert named() is None
    config = json.loads((home / "sae/cfg.json").read_text())
    del config["metadata"]
    (home / "sae/cfg.json").write_text(json.dumps({**config, "hook_point": NORMALIZED}))
    assert named() == NORMALIZED


def test_head_output_dictionary_for_qk_is_refused_even_where_the_width_fits(home: Path) -> None:
    signed_axes(home / "sae", HEAD_OUTPUT, reshape_activations="hook_z")
    assert json.loads((home / "sae/cfg.json").read_text())["d_in"] == D_MODEL, "the width fits"
    use_dictionary(home, NORMALIZED, f"trained at {HEAD_OUTPUT!r}")
    edit_config(home / "sae", metadata={"hook_name": None})
    use_dictionary(home, NORMALIZED, "head outputs", "hook_z")
    refused(home / "tiny.toml", "head outputs", use=lambda target: target.dictionary_for(1))
    edit_config(home / "sae", metadata={"hook_name": HEAD_OUTPUT})
    file = write_target(home, home / "model", {HEAD_OUTPUT: home / "sae"}, home / "text")
    target = fra.load_target(file)
    assert targets.admit(target).dictionaries[0].hook == HEAD_OUTPUT, "as what it is, it is welcome"
    refused(file, HEAD_OUTPUT, "head outputs", use=lambda target: target.dictionary_for(1))
    with pytest.raises(FraError, match="head outputs"):
        freeze(target.model, torch.arange(9)[None], 1, HEAD_OUTPUT)


@pytest.mark.parametrize("kind", ["transcoder", "temporal", "matching_pursuit"])
@pytest.mark.parametrize("hook", [NORMALIZED, HEAD_OUTPUT])
def test_transcoders_and_temporal_dictionaries_are_refused_by_name(home: Path, kind: str, hook: str) -> None:
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    cls, config = get_sae_class(kind)
    options = {"d_in": D_MODEL, "d_sae": 64, "metadata": SAEMetadata(hook_name=hook)}
    if kind == "transcoder":
        options |= {"d_out": D_MODEL, "apply_b_dec_to_input": False}
    elif kind == "temporal":
        options |= {"n_heads": 1, "bottleneck_factor": 1}
    cls(config(**options)).save_model(home / "sae")
    use_dictionary(home, hook, kind)


def test_an_unknown_architecture_is_refused_by_name(home: Path) -> None:
    edit_config(home / "sae", architecture="holographic")
    use_dictionary(home, NORMALIZED, "holographic")


def test_unfolded_activation_scaling_is_refused(home: Path) -> None:
    edit_config(home / "sae", normalize_activations="expected_average_only_in")
    refused(home / "tiny.toml", "expected_average_only_in", use=lambda target: target.dictionaries[NORMALIZED])


@pytest.mark.parametrize(
    ("hook", "bias", "words"),
    [
        (NORMALIZED, -1e3, ("L0 is zero",)),
        (NORMALIZED, 1e3, ("64 of its 64", "not sparse")),
        (HEAD_OUTPUT, -1e3, ("no live feature",)),
        (HEAD_OUTPUT, 1e3, ("64 of its 64", "not sparse")),
    ],
)
def test_l0_of_zero_or_near_d_sae(home: Path, hook: str, bias: float, words: tuple[str, ...]) -> None:
    signed_axes(home / "sae", hook, k=0, bias=bias)
    use_dictionary(home, hook, hook, *words)


def test_a_dictionary_that_explains_nothing_is_refused(home: Path) -> None:
    build_sae("topk", D_MODEL, NORMALIZED, home / "sae")
    use_dictionary(home, NORMALIZED, "explained variance -", "another")


def test_size_that_is_not_the_models(home: Path) -> None:
    use_dictionary(home, NORMALIZED, "size.n_heads", "is 8", "has 4", size="[size]\nn_layers = 2\nn_heads = 8")
    use_dictionary(home, NORMALIZED, "size.n_layers", "is 3", "has 2", size="[size]\nn_layers = 3\nn_heads = 4")


def test_what_files_alone_tell_is_refused_before_anything_is_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence of the preflight and, where the whole target is admitted, the same one."""

    def early(file: Path, *words: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(loading, "load_target_model", None)
            return refused(file, *words, use=preflight)

    def written(hook: str = NORMALIZED, text: Path | str = "text", **replace: str) -> Path:
        return write_target(home, home / "model", {hook: home / "sae"}, text, **replace)

    assert preflight(fra.load_target(home / "tiny.toml")), "three documents of two sources are too few"
    size = "[size]\nn_layers = 2\nn_heads = 8"
    assert early(written(size=size), "size.n_heads", "is 8", "has 4") == refused(home / "tiny.toml")
    assert early(written(OTHER_HOOK), f"trained at {NORMALIZED!r}") == refused(home / "tiny.toml")
    early(written(text="txet"), "there is no directory", str(home / "txet"))
    signed_axes(home / "sae", NORMALIZED, d_in=16)
    early(written(), "width 16 and the model has 32", "another model")
    for file in (home / "model").glob("*token*"):
        file.unlink()
    early(written(), "has no tokenizer", str(home / "model"))


def test_layer_out_of_range_or_without_dictionary(home: Path) -> None:
    for layer in (-1, 2):
        refused(
            home / "tiny.toml", f"layer {layer} is out of range", use=lambda target, n=layer: target.dictionary_for(n)
        )
    refused(
        home / "tiny.toml",
        "no dictionary at the attention input of layer 0",
        use=lambda target: target.dictionary_for(0),
    )


# Text


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"a-1": TEXT, "a-2": ""}, ("a-2.txt", "is empty")),
        ({"a-1": " \n\t "}, ("a-1.txt", "is empty")),
        ({"a-1": "x"}, ("'a-1'", "has 1 tokens")),
    ],
)
def test_empty_text(home: Path, texts: dict[str, str], words: tuple[str, ...]) -> None:
    shutil.rmtree(home / "text")
    write_text(home / "text", texts)
    refused(home / "tiny.toml", *words)


def test_missing_text(home: Path) -> None:
    (home / "text/a-1.txt").write_bytes(b"\xff\xfe")
    refused(home / "tiny.toml", "a-1.txt", "UTF-8")
    shutil.rmtree(home / "text")
    (home / "text").mkdir()
    refused(home / "tiny.toml", "no .txt file")
    (home / "text").rmdir()
    file = write_target(home, home / "model", {NORMALIZED: home / "sae"}, "./text")
    refused(file, "no directory")
    file = write_target(home, home / "model", {NORMALIZED: home / "sae"}, "somebody/no-such-dataset")
    refused(file, "the dataset 'somebody/no-such-dataset'")


def test_tokens_longer_than_the_context_or_outside_the_vocabulary(home: Path) -> None:
    model = fra.load_target(home / "tiny.toml").model
    for tokens, word in ((torch.zeros(1, 33, dtype=torch.long), "context"), (torch.tensor([[D_VOCAB]]), "vocabulary")):
        with pytest.raises(FraError, match=word) as caught:
            freeze(model, tokens, 1, NORMALIZED)
        one_sentence(caught.value)


# The hub


@pytest.mark.parametrize(
    ("release", "sae_id", "words"),
    [
        ("gpt2-small-res-jp", "blocks.1.hook_resid_pre", ("no release", "gpt2-small-res-jb")),
        ("gpt2-small-res-jb", "blocks.99.hook_resid_pre", ("no dictionary", "blocks.9.hook_resid_pre")),
        ("gpt2-small-hook-z-kk", "blocks.1.hook_z", ("pickles", "allow_pickle_release")),
        ("gpt2-small-res-jb", "blocks.1.hook_resid_pre", ("hub is not reached",)),
        ("somebody/no-such-repository", "first", ("hub is not reached",)),
        ("a//b/c", "first", ("hub has no",)),
    ],
)
def test_releases_that_cannot_be_had(home: Path, release: str, sae_id: str, words: tuple[str, ...]) -> None:
    file = write_target(home, home / "model", {"blocks.1.hook_resid_pre": (release, sae_id)}, home / "text")
    refused(file, *words)


def test_a_pickled_model_of_the_hub_must_be_allowed(home: Path) -> None:
    file = write_target(home, None, {}, home / "text", model_keys='name = "gelu-2l"\nprocessing = "none"')
    refused(file, "gelu-2l", "allow_pickle_release")
