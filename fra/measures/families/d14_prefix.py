"""How long a prefix induction heads need: the same examples for every head, one to nine matching tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.weights import Model
from fra.dictionaries.hooks import LayerHooks
from fra.errors import CannotLoad
from fra.measures.families.designs import Prefixes
from fra.measures.families.families import Families
from fra.statistics import stats
from fra.statistics.stats import Floats, seed_of
from fra.verdicts.claim import Claim, Evidence, parse_head
from fra.verdicts.decide import WHOLE, Beside, Sampled, decide, means_of

if TYPE_CHECKING:
    from fra.targets.target import Target

SLOPE, SHORT, TOKEN, OVER_SHORT = (
    "slope difference",
    "short-prefix head at one token",
    "token before the match, over an unrelated one",
    "the same, over the short-prefix head",
)
_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class PrefixExamples:
    """The same examples at prefix lengths 1..K: BOS, filler, X_1..X_K Y, filler, then K tokens of which the last k are
    X_{K+1-k}..X_K. All tokens are distinct but for the match.
    """

    tokens: Int[Tensor, "n n_prefix pos"]
    before: Int[Tensor, "n pos"]
    """At the longest prefix, the token before the match's last token replaced in the later copy."""
    unrelated: Int[Tensor, "n pos"]
    """At the longest prefix, a filler token between the copies replaced."""
    key: Int[Tensor, " n"]
    """Position of Y."""


def prefix_examples(
    pool: Int[np.ndarray, " n_pool"], bos: int | None, design: Prefixes, seed_parts: Sequence[str]
) -> PrefixExamples:
    """All examples, those that choose first. Where the copies lie varies from one to the next, and not with the prefix
    length.
    """
    rng = np.random.default_rng(seed_of(*seed_parts))
    longest, filler = design.longest, design.filler
    size = 1 + filler + longest + 1 + longest
    if len(pool) < size + longest + 2:
        raise CannotLoad(f"a pool of {len(pool)} tokens is too small for prefixes: {size + longest + 2} are needed")
    tokens, before, unrelated, keys = [], [], [], []
    for _ in range(design.chosen + design.measured):
        fresh = rng.choice(pool, size + longest + 2, replace=False)
        lead = int(rng.integers(design.margin, filler - design.margin))
        base = fresh[:size].copy()
        base[0] = base[0] if bos is None else bos
        start = 1 + lead
        prefix = base[start : start + longest].copy()
        base[-longest:] = fresh[size : size + longest]  # tokens of their own where the prefix does not reach
        rows = []
        for k in range(1, longest + 1):
            row = base.copy()
            row[-k:] = prefix[-k:]
            rows.append(row)
        corrupt, other = rows[-1].copy(), rows[-1].copy()
        corrupt[-2] = fresh[-1]
        other[int(rng.integers(start + longest + 1, size - longest))] = fresh[-2]
        tokens.append(np.stack(rows))
        before.append(corrupt)
        unrelated.append(other)
        keys.append(start + longest)
    stacked = [torch.from_numpy(np.stack(part)) for part in (tokens, before, unrelated)]
    return PrefixExamples(stacked[0], stacked[1], stacked[2], torch.tensor(keys))


@dataclass(frozen=True)
class PrefixAttention:
    """Attention from the last position to Y, by head."""

    heads: list[str]
    at: Float[np.ndarray, "n_heads n n_prefix"]
    before: Float[np.ndarray, "n_heads n"]
    unrelated: Float[np.ndarray, "n_heads n"]

    def slopes(self) -> Float[np.ndarray, "n_heads n"]:
        """Least-squares slope of attention in prefix length (per token), for every example."""
        k = np.arange(1, self.at.shape[-1] + 1) - (self.at.shape[-1] + 1) / 2
        found: Floats = (self.at * k).sum(-1) / (k**2).sum()
        return found


