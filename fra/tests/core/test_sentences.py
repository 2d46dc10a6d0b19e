"""Sentence-level sensitivity: against loops, autograd and the model's own pattern; and how text is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fra import resolve
from fra.core.sentences import Sensitivity, segments, sensitivity, sentence_starts
from fra.errors import FraError
from fra.measures.identities.s01_sentences import identities
from fra.tests import models

LAYER, HEAD = 0, 2
SEGMENT = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3, 3, 3])
PRECISION = {"llama": 1e-6, "gemma2": 1e-6}  # whose softmax and norms in transformers are of single precision
KINDS = ("gpt2", "llama", "gemma2", "pythia")  # gemma2 caps its scores, pythia and llama rotate


def of(kind: str, segment: Tensor = SEGMENT) -> Sensitivity:
    hook = f"blocks.{LAYER}.hook_resid_pre"
    sae = models.tiny_sae(hook, dtype="float64")
    tokens = models.random_tokens(len(segment), 1)
    return sensitivity(models.tiny(kind, torch.float64), sae, tokens, segment, LAYER, HEAD)


def by_loops(one: Sensitivity, i: int, j: int) -> Tensor:
    """The definition, written out, from the model's own pattern and scores and `ResolvedHead.channel`."""
    frozen, F = one.resolved.frozen, one.resolved.channel(i, j)
    A, S = frozen.pattern[0, HEAD], frozen.model_scores[0, HEAD]
    n, T = one.n, len(one.segment)
    phi = torch.zeros(n, n, dtype=torch.float64)
    for t in range(T):
        a = int(one.segment[t])
        slope = [1.0 if frozen.softcap is None else 1 - (float(S[t, u]) / frozen.softcap) ** 2 for u in range(t + 1)]
        mean = sum(float(A[t, u]) * slope[u] * float(F[t, u]) for u in range(t + 1))
        for s in range(t + 1):
            part = float(A[t, s]) * (slope[s] * float(F[t, s]) - mean)
            phi[a, int(one.segment[s])] += part / int((one.segment == a).sum())
    return phi


