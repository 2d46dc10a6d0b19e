"""Small targets on disk, of the format that users write, for the tests of reading, loading and admission."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fra
from fra import targets
from fra.errors import FraError
from fra.tests.models import D_MODEL, build_sae

NORMALIZED = "blocks.1.ln1.hook_normalized"
HEAD_OUTPUT = "blocks.1.attn.hook_z"
TEXT = "one and two make more than one, said three. four and five make more than four, said seven."


def signed_axes(
    folder: Path, hook: str, *, k: int = 12, bias: float = 0.0, d_in: int = D_MODEL, **options: Any
) -> Path:
    """A dictionary that is right by construction: features are the signed axes of the activation, the k largest are
    kept.

    k = 0 makes it a plain ReLU with `bias` added before it.
    """
    build_sae("topk" if k else "standard", d_in, hook, folder, d_sae=2 * d_in, **({"k": k} if k else {}), **options)
    axes = torch.cat((torch.eye(d_in), -torch.eye(d_in)))
    weights = {"W_dec": axes, "W_enc": axes.T, "b_dec": torch.zeros(d_in), "b_enc": torch.full((2 * d_in,), bias)}
    assert set(weights) == set(load_file(folder / "sae_weights.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "sae_weights.safetensors")
    return folder


def edit_config(folder: Path, *, metadata: Mapping[str, Any] | None = None, **values: Any) -> Path:
    """Sets values of a saved dictionary's cfg.json and of its metadata; None removes one of the metadata."""
    file = folder / "cfg.json"
    config = json.loads(file.read_text())
    config.update(values)
    config["metadata"] = {k: v for k, v in {**config["metadata"], **(metadata or {})}.items() if v is not None}
    file.write_text(json.dumps(config))
    return folder


def write_text(folder: Path, texts: Mapping[str, str] | None = None) -> Path:
    """A directory of .txt documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (texts or {"a-1": TEXT, "a-2": TEXT[::-1], "b-1": TEXT * 3}).items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def write_target(
    folder: Path,
    model: Path | None,
    dictionaries: Mapping[str, Path | tuple[str, str]],
    text: Path | str,
    **replace: str,
) -> Path:
    """A target file in `folder`, its paths relative to it. `replace`: head, model_keys, heads, size."""
    folder.mkdir(parents=True, exist_ok=True)

    def relative(path: Path) -> str:
        return json.dumps(os.path.relpath(path, folder))

    lines = ['name = "tiny"', replace.get("head", ""), "[model]"]
    if model is not None:
        lines.append(f"path = {relative(model)}")
    lines.append(replace.get("model_keys", 'processing = "none"'))
    for hook, source in dictionaries.items():
        lines += ["[[dictionary]]", f"hook = {json.dumps(hook)}"]
        if isinstance(source, Path):
            lines.append(f"path = {relative(source)}")
        else:
            lines += [f"release = {json.dumps(source[0])}", f"sae_id = {json.dumps(source[1])}"]
    lines += [
        replace.get("heads", ""),
        "[text]",
        f"documents = {relative(text) if isinstance(text, Path) else json.dumps(text)}",
    ]
    lines += [replace.get("size", "[size]\nn_layers = 2\nn_heads = 4")]
    file = folder / "tiny.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def one_sentence(error: BaseException) -> str:
    """The message of an error, which must be one line that reads as a sentence."""
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert 20 < len(text) < 700
    return text


def refused(file: Path | str, *words: str, use: Callable[[targets.Target], Any] = targets.admit) -> str:
    """The sentence with which a target is refused, in which `words` must stand."""
    with pytest.raises(FraError) as caught:
        use(fra.load_target(file))
    text = one_sentence(caught.value)
    for word in words:
        assert word in text, text
    return text
