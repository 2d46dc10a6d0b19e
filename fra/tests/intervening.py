"""What the tests of interventions share: models, dictionaries, and the attention that should be left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

import fra
from fra import interventions as iv
from fra.tests.models import NORMS_IN_FLOAT32, random_tokens, tiny, tiny_sae

LAYER, HEAD = 1, 2  # a sliding window in Gemma and GPT-Neo; the second key-value head under GQA
ATTN = f"blocks.{LAYER}.attn"
SCORES, PATTERN, Z = f"{ATTN}.hook_attn_scores", f"{ATTN}.hook_pattern", f"{ATTN}.hook_z"
TOKENS = torch.stack([random_tokens(16, seed) for seed in (0, 1)])
BRIDGE_SOFTMAX = 2e-6
"""TransformerBridge takes the softmax in float32, whatever the model's precision."""


def hook_of(kind: str) -> str:
    return f"blocks.{LAYER}." + ("hook_resid_pre" if kind == "no_layernorm" else "ln1.hook_normalized")


def double(kind: str) -> Any:
    return tiny(kind, torch.float64)


def sae_of(kind: str) -> Any:
    return tiny_sae(hook_of(kind))


def at(kind: str) -> dict[str, Any]:
    """Where the interventions of this file are made."""
    return {"layer": LAYER, "head": HEAD, "dictionary": sae_of(kind)}


def tolerance(kind: str) -> float:
    """Scores here are of order 1 to 10."""
    return 1e-5 if kind in NORMS_IN_FLOAT32 else 1e-10


def seen(model: Any, *names: str, tokens: torch.Tensor = TOKENS, hooks: Any = ()) -> list[torch.Tensor]:
    """Activations at these hooks in one pass, under `hooks` and what else is on the model."""
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        cache = model.run_with_cache(tokens, names_filter=list(names))[1]
    return [cache[name].detach() for name in names]


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).detach()


def resolved(kind: str, tokens: torch.Tensor = TOKENS, hook: str | None = None) -> list[Any]:
    sae = tiny_sae(hook or hook_of(kind))
    return [fra.resolve(double(kind), sae, document, LAYER, HEAD) for document in tokens]


def strong(heads: list[Any], n: int = 12) -> torch.Tensor:
    """The strongest channels of the first document, and one that is live in the second."""
    tables = [heads[0].channels("abs", n=n), heads[1].channels("abs", n=1)]
    return torch.tensor(pd.concat(tables)[["q_feature", "k_feature"]].drop_duplicates().to_numpy())


def maps(heads: list[Any], channels: torch.Tensor) -> torch.Tensor:
    """Sum of the channels' maps, [batch, q_pos, k_pos]."""
    return torch.stack([sum(head.channel(int(i), int(j)) for i, j in channels) for head in heads])


def after(heads: list[Any], taken: torch.Tensor) -> torch.Tensor:
    """softcap(scores - taken), -inf where masked."""
    kept = [head.frozen.cap(head.scores() - part) for head, part in zip(heads, taken, strict=True)]
    return torch.stack(kept).masked_fill(~heads[0].frozen.mask, -torch.inf)


def check(kind: str, heads: list[Any], intervention: iv.Intervention, taken: torch.Tensor) -> None:
    """The model's scores and pattern under the intervention are those without `taken`; other heads are as before."""
    model, mask = double(kind), heads[0].frozen.mask
    assert float(taken.abs().max()) > 0.05, "nothing worth removing"
    before = seen(model, SCORES, PATTERN)
    with intervention:
        scores, pattern = seen(model, SCORES, PATTERN)
    expected = after(heads, taken)
    assert float((scores[:, HEAD] - expected)[:, mask].abs().max()) < tolerance(kind)
    assert float((pattern[:, HEAD] - expected.softmax(-1)).abs().max()) < max(tolerance(kind), BRIDGE_SOFTMAX)
    assert float((pattern[:, HEAD] - before[1][:, HEAD]).abs().max()) > 1e-3
    others = [head for head in range(pattern.shape[1]) if head != HEAD]
    assert torch.equal(pattern[:, others], before[1][:, others])
    assert torch.equal(scores[:, HEAD][:, ~mask], before[0][:, HEAD][:, ~mask])


def push(layer: int = LAYER) -> tuple[str, Callable[..., torch.Tensor]]:
    """Somebody else's edit of the residual stream."""
    noise = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return f"blocks.{layer}.hook_resid_pre", lambda x, hook: x + 0.7 * noise
