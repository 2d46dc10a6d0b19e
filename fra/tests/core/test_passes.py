"""A pass ends where the last hook that it is run for has fired, and shows what a whole pass shows."""

import pytest
import torch

from fra.architectures.known import architecture_of
from fra.core.frozen import freeze, read_present
from fra.tests.models import random_tokens, tiny

KINDS = ["gpt2", "llama", "gemma2", "pythia"]


def modules_run(model, run) -> set[str]:
    """Names of the model's own modules that begin to run."""
    seen: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: seen.add(name)) for name, module in model.named_modules()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name.replace("_original_component.", "") for name in seen}  # the bridge wraps the model's own modules


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_behind_the_attention_of_the_layer_is_run(kind):
    model, tokens = tiny(kind), random_tokens()[None]
    whole = modules_run(model, lambda: model(tokens))
    for layer in (0, model.cfg.n_layers - 1):
        own = modules_run(
            model, lambda layer=layer: freeze(model, tokens, layer, f"blocks.{layer}.ln1.hook_normalized")
        )
        assert any(name.startswith(f"blocks.{layer}.") and "attn" in name for name in own)
        behind = [f"blocks.{later}" for later in range(layer + 1, model.cfg.n_layers)]
        behind += [f"blocks.{layer}.mlp", "unembed"]
        for part in behind:
            assert any(part in name for name in whole), "a whole pass runs it"
            assert not any(name.startswith(part) for name in own if not name.endswith("hook_in")), (layer, part)


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_shows_is_what_a_whole_pass_shows(kind):
    model, tokens = tiny(kind), random_tokens()[None]
    names = {"x": "blocks.1.ln1.hook_normalized", "z": "blocks.0.attn.hook_z", "pattern": "blocks.1.attn.hook_pattern"}
    own = architecture_of(model)
    points = {key: own.point(name) for key, name in names.items()}
    _, cache = model.run_with_cache(tokens, names_filter=list(points.values()))
    before = sum(len(point.fwd_hooks) for point in model.hook_dict.values())
    got = read_present(model, tokens, 1, names)
    assert got.keys() == names.keys()
    for key, point in points.items():
        assert torch.equal(got[key], cache[point]), key
    assert sum(len(point.fwd_hooks) for point in model.hook_dict.values()) == before, "no hook stays"
    assert torch.equal(model(tokens), model(tokens)), "and the model is as it was"


def test_a_hook_that_stays_silent_is_no_error():
    model, tokens = tiny("gpt2"), random_tokens()[None]
    got = read_present(model, tokens, 0, {"x": "blocks.0.ln1.hook_normalized", "later": "blocks.1.ln1.hook_normalized"})
    assert got.keys() == {"x"}, "the pass ends behind layer 0"
