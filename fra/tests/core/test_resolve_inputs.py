"""What `fra.resolve` takes for a document and a head, and what it says of anything else."""

from __future__ import annotations

import doctest
import re
from typing import Any

import pytest
import torch

import fra
from fra.architectures.known import one_document
from fra.core import resolve as resolving
from fra.errors import FraError
from fra.tests.models import random_tokens, tiny, tiny_sae

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, torch.Tensor]:
    return tiny("gpt2"), tiny_sae(HOOK), random_tokens(9)


def test_a_head_by_name_and_tokens_as_lists_or_arrays_are_the_same_head(parts: tuple[Any, Any, torch.Tensor]) -> None:
    model, sae, tokens = parts
    expected = fra.resolve(model, sae, tokens, layer=1, head=3).scores()
    for given in (tokens, tokens.tolist(), tokens.numpy(), tokens.int()):
        found = fra.resolve(model, sae, given, head="L1H3")
        assert torch.equal(found.scores(), expected)
    assert re.match(r"ResolvedHead\(L1H3, 9 positions, \d+ live entries of \d+ features\)$", repr(found))
    assert not torch.equal(fra.resolve(model, sae, tokens, head="L1H2").scores(), expected)


@pytest.mark.parametrize(
    ("tokens", "place", "words"),
    [
        ("the cat", {"head": "L1H3"}, "not a text: give the ids"),
        (None, {"head": "L1H3"}, "not a NoneType"),
        ([[1, 2, 3]], {"head": "L1H3"}, r"of shape \[1, 3\]"),
        ([[1, 2], [3, 4]], {"head": "L1H3"}, r"of shape \[2, 2\]"),
        ([0.5, 1.0], {"head": "L1H3"}, "float"),
        ([1, 2, 3], {}, 'layer=1, head=4, or head="L1H4"'),
        ([1, 2, 3], {"layer": 1}, 'layer=1, head=4, or head="L1H4"'),
        ([1, 2, 3], {"layer": 0, "head": "L1H3"}, "lies in layer 1, and layer=0"),
        ([1, 2, 3], {"head": "1.3"}, "as in L1H3"),
        ([1, 2, 3], {"head": "L1H9"}, "head"),
    ],
)
def test_anything_else_is_answered_in_a_sentence(
    parts: tuple[Any, Any, torch.Tensor], tokens: Any, place: dict[str, Any], words: str
) -> None:
    with pytest.raises(FraError, match=words) as caught:
        fra.resolve(*parts[:2], tokens, **place)
    assert "\n" not in str(caught.value)


def test_tables_have_the_tokens_where_asked(
    parts: tuple[Any, Any, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sae, tokens = parts
    plain = fra.resolve(model, sae, tokens, head="L1H3")
    monkeypatch.setattr(resolving, "text_of", lambda tokenizer: lambda token: f"<{token}>")
    m = fra.resolve(model, sae, tokens, head="L1H3")
    top = m.top(20, text=True)
    assert top["q_token"].tolist() == [f"<{tokens[at]}>" for at in top["q_pos"]]
    assert top["k_token"].tolist() == [f"<{tokens[at]}>" for at in top["k_pos"]]
    assert top.drop(columns=["q_token", "k_token"]).equals(plain.top(20))
    channels = m.channels(n=30, text=True)
    assert channels.drop(columns=["q_token", "k_token"]).equals(plain.channels(n=30))
    activation = sae.encode(m.frozen.x[0])  # [pos, d_sae]
    for side in ("q", "k"):
        for feature, token in zip(channels[f"{side}_feature"], channels[f"{side}_token"], strict=True):
            assert token == f"<{tokens[activation[:, feature].argmax()]}>"
    bare = fra.ResolvedHead(m.frozen, m.codes, 3)
    with pytest.raises(FraError, match="not known as text"):
        bare.top(3, text=True)
    page = m._repr_html_()
    assert "L1H3" in page
    assert "&lt;0&gt;" in page, "tokens are escaped"


def test_a_census_of_one_head_by_name_and_what_objects_say(parts: tuple[Any, Any, torch.Tensor]) -> None:
    model, sae, tokens = parts
    seen = fra.census(model, sae, [tokens, tokens[:5]], layer=1)
    expected = seen.channels(n=7, heads=[2])
    assert seen.channels(n=7, head="L1H2").equals(expected)
    assert seen.channels(n=7, head=2).equals(expected)
    assert not seen.channels(n=7, head=1).equals(expected)
    for wrong, words in (({"head": "L0H2"}, "layer=1 is asked for"), ({"head": 2, "heads": [2]}, "not both")):
        with pytest.raises(FraError, match=words):
            seen.channels(n=7, **wrong)
    assert repr(seen).startswith("Census(layer 1, heads [0, 1, 2, 3], 2 documents, 14 positions, ")
    assert "L1H3" in seen._repr_html_()
    removal = fra.remove(model, seen.channels(n=3, head=2), layer=1, head=2, dictionary=sae)
    assert "changes blocks.1.attn.hook_attn_scores; reads " in repr(removal)
    assert "<td style='text-align:left'>no</td>" in removal._repr_html_()
    with removal:
        assert "<td style='text-align:left'>yes</td>" in removal._repr_html_()


def test_the_example_of_resolve_runs() -> None:
    """`help(fra.resolve)`: what it shows is what happens."""
    (example,) = doctest.DocTestFinder(recurse=False).find(
        fra.resolve, "fra.resolve", globs={"fra": fra, "torch": torch}
    )
    assert len(example.examples) > 8
    said: list[str] = []
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)
    for word in ("[q_pos, k_pos]", "nats", "Raises FraError", "head=", "slot:"):
        assert word in (fra.resolve.__doc__ or "")


def test_several_documents_are_refused_with_what_to_give() -> None:
    with pytest.raises(FraError, match=r"torch\.int64 of shape \[2, 3\]: give one document's integer ids"):
        one_document(torch.ones(2, 3, dtype=torch.long))
