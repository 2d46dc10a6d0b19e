"""What stands at the source positions of a feature's firings: its own token, or others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.attribution.head_outputs import HeadOutputs, Live

_ENTRIES_AT_ONCE = 4096


@dataclass(frozen=True)
class Sources:
    """What stands at the sources of firings, [n] each."""

    attribution: Float[Tensor, " n"]
    """Share of squared DFA of the head on positions that hold the feature's token."""
    attention: Float[Tensor, " n"]
    """The head's attention on them."""
    frequency: Float[Tensor, " n"]
    """Their share of the positions up to the firing."""
    another: Float[Tensor, " n"]
    """Mean over the other positions of the share of squared DFA on positions that hold the token of that one."""


def sources(o: HeadOutputs, tokens: Int[Tensor, "batch pos"], at: Live, own: Int[Tensor, " n"], head: int) -> Sources:
    """Of firings whose features have the tokens `own`, through one head."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("attribution", "attention", "frequency", "another")}
    same = (tokens[:, :, None] == tokens[:, None]).to(o.z).cumsum(1)  # [doc, t, s]: positions up to t like that at s
    for start in range(0, len(at), _ENTRIES_AT_ONCE):
        some = slice(start, start + _ENTRIES_AT_ONCE)
        part = Live(at.doc[some], at.pos[some], at.feature[some], at.value[some])
        squares = o.sources(part, head).square()
        total = squares.sum(1).clamp(min=torch.finfo(squares.dtype).tiny)
        seen = torch.arange(tokens.shape[1], device=tokens.device) <= part.pos[:, None]
        here = (tokens[part.doc] == own[some, None]) & seen
        others = (seen & ~here).sum(1).clamp(min=1)
        parts["attribution"].append((squares * here).sum(1) / total)
        parts["attention"].append((o.pattern[part.doc, head, part.pos] * here).sum(1))
        parts["frequency"].append(here.sum(1) / seen.sum(1))
        elsewhere = squares * ~here * same[part.doc, part.pos]
        parts["another"].append(elsewhere.sum(1) / others / total)
    return Sources(**{name: torch.cat(values) if values else o.z.new_zeros(0) for name, values in parts.items()})
