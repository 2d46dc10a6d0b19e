"""What channels look like to a person: one channel on one document, and the tokens on which channels are live; and both
as a report shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.core.coded import Arm, pair_couplings
from fra.report.pictures import ChannelPicture, counted, features_on, packed
from fra.search.channels import Arms

LONGEST = 48
"""Positions of a natural document that are shown, where the channel does something among them: a map of more is wider
than half a page.
"""
_BEHIND = 2  # positions shown behind the strongest entry's query


@dataclass(frozen=True)
class Example:
    """One channel of one head on one document, or on its beginning, for a person to look at."""

    pair: tuple[int, int]
    tokens: Int[np.ndarray, " pos"]
    pattern: Float[np.ndarray, "pos pos"]
    contribution: Float[np.ndarray, "pos pos"]
    """F_ij in nats."""


@dataclass(frozen=True)
class Shown:
    """An example, with the tokens on which the channel is live: ids and counts, the most frequent first."""

    example: Example
    query: Sequence[tuple[int, int]]
    key: Sequence[tuple[int, int]]

    def picture(self, on: str, text: Callable[[int], str], page: str | None) -> ChannelPicture:
        """What the report draws: the head's pattern beside the channel's map, with tokens and links.

        on: what the document is. text: a token's. page: the address on Neuronpedia below which the dictionary's
        features have pages.
        """
        i, j = self.example.pair
        found: ChannelPicture = {
            "document": on,
            "channel": f"{i} -> {j}",
            "query tokens": counted(self.query, text),
            "key tokens": counted(self.key, text),
            "tokens": [text(int(token)) for token in self.example.tokens],
            "maps": {
                "attention": packed(self.example.pattern),
                f"channel {i} -> {j} (nats)": packed(self.example.contribution),
            },
        }
        if page is not None:
            found["pages"] = features_on(page, self.example.pair)
        return found


def example(arms: Arms, head: int, pair: Int[Tensor, " 2"]) -> Example | None:
    """The channel on the shortest repeated document in which it is live on the stripe; None where there is none."""
    batch, arm = arms.batch, arms.repeated
    q, k = arm.columns("query", head, pair[:1])[..., 0], arm.columns("key", head, pair[1:])[..., 0]
    live = (q[batch.row_doc, batch.row_pos] != 0) & (k[batch.row_doc, batch.row_key] != 0)
    documents = torch.unique(batch.row_doc[live])
    if not len(documents):
        return None
    doc = int(documents[batch.periods[documents].argmin()])
    return _on(arm, head, pair, doc, batch.tokens[doc, : 1 + 2 * int(batch.periods[doc])])


def first_example(arms: Arms, head: int, pairs: Int[np.ndarray | Tensor, "n 2"]) -> Shown | None:
    """The first of some channels that is live on the stripe, with what stands there; None where none is."""
    every = torch.as_tensor(pairs, device=arms.batch.row_doc.device)
    for number in range(len(every)):
        if (found := example(arms, head, every[number])) is not None:
            (row,) = live_tokens(arms, every[number : number + 1])
            return Shown(found, row["query"], row["key"])
    return None


def example_on_text(
    arm: Arm,
    head: int,
    pair: tuple[int, int],
    tokens: Int[Tensor, "batch pos"],
    lengths: Sequence[int],
    where: Bool[Tensor, "batch q_pos k_pos"] | None = None,
) -> Shown | None:
    """The channel on the beginning of the natural document on which it contributes most to one score, with the tokens
    on which its features are live; None where it contributes to none.

    Entries among the first LONGEST positions come first, whatever their size, then those of the smallest query. where:
    which entries count, all where None. `lengths`: of the documents without padding.
    """
    home = arm.codes.decoder.device
    tokens, both = tokens.to(home), torch.tensor(pair, device=home)
    F = _contributions(arm, head, both, torch.arange(len(tokens), device=home))
    real = torch.arange(F.shape[1], device=home) < torch.tensor(lengths, device=home)[:, None]
    size = F.abs() * real[:, :, None]
    if where is not None:
        size = size * where.to(home)
    near = size[:, :LONGEST]
    if not bool((near > 0).any()):
        queries = torch.nonzero(size.amax((0, 2)) > 0)[:, 0]
        if not len(queries):
            return None
        near = size[:, : int(queries[0]) + 1]
    doc, query = divmod(int(near.amax(-1).argmax()), near.shape[1])
    end = min(int(lengths[doc]), query + 1 + _BEHIND)
    rows = [arm.codes.row[arm.codes.feature == feature] for feature in pair]
    held = [tokens.flatten()[at[real.flatten()[at]]] for at in rows]
    return Shown(_on(arm, head, both, doc, tokens[doc, :end]), *map(most_common, held))


def _contributions(
    arm: Arm, head: int, pair: Int[Tensor, " 2"], docs: Int[Tensor, " n"]
) -> Float[Tensor, "n q_pos k_pos"]:
    """F_ij in chosen documents; zero where masked."""
    q, k = arm.columns("query", head, pair[:1])[docs, :, 0], arm.columns("key", head, pair[1:])[docs, :, 0]
    at = torch.arange(q.shape[1], device=q.device)
    G = pair_couplings(arm, head, pair[None], at)[0]
    F = q[:, :, None] * k[:, None, :] * (G if len(G) == 1 else G[(at[:, None] - at).clamp(min=0)])
    return F.masked_fill(~arm.frozen.mask[: len(at), : len(at)], 0.0)


def _on(arm: Arm, head: int, pair: Int[Tensor, " 2"], doc: int, tokens: Int[Tensor, " n"]) -> Example:
    n = len(tokens)
    F = _contributions(arm, head, pair, torch.tensor([doc], device=pair.device))[0, :n, :n]
    i, j = pair.tolist()
    return Example((i, j), *(np.asarray(part.cpu()) for part in (tokens, arm.frozen.pattern[doc, head, :n, :n], F)))


def live_tokens(arms: Arms, pairs: Tensor, top: int = 6) -> list[dict[str, Any]]:
    """What stands where each channel is live on the stripe: query tokens, key tokens, and breadth.

    Breadth is the inverse Simpson index (1 / sum of squared shares) of the tokens on rows with i live.
    """
    doc, pos, key = arms.batch.row_doc, arms.batch.row_pos, arms.batch.row_key
    tokens = arms.batch.tokens
    found = []
    q_ids, q_at = torch.unique(pairs[:, 0], return_inverse=True)
    k_ids, k_at = torch.unique(pairs[:, 1], return_inverse=True)
    q = arms.repeated.columns("query", 0, q_ids)[doc, pos] != 0
    k = arms.repeated.columns("key", 0, k_ids)[doc, key] != 0
    for number in range(len(pairs)):
        live = q[:, q_at[number]]
        both = live & k[:, k_at[number]]
        row: dict[str, Any] = {"live_pair_share": float(both.sum() / live.sum().clamp(min=1))}
        for name, at in (("query", tokens[doc[live], pos[live]]), ("key", tokens[doc[both], key[both]])):
            row[name] = most_common(at, top)
            if name == "query":
                times = torch.unique(at, return_counts=True)[1]
                shares = times.double() / times.sum().clamp(min=1)
                row["breadth"] = float(1 / shares.square().sum()) if len(times) else 0.0
                row["heaviest"] = row[name][0][0] if row[name] else -1
        found.append(row)
    return found


def most_common(tokens: Int[Tensor, " n"], top: int = 6) -> list[tuple[int, int]]:
    """The most frequent tokens with how often they stand there; of equals the smaller id first."""
    ids, times = torch.unique(tokens, return_counts=True)
    order = times.argsort(descending=True, stable=True)[:top]
    return [(int(ids[n]), int(times[n])) for n in order]
