"""Random entries, layers and whole models of given sizes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

from fra._census.corpus import Corpus
from fra._census.observe import Layer
from fra._census.result import Census
from fra.core.frozen import Rotary
from fra.core.weights import QKWeights
from fra.tests.models import build_tokenizer, folder, load_model


def entries(n_docs: int, n_pos: int, l0: int, d_sae: int, offset: int | None = None, seed: int = 0) -> Corpus:
    """Documents of equal length; every position has l0 distinct features, all features equally likely."""
    g = torch.Generator().manual_seed(seed)
    n_rows = n_docs * n_pos
    drawn = [torch.rand(min(512, n_rows - a), d_sae, generator=g).topk(l0).indices for a in range(0, n_rows, 512)]
    feature = torch.cat(drawn).sort(-1).values.flatten()
    offsets = [] if offset is None else [offset] * n_docs
    return Corpus(
        number=torch.arange(n_docs),
        length=torch.full((n_docs,), n_pos),
        n_offsets=torch.full((n_docs,), int(offset is not None)),
        offset=torch.tensor(offsets, dtype=torch.long),
        per_row=torch.full((n_rows,), l0, dtype=torch.int32),
        feature=feature.int(),
        value=torch.rand(n_rows * l0, generator=g) + 0.1,
        gain_q=None,
        gain_k=None,
        inputs=None,
    )


def layer(d_sae: int, n_heads: int, d_head: int = 64, d_model: int = 768, n_pos: int | None = None) -> Layer:
    """Random maps of a layer; with rotation where `n_pos` is given."""
    g = torch.Generator().manual_seed(1)
    rotary = None
    if n_pos is not None:
        angles = torch.arange(n_pos)[:, None] * 10_000 ** (-torch.arange(0, d_head, 2) / d_head)
        rotary = Rotary(angles.cos().repeat(1, 2), angles.sin().repeat(1, 2), adjacent=False)
    weights = QKWeights(
        layer=0,
        hook_name="blocks.0.hook_resid_pre",
        W_q=torch.randn(n_heads, d_model, d_head, generator=g),
        W_k=torch.randn(n_heads, d_model, d_head, generator=g),
        b_q=torch.zeros(n_heads, d_head),
        b_k=torch.zeros(n_heads, d_head),
        norm_q=None,
        norm_k=None,
        scale=d_head**-0.5,
        softcap=None,
        window=None,
    )
    return Layer(weights, torch.randn(d_sae, d_model, generator=g) / d_model**0.5, rotary)


def of(layer: Layer, corpus: Corpus, memory_budget: int = 1 << 30) -> Census:
    """A census of these."""
    return Census(layer, corpus, tuple(range(layer.n_heads)), ("sum",), memory_budget, str)


SIZES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50_257, "d_sae": 24_576, "layer": 5},
    "mini": {"n_layer": 3, "n_head": 8, "n_embd": 256, "vocab_size": 4_096, "d_sae": 2_048, "layer": 1},
}
"""GPT-2 small's and `mini`'s."""


@cache
def whole_model(size: str, rotary: bool, l0: int = 32) -> tuple[Any, Any, int]:
    """A random model (learned positions as GPT-2, or rotary as GPT-NeoX), a random dictionary, and its layer."""
    n = SIZES[size]
    sizes = {"vocab_size": n["vocab_size"], "hidden_size": n["n_embd"], "num_attention_heads": n["n_head"]}
    torch.manual_seed(0)
    if rotary:
        more = {"intermediate_size": 4 * n["n_embd"], "rotary_pct": 1.0, "max_position_embeddings": 1024}
        config: Any = GPTNeoXConfig(**sizes, num_hidden_layers=n["n_layer"], **more)
    else:
        config = GPT2Config(vocab_size=n["vocab_size"], n_embd=n["n_embd"], n_layer=n["n_layer"], n_head=n["n_head"])
    place = folder() / f"bench-{size}-{rotary}"
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    build_tokenizer().save_pretrained(place)
    hook = f"blocks.{n['layer']}.ln1.hook_normalized"
    metadata = SAEMetadata(hook_name=hook)
    sae = TopKSAE(TopKSAEConfig(k=l0, d_in=n["n_embd"], d_sae=n["d_sae"], metadata=metadata))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / n["n_embd"] ** 0.5)
    return load_model(place), sae, n["layer"]
