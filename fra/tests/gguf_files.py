"""Tiny GGUF files of a llama, written by the gguf package's writer as llama.cpp's converter does, and that model's
logits by other means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from fra.tests.models import D_VOCAB, N_CTX

N_HEADS, N_KV_HEADS, D_HEAD = 4, 2, 8
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def name_in_gguf(name: str) -> str:
    """The name that llama.cpp has for a weight of transformers' llama."""
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a head in llama.cpp's order, which rotates neighbours: 0, n/2, 1, n/2 + 1, ..."""
    halves = weight.reshape(n_heads, 2, D_HEAD // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def rows_of(name: str) -> int | None:
    """Heads of a weight that llama.cpp permutes."""
    return N_HEADS if "attn_q." in name else N_KV_HEADS if "attn_k." in name else None


def write_gguf(
    file: Path,
    model: Path,
    kind: str = "F32",
    *,
    architecture: str = "llama",
    fields: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    extra: Mapping[str, np.ndarray] | None = None,
    change: Mapping[str, float] | None = None,
) -> Path:
    """The llama in the Hugging Face directory `model` as a GGUF file, matrices of ggml type `kind`.

    fields: further metadata. without: tensors left out. extra: further ones. change: the first value of a tensor.
    """
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(D_HEAD)
    writer.add_rope_freq_base(500.0)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(D_VOCAB)
    for key, value in (fields or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    _add_tokenizer(writer, model)
    for name, tensor in load_file(model / "model.safetensors").items():
        own = name_in_gguf(name)
        if own in without:
            continue
        weight = tensor.numpy().copy()
        weight.flat[0] = (change or {}).get(own, weight.flat[0])
        n_heads = rows_of(own)
        weight = weight if n_heads is None else permuted(weight, n_heads)
        _add(writer, own, weight, "F32" if weight.ndim == 1 else kind)
    for name, weight in (extra or {}).items():
        _add(writer, name, weight, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: str) -> None:
    blocks_fit = weight.shape[-1] % 32 == 0  # else llama.cpp falls back too
    of_kind = gguf.GGMLQuantizationType[kind if blocks_fit or kind == "F32" else "F16"]
    writer.add_tensor(name, gguf.quantize(weight, of_kind), raw_dtype=of_kind)


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path) -> None:
    bpe = json.loads((model / "tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [int(gguf.TokenType.CONTROL if n == 0 else gguf.TokenType.NORMAL) for n in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def dequantised(file: Path) -> dict[str, np.ndarray]:
    """Every tensor by the gguf package's own dequantiser, in llama.cpp's order of rows."""
    return {t.name: np.array(gguf.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(file).tensors}


def logits(file: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [pos, d_vocab] of the llama in a GGUF file in float64, from the file's own numbers and llama.cpp's order
    of rows, whose rotation turns neighbours; no model class has a part in it.
    """
    reader = gguf.GGUFReader(file)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    weights = {name: torch.from_numpy(tensor).double() for name, tensor in dequantised(file).items()}
    n_heads, n_kv = field("attention.head_count"), field("attention.head_count_kv")
    rotated, base = field("rope.dimension_count"), field("rope.freq_base")
    angles = torch.arange(len(tokens)).double()[:, None] * base ** (-torch.arange(0, rotated, 2).double() / rotated)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        eps = field("attention.layer_norm_rms_epsilon")
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]

    def heads(x: torch.Tensor, name: str, n: int, rotate: bool) -> torch.Tensor:
        found = (x @ weights[f"{name}.weight"].T).view(len(tokens), n, -1)
        if rotate:
            turned = torch.view_as_complex(found.reshape(*found.shape[:2], -1, 2).contiguous())
            turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
            found = torch.view_as_real(turned).flatten(-2)
        return found.repeat_interleave(n_heads // n, dim=1)

    x = weights["token_embd.weight"][tokens]
    future = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    for layer in range(field("block_count")):
        block = f"blk.{layer}"
        normed = norm(x, f"{block}.attn_norm")
        q, k = heads(normed, f"{block}.attn_q", n_heads, True), heads(normed, f"{block}.attn_k", n_kv, True)
        v = heads(normed, f"{block}.attn_v", n_kv, False)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        x = x + mixed.flatten(1) @ weights[f"{block}.attn_output.weight"].T
        normed = norm(x, f"{block}.ffn_norm")
        gate, up = (normed @ weights[f"{block}.ffn_{part}.weight"].T for part in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ weights[f"{block}.ffn_down.weight"].T
    unembed = weights.get("output.weight", weights["token_embd.weight"])
    return norm(x, "output_norm") @ unembed.T
