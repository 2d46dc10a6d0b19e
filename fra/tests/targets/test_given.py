"""`fra.load`: a target without a target file is the target that a file would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fra
from fra.errors import FraError
from fra.tests.tiny_targets import one_sentence

TEXTS = {"a": "the cat sat on the mat", "b": "one bird and another bird"}


@pytest.fixture(scope="module")
def mini() -> Any:
    return fra.load_target("mini")


def test_it_does_what_the_target_of_a_file_does(mini: Any) -> None:
    hooks = [hook for hook in mini.dictionaries if "ln1" in hook]
    given = fra.load(mini.model, [mini.dictionaries[hook] for hook in hooks], TEXTS)
    assert isinstance(given, fra.Target)
    assert (given.n_layers, given.n_heads, given.heads) == (mini.n_layers, mini.n_heads, mini.heads)
    assert given.resolvable == mini.resolvable
    assert list(given.dictionaries) == hooks
    assert torch.equal(given.tokens(TEXTS["a"]), mini.tokens(TEXTS["a"]))
    assert given.processing == mini.processing
    assert [(d.name, d.source, d.text) for d in given.documents()] == [(n, n, t) for n, t in TEXTS.items()]
    hook, sae = given.dictionary_for(1)
    expected = fra.resolve(mini.model, sae, mini.tokens(TEXTS["a"]), head="L1H4").scores()
    assert torch.equal(fra.resolve(given.model, sae, given.tokens(TEXTS["a"]), head="L1H4").scores(), expected)
    admitted = fra.targets.admit(given)
    assert [quality.hook for quality in admitted.dictionaries] == hooks
    others = fra.load(mini.model, sae, ["one text", "another"])
    assert [document.name for document in others.documents()] == ["text-1", "text-2"]
    assert others.fingerprint() != given.fingerprint()
    assert "mine" in given._repr_html_()
    assert hook in repr(given)
    with pytest.raises(FraError, match="cannot be loaded again in float64"):
        given.in_double()


def test_head_outputs_say_what_they_are(mini: Any) -> None:
    sae = mini.dictionaries["blocks.1.attn.hook_z"]
    seen = fra.attribution.observe(mini.model, sae, [mini.tokens(text) for text in TEXTS.values()])
    n_pos = max(len(mini.tokens(text)) for text in TEXTS.values())
    assert repr(seen) == (
        f"HeadOutputs(2 documents of at most {n_pos} positions, 8 heads, {len(seen.live)} live entries of "
        f"{sae.cfg.d_sae} features)"
    )
    assert f"{len(seen.live)} (" in seen._repr_html_()


def test_what_does_not_fit_is_said_in_a_sentence(mini: Any) -> None:
    _, sae = mini.dictionary_for(1)
    for model, dictionary, texts, words in (
        (mini.model, sae, "one text", "several documents"),
        (mini.model, sae, [], "no document"),
        (mini.model, sae, ["text", " "], "'text-2' is empty"),
        (mini.model, "sae", ["text"], "not a SAELens dictionary"),
        (mini.model, [sae, mini.seed_dictionaries(sae.cfg.metadata.hook_name)[0]], ["text"], "two dictionaries at"),
    ):
        with pytest.raises(FraError, match=words) as caught:
            fra.load(model, dictionary, texts)
        assert "\n" not in str(caught.value)


def test_arguments_that_make_no_target_are_said_in_a_sentence(mini: Any) -> None:
    _, sae = mini.dictionary_for(1)
    for arguments, words in (
        ({"name": "a\x00b"}, r"name: must be letters, digits, dots"),
        ({"name": "a\nb\u202e"}, r"name: must be letters, digits, dots"),
        ({"name": ""}, r"name: must be letters, digits, dots"),
    ):
        with pytest.raises(FraError, match=words) as caught:
            fra.load(mini.model, sae, ["text"], **arguments)
        one_sentence(caught.value)
