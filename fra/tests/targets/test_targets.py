"""Reading, loading and admitting targets: presets, local directories, and the hub as it lies in its cache."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fra
from fra import targets
from fra.errors import CannotLoad, FraError
from fra.targets.processing import NAMED, check_agreement, declared_by, settle
from fra.tests.models import build_model
from fra.tests.tiny_targets import (
    HEAD_OUTPUT,
    NORMALIZED,
    TEXT,
    edit_config,
    one_sentence,
    signed_axes,
    write_target,
    write_text,
)

PRESETS = {
    "mini", "gpt2-small", "pythia-70m-deduped", "gemma-2-2b", "llama-3.1-8b", "qwen3-1.7b", "gpt2-no-ln", "gelu-2l",
}  # fmt: skip
ON_HUB = sorted(PRESETS - {"mini"})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    build_model("gpt2", folder / "model")
    signed_axes(folder / "saes" / NORMALIZED, NORMALIZED)
    signed_axes(folder / "saes" / HEAD_OUTPUT, HEAD_OUTPUT, reshape_activations="hook_z")
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def target(home: Path) -> targets.Target:
    dictionaries = {hook: home / "saes" / hook for hook in (NORMALIZED, HEAD_OUTPUT)}
    heads = '[heads]\nknown_tih = ["L1H3"]\nknown_from = "this test"'
    return fra.load_target(write_target(home / "files", home / "model", dictionaries, home / "text", heads=heads))


def test_reading_a_target_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fra.targets.file import read_target; spec, folder = read_target('gpt2-small');"
        "print(spec.size.n_layers, [m for m in ('torch', 'numpy', 'transformer_lens', 'sae_lens') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["12", "[]\n"]


def test_every_preset_of_the_design_is_there() -> None:
    assert set(targets.presets()) >= PRESETS
    for name in PRESETS:
        spec, folder = targets.read_target(name)
        assert spec.name == name
        assert folder.name == "targets"


def test_a_path_beats_a_name_and_the_working_directory_beats_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_target(tmp_path / "fixtures" / "targets", Path("m"), {}, "some/text").rename("fixtures/targets/mini.toml")
    assert targets.read_target("mini")[0].name == "tiny"
    write_target(tmp_path, Path("m"), {}, "some/text", size="[size]\nn_layers = 7\nn_heads = 1").rename("mini")
    assert targets.read_target("mini")[0].size.n_layers == 7
    assert targets.read_target("gelu-2l")[0].name == "gelu-2l"


@pytest.mark.parametrize("name", ON_HUB)
def test_presets_name_real_releases_of_their_model(name: str) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    from transformer_lens.loading_from_pretrained import make_model_alias_map

    alias = make_model_alias_map()
    spec, _ = targets.read_target(name)
    pickled = name == "gelu-2l"
    for entry in spec.dictionary:
        known = get_pretrained_saes_directory()[str(entry.release)]
        assert entry.sae_id in known.saes_map
        assert alias.get(known.model.lower(), known.model) == spec.model.name
        loader = loaders.get_conversion_loader_name(str(entry.release))
        pickled |= "torch.load(" in inspect.getsource(loaders.NAMED_PRETRAINED_SAE_LOADERS[loader])
        folder = known.saes_map[str(entry.sae_id)]
        if loader in ("gemma_2", "qwen_scope"):  # these know hook and width without the hub
            config = loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[loader](known.repo_id, folder, "cpu", False, None)
            assert config["hook_name"] == entry.hook
        else:
            layer = entry.hook.split(".")[1]
            assert layer in "".join(c if c.isdigit() else " " for c in str(entry.sae_id)).split()
    assert spec.allow_pickle_release == pickled
    assert all(int(head[1]) < spec.size.n_layers for head in spec.heads.known_tih)


def test_pickled_loaders_are_those_that_call_torch_load() -> None:
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS

    from fra.checkpoints.hub import PICKLED_LOADERS

    found = {
        name for name, loader in NAMED_PRETRAINED_SAE_LOADERS.items() if "torch.load(" in inspect.getsource(loader)
    }
    assert found == PICKLED_LOADERS


@pytest.mark.parametrize("name", ON_HUB)
def test_presets_say_what_is_missing_without_a_hub(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(CannotLoad) as caught:
        _ = fra.load_target(name).model
    text = one_sentence(caught.value)
    assert str(targets.read_target(name)[0].model.name) in text
    assert time.monotonic() - started < 30, "a missing hub is noticed at once"


def test_a_target_offers_model_dictionaries_and_text(target: targets.Target) -> None:
    assert target.heads == tuple(f"L{layer}H{head}" for layer in range(2) for head in range(4))
    assert target.known_tih == ("L1H3",)
    assert target.processing == NAMED["none"]
    assert target.model.cfg.n_layers == 2
    assert list(target.dictionaries) == [NORMALIZED, HEAD_OUTPUT]
    assert target.dictionaries[NORMALIZED] is target.dictionaries[NORMALIZED], "loaded once"
    hook, sae = target.dictionary_for(1)
    assert hook == NORMALIZED
    assert sae.cfg.metadata.hook_name == NORMALIZED
    assert [(d.name, d.source) for d in target.documents()] == [("a-1", "a"), ("a-2", "a"), ("b-1", "b")]
    assert target.tokenizer.decode(target.encode(TEXT)) == TEXT
    assert target.bos == target.tokenizer.bos_token_id


def test_resid_post_of_the_layer_before_is_the_attention_input(home: Path) -> None:
    before, own = "blocks.0.hook_resid_post", "blocks.0.hook_resid_pre"
    for hook in (before, own):
        signed_axes(home / "saes" / hook, hook)
    spec = write_target(home / "residual", home / "model", {h: home / "saes" / h for h in (before, own)}, home / "text")
    residual = fra.load_target(spec)
    assert [residual.hook_for(layer) for layer in (0, 1)] == [own, before]
    assert {q.hook for q in targets.admit(residual).dictionaries} == {before, own}


def test_admission_measures_what_brute_force_measures(target: targets.Target) -> None:
    report = targets.admit(target)
    model, n_ctx = target.model, 32
    by_hook = {q.hook: q for q in report.dictionaries}
    assert set(by_hook) == {NORMALIZED, HEAD_OUTPUT}
    for hook, quality in by_hook.items():
        inputs, errors, live = [], [], []
        for document in target.documents():
            tokens = torch.tensor([[target.bos, *target.encode(document.text)][:n_ctx]])
            _, cache = model.run_with_cache(tokens)
            x = cache[hook][0].flatten(1)[1:].double()
            # Signed axes: of each position the twelve largest coordinates in absolute value are kept as they are.
            kept = torch.zeros_like(x)
            top = x.abs().topk(12).indices
            kept.scatter_(1, top, x.gather(1, top))
            inputs.append(x)
            errors.append(x - kept)
            live.append((kept != 0).sum(1))
        x, error = torch.cat(inputs), torch.cat(errors)
        assert quality.l0 == pytest.approx(float(torch.cat(live).double().mean()))
        explained = 1 - float((error**2).sum() / ((x - x.mean(0)) ** 2).sum())
        assert quality.explained_variance == pytest.approx(explained, abs=1e-5)
        assert quality.positions == len(x)


def test_a_document_longer_than_the_context_is_cut(home: Path) -> None:
    long = write_text(home / "long", {"only": TEXT * 50})
    spec = write_target(home / "long_file", home / "model", {NORMALIZED: home / "saes" / NORMALIZED}, long)
    report = targets.admit(fra.load_target(spec))
    assert report.dictionaries[0].positions == 31


def test_the_fingerprint_moves_with_weights_text_and_precision_only(home: Path, tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path / "model")
    sae = signed_axes(tmp_path / "sae", NORMALIZED)
    text = write_text(tmp_path / "text")
    file = write_target(tmp_path, model, {NORMALIZED: sae}, text)
    first = fra.load_target(file).fingerprint()
    (tmp_path / "elsewhere").mkdir()
    moved = write_target(tmp_path / "elsewhere", model, {NORMALIZED: sae}, text)
    assert fra.load_target(moved).fingerprint() == first
    prints = [first, fra.load_target(file, dtype="float64").fingerprint()]
    (text / "a-1.txt").write_text(TEXT + " more")
    prints.append(fra.load_target(file).fingerprint())
    signed_axes(sae, NORMALIZED, bias=0.01)
    prints.append(fra.load_target(file).fingerprint())
    build_model("gpt2", model, seed=1)
    prints.append(fra.load_target(file).fingerprint())
    assert len(set(prints)) == 5


def test_precision_reaches_model_and_dictionary(home: Path) -> None:
    file = write_target(home / "double", home / "model", {NORMALIZED: home / "saes" / NORMALIZED}, home / "text")
    double = fra.load_target(file, dtype=torch.float64)
    assert next(double.model.parameters()).dtype == torch.float64
    assert double.dictionaries[NORMALIZED].W_dec.dtype == torch.float64
    with pytest.raises(FraError, match="no precision 'int8'"):
        fra.load_target(file, dtype="int8")


def test_undeclared_processing_is_that_of_the_dictionary(home: Path, tmp_path: Path) -> None:
    sae = signed_axes(tmp_path / "sae", NORMALIZED)
    edit_config(sae, metadata={"model_from_pretrained_kwargs": {"fold_ln": True, "center_writing_weights": False}})
    file = write_target(tmp_path, home / "model", {NORMALIZED: sae}, home / "text", model_keys="")
    folded = fra.load_target(file)
    assert folded.processing == {"fold_ln"}
    plain = fra.load_target(write_target(tmp_path / "plain", home / "model", {}, home / "text"))
    W_Q = plain.model.blocks[1].ln1.weight[:, None] * plain.model.blocks[1].attn.W_Q
    torch.testing.assert_close(folded.model.blocks[1].attn.W_Q, W_Q - W_Q.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("hook", "named", "processing", "agrees"),
    [
        ("blocks.5.hook_resid_pre", {"center_writing_weights": True}, "folded", True),  # gpt2-small-res-jb
        ("blocks.5.hook_resid_pre", {"center_writing_weights": True}, "none", False),
        ("blocks.5.hook_resid_pre", {}, "folded", False),
        ("blocks.5.hook_resid_pre", {"fold_ln": True}, "none", False),  # said, so it counts
        ("blocks.5.ln1.hook_normalized", {}, "none", True),
        ("blocks.5.ln1.hook_normalized", {}, "folded", False),
        ("blocks.5.attn.hook_z", {"fold_value_biases": True}, "folded", True),
        ("blocks.5.attn.hook_z", {"fold_ln": True}, "folded", False),  # value biases were not folded, and they sit in z
        ("blocks.5.hook_attn_out", {"center_writing_weights": True}, "folded", True),
        ("blocks.5.hook_attn_out", {"fold_value_biases": True}, "folded", False),  # weights were not centred
        ("blocks.5.hook_mlp_out", {"fold_ln": True}, "folded", False),
        ("blocks.5.hook_resid_pre", None, "folded", True),
    ],
)
def test_processing_agrees_where_it_reaches_the_hook(
    hook: str, named: dict[str, bool] | None, processing: str, agrees: bool
) -> None:
    if agrees:
        check_agreement(hook, named, NAMED[processing])
    else:
        with pytest.raises(FraError, match=hook.replace(".", r"\.")) as caught:
            check_agreement(hook, named, NAMED[processing])
        one_sentence(caught.value)


def test_what_processing_reaches_is_what_the_model_shows(home: Path) -> None:
    """The table of fra.targets.processing against the activations of the model itself, flag by flag."""
    from fra.targets.models import load_model

    tokens = torch.arange(1, 12)[None]
    hooks = ("blocks.1.hook_resid_pre", NORMALIZED, HEAD_OUTPUT)

    def activations(processing: frozenset[str]) -> dict[str, torch.Tensor]:
        _, cache = load_model(home / "model", processing=processing, dtype=torch.float64).run_with_cache(tokens)
        return {hook: cache[hook] for hook in hooks}

    plain, reached = activations(frozenset()), set()
    for flag in NAMED["folded"]:
        # Value biases go to the output bias only once LayerNorm's bias is in them.
        processed = activations(frozenset({flag} | ({"fold_ln"} if flag == "fold_value_biases" else set())))
        for hook in hooks:
            changed = not torch.allclose(plain[hook], processed[hook].view_as(plain[hook]), atol=1e-6)
            if changed:
                reached.add((flag, hook))
                with pytest.raises(FraError):
                    check_agreement(hook, {}, frozenset({flag}))
    assert reached == {("center_writing_weights", hooks[0]), ("fold_value_biases", HEAD_OUTPUT)}


def test_processing_that_nobody_says_or_two_say_differently_is_refused() -> None:
    with pytest.raises(FraError, match="neither the target nor a dictionary"):
        settle(None, {NORMALIZED: None})
    a, b = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"
    with pytest.raises(FraError, match="center_writing_weights off"):
        settle(None, {a: {"center_writing_weights": True}, b: {"center_writing_weights": False}})
    assert settle(None, {a: {"center_writing_weights": True}, NORMALIZED: None}) == {"center_writing_weights"}
    assert declared_by({}) is None
    assert declared_by({"model_from_pretrained_kwargs": {}}) == {}
    assert declared_by({"model_class_name": "AutoModelForCausalLM"}) == {}


def _cached(cache: Path, repo: str, *, kind: str = "models") -> Path:
    """A repository as huggingface_hub caches it; returns its snapshot folder."""
    root = cache / "hub" / f"{kind}--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    return snapshot


_HUB_RUN = """
import json, sys, torch, fra
from fra import targets
from fra.checkpoints.hub import dataset_texts
from fra.errors import FraError
torch.set_num_threads(1)
t = fra.load_target(sys.argv[1])
report = targets.admit(t)
def refusal(path):
    try:
        t = fra.load_target(path); list(t.dictionaries.values())
    except FraError as error:
        return [type(error).__name__, str(error)]
