"""Reading target files: what does not fit is named by line or key, and no input whatever does anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fra import targets
from fra.errors import FraError
from fra.tests.tiny_targets import NORMALIZED, one_sentence, refused, write_target


@pytest.mark.parametrize("name", ["no-such-target", "/no/such/file.toml", "", "a\x00b", "x" * 5000, "."])
def test_unknown_target(name: str) -> None:
    refused(name, "no target", "gpt2-small")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "a"\n[model\npath = "m"\n', ("line 2",)),
        ('name = "a"\nname = "b"\n', ("line 2",)),
        ('name = "a', ("line 1",)),
        ("x = 1" + "0" * 5000, ("not TOML",)),
        ("x = " + "[" * 5000, ("nested too deeply",)),
        ('name = "tiny"\n', ("model: missing", "more")),
    ],
)
def test_malformed_file_names_the_line(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    (tmp_path / "bad.toml").write_text(text)
    refused(tmp_path / "bad.toml", "bad.toml", *words)


def test_a_file_that_is_not_text_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b'name = "a"\n# \xff\n')
    refused(tmp_path / "bad.toml", "UTF-8", "line 2")


@pytest.mark.parametrize(
    ("replace", "words"),
    [
        ({"model_keys": "processing = 3"}, ("model.processing",)),
        ({"model_keys": 'processing = "fold"'}, ("model.processing",)),
        ({"model_keys": "[model.processing]\nfold = true"}, ("model.processing", "fold: unknown key")),
        ({"model_keys": 'dtype = "int8"'}, ("model.dtype",)),
        ({"model_keys": 'name = "gpt2"'}, ("model: give either path",)),
        ({"model_keys": 'revision = "main"'}, ("revision goes with name",)),
        ({"model_keys": "trust = true"}, ("model.trust: unknown key",)),
        ({"head": "author = 1"}, ("author: unknown key",)),
        ({"heads": '[heads]\nknown_tih = ["L1H3"]'}, ("heads: known_from",)),
        ({"heads": '[heads]\nknown_tih = ["1.3"]\nknown_from = "x"'}, ("heads.known_tih.0",)),
        ({"heads": '[heads]\nknown_tih = ["L2H0"]\nknown_from = "x"'}, ("L2H0", "outside the 2 x 4")),
        ({"heads": '[heads]\nknown_tih = ["L1H4"]\nknown_from = "x"'}, ("L1H4", "outside the 2 x 4")),
        ({"size": "[size]\nn_layers = 2"}, ("size.n_heads: missing",)),
        ({"size": '[size]\nn_layers = "2"\nn_heads = 4'}, ("size.n_layers",)),
        ({"size": "[size]\nn_layers = 0\nn_heads = 4"}, ("size.n_layers",)),
        ({"size": "[size]\nn_layers = 1\nn_heads = 4"}, (NORMALIZED, "beyond the 1 layers")),
    ],
)
def test_a_value_that_does_not_fit_names_its_key(
    tmp_path: Path, replace: dict[str, str], words: tuple[str, ...]
) -> None:
    file = write_target(tmp_path, tmp_path / "model", {NORMALIZED: tmp_path / "sae"}, tmp_path / "text", **replace)
    refused(file, "tiny.toml", *words)


_SOUND_FILE = 'name = "a"\n[model]\npath = "m"\n[text]\ndocuments = "t"\n[size]\nn_layers = 2\nn_heads = 4\n'


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"a"', '"my model"', ("name: must be letters, digits",)),
        ('"m"', '"C:\\Users\\x"', ("line 3", "write paths with / or in single quotes")),
        ('"m"', '"C:\\data"', ("line 3", "write paths with / or in single quotes")),
        (
            "[size]",
            '[dictionary]\nhook = "x"\n[size]',
            ("dictionary: must be a list", "[[dictionary]], in two brackets"),
        ),
        ("documents", "document", ("text.document: unknown key (is documents meant?)",)),
        (
            "[size]",
            '[heads]\nknown_tih = "L1H3"\n[size]',
            ('heads.known_tih: must be a list: write it in brackets, as ["',),
        ),
        (
            "[size]",
            '[[dictionary]]\nhook = "x"\npath = "y"\n[size]',
            ("dictionary.0.hook: must be a hook of TransformerLens",),
        ),
    ],
)
def test_common_slips_are_answered_with_what_to_write(
    tmp_path: Path, old: str, new: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "bad.toml").write_text(_SOUND_FILE.replace(old, new))
    refused(tmp_path / "bad.toml", *words)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_bytes(b"\xef\xbb\xbf" + _SOUND_FILE.encode())
    assert targets.read_target(tmp_path / "good.toml")[0].name == "a"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('hook = "blocks.0.hook_resid_pre"', "dictionary.0: give either path"),
        ('hook = "blocks.0.hook_resid_pre"\nrelease = "r"', "release and sae_id go together"),
        ('hook = "resid"\npath = "p"', "dictionary.0.hook"),
    ],
)
def test_a_dictionary_entry_that_does_not_fit(tmp_path: Path, entry: str, words: str) -> None:
    file = write_target(tmp_path, tmp_path / "model", {}, tmp_path / "text", heads=f"[[dictionary]]\n{entry}")
    refused(file, words)


_KEYS = st.sampled_from(
    [
        *("name", "model", "path", "revision", "dtype", "processing", "prepend_bos", "dictionary", "hook", "release"),
        *("sae_id", "heads", "known_tih", "known_from", "text", "documents", "size", "n_layers", "n_heads"),
        *("allow_pickle_release", "other"),
    ]
)
_LEAVES = (
    st.sampled_from(["tiny", "none", "folded", "float32", NORMALIZED, "L1H3", "blocks.99999.hook_z", "\u0660", ""])
    | st.text(max_size=12)
    | st.integers()
    | st.floats()
    | st.booleans()
)
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12
)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value) if isinstance(value, (str, bool)) else repr(value)


_SOUND = {
    "name": "tiny",
    "model": {"path": "m", "processing": "none"},
    "dictionary": [{"hook": NORMALIZED, "path": "d"}],
    "heads": {"known_tih": ["L1H3"], "known_from": "x"},
    "text": {"documents": "t"},
    "size": {"n_layers": 2, "n_heads": 4},
}


def _read(folder: Path, raw: bytes) -> bool:
    """Whether it was accepted; anything but acceptance or one sentence fails the test."""
    file = folder / "fuzz.toml"
    file.write_bytes(raw)
    try:
        spec, where = targets.read_target(file)
    except FraError as error:
        one_sentence(error)
        return False
    assert where == folder.resolve()
    assert spec.size.n_layers >= 1
    return True


_FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_FUZZ
@given(raw=st.binary(max_size=80) | st.text(max_size=80).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_fuzz_bytes(tmp_path: Path, raw: bytes) -> None:
    assert not _read(tmp_path, raw)


@_FUZZ
@given(table=st.dictionaries(_KEYS, _VALUES, max_size=7), change=st.lists(st.tuples(_KEYS, _VALUES), max_size=2))
def test_fuzz_structures(tmp_path: Path, table: dict[str, Any], change: list[tuple[str, Any]]) -> None:
    for content in (table, {**_SOUND, **dict(change)}):
        _read(
            tmp_path, "\n".join(f"{key} = {_toml(value)}" for key, value in content.items()).encode("utf-8", "replace")
        )


@_FUZZ
@given(data=st.data())
def test_fuzz_damaged_presets(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(sorted(targets.presets().items())[2][1].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        raw[start : start + data.draw(st.integers(0, 20))] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"[[", b'"', b"\n"])
        )
    _read(tmp_path, bytes(raw))


def test_the_fuzzed_reader_accepts_what_is_sound(tmp_path: Path) -> None:
    assert _read(tmp_path, "\n".join(f"{key} = {_toml(value)}" for key, value in _SOUND.items()).encode())