@torch.no_grad()
def prefix_attention(model: Model, examples: PrefixExamples, heads: Sequence[tuple[int, int]]) -> PrefixAttention:
    """The same examples for every (layer, head)."""
    device = next(model.parameters()).device
    n, n_prefix, pos = examples.tokens.shape
    rows = torch.cat([examples.tokens.flatten(0, 1), examples.before, examples.unrelated]).to(device)
    keys = torch.cat([examples.key.repeat_interleave(n_prefix), examples.key, examples.key]).to(device)
    layers = sorted({layer for layer, _ in heads})
    names = {layer: LayerHooks(layer).pattern for layer in layers}
    parts: list[Tensor] = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        _, cache = model.run_with_cache(some, names_filter=list(names.values()), stop_at_layer=layers[-1] + 1)
        every, key = torch.arange(len(some), device=device), keys[start : start + _ROWS_AT_ONCE]
        parts.append(torch.stack([cache[names[layer]][every, head, pos - 1, key] for layer, head in heads]))
    found = np.asarray(torch.cat(parts, dim=1).double().cpu())
    long, before, unrelated = np.split(found, [n * n_prefix, n * n_prefix + n], axis=1)
    return PrefixAttention(
        [f"L{layer}H{head}" for layer, head in heads], long.reshape(len(heads), n, n_prefix), before, unrelated
    )


def compared(slopes: Float[np.ndarray, "n_heads n"], design: Prefixes) -> tuple[int, int]:
    """The heads with the steepest and the flattest slope on the examples that choose, and on no other."""
    first = slopes[:, : design.chosen].mean(1)
    return int(first.argmax()), int(first.argmin())


def prefix_evidence(claim: Claim, target: Target, families: Families) -> Evidence:
    """D14: of the target's induction heads, the one with the steepest slope against the one with the flattest, both
    chosen on other examples.
    """
    families.registered_by(claim)
    design = claim.designed(Prefixes)
    heads = [parse_head(name) for name, s in families.status.items() if s.status == "TIH"]
    if len(heads) < 2:
        return Evidence(claim=claim, head=None, cannot="the target has fewer than two induction heads to compare")
    families.progress(f"{claim.id}: {len(heads)} heads")
    examples = prefix_examples(families.pool, target.bos, design, (target.name, "prefixes"))
    return evidence_of(claim, target.name, prefix_attention(target.model, examples, heads))


def evidence_of(claim: Claim, target: str, found: PrefixAttention) -> Evidence:
    """The same from attention that was read."""
    design = claim.designed(Prefixes)
    slopes = found.slopes()
    long, short = compared(slopes, design)
    rest = slice(design.chosen, None)

    def drop(head: int, corrupted: Floats) -> Floats:
        own: Floats = found.at[head, rest, -1] - corrupted[head, rest]
        return own

    numbers: dict[str, tuple[Floats, tuple[float, float] | None]] = {
        SLOPE: (slopes[long, rest] - slopes[short, rest], None),
        SHORT: (found.at[short, rest, 0], (0.0, 1.0)),
        TOKEN: (drop(long, found.before) - drop(long, found.unrelated), (-2.0, 2.0)),
        OVER_SHORT: (drop(long, found.before) - drop(short, found.before), (-2.0, 2.0)),
    }
    columns = [
        Sampled(name=name, samples={WHOLE: means_of(claim, target, WHOLE, name, values)}, bounded=bounded)
        for name, (values, bounded) in numbers.items()
    ]
    beside = Beside(
        candidates=(f"{found.heads[long]} against {found.heads[short]}",),
        detail={"long": found.heads[long], "short": found.heads[short]} | _by_head(claim, target, found),
    )
    return decide(claim, columns, {WHOLE: beside}, q_over=())[WHOLE]


def _by_head(claim: Claim, target: str, found: PrefixAttention) -> dict[str, Any]:
    """Every head's slope with its interval, its attention by prefix length, and what the corruptions do to it."""
    rest = slice(claim.designed(Prefixes).chosen, None)
    slopes = found.slopes()[:, rest]
    rows = []
    for k, name in enumerate(found.heads):
        means = stats.ClusterMeans(slopes[k], None, seed=seed_of(claim.digest, target, name))
        at = found.at[k, rest]
        rows.append(
            {
                "head": name,
                "slope (a token)": float(slopes[k].mean()),
                "low": float(means.lower(claim.level, False)[0]),
                "high": float(means.upper(claim.level, False)[0]),
                "attention by prefix length": [float(x) for x in at.mean(0)],
                "token before the match replaced": float(found.before[k, rest].mean()),
                "unrelated token replaced": float(found.unrelated[k, rest].mean()),
            }
        )
    return {"heads": rows}
