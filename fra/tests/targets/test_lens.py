"""TransformerLens without HookedTransformer, as version 4 is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformer_lens

import fra
from fra.checkpoints import lens
from fra.targets import models
from fra.tests.models import load_model, model_folder, random_tokens, tiny_sae
from fra.tests.tiny_targets import one_sentence


@pytest.fixture
def without_hooked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    lens.model_names.cache_clear()
    for module in (lens, models):
        monkeypatch.setattr(module, "loading_from_pretrained", None)
    yield
    lens.model_names.cache_clear()


@pytest.mark.usefixtures("without_hooked")
def test_models_of_the_bridge_resolve() -> None:
    model = load_model(model_folder("llama"))
    resolved = fra.resolve(model, tiny_sae("blocks.1.ln1.hook_normalized"), random_tokens(), head="L1H2")
    shown = resolved.frozen.model_scores[0, 2].masked_fill(~resolved.frozen.mask, -torch.inf)
    torch.testing.assert_close(resolved.scores(), shown, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_hooked")
@pytest.mark.parametrize("kind", ["gpt_neo", "no_layernorm"])
def test_models_that_need_the_other_class_are_refused_in_a_sentence(kind: str) -> None:
    with pytest.raises(fra.errors.FraError, match="TransformerLens 4 has not: install transformer-lens<4") as caught:
        load_model(model_folder(kind))
    one_sentence(caught.value)


def test_short_names_are_those_of_either_version(monkeypatch: pytest.MonkeyPatch, without_hooked: None) -> None:
    other = ModuleType("transformer_lens.supported_models")
    vars(other)["MODEL_ALIASES"] = {"EleutherAI/pythia-70m": ["Pythia-70M", "pythia"], "gpt2": ["gpt2-small"]}
    monkeypatch.setitem(sys.modules, other.__name__, other)
    monkeypatch.setattr(transformer_lens, "supported_models", other, raising=False)
    names = lens.model_names()
    assert names["pythia-70m"] == names["eleutherai/pythia-70m"] == "EleutherAI/pythia-70m"
    assert names["gpt2-small"] == "gpt2"


def test_its_absence_is_found_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens 4 raises ImportError for the names that it has no more."""
    bare = ModuleType("transformer_lens")
    monkeypatch.setitem(sys.modules, "transformer_lens", bare)
    other = ModuleType("lens_of_4")
    exec(compile(Path(lens.__file__).read_text(), lens.__file__, "exec"), vars(other))
    assert vars(other)["loading_from_pretrained"] is None
    assert not isinstance(bare, vars(other)["HookedTransformer"])
