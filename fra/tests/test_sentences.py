"""Sentences out of sight, receivers and continuations: against transformers with a mask of its own, loops, scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM

import fra
from fra import sentences
from fra.errors import FraError
from fra.tests import models
from fra.tests.tiny_targets import one_sentence

SEGMENT = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 5, 5, 6, 6, 7])
TOKENS = models.random_tokens(len(SEGMENT), 4)
CUT = sentences.Segments(TOKENS, SEGMENT, ("bos", *["sentence"] * 7), ("", *"abcdefg"))


def masked_by_hand(kind: str, chosen: tuple[int, ...]) -> torch.Tensor:
    """Logits of transformers' own model under a mask [query, key] that is written out."""
    hf = AutoModelForCausalLM.from_pretrained(
        models.model_folder(kind), attn_implementation="eager", dtype=torch.float64
    )
    n = len(TOKENS)
    sees, near = torch.zeros(2, n, n, dtype=torch.bool)
    for t in range(n):
        for s in range(t + 1):
            sees[t, s] = not (int(SEGMENT[s]) in chosen and SEGMENT[t] > SEGMENT[s])
            near[t, s] = t - s < models.WINDOW
    masks = [
        torch.zeros(1, 1, n, n, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
        for seen in (sees, sees & near)
    ]
    windows = {"full_attention": masks[0], "sliding_attention": masks[1]}
    with torch.no_grad():
        return hf(TOKENS[None], attention_mask=windows if kind == "gemma2" else masks[0]).logits[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("chosen", [(2,), (1, 5)])
def test_a_suppressed_sentence_is_masked_at_later_rows(kind: str, chosen: tuple[int, ...]) -> None:
    model = models.tiny(kind, torch.float64)
    plain = model(TOKENS[None])[0].detach()
    with sentences.suppress(model, CUT, chosen if len(chosen) > 1 else chosen[0]):
        found = model(TOKENS[None])[0].detach()
        _, cache = model.run_with_cache(TOKENS[None], names_filter=["blocks.1.attn.hook_pattern"])
    torch.testing.assert_close(found, masked_by_hand(kind, chosen), rtol=0, atol=1e-5)
    until = int((min(chosen) >= SEGMENT).sum())
    assert torch.equal(found[:until], plain[:until])
    assert float((found[until:] - plain[until:]).abs().max()) > 1e-3
    pattern = cache["blocks.1.attn.hook_pattern"][0]
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]), rtol=0, atol=1e-6)
    assert not bool(pattern.triu(1).any())
    assert torch.equal(model(TOKENS[None])[0].detach(), plain)


def test_in_some_layers_alone() -> None:
    model = models.tiny("gpt2", torch.float64)
    with sentences.suppress(model, CUT, 2, layers=[1]):
        _, cache = model.run_with_cache(TOKENS[None])
    later, keys = SEGMENT > 2, SEGMENT == 2
    assert float(cache["blocks.1.attn.hook_pattern"][0][:, later][..., keys].abs().max()) == 0
    assert float(cache["blocks.0.attn.hook_pattern"][0][:, later][..., keys].min()) > 0


def test_receivers_are_those_of_loops() -> None:
    model = models.tiny("gpt2", torch.float64)
    _, cache = model.run_with_cache(TOKENS[None])
    apart = 3
    table = fra.sentences.receiver_heads(model, CUT, apart).set_index("head")
    for layer in range(2):
        for head in range(4):
            A = cache[f"blocks.{layer}.attn.hook_pattern"][0, head]
            scores = []
            for b in range(1, 8 - apart):
                keys = [s for s in range(15) if SEGMENT[s] == b]
                paid = [
                    np.mean([float(A[t, s]) for t in range(15) if SEGMENT[t] == a for s in keys])
                    for a in range(b + apart, 8)
                ]
                scores.append(np.mean(paid))
            row = table.loc[f"L{layer}H{head}"]
            assert row["kurtosis"] == pytest.approx(scipy.stats.kurtosis(scores), rel=1e-6)
            assert row["sentence"] == 1 + int(np.argmax(scores))
            assert row["received"] == pytest.approx(max(scores), rel=1e-6)
    assert list(table["kurtosis"]) == sorted(table["kurtosis"], reverse=True)


