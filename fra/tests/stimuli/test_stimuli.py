"""Documents: repeats, deranged controls, stripes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fra.errors import FraError
from fra.induction.status import STRIPES, contrast, head_status, stripe_attention
from fra.stimuli import repeated as stimuli
from fra.stimuli.padding import Texts, padded
from fra.tests import circuit


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 60), st.integers(0, 2**31), st.booleans())
def test_a_control_keeps_nothing_of_the_repeat(period: int, seed: int, natural: bool) -> None:
    rng = np.random.default_rng(seed)
    passage = rng.integers(0, 25, period) if natural else rng.choice(1000, period, replace=False)
    doc = stimuli.repeat(passage, 5000, rng, "x")
    first, second = doc.control[1 : period + 1], doc.control[period + 1 :]
    assert sorted(first.tolist()) == sorted(passage.tolist())
    assert (
        second.tolist() == passage.tolist() == doc.tokens[1 : period + 1].tolist() == doc.tokens[period + 1 :].tolist()
    )
    assert not bool((first == second).any()), "a token stayed in place"
    pairs = set(zip(passage[:-1].tolist(), passage[1:].tolist(), strict=True))
    assert not pairs & set(zip(first[:-1].tolist(), first[1:].tolist(), strict=True)), "a pair stayed together"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=4))
def test_documents_come_out_of_a_batch_as_they_went_in(ids: list[list[int]]) -> None:
    documents = [torch.tensor(document) for document in ids]
    texts = Texts.of(documents, [f"s{k}" for k in range(len(ids))])
    assert [document.tolist() for document in texts.documents()] == ids
    assert texts.real.sum(1).tolist() == list(texts.lengths) == list(map(len, ids))
    assert bool((texts.tokens == texts.tokens[:, :1])[~texts.real].all()), "padding is the document's first token"
    assert torch.equal(padded(documents, 12)[:, : texts.tokens.shape[1]], texts.tokens)
    assert texts.first(1).documents()[0].tolist() == ids[0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(16, 40), min_size=1, max_size=4), st.integers(0, 2**31))
def test_rows_and_keys_of_a_batch(periods: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = [stimuli.repeat(rng.choice(500, p, replace=False), 999, rng, str(p)) for p in periods]
    batch = stimuli.Batch.of(made)
    for document, own in zip(batch.documents(), made, strict=True):
        assert torch.equal(document, own.tokens)
    for d, t, s, moved in zip(batch.row_doc, batch.row_pos, batch.row_key, batch.row_moved, strict=True):
        period = int(batch.periods[d])
        assert period < int(t) <= 2 * period
        assert int(s) == int(t) - period + 1
        assert batch.tokens[d, t] == batch.tokens[d, t - period]
        assert batch.control[d, moved] == batch.tokens[d, s]
        assert int(moved) <= int(t)
    assert len(batch.row_doc) == sum(periods)


def test_a_passage_of_one_word_has_no_control() -> None:
    with pytest.raises(FraError, match="no deranged control"):
        stimuli.repeat(np.full(20, 7), 0, np.random.default_rng(0), "x")


def test_the_pool_leaves_out_extremes_and_special_tokens() -> None:
    frequency = np.arange(400, dtype=float)
    pool = stimuli.token_pool(frequency, special=[200])
    assert 200 not in pool
    assert pool.min() == 100
    assert pool.max() == 389
    with pytest.raises(FraError, match="too few"):
        stimuli.token_pool(np.arange(20.0))


@pytest.mark.parametrize("on", STRIPES)
def test_stripe_metrics_tell_stripes_apart(on: str) -> None:
    rng = np.random.default_rng(0)
    batch = stimuli.Batch.of([stimuli.repeat(rng.choice(500, p, replace=False), 999, rng, "x") for p in (17, 22)])
    keys = {
        "induction": batch.row_key,
        "duplicate": batch.row_key - 1,
        "previous": batch.row_pos - 1,
        "after": batch.row_key + 1,
        "before": batch.row_key - 2,
    }
    pattern = torch.zeros(2, 45, 45)
    pattern[batch.row_doc, batch.row_pos, keys[on]] = 1.0
    found = {name: float(value.mean()) for name, value in stripe_attention(pattern, batch).items()}
    for name in STRIPES:
        overlap = float((keys[name] == keys[on]).float().mean())  # the last rows of a copy, where stripes can meet
        assert found[name] == pytest.approx(1.0 if name == on else overlap)
        assert name == on or overlap < 0.1


def test_contrast_takes_the_larger_control() -> None:
    rng = np.random.default_rng(0)
    batch = stimuli.Batch.of([stimuli.repeat(rng.choice(500, 20, replace=False), 999, rng, "x")])
    repeated, control = torch.zeros(1, 41, 41), torch.zeros(1, 41, 41)
    repeated[batch.row_doc, batch.row_pos, batch.row_key] = 0.9
    control[batch.row_doc, batch.row_pos, batch.row_key] = 0.1
    control[batch.row_doc, batch.row_pos, batch.row_moved] += 0.3
    moved_too = batch.row_moved == batch.row_key
    expected = torch.where(moved_too, 0.9 - 0.4, 0.9 - 0.3)
    torch.testing.assert_close(
        contrast(repeated, control, batch)[0] if repeated.ndim == 4 else contrast(repeated, control, batch), expected
    )


def test_a_duplicate_token_head_is_no_induction_head() -> None:
    """The circuit with its key map reading the token itself: it attends to t - P, and has no contrast at t - P + 1."""
    model = circuit.model()
    attention = model.blocks[1].attn
    with torch.no_grad():
        attention.W_K[0] = 0.0
        token = torch.arange(circuit.D_VOCAB)
        attention.W_K[0, token, token] = 1.0
    batch = stimuli.Batch.of(stimuli.repeated_random(90, np.arange(48), circuit.N_CTX, circuit.BOS, ("d",)))
    status = head_status(model, batch, target="t", stimulus="s")["L1H0"]
    assert status.stripes["duplicate"] > 0.4
    assert status.status == "not a TIH"
