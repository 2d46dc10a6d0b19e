"""A model on two devices: weights, hooks, documents and dictionaries meet on the device of their layer, and numbers are
those of one device. The GPUs are none (`fake_devices`); a target's model is laid out by accelerate, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import fra
from fra.errors import FraError
from fra.induction.status import patterns
from fra.targets import admission, models
from fra.targets.admission import spot_check
from fra.tests.fake_devices import FakeDevices, lay_over, put, tag_of
from fra.tests.models import load_model, model_folder, random_tokens, tiny_sae
from fra.tests.suites import ROOT
from fra.tests.tiny_targets import one_sentence

DOCUMENTS = [random_tokens(9 + seed, seed) for seed in range(4)]
TOKENS = DOCUMENTS[0]


@pytest.fixture
def two() -> Iterator[FakeDevices]:
    with FakeDevices() as devices:
        yield devices


def everything(model: Any, home: str) -> dict[str, Any]:
    """Numbers of each layer, on the CPU; `home`: where the second layer is."""
    found: dict[str, Any] = {}
    for layer in (0, 1):
        sae = on(tiny_sae(f"blocks.{layer}.hook_resid_pre"), home if layer else FIRST[home])
        m = fra.resolve(model, sae, TOKENS, head=f"L{layer}H1")
        found[f"scores {layer}"] = m.scores().cpu()
        found[f"channels {layer}"] = m.channels(n=20)
        found[f"output {layer}"] = fra.resolve_output(model, sae, TOKENS, layer, 2).z().cpu()
        counted = fra.census(model, sae, DOCUMENTS, layer, reduce=("sum", "mass", "max"), stripes=[1, 2, 3, 4])
        for name in ("sum", "mass", "max"):
            found[f"{name} {layer}"] = counted.channels(name, n=10)
        with fra.remove(model, found[f"channels {layer}"], layer=layer, head=1, dictionary=sae):
            found[f"removed {layer}"] = model(TOKENS[None].to(FIRST[home]), return_type="logits").cpu()
    found["patterns"] = patterns(model, TOKENS[None]).cpu()
    return found


FIRST = {"cuda:1": "cuda:0", "cpu": "cpu"}
"""Where the first layer is."""


def on(module: Any, device: str) -> Any:
    for tensor in (*module.parameters(), *module.buffers()):
        put(tensor, device)
    return module


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_numbers_are_those_of_one_device(kind: str) -> None:
    alone = everything(load_model(model_folder(kind)), "cpu")
    with FakeDevices() as devices:
        model = lay_over(load_model(model_folder(kind)), 1)
        assert {tag_of(next(block.parameters())) for block in model.blocks} == {"cuda:0", "cuda:1"}
        both = everything(model, "cuda:1")
        assert devices.moves > 10
    for layer in (0, 1):
        on(tiny_sae(f"blocks.{layer}.hook_resid_pre"), "cpu")
    for name, value in alone.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(both[name], value, rtol=1e-4)
        else:
            torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-4)


def test_the_fake_devices_do_not_mix(two: FakeDevices) -> None:
    one, other = put(torch.ones(3), "cuda:0"), torch.ones(3, device="cuda:1")
    assert (one.device, other.device) == (torch.device("cuda:0"), torch.device("cuda:1"))
    for mixed in (
        lambda: one + other,
        lambda: one @ other,
        lambda: torch.cat((one, other)),
        lambda: one + torch.ones(3),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert (one + other.to(one)).device == one.device
    assert (one * torch.tensor(2.0)).device == one.device  # a number
    with pytest.raises(TypeError, match="numpy"):
        one.numpy()


def target_with(folder: Path, device_map: str) -> Path:
    text = (ROOT / "fixtures" / "targets" / "mini.toml").read_text().replace('"../', f'"{ROOT}/fixtures/')
    file = folder / "mine.toml"
    file.write_text(text.replace("[model]\n", f"[model]\ndevice_map = {device_map}\n"))
    return file


def test_a_target_file_lays_its_model_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = fra.load_target("mini")
    assert alone.model is not None
    asked: list[Any] = []
    load = models.AutoModelForCausalLM.from_pretrained

    def recorded(*args: Any, **options: Any) -> Any:
        asked.append(options.get("device_map"))
        return load(*args, **options)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", recorded)
    laid = fra.load_target(target_with(tmp_path, '{ "" = "cpu", "transformer.h.1" = "cpu" }'))
    assert laid.model is not None
    assert asked == [{"": "cpu", "transformer.h.1": "cpu"}]
    tokens = alone.tokens(alone.documents()[0].text, 24)
    values = [
        fra.resolve(target.model, target.dictionary_for(1)[1], tokens, head="L1H4").channels(n=20)
        for target in (alone, laid)
    ]
    pd.testing.assert_frame_equal(*values)
    assert fra.load_target(target_with(tmp_path, '"auto"')).model.cfg.device == "cpu"


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ('"everywhere"', "model.device_map"),
        ('{ "" = "meta" }', "device_map names the device 'meta'"),
        ('{ "" = "disk" }', "device_map names the device 'disk'"),
        ('{ "" = "cpu", "transformer.h.1" = 0 }', "GPUs alone or the CPU alone"),
        ("{ }", "must name devices"),
        ('{ "" = 3 }', "cannot be laid out as device_map says"),
    ],
)
def test_what_cannot_be_laid_out_is_one_sentence(device_map: str, message: str, tmp_path: Path) -> None:
    if "= 3" in device_map and torch.cuda.device_count() > 3:
        pytest.skip("there are that many GPUs")
    with pytest.raises(FraError, match=message) as caught:
        _ = fra.load_target(target_with(tmp_path, device_map)).model
    one_sentence(caught.value)


@pytest.mark.parametrize(("spoil", "width"), [(0.0, None), (0.02, None), (-0.02, 2048)])
def test_an_accelerator_that_computes_other_numbers_is_not_admitted(spoil: float, width: int | None) -> None:
    target = fra.load_target("mini")
    tokens = target.tokens(target.documents()[0].text)
    _ = [target.model, *target.dictionaries.values()]
    spot_check(target, tokens)  # a CPU is not asked
    with FakeDevices(spoil, width) as devices:
        for one in (target.model, *target.dictionaries.values()):
            on(one, "cuda:0")
        if not spoil:
            spot_check(target, tokens)
            assert devices.moves
            return
        # What is wrong everywhere agrees with itself: the model's scores are those of its weights. Width 2048: the
        # dictionary's products alone.
        with pytest.raises(FraError, match="cuda:0 computes other numbers than the CPU at layer 0") as caught:
            spot_check(target, tokens)
    one_sentence(caught.value)


def test_the_model_is_run_to_the_layer_that_is_asked_for() -> None:
    target = fra.load_target("mini")
    model, tokens = target.model, target.tokens(target.documents()[0].text, 32)
    ran: list[int] = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    model.unembed.register_forward_hook(lambda *_: ran.append(99))
    model(tokens[None])
    assert ran == [0, 1, 2, 99]
    z = "blocks.1.attn.hook_z"
    uses: list[tuple[int, Callable[[int, Any], Any]]] = [
        (0, lambda layer, sae: fra.resolve(model, sae, tokens, head=f"L{layer}H1")),
        (0, lambda layer, sae: fra.resolve_output(model, sae, tokens, layer, 1)),
        (0, lambda layer, sae: fra.census(model, sae, [tokens, tokens[:9]], layer)),
        (0, lambda layer, sae: fra.interventions.head_outputs(model, tokens[None], layer=layer, head=1)),
        (0, lambda layer, sae: admission.see(target, f"blocks.{layer}.ln1.hook_normalized", tokens)),
        (1, lambda layer, sae: fra.attribution.observe(model, target.dictionaries[z], tokens[None])),
        (1, lambda layer, sae: admission.see(target, z, tokens)),
    ]
    for layer in (0, 1):
        _, sae = target.dictionary_for(layer)
        for least, use in uses:
            ran.clear()
            use(layer, sae)
            assert set(ran) <= set(range(max(least, layer) + 1)), "nothing behind the layer, and no logits"
    ran.clear()
    patterns(model, tokens[None])
    assert 99 not in ran, "patterns of all layers need no logits"
