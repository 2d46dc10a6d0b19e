"""What `fra.resolve` takes for a document and a head, and what it says of anything else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fra
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