print(json.dumps({
    "model": type(t.model).__name__, "processing": sorted(t.processing), "hooks": [q.hook for q in report.dictionaries],
    "fold": [s.cfg.normalize_activations for s in t.dictionaries.values()], "fingerprint": t.fingerprint(),
    "dataset": dataset_texts(sys.argv[4], 2), "refusal": refusal(sys.argv[2]),
    "remarks": targets.admit(fra.load_target(sys.argv[3])).remarks,
}))
"""


def test_hub_releases_load_through_their_own_loaders_from_the_cache(home: Path, tmp_path: Path) -> None:
    """A model and three releases laid out as the hub's client caches them: SAELens' format, a bare repository, a
    pickle.
    """
    cache = tmp_path / "hf"
    snapshot = _cached(cache, "gpt2")
    for file in (home / "model").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    residual = "blocks.1.hook_resid_pre"
    released = signed_axes(_cached(cache, "jbloom/GPT2-Small-SAEs-Reformatted") / residual, residual)
    before_version_6 = {
        **{"model_name": "gpt2-small", "hook_point": residual, "hook_point_layer": 1, "d_in": 32, "d_sae": 64},
        **{"dtype": "float32", "device": "cpu", "normalize_activations": False},
        **{"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 12}},
    }
    (released / "cfg.json").write_text(json.dumps(before_version_6))
    bare = _cached(cache, "somebody/dictionaries") / "first"
    signed_axes(bare, "blocks.0.hook_resid_pre")
    pickled = _cached(cache, "ckkissane/attn-saes-gpt2-small-all-layers")
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    stem = get_pretrained_saes_directory()["gpt2-small-hook-z-kk"].saes_map["blocks.1.hook_z"].removesuffix(".pt")
    weights = load_file(signed_axes(tmp_path / "z", HEAD_OUTPUT, k=0) / "sae_weights.safetensors")
    torch.save(weights, pickled / f"{stem}.pt")
    (pickled / f"{stem}_cfg.json").write_text(json.dumps({"act_size": 32, "dict_size": 64, "act_name": HEAD_OUTPUT}))
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("first", " ", "second", "third"))
    )

    releases: dict[str, Path | tuple[str, str]] = {
        "blocks.0.hook_resid_pre": ("somebody/dictionaries", "first"),
        residual: ("gpt2-small-res-jb", residual),
        HEAD_OUTPUT: ("gpt2-small-hook-z-kk", "blocks.1.hook_z"),
    }
    keys = 'name = "gpt2"'
    file = write_target(
        tmp_path / "a", None, releases, home / "text", model_keys=keys, head="allow_pickle_release = true"
    )
    unwanted = write_target(tmp_path / "b", None, releases, home / "text", model_keys=keys + '\nprocessing = "folded"')
    contradicting = write_target(
        tmp_path / "c", None, {residual: releases[residual]}, home / "text", model_keys=keys + '\nprocessing = "none"'
    )
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", _HUB_RUN, str(file), str(unwanted), str(contradicting), str(data)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model"] == "TransformerBridge"
    # Undeclared: what SAELens says of gpt2-small-res-jb; the others say nothing.
    assert found["processing"] == ["center_writing_weights"]
    assert found["hooks"] == list(releases)
    assert found["fold"] == ["none"] * 3
    assert len(found["fingerprint"]) == 64
    assert found["dataset"] == ["first", "second"]
    kind, sentence = found["refusal"]
    assert kind == "FraError" and "allow_pickle_release" in sentence
    assert any(
        "center_writing_weights on" in said and "the target file is believed" in said for said in found["remarks"]
    )
