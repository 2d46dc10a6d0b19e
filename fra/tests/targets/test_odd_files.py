"""Files and texts as other programs leave them: byte order marks, halves of characters, tensors too many, a tokenizer
that cuts, pads or ends every text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fra
from fra.errors import FraError
from fra.tests.models import BOS, build_model
from fra.tests.tiny_targets import NORMALIZED, TEXT, one_sentence, signed_axes, write_target, write_text


def target(folder: Path, edit: Callable[[Path], Any]) -> fra.Target:
    """A tiny target whose model's folder, or the dictionary's beside it, was edited."""
    build_model("gpt2", folder / "model")
    signed_axes(folder / "sae", NORMALIZED)
    write_text(folder / "text")
    edit(folder / "model")
    return fra.load_target(write_target(folder, folder / "model", {NORMALIZED: folder / "sae"}, folder / "text"))


def of_tokenizer(**values: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        file = model / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


ENDED = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": BOS, "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
}
PADDED = {
    **{"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None},
    **{"pad_id": 0, "pad_type_id": 0, "pad_token": BOS},
}
CUT = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    "values", [{"truncation": CUT}, {"padding": PADDED}, {"post_processor": ENDED}], ids=["cut", "padded", "ended"]
)
def test_what_a_tokenizers_file_adds_or_cuts_is_no_text(values: dict[str, Any], tmp_path: Path) -> None:
    """Training leaves truncation and padding in tokenizer.json: 8 tokens of every document, or 64 of each."""
    plain = target(tmp_path / "plain", lambda model: None).tokens(TEXT)
    assert 8 < len(plain) < 64
    assert torch.equal(target(tmp_path / "other", of_tokenizer(**values)).tokens(TEXT), plain)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_byte_order_mark_in_a_models_file_is_named(name: str, tmp_path: Path) -> None:
    def edit(model: Path) -> None:
        (model / name).write_bytes(b"\xef\xbb\xbf" + (model / name).read_bytes())

    with pytest.raises(
        FraError, match=rf"{name} begins with a byte order mark: save it as UTF-8 without one"
    ) as caught:
        target(tmp_path, edit).tokens(TEXT)
    one_sentence(caught.value)


def test_half_a_character_is_refused_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(FraError, match=r"half of a surrogate pair \(character 4\)") as caught:
        target(tmp_path, lambda model: None).tokens("one \ud800 two")
    one_sentence(caught.value)


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    def edit(model: Path) -> None:
        file = model.parent / "sae" / "sae_weights.safetensors"
        save_file({**load_file(file), "log_feature_sparsity": torch.zeros(64)}, file)

    with pytest.raises(FraError, match=r"cannot be loaded: .*log_feature_sparsity") as caught:
        _ = target(tmp_path, edit).dictionaries[NORMALIZED]
    one_sentence(caught.value)


def test_loading_uses_up_no_random_numbers(tmp_path: Path) -> None:
    """A seed that was set before is what it was, whatever the libraries draw to fill what they then read."""
    made = target(tmp_path, lambda model: None)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _ = made.model, made.dictionaries[NORMALIZED], made.tokens(TEXT)
    assert torch.equal(torch.get_rng_state(), before)
