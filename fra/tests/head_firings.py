"""Firings of head-output dictionaries that are made up: blocks, values and patterns are given."""

from __future__ import annotations

import torch

from fra.attribution.head_outputs import HeadOutputs, Live
from fra.dictionaries.encoder import Encoder
from fra.measures.head_outputs.corpus import Documents, HeadFirings

Z = "blocks.1.attn.hook_z"
N_HEADS, D_HEAD = 4, 8


def made_up(blocks: torch.Tensor, n_docs: int = 12, n_pos: int = 30, seed: int = 0, bias: float = -1.0) -> HeadFirings:
    """Firings of a ReLU dictionary with encoder blocks [n_heads, d_head, d_sae] on random values and patterns."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(n_docs, n_pos, N_HEADS, D_HEAD, generator=g, dtype=torch.float64)
    scores = 3 * torch.randn(n_docs, N_HEADS, n_pos, n_pos, generator=g, dtype=torch.float64)
    pattern = scores.masked_fill(torch.ones(n_pos, n_pos).triu(1).bool(), -torch.inf).softmax(-1)
    return firings_of(blocks, values, pattern, torch.randint(1, 200, (n_docs, n_pos), generator=g), bias)


def firings_of(
    blocks: torch.Tensor, values: torch.Tensor, pattern: torch.Tensor, tokens: torch.Tensor, bias: float
) -> HeadFirings:
    """What a ReLU dictionary does on given values and patterns."""
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
    below = torch.full((blocks.shape[2],), bias, dtype=torch.float64)
    pre = torch.einsum("bthd,hdf->btf", z, blocks) + below
    doc, pos, feature = (pre > 0).nonzero(as_tuple=True)
    live = Live(doc, pos, feature, pre[doc, pos, feature])
    real = torch.ones(z.shape[:2], dtype=torch.bool)
    outputs = HeadOutputs(Encoder(Z, 1, blocks, below, "none"), z, values, pattern, real.to(z), real, live)
    documents = Documents(tokens, real, tuple(f"s{k}" for k in range(len(tokens))), list(tokens))
    return HeadFirings(documents, outputs, live.where(live.pos > 0))


def blocks_of(heads: list[int], seed: int = 1, size: float = 3.0) -> torch.Tensor:
    """Features that each read some one head, strongly; a fifth of that everywhere else."""
    g = torch.Generator().manual_seed(seed)
    blocks = 0.2 * size * torch.randn(N_HEADS, D_HEAD, len(heads), generator=g, dtype=torch.float64) / D_HEAD**0.5
    for feature, head in enumerate(heads):
        blocks[head, :, feature] *= 5
    return blocks
