"""What a target says of its tokens is what the model gets: BOS, special tokens in text, ids without a token."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config

import fra
from fra import targets
from fra.errors import FraError
from fra.stimuli.natural import natural_documents
from fra.stimuli.repeated import token_pool
from fra.stimuli.sets import mean_prediction
from fra.targets import tokens as target_tokens
from fra.tests.models import BOS, D_VOCAB, build_model
from fra.tests.tiny_targets import refused, signed_axes, write_target, write_text

HOOK = "blocks.1.ln1.hook_normalized"


def target(folder: Path, model_keys: str = 'processing = "none"', config: Any = None, **texts: str) -> targets.Target:
    if not (folder / "m").exists():
        build_model("gpt2", folder / "m", config=config)
        signed_axes(folder / "s", HOOK)
    write_text(folder / "text", texts or None)
    file = write_target(folder, folder / "m", {HOOK: folder / "s"}, folder / "text", model_keys=model_keys)
    return fra.load_target(file)


def without_bos(folder: Path) -> None:
    """As Qwen 2.5: an end of text and no beginning."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if file.exists():
            file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": None, "eos_token": BOS}))
    assert AutoTokenizer.from_pretrained(folder).bos_token_id is None


def test_a_tokenizer_without_bos_is_asked_itself(tmp_path: Path) -> None:
    """TransformerLens puts EOS in its place."""
    target(tmp_path)
    without_bos(tmp_path / "m")
    file = tmp_path / "tiny.toml"
    refused(file, "tokenizer of 'tiny' has no BOS token", "prepend_bos = false")
    without = target(tmp_path, 'processing = "none"\nprepend_bos = false')
    assert without.bos is None
    assert without.tokens("one and two").tolist() == without.encode("one and two")


@pytest.mark.parametrize("prepend", [True, False])
def test_tokens_are_what_the_model_makes_of_the_text(prepend: bool, tmp_path: Path) -> None:
    given = target(tmp_path, f'processing = "none"\nprepend_bos = {str(prepend).lower()}')
    text = "three and four make more than three, said six."
    ids = AutoTokenizer.from_pretrained(tmp_path / "m")(text, add_special_tokens=False)["input_ids"]
    expected = [0, *ids] if prepend else ids
    assert given.tokens(text).tolist() == expected
    assert given.model.to_tokens(text)[0].tolist() == expected
    assert given.tokens(text, 4).tolist() == expected[:4]
    long = " ".join([text] * 9)
    assert len(given.tokens(long)) == int(given.model.cfg.n_ctx)
    assert natural_documents(given, 2)[0][0] == expected[0] or not prepend


def test_a_special_token_that_the_text_spells_is_text(tmp_path: Path) -> None:
    given = target(tmp_path, **{f"a-{n}": BOS + "one and two make more than one." for n in range(8)})
    tokens = natural_documents(given, 1)[0].tolist()
    assert tokens.count(given.bos) == 1
    assert given.tokenizer.decode(tokens[1:]).startswith(BOS)


def test_rows_of_the_embedding_that_are_no_tokens_leave_the_pool(tmp_path: Path) -> None:
    wide = GPT2Config(vocab_size=384, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    given = target(tmp_path, config=wide)
    n_tokens = len(given.tokenizer)
    assert n_tokens < 384
    frequency = mean_prediction(given.model, given)
    assert np.isnan(frequency[n_tokens:]).all() and np.isfinite(frequency[:n_tokens]).all()
    pool = token_pool(frequency, [0])
    assert len(pool) > 0.6 * n_tokens and pool.max() < n_tokens
    # quantiles are those of the tokens alone
    assert pool.tolist() == token_pool(frequency[:n_tokens], [0]).tolist()


def test_ids_beyond_the_embedding_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    """In the last document: those that admission measures on may be without."""
    texts = {f"a-{n}": "one and two make more than one, said two." for n in range(9)} | {
        "z-1": "six and seven make six"
    }
    plain = target(tmp_path / "plain", **texts)
    highest = {name: max(plain.encode(text)) for name, text in texts.items()}
    assert highest["z-1"] > highest["a-0"]
    narrow = GPT2Config(vocab_size=highest["z-1"], n_positions=32, n_embd=32, n_layer=2, n_head=4)
    given = target(tmp_path / "narrow", config=narrow, **texts)
    with pytest.raises(FraError, match=f"makes the id {highest['z-1']} of the text 'six and"):
        targets.admit(given)


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    target(tmp_path)
    for file in (tmp_path / "m").glob("*token*"):
        file.unlink()
    refused(tmp_path / "tiny.toml", "the model of 'tiny' has no tokenizer that can be read", "tokenizer files")


def test_long_texts_are_read_as_far_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = target(tmp_path).tokenizer
    read = 0

    def counting(text: str, **options: Any) -> Any:
        nonlocal read
        read += len(text)
        return tokenizer(text, **options)

    text = "one and two make more than one, said two. " * 5000
    assert target_tokens.encode(counting, text, 48) == target_tokens.encode(tokenizer, text)[:48]
    assert read < 0.4 * len(text)
    monkeypatch.setattr(target_tokens, "AT_LEAST", 8)
    monkeypatch.setattr(target_tokens, "CHARACTERS", 1)
    draw = random.Random(0)
    for _ in range(40):  # cuts fall within words and tokens
        words = "".join(
            draw.choice(["one", "two", " and", " seven", "\N{GRINNING FACE}", "  ", "xyz"]) for _ in range(90)
        )
        for limit in (1, 5, 17):
            assert target_tokens.encode(tokenizer, words, limit) == target_tokens.encode(tokenizer, words)[:limit]


def test_the_pool_needs_no_frequency_of_what_is_no_token() -> None:
    frequency = np.arange(200.0)
    frequency[150:] = np.nan
    assert token_pool(frequency).tolist() == token_pool(np.arange(150.0)).tolist()
    assert torch.tensor(token_pool(frequency)).max() < min(150, D_VOCAB)


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    given = target(tmp_path, **{"a-1": "\ufeffone and two make more than one.", "b-1": "three"})
    assert [document.text[:3] for document in given.documents()] == ["one", "thr"]
    file = tmp_path / "tiny.toml"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert fra.load_target(file).name == "tiny"


def test_a_tokenizer_without_any_special_token_is_no_fault_of_the_text(tmp_path: Path) -> None:
    """What is missing is said with what to write; with that line the target is this model's own, ids and all."""
    target(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = tmp_path / "m" / name
        if file.exists():
            own = json.loads(file.read_text())
            file.write_text(json.dumps({k: v for k, v in own.items() if not k.endswith("_token")}))
    assert AutoTokenizer.from_pretrained(tmp_path / "m").all_special_tokens == []
    said = refused(tmp_path / "tiny.toml", "tokenizer of 'tiny' has no BOS token", "prepend_bos = false")
    assert "vocabulary" not in said
    given = target(tmp_path, 'processing = "none"\nprepend_bos = false')
    targets.admit(given)
    ids = AutoTokenizer.from_pretrained(tmp_path / "m")("one and two")["input_ids"]
    assert given.tokens("one and two").tolist() == ids == given.model.to_tokens("one and two")[0].tolist()
