"""A hand-built two-layer induction circuit with a one-hot dictionary: every channel that it has was written down.

Attention only, no LayerNorm. The residual stream holds, side by side, the token (one-hot), the position (one-hot) and
the previous token. L0H0 attends to the position before and copies its token into the third block; L1H0 scores STRENGTH
nats where the query's token is the key's previous token. L0H1 and L1H1 have random weights and write nothing. The
dictionary's features are the residual stream's coordinates, so that the channels of L1H0 are exactly (token v, previous
token v).
"""

from __future__ import annotations

import warnings

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer, HookedTransformerConfig

D_VOCAB, N_CTX = 65, 41
D_MODEL = 2 * D_VOCAB + N_CTX
BOS = 64
STRENGTH = 8.0
HOOK = "blocks.1.hook_resid_pre"
PREVIOUS = D_VOCAB + N_CTX  # where the third block begins


def model(strength: float = STRENGTH) -> HookedTransformer:
    """The circuit; `strength` in nats."""
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=D_MODEL,
        d_head=D_VOCAB,
        n_heads=2,
        n_ctx=N_CTX,
        d_vocab=D_VOCAB,
        attn_only=True,
        normalization_type=None,
        device="cpu",
        init_weights=False,
        seed=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the Bridge has no way to write weights down
        circuit = HookedTransformer(config)
    root = D_VOCAB**0.5  # scores are divided by sqrt(d_head)
    with torch.no_grad():
        for parameter in circuit.parameters():
            parameter.zero_()
        token, position = torch.arange(D_VOCAB), torch.arange(N_CTX)
        circuit.embed.W_E[token, token] = 1.0
        circuit.pos_embed.W_pos[position, D_VOCAB + position] = 1.0
        first, second = circuit.blocks[0].attn, circuit.blocks[1].attn
        first.W_Q[0, D_VOCAB + position[1:], position[:-1]] = 20.0 * root
        first.W_K[0, D_VOCAB + position, position] = 1.0
        first.W_V[0, token, token] = 1.0
        first.W_O[0, token, PREVIOUS + token] = 1.0
        second.W_Q[0, token, token] = strength * root
        second.W_K[0, PREVIOUS + token, token] = 1.0
        second.W_V[0, token, token] = 1.0
        second.W_O[0, token, token] = 1.0
        circuit.unembed.W_U[token, token] = 5.0
        generator = torch.Generator().manual_seed(0)
        for attention in (first, second):  # a head with weights but no purpose
            for weight in (attention.W_Q, attention.W_K):
                weight[1] = 0.3 * torch.randn(D_MODEL, D_VOCAB, generator=generator)
    return circuit.eval()


def dictionary() -> StandardSAE:
    """One feature for each coordinate of the residual stream before layer 1."""
    sae = StandardSAE(
        StandardSAEConfig(d_in=D_MODEL, d_sae=D_MODEL, metadata=SAEMetadata(model_name="circuit", hook_name=HOOK))
    )
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D_MODEL))
        sae.W_dec.copy_(torch.eye(D_MODEL))
        sae.b_enc.fill_(-0.01)  # the softmax leaves a little everywhere; it belongs to the error term
        sae.b_dec.zero_()
    return sae
