"""A page of the size that the explorer is made for: 64 tokens, 9 heads of 64 with grouped keys and rotary positions,
L0 48 of 4,608 features, head outputs in a dictionary as large.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sae_lens import SAE
from transformers import LlamaConfig

import fra
from fra.explorer import explore
from fra.tests.models import build_model, build_sae, load_model

N_TOKENS, N_HEADS, D_HEAD, L0, D_SAE = 64, 9, 64, 48, 4608
HOOKS = ("blocks.1.ln1.hook_normalized", "blocks.1.attn.hook_z")
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "and", "make", "more", "than", "said")


def target(folder: Path) -> Any:
    """Random model and dictionaries, with twenty documents of random words."""
    d_model = N_HEADS * D_HEAD
    sizes = {"hidden_size": d_model, "intermediate_size": 256, "head_dim": D_HEAD, "max_position_embeddings": 256}
    config = LlamaConfig(
        **sizes, vocab_size=300, num_hidden_layers=2, num_attention_heads=N_HEADS, num_key_value_heads=3
    )
    model = load_model(build_model("llama", folder / "model", config=config))
    options: dict[str, Any] = {"d_sae": D_SAE, "k": L0}
    saes = [SAE.load_from_disk(build_sae("topk", d_model, hook, folder / hook, **options)) for hook in HOOKS]
    return fra.load(model, saes, [" ".join(words) for words in np.random.default_rng(0).choice(WORDS, (20, 60))])


def large_page(folder: Path) -> Path:
    """The page, as a file in the folder."""
    made, file = target(folder), folder / "page.html"
    words = np.random.default_rng(1).choice(WORDS, N_TOKENS)
    text = next(text for n in range(1, N_TOKENS + 1) if len(made.tokens(text := " ".join(words[:n]))) >= N_TOKENS)
    assert len(made.tokens(text)) == N_TOKENS
    explore(made, text, layer=1, output=file)
    return file
