"""Text to token ids, by the tokenizer that stands beside a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fra.checkpoints.weights import LIBRARY_ERRORS, first_line
from fra.errors import FraError

CHARACTERS = 24
"""Of a long text, for each token asked for: as many as a long token has."""
AT_LEAST = 20_000


def load_tokenizer(folder: Path, target: str) -> Any:
    """The tokenizer in a model's directory, as its files have it: TransformerLens fills special tokens that are missing
    with others. Raises FraError where there is none.
    """
    from transformers import AutoTokenizer

    missing = f"the model of {target!r} has no tokenizer that can be read in {folder}"
    advice = "put the model's tokenizer files there (tokenizer.save_pretrained)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (*LIBRARY_ERRORS, ImportError) as error:
        raise FraError(f"{missing} ({first_line(error)}): {advice}.") from error
    # transformers makes an empty one where there are no files.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise FraError(f"{missing} (it knows no token but special ones): {advice}.")
    return tokenizer


def encode(tokenizer: Any, text: str, limit: int | None = None) -> list[int]:
    """Token ids of a text, of any length or the first `limit`, without special tokens: where a text spells one, it is
    text. Of a long text only as much is read as the first `limit` ids need.
    """
    if limit is None:
        return _encode(tokenizer, text)
    n = max(AT_LEAST, CHARACTERS * limit)
    before: list[int] | None = None
    while n < len(text):
        # What follows may join the last word, so that two lengths must agree.
        found = _encode(tokenizer, text[:n])[: limit + 1]
        if len(found) > limit and found == before:
            return found[:limit]
        before, n = found, 2 * n
    return _encode(tokenizer, text)[:limit]


def _encode(tokenizer: Any, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FraError(
            f"the text holds half of a surrogate pair (character {error.start}), which is no text: replace it, as "
            "text.encode('utf-8', 'replace').decode() does."
        ) from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
    return ids


def no_tokens(tokenizer: Any, d_vocab: int) -> list[int]:
    """Ids below `d_vocab` that are no token of the tokenizer's: rows that pad an embedding."""
    return sorted(set(range(d_vocab)) - set(tokenizer.get_vocab().values()))