@pytest.mark.parametrize("kind", KINDS)
def test_phi_is_its_definition_and_the_derivative(kind: str) -> None:
    one = of(kind)
    strongest = one.resolved.channels(n=3)
    phi = one.phi(strongest)
    frozen = one.resolved.frozen
    assert (frozen.softcap is not None) == (kind == "gemma2")
    for k, (i, j) in enumerate(strongest[["q_feature", "k_feature"]].to_numpy().tolist()):
        close = PRECISION.get(kind, 1e-10)
        torch.testing.assert_close(phi[..., k], by_loops(one, i, j), rtol=close, atol=close)
        F, S = one.resolved.channel(i, j), one.resolved.scores()

        def attention(gain: Tensor, F: Tensor = F, S: Tensor = S) -> Tensor:
            capped = frozen.cap(S.masked_fill(~frozen.mask, 0.0) + gain * F)
            A = capped.masked_fill(~frozen.mask, -torch.inf).softmax(-1)
            return torch.stack(
                [
                    torch.stack(
                        [
                            A[one.segment == a][:, one.segment == b].sum() / (one.segment == a).sum()
                            for b in range(one.n)
                        ]
                    )
                    for a in range(one.n)
                ]
            )

        zero = torch.zeros((), dtype=torch.float64)
        derivative = torch.autograd.functional.jacobian(attention, zero)
        torch.testing.assert_close(phi[..., k], derivative, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(one.attention(), attention(zero), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_the_strongest_are_those_of_an_enumeration_of_all_channels(kind: str) -> None:
    one = of(kind)
    sparse = one.resolved.to_sparse()
    (t, s, i, j), F = sparse.indices(), sparse.values()
    for a, b in ((3, 1), (2, 2), (1, 0)):
        table = torch.zeros(one.resolved.d_sae, one.resolved.d_sae, dtype=torch.float64)
        A = one.resolved.frozen.pattern[0, HEAD]
        capped = one.resolved.frozen.model_scores[0, HEAD]
        cap = one.resolved.frozen.softcap
        slope = torch.ones_like(A) if cap is None else 1 - (capped / cap) ** 2
        member = (one.segment == b).double()
        weight = (A * slope * (member - (A @ member)[:, None])) * (one.segment == a)[:, None] / (one.segment == a).sum()
        table.index_put_((i, j), weight[t, s] * F, accumulate=True)
        found = one.strongest(a, b, 7)
        order = table.abs().flatten().argsort(descending=True)[:7]
        close = PRECISION.get(kind, 1e-10)
        assert found["value"].to_list() == pytest.approx(table.flatten()[order].tolist(), rel=close, abs=close)
        phi = one.phi(found)[a, b]
        assert phi.tolist() == pytest.approx(found["value"].to_list(), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_identities_hold_in_the_models_own_pattern(kind: str) -> None:
    sae = models.tiny_sae(f"blocks.{LAYER}.hook_resid_pre", dtype="float64")
    tokens, model = models.random_tokens(len(SEGMENT), 2), models.tiny(kind, torch.float64)
    for row in identities(model, sae, tokens, SEGMENT, LAYER, ("test", kind)):
        assert row["finite difference"] < (1e-4 if kind in PRECISION else 1e-6)
        assert max(row["conservation"], row["splits and merges"]) < 1e-10
        assert row["token sensitivities"] < PRECISION.get(kind, 1e-10)
        assert row["without the row's mean"] > 1e-2


def test_single_precision_conserves_too() -> None:
    model, sae = models.tiny("gpt2"), models.tiny_sae("blocks.0.ln1.hook_normalized")
    one = Sensitivity(resolve(model, sae, models.random_tokens(len(SEGMENT)), 0, 1), SEGMENT)
    phi = one.phi(one.resolved.channels(n=4))
    assert float(phi.sum(1).abs().max()) < 1e-12 * float(phi.abs().max())
    of_all = one.of_scores(one.resolved.blocks()["feature", "feature"])
    every = one.phi(one.resolved.channels()).sum(-1)
    torch.testing.assert_close(every, of_all, rtol=1e-4, atol=1e-6)


def test_a_text_is_cut_into_bos_prompt_and_sentences() -> None:
    tokenizer = models.build_tokenizer()
    prompt, text = "Add one and two. ", "One and two make three.  Is “four” more? Yes!\n\nSo said Mr. Five, café."
    cut = segments(tokenizer, text, prompt=prompt, bos=0)
    assert cut.kinds == ("bos", "prompt", "sentence", "sentence", "sentence", "sentence")
    assert cut.texts[1:] == (
        prompt,
        "One and two make three.  ",
        "Is “four” more? ",
        "Yes!\n\n",
        "So said Mr. Five, café.",
    )
    assert cut.tokens.tolist() == [0, *tokenizer(prompt + text, add_special_tokens=False)["input_ids"]]
    for k in range(1, len(cut)):
        own = tokenizer.decode(cut.tokens[cut.segment == k].tolist())
        assert own.strip() == cut.texts[k].strip()
    assert int(cut.segment[0]) == 0
    assert int((cut.segment == 0).sum()) == 1
    steps = cut.segment.diff()
    assert bool(((steps == 0) | (steps == 1)).all())


def test_starts_may_be_given_and_tokens_across_a_start_are_of_their_first_letter() -> None:
    tokenizer = models.build_tokenizer()
    text = "one and two and three"
    cut = segments(tokenizer, text, starts=[0, 7, 8, 12])  # " two" begins with the space at 7
    assert [tokenizer.decode(cut.tokens[cut.segment == k].tolist()) for k in range(len(cut))] == [
        "one and",
        " two",
        " and three",
    ]
    assert cut.texts == ("one and", "two ", "and three")


def test_where_sentences_begin() -> None:
    text = 'He paid $3.50 to J. Smith, i.e. too much. "Why?" she said... (No.) End'
    starts = sentence_starts(text)
    assert [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)] == [
        "He paid $3.50 to J. Smith, i.e. too much. ",
        '"Why?" ',
        "she said... ",
        "(No.) ",
        "End",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"text": "  "}, "empty"),
        ({"text": "one two", "starts": [1]}, "ascend from 0"),
        ({"text": "one two", "starts": [0, 9]}, "within the text"),
        ({"text": "one", "tokenizer": object()}, "no offsets"),
    ],
)
def test_text_that_cannot_be_cut(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(FraError, match=says):
        segments(**{"tokenizer": models.build_tokenizer(), **arguments})  # type: ignore[arg-type]


def test_bad_segments_and_channels() -> None:
    for segment in ([0, 2, 2], [1, 1, 1], [0, 1, 0], [0, 0]):
        with pytest.raises(FraError, match="segments must be"):
            Sensitivity(of("gpt2", torch.tensor([0, 0, 0])).resolved, torch.tensor(segment))
    one = of("gpt2")
    for channels in ([[0, 96]], [[0, 1, 2]], torch.zeros(2, 2)):
        with pytest.raises(FraError, match="feature ids"):
            one.phi(channels)
    with pytest.raises(FraError, match="numbered from 0"):
        one.strongest(4, 0, 1)
    with pytest.raises(FraError, match="positive"):
        one.strongest(0, 0, 0)
