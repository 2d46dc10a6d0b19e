"""Wherever a head is taken it may be named: "L1H4" does what layer=1, head=4 does; and what is no head, or no document,
is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fra
from fra import attribution, interventions
from fra.core.sentences import sensitivity
from fra.errors import FraError
from fra.tests.models import random_tokens, tiny, tiny_sae
from fra.tests.tiny_targets import HEAD_OUTPUT, NORMALIZED, one_sentence

NUMBERS: dict[str, Any] = {"layer": 1, "head": 2}
NAME: dict[str, Any] = {"head": "L1H2"}
TOKENS = random_tokens(12)


def logits(change: Any) -> torch.Tensor:
    with change, torch.no_grad():
        found: torch.Tensor = tiny("gpt2")(TOKENS[None])
    return found


def intervened(make: Callable[..., Any], *arguments: Any, **more: Any) -> Callable[..., torch.Tensor]:
    return lambda **head: logits(make(tiny("gpt2"), *arguments, **head, **more))


SAE = {"dictionary": tiny_sae(NORMALIZED)}
PAIRS = [(i, j) for i in range(40) for j in range(40)]
TAKES_A_HEAD = {
    "resolve": lambda **head: fra.resolve(tiny("gpt2"), tiny_sae(NORMALIZED), TOKENS, **head).scores().tril(),
    "resolve_output": lambda **head: fra.resolve_output(tiny("gpt2"), tiny_sae(NORMALIZED), TOKENS, **head).z(),
    "sensitivity": lambda **head: sensitivity(
        tiny("gpt2"), tiny_sae(NORMALIZED), TOKENS, torch.arange(12) // 4, **head
    ).attention(),
    "head_outputs": lambda **head: interventions.head_outputs(tiny("gpt2"), TOKENS[None], **head),
    "remove": intervened(fra.remove, PAIRS, **SAE),
    "scale": intervened(interventions.scale, PAIRS, 3.0, **SAE),
    "keep_only": intervened(interventions.keep_only, PAIRS, **SAE),
    "scale_blocks": intervened(interventions.scale_blocks, [("feature", "bias")], **SAE),
    "scale_features": intervened(interventions.scale_features, list(range(40)), "query", **SAE),
    "remove_output": intervened(interventions.remove_output, list(range(40)), **SAE),
    "scale_output": intervened(interventions.scale_output, list(range(40)), 2.0, **SAE),
    "set_output": intervened(interventions.set_output, torch.ones(8)),
    "zero_ablate": intervened(interventions.zero_ablate),
    "mean_ablate": intervened(interventions.mean_ablate, TOKENS[None]),
    "patch_output": intervened(interventions.patch_output, TOKENS.flip(0)[None]),
    "patch_pattern": intervened(interventions.patch_pattern, TOKENS.flip(0)[None]),
}


@pytest.mark.parametrize("name", TAKES_A_HEAD)
def test_a_name_does_what_numbers_do(name: str) -> None:
    do = TAKES_A_HEAD[name]
    by_number = do(**NUMBERS)
    assert torch.equal(do(**NAME), by_number)
    assert torch.equal(do(layer=1, head="L1H2"), by_number)
    assert not torch.equal(do(head="L1H3"), by_number), "another head is another result"
    for wrong, says in (
        ({"head": "L9H0"}, "out of range"),
        ({"head": "H2"}, "is not a head"),
        ({"head": 2}, "say which"),
    ):
        with pytest.raises(FraError, match=says) as caught:
            do(**wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(FraError, match="lies in layer 1, and layer=0"):
        do(layer=0, head="L1H2")


def test_attribution_takes_names() -> None:
    sae, features = tiny_sae(HEAD_OUTPUT), torch.tensor([0, 5])
    by_number = attribution.by_source(tiny("gpt2"), sae, TOKENS, features, 2)
    assert torch.equal(attribution.by_source(tiny("gpt2"), sae, TOKENS, features, "L1H2"), by_number)
    seen = attribution.observe(tiny("gpt2"), sae, TOKENS)
    assert torch.equal(seen.sources(seen.live, "L1H2"), seen.sources(seen.live, 2))
    with pytest.raises(FraError, match="lies in layer 0"):
        seen.sources(seen.live, "L0H2")


def test_a_census_takes_names() -> None:
    model, sae = tiny("gpt2"), tiny_sae(NORMALIZED)
    documents = [TOKENS, random_tokens(9, 3)]
    whole = fra.census(model, sae, documents, 1)
    few = fra.census(model, sae, documents, heads=["L1H2", "L1H0"])
    assert few.heads == (2, 0)
    assert fra.census(model, sae, documents, heads="L1H2").heads == (2,)
    expected = whole.channels(n=7, heads=[2])
    for found in (
        whole.channels(n=7, head="L1H2"), whole.channels(n=7, head=2), whole.channels(n=7, heads=["L1H2"]),
        whole.channels(n=7, heads="L1H2"), few.channels(n=7, head="L1H2"),
    ):  # fmt: skip
        assert found.equals(expected)
    q, k = int(expected.q_feature[0]), int(expected.k_feature[0])
    assert whole.examples("L1H2", q, k).equals(whole.examples(2, q, k))
    for wrong, says in (
        ({"heads": ["L1H2", "L0H2"]}, "several layers"), ({}, "say which layer"), ({"heads": []}, "names none"),
        ({"layer": 0, "heads": ["L1H2"]}, "lies in layer 1"), ({"heads": [2]}, "say which head"),
    ):  # fmt: skip
        with pytest.raises(FraError, match=says):
            fra.census(model, sae, documents, **wrong)


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ("a text", "documents is one text"),
        (["a text", "another"], "not a text"),
        (TOKENS, r"of shape \[12\]: give a list of documents"),
        (TOKENS.numpy(), r"of shape \[12\]"),
        (TOKENS.tolist(), "list of single token ids"),
        (None, "a NoneType"),
        ([], "there are no documents"),
        ([TOKENS[None]], r"document 0: .*give tokens\[0\]"),
        ([TOKENS.float()], "document 0: .*torch.float32"),
    ],
)
def test_what_is_no_list_of_documents_is_one_sentence(documents: Any, says: str) -> None:
    with pytest.raises(FraError, match=says) as caught:
        fra.census(tiny("gpt2"), tiny_sae(NORMALIZED), documents, 1)
    one_sentence(caught.value)


def test_lists_arrays_and_tensors_of_documents_are_one_census() -> None:
    two = torch.stack([TOKENS, random_tokens(12, 3)])
    expected = fra.census(tiny("gpt2"), tiny_sae(NORMALIZED), list(two), 1).channels(n=9)
    for documents in (two, two.numpy(), two.tolist(), [document.numpy() for document in two]):
        assert fra.census(tiny("gpt2"), tiny_sae(NORMALIZED), documents, 1).channels(n=9).equals(expected)
    with pytest.raises(FraError, match=r"give tokens\[0\]"):
        fra.resolve(tiny("gpt2"), tiny_sae(NORMALIZED), two[:1], head="L1H2")


def test_what_is_removed_may_be_a_list_an_array_or_a_table() -> None:
    model, sae = tiny("gpt2"), tiny_sae(NORMALIZED)
    table = fra.resolve(model, sae, TOKENS, head="L1H2").channels(n=5)
    pairs = table[["q_feature", "k_feature"]].to_numpy()
    expected = logits(fra.remove(model, table, head="L1H2", dictionary=sae))
    for channels in (pairs, pairs.tolist(), torch.tensor(pairs)):
        assert torch.equal(logits(fra.remove(model, channels, head="L1H2", dictionary=sae)), expected)
    for wrong, says in ((pairs[0], "of shape"), (pairs / 2, "float64"), ([], "no channels")):
        with pytest.raises(FraError, match=says) as caught:
            fra.remove(model, wrong, head="L1H2", dictionary=sae)
        one_sentence(caught.value)
