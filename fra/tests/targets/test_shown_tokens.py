"""Tokens as they are shown: no byte is lost, nor a space."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fra.dictionaries.texts import text_of
from fra.tests.models import build_tokenizer


def test_bytes_that_are_no_whole_character_are_told_apart() -> None:
    tokenizer = build_tokenizer()
    show = text_of(tokenizer)
    emoji = [show(token) for token in tokenizer.encode("\N{GRINNING FACE}")]
    assert emoji == [r"\xf0", r"\x9f", r"\x98", r"\x80"]
    assert [show(token) for token in tokenizer.encode("one and")] == ["one", " and"]


def test_sentencepiece_keeps_its_leading_space_and_bytes() -> None:
    vocabulary = {"<unk>": 0, "\u2581one": 1, "two": 2, "<0xF0>": 3, "<0x41>": 4, "\u2581": 5}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    show = text_of(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    assert [show(token) for token in range(1, 6)] == [" one", "two", r"\xf0", "A", " "]


def test_without_a_tokenizer_ids_are_shown() -> None:
    assert text_of(None)(7) == "7"