def test_importance_is_the_fall_of_the_answer() -> None:
    model, answer = models.tiny("gpt2", torch.float64), TOKENS[[3, 7]]
    whole = torch.cat([TOKENS, answer])
    found = sentences.importance(model, CUT, answer)
    assert list(found["segment"]) == list(range(1, 8))

    def log_prob(logits: torch.Tensor) -> float:
        steps = logits[len(TOKENS) - 1 : -1].detach().log_softmax(-1)
        return float(sum(steps[k, int(answer[k])] for k in range(2)))

    last = sentences.Segments(whole, torch.cat([SEGMENT, torch.tensor([8, 8])]), (*CUT.kinds, "sentence"), ("",) * 9)
    plain = log_prob(model(whole[None])[0])
    for number in (1, 4, 7):
        with sentences.suppress(model, last, number):
            fell = plain - log_prob(model(whole[None])[0])
        assert float(found.set_index("segment").loc[number, "nats"]) == pytest.approx(fell, abs=1e-9)
    assert found["nats"].abs().min() > 1e-6


def test_a_continuation_keeps_its_ids() -> None:
    """Ids that tokenizing their own text would not give back, and a character that two tokens share."""
    tokenizer = models.build_tokenizer()
    start = sentences.segments(tokenizer, "one and two make more than one.", bos=0)
    spelt = [tokenizer.convert_tokens_to_ids(letter) for letter in "one"]
    accent = tokenizer("é", add_special_tokens=False)["input_ids"]
    more = tokenizer(". two make six", add_special_tokens=False)["input_ids"]
    ids = [*spelt, *accent, *more]
    assert len(accent) == 2 and tokenizer("oneé. two make six", add_special_tokens=False)["input_ids"] != ids
    whole = sentences.continued(tokenizer, start, torch.tensor(ids))
    assert whole.tokens.tolist() == [*start.tokens.tolist(), *ids]
    assert whole.texts[len(start) :] == ("oneé. ", "two make six")
    at = whole.segment[len(start.tokens) :].tolist()
    first = len(spelt) + len(accent) + 1  # the full stop is of the first sentence
    assert at == [len(start)] * first + [len(start) + 1] * (len(ids) - first)
    with pytest.raises(FraError, match="no ids"):
        sentences.continued(tokenizer, start, torch.tensor([], dtype=torch.long))


def test_continuations_are_drawn_as_the_model_says() -> None:
    model = models.tiny("gpt2", torch.float64)
    prompt = TOKENS[:5]
    drawn = sentences.resample(model, prompt, 4000, 1, seed=3)[:, 0]
    expected = model(prompt[None])[0, -1].detach().softmax(-1)
    counts = torch.bincount(drawn, minlength=len(expected))
    often = expected > 0.01
    observed = [*counts[often].tolist(), int(counts[~often].sum())]
    chances = np.array([*expected[often].tolist(), float(expected[~often].sum())])
    assert scipy.stats.chisquare(observed, chances / chances.sum() * sum(observed)).pvalue > 1e-4
    two = sentences.resample(model, prompt, 3, 4, seed=5)
    assert torch.equal(two, sentences.resample(model, prompt, 3, 4, seed=5))
    assert not torch.equal(two, sentences.resample(model, prompt, 3, 4, seed=6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: sentences.suppress(m, CUT, 8), "segment 8 is not there"),
        (lambda m: sentences.suppress(m, CUT, 1, layers=[2]), "layer 2 is out of range"),
        (lambda m: sentences.receiver_heads(m, CUT, 7), "7 sentences"),
        (lambda m: sentences.receiver_heads(m, CUT, 0), "at least 1"),
        (lambda m: sentences.resample(m, TOKENS, 1, 40, seed=0), "beyond the model's context of 32"),
        (lambda m: sentences.resample(m, TOKENS, 0, 4, seed=0), "positive number"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(FraError, match=message) as caught:
        call(models.tiny("gpt2"))
    one_sentence(caught.value)


def test_another_length_is_refused_in_the_pass() -> None:
    model = models.tiny("gpt2")
    with sentences.suppress(model, CUT, 2), pytest.raises(FraError, match="documents of that length"):
        model(TOKENS[None, :9])
