"""What users name an intervention by: features, channels, positions, entries of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypedDict

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fra.core.coded import Channels
from fra.dictionaries.codes import check_dictionary
from fra.errors import FraError

Positions: TypeAlias = Tensor | Sequence[int] | None
"""Which positions: Bool[Tensor, "pos"] or Bool[Tensor, "batch pos"], or a list of integers; None for all."""


def channel_pairs(channels: Channels, dictionary: Any) -> Int[Tensor, "n 2"]:
    """Channels as distinct pairs of ids. Raises FraError where they are none, or not ids of this dictionary."""
    check_dictionary(dictionary)
    if isinstance(channels, pd.DataFrame):
        lacking = [name for name in ("q_feature", "k_feature") if name not in channels]
        if lacking:
            raise FraError(f"the channels have no column {lacking[0]!r}: give columns q_feature and k_feature.")
        channels = channels[["q_feature", "k_feature"]].to_numpy()
    try:
        pairs = channels if isinstance(channels, Tensor) else torch.tensor(np.asarray(channels))
    except (TypeError, ValueError) as error:
        raise FraError(
            "channels are no numbers: give integer ids of shape [n, 2], query feature and key feature."
        ) from error
    if pairs.numel() == 0:
        return torch.zeros(0, 2, dtype=torch.long)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
        raise FraError(
            f"channels are {pairs.dtype} of shape {list(pairs.shape)}: give "
            "integer ids of shape [n, 2], query feature and key feature."
        )
    _check_ids(pairs, dictionary)
    distinct: Tensor = torch.unique(pairs.long(), dim=0)
    return distinct


def feature_ids(features: Tensor | Sequence[int], dictionary: Any, empty: bool = False) -> Int[Tensor, " n"]:
    """Distinct feature ids. Raises FraError where they are none (unless `empty`), or not ids of this dictionary."""
    check_dictionary(dictionary)
    ids = torch.as_tensor(features)
    if ids.numel() == 0:
        if not empty:
            raise FraError("there are no features to change: give at least one feature id.")
        return torch.zeros(0, dtype=torch.long)
    if ids.ndim != 1 or ids.is_floating_point():
        raise FraError(f"features are {ids.dtype} of shape {list(ids.shape)}: give integer ids of shape [n].")
    _check_ids(ids, dictionary)
    distinct: Tensor = torch.unique(ids.long())
    return distinct


def _check_ids(ids: Tensor, dictionary: Any) -> None:
    outside = ids[(ids < 0) | (ids >= dictionary.cfg.d_sae)]
    if len(outside):
        raise FraError(
            f"feature {int(outside[0])} is out of range: the dictionary has {dictionary.cfg.d_sae} features."
        )


def chosen_positions(
    name: str, chosen: Positions, batch: int, pos: int, device: torch.device
) -> Bool[Tensor, "#b pos"]:
    """`chosen` as a mask over [batch or 1, pos]. Raises FraError where it does not fit the documents of this pass."""
    if chosen is None:
        return torch.ones(1, pos, dtype=torch.bool, device=device)
    given = torch.as_tensor(chosen, device=device)
    if given.dtype != torch.bool:
        ids = given.long()
        if ids.ndim != 1 or bool(((ids < 0) | (ids >= pos)).any()):
            raise FraError(
                f"{name} are positions outside 0 to {pos - 1}: give positions of these documents, or a mask."
            )
        given = torch.zeros(pos, dtype=torch.bool, device=device).index_fill_(0, ids, True)
    given = given if given.ndim > 1 else given[None]
    if given.ndim != 2 or given.shape[1] != pos or given.shape[0] not in (1, batch):
        raise FraError(
            f"{name} has shape {list(given.shape)} and these documents are {[batch, pos]}: give one value a position."
        )
    return given


class Where(TypedDict, total=False):
    """Where an intervention applies, and which pass it is computed from; everywhere and the pass itself by default."""

    rows: Positions
    """Only at these query positions."""
    keys: Positions
    """Only at these key positions."""
    entries: Tensor | None
    """Only where this Boolean mask, [q_pos, k_pos] or [batch, q_pos, k_pos], is true."""
    clean: Tensor | None
    """Documents, [batch, pos]: take codes, scales and pattern from a pass over these, as the model is without hooks."""


def check_where(where: Where) -> None:
    """Raises FraError for a name that `Where` does not have: it would silently apply everywhere."""
    unknown = sorted(set(where) - set(Where.__annotations__))
    if unknown:
        raise FraError(f"{unknown[0]!r} does not say where: use {', '.join(Where.__annotations__)}.")


def chosen_entries(where: Where, batch: int, pos: int, device: torch.device) -> Bool[Tensor, "#b pos pos"]:
    """Which entries of a head's score matrix may change: `rows` by `keys`, and `entries` where given."""
    chosen = chosen_positions("rows", where.get("rows"), batch, pos, device)[:, :, None]
    chosen = chosen & chosen_positions("keys", where.get("keys"), batch, pos, device)[:, None, :]
    entries = where.get("entries")
    if entries is None:
        return chosen
    given = entries.to(device) if entries.ndim > 2 else entries.to(device)[None]
    if given.dtype != torch.bool or given.shape[1:] != (pos, pos) or given.shape[0] not in (1, batch):
        raise FraError(
            f"entries is {given.dtype} of shape {list(given.shape)}: give a "
            f"Boolean mask of shape [{pos}, {pos}] or [{batch}, {pos}, {pos}]."
        )
    return chosen & given
