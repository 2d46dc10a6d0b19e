"""Interventions on a head's scores and on its output by feature: channels, blocks, features."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import product
from typing import Any, Unpack

import torch
from jaxtyping import Int
from torch import Tensor

from fra.architectures.face import face, set_aside
from fra.architectures.known import place_of
from fra.core.coded import Arm, Channels
from fra.core.frozen import Side, freeze
from fra.core.output import value_features, value_terms
from fra.core.reductions import TERMS
from fra.core.weights import Model, check_layer_and_head, ov_weights, qk_weights
from fra.dictionaries.codes import check_dictionary, codes, dictionary_hook
from fra.dictionaries.hooks import LayerHooks
from fra.errors import FraError
from fra.interventions.arguments import Where, channel_pairs, check_where, chosen_entries, feature_ids
from fra.interventions.attach import (
    Intervention,
    Pass,
    Rows,
    alike,
    before_cap,
    fitting,
    frozen_in_pass,
    layer_names,
    unhooked,
    with_head,
)

_PAIRS_AT_ONCE = 64


@face
def remove(
    model: Model,
    channels: Channels,
    *,
    layer: int | None = None,
    head: int | str | None = None,
    dictionary: Any,
    **where: Unpack[Where],
) -> Intervention:
    """Takes the contributions F_ij(t,s) of these channels out of a head's scores, before softcap, and nothing else.

    layer and head: by number, or the head alone by name (head="L1H4"). channels: pairs of feature ids (a tensor, array,
    list, or a table as `ResolvedHead.channels` gives it); a pair named twice is removed once. dictionary: of this
    layer's attention input.
    where: `rows`, `keys`: only at these query or key positions (a mask [pos] or [batch, pos], or a list of positions);
    `entries`: only where this mask, [q_pos, k_pos] or [batch, q_pos, k_pos], is true; `clean`: take codes and scales
    from a pass over these tokens as the model is without hooks, not from the pass that is changed.

    >>> target = fra.load_target("mini")
    >>> _, sae = target.dictionary_for(1)
    >>> tokens = target.tokens("the cat sat, and the cat sat")
    >>> channels = fra.resolve(target.model, sae, tokens, head="L1H3").channels(n=10)
    >>> before = target.model(tokens[None])
    >>> with fra.remove(target.model, channels, layer=1, head=3, dictionary=sae):
    ...     after = target.model(tokens[None])
    >>> bool((after - before).abs().max() > 0), bool((target.model(tokens[None]) == before).all())
    (True, True)

    Raises FraError for channels, layer, head or dictionary that do not fit, no channel at all, and a model whose scores
    `fra.resolve` would refuse; in the pass, for positions that do not fit it and with a key-value cache.
    """
    return scale(model, channels, 0.0, layer=layer, head=head, dictionary=dictionary, **where)


@face
def scale(
    model: Model,
    channels: Channels,
    factor: float,
    *,
    layer: int | None = None,
    head: int | str | None = None,
    dictionary: Any,
    **where: Unpack[Where],
) -> Intervention:
    """Multiplies the contributions of these channels to a head's scores by `factor`; otherwise as `remove`."""
    pairs = channel_pairs(channels, dictionary)
    if len(pairs) == 0:
        raise FraError("there are no channels to change: give at least one pair of feature ids.")
    share = channel_share(pairs)
    return _change_scores(model, share, factor, *place_of(layer, head), dictionary, where)


@face
def keep_only(
    model: Model,
    channels: Channels,
    *,
    layer: int | None = None,
    head: int | str | None = None,
    dictionary: Any,
    **where: Unpack[Where],
) -> Intervention:
    """Takes every feature-feature term out of a head's scores but those of these channels (none of them: all are taken
    out). Terms with a bias or an error on either side stay: `scale_blocks` removes those. Otherwise as `remove`.
    """
    pairs = channel_pairs(channels, dictionary)
    kept, block = channel_share(pairs), _blocks([("feature", "feature")])

    def share(arm: Arm, head: int) -> Tensor:
        return block(arm, head) - kept(arm, head)

    return _change_scores(model, share, 0.0, *place_of(layer, head), dictionary, where)


@face
def scale_blocks(
    model: Model,
    blocks: Collection[tuple[str, str]],
    factor: float = 0.0,
    *,
    layer: int | None = None,
    head: int | str | None = None,
    dictionary: Any,
    **where: Unpack[Where],
) -> Intervention:
    """Multiplies whole blocks of a head's scores by `factor`; 0 removes them.

    blocks: pairs of "feature", "bias" or "error", of the query and of the key, as in `ResolvedHead.blocks`. Otherwise
    as `remove`. Raises FraError for an unknown block.
    """
    unknown = [block for block in blocks if block not in product(TERMS, TERMS)]
    if unknown or not blocks:
        named = f"{unknown[0]!r} is no block of a score" if unknown else "there are no blocks to change"
        raise FraError(f"{named}: name pairs of {', '.join(TERMS)}.")
    return _change_scores(model, _blocks(blocks), factor, *place_of(layer, head), dictionary, where)


@face
def scale_features(
    model: Model,
    features: Int[Tensor, " n"] | Sequence[int],
    side: Side,
    factor: float = 0.0,
    *,
    layer: int | None = None,
    head: int | str | None = None,
    dictionary: Any,
    **where: Unpack[Where],
) -> Intervention:
    """Multiplies what features do on one side of a head's scores by `factor`, against all that stands on the other side
    (features, bias and error); 0 removes them from the head's queries or keys. Otherwise as `remove`.
    """
    if side not in ("query", "key"):
        raise FraError(f"side={side!r} is unknown: choose one of query, key.")
    ids = feature_ids(features, dictionary)

    def share(arm: Arm, head: int) -> Tensor:
        frozen = arm.frozen
        W, _ = frozen.weights(side, head)
        pos = arm.codes.shape[1]
        # columns carry the norm's scale and the QK-norm's gain
        projected = arm.columns(side, head, ids.to(W.device)) @ (arm.codes.decoder[ids.to(W.device)] @ W)
        if frozen.rotary is not None:
            projected = frozen.rotary.rotate(projected, torch.arange(pos, device=W.device))
        if side == "query":
            return frozen.scale * projected @ frozen.vectors("key", head).mT
        return frozen.scale * frozen.vectors("query", head) @ projected.mT

    return _change_scores(model, share, factor, *place_of(layer, head), dictionary, where)


@face
def remove_output(
    model: Model,
    features: Int[Tensor, " n"] | Sequence[int],
    *,
    layer: int | None = None,
    head: int | str | None = None,
    dictionary: Any,
    terms: Collection[str] = (),
    **where: Unpack[Where],
) -> Intervention:
    """Takes what features contribute to a head's output out of hook_z, and so out of the residual stream.

    That is, for each row t, sum_s A(t,s) a_i(s) g_s / sigma_s d_i W_V, over the keys chosen; A is the pattern of the
    pass. terms: whole kinds of term to remove as well, "bias" (with b_V), "error", or "feature" for all features.
    where: as in `remove`.

    Raises FraError for features, terms, layer, head or dictionary that do not fit, and for nothing to remove.
    """
    return scale_output(model, features, 0.0, layer=layer, head=head, dictionary=dictionary, terms=terms, **where)


@face
def scale_output(
    model: Model,
    features: Int[Tensor, " n"] | Sequence[int],
    factor: float,
    *,
    layer: int | None = None,
    head: int | str | None = None,
    dictionary: Any,
    terms: Collection[str] = (),
    **where: Unpack[Where],
) -> Intervention:
    """Multiplies what features contribute to a head's output by `factor`; otherwise as `remove_output`."""
    return _scale_output(model, features, factor, *place_of(layer, head), dictionary, terms, where)


def _scale_output(
    model: Model,
    features: Int[Tensor, " n"] | Sequence[int],
    factor: float,
    layer: int,
    head: int,
    dictionary: Any,
    terms: Collection[str],
    where: Where,
) -> Intervention:
    check_layer_and_head(model, layer, head)
    check_dictionary(dictionary)
    check_where(where)
    unknown = sorted(set(terms) - set(TERMS))
    if unknown:
        raise FraError(f"{unknown[0]!r} is no kind of term: name some of {', '.join(TERMS)}.")
    ids = feature_ids(features, dictionary, empty=bool(terms))
    if "feature" in terms:
        ids = ids[:0]  # all of them already
    hook_name = dictionary_hook(dictionary)
    weights, values = qk_weights(model, layer, hook_name), ov_weights(model, layer, hook_name)
    hooks = LayerHooks(layer)
    seen = Pass(layer_names(model, layer, hook_name) | {"pattern": hooks.pattern})

    def share(arm: Arm, pattern: Tensor, n_docs: int, rows: Rows) -> Tensor:
        total = value_features(arm, values, head, ids.to(pattern.device))
        if terms:
            total = total + value_terms(arm, values, head, terms)
        return (
            pattern
            * chosen_entries(where, n_docs, pattern.shape[1], pattern.device).expand(n_docs, -1, -1)[rows]
            @ total
        )

    fixed, clean = None, where.get("clean")
    if clean is not None:
        arm = _clean_arm(model, dictionary, clean, layer)
        fixed = share(arm, arm.frozen.pattern[:, head], len(arm.frozen.x), slice(None))

    def edit(z: Tensor, hook: Any) -> Tensor:
        got, taken = seen.take(), fixed
        if taken is None:
            with torch.no_grad(), set_aside():
                taken = weights.W_q.new_zeros(*z.shape[:2], values.W_V.shape[-1])
                for rows, some in alike(model, layer, got):
                    frozen = frozen_in_pass(model, weights, some, some["pattern"])
                    arm, pattern = Arm(frozen, codes(dictionary, frozen.x)), some["pattern"][:, head].to(frozen.x)
                    taken[rows] = share(arm, pattern, len(z), rows)
        change = (1 - factor) * taken
        return with_head(z, head, len(values.W_O), lambda own: own - fitting(change, own))

    return Intervention(model, seen.readers(), [(hooks.z, edit)])


Share = Callable[[Arm, int], Tensor]
"""What an intervention is about: a part of one head's scores, [batch, q_pos, k_pos], before softcap."""


def channel_share(pairs: Int[Tensor, "n 2"]) -> Share:
    """The sum of F_ij over these pairs."""

    def share(arm: Arm, head: int) -> Tensor:
        frozen, decoder = arm.frozen, arm.codes.decoder
        batch, pos = arm.codes.shape
        everywhere = torch.arange(pos, device=decoder.device)
        q_ids, q_at = torch.unique(pairs[:, 0].to(decoder.device), return_inverse=True)
        k_ids, k_at = torch.unique(pairs[:, 1].to(decoder.device), return_inverse=True)
        q, k = arm.columns("query", head, q_ids), arm.columns("key", head, k_ids)
        U, V = frozen.scale * decoder[q_ids] @ frozen.W_q[head], decoder[k_ids] @ frozen.W_k[head]
        total = q.new_zeros(batch, pos, pos)
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            i, j = (at[start : start + _PAIRS_AT_ONCE] for at in (q_at, k_at))
            if frozen.rotary is None:
                # Shapes must not depend on the text, here and below: a product of another shape rounds differently, and
                # earlier positions would feel later tokens in their last bit.
                total += (q[..., i] * (U[i] * V[j]).sum(-1)) @ k[..., j].mT
                continue
            left = frozen.rotary.rotate(U[i][:, None].expand(-1, pos, -1), everywhere).transpose(0, 1)
            right = frozen.rotary.rotate(V[j][:, None].expand(-1, pos, -1), everywhere).transpose(0, 1)
            total += (q[..., i, None] * left).flatten(2) @ (k[..., j, None] * right).flatten(2).mT
        return total

    return share


def _blocks(blocks: Collection[tuple[str, str]]) -> Share:
    """The sum of whole blocks."""

    def vectors(arm: Arm, side: Side, head: int, term: str) -> Tensor:
        frozen, found = arm.frozen, arm.codes
        W, b = frozen.weights(side, head)
        rows = torch.arange(frozen.x[..., 0].numel(), device=W.device)
        parts = {"bias": found.bias, "error": found.error}
        total = parts[term] if term in parts else frozen.x - found.bias - found.error
        placed = frozen.place(side, head, total.flatten(0, 1) @ W, rows)
        if term == "bias":
            placed = placed + frozen.place(side, head, b.expand(len(rows), -1), rows, scaled=False)
        return placed.view(*frozen.x.shape[:2], -1)

    def share(arm: Arm, head: int) -> Tensor:
        return arm.frozen.scale * torch.stack(
            [vectors(arm, "query", head, a) @ vectors(arm, "key", head, b).mT for a, b in sorted(set(blocks))]
        ).sum(0)

    return share


def _change_scores(
    model: Model,
    share: Share,
    factor: float,
    layer: int,
    head: int,
    dictionary: Any,
    where: Where,
) -> Intervention:
    """Multiplies a share of one head's scores by `factor`, before softcap, and only where keys may be attended."""
    check_dictionary(dictionary)
    check_layer_and_head(model, layer, head)
    check_where(where)
    hook_name = dictionary_hook(dictionary)
    weights = qk_weights(model, layer, hook_name)
    seen = Pass(layer_names(model, layer, hook_name))
    fixed, clean = None, where.get("clean")
    if clean is not None:
        with torch.no_grad():
            fixed = share(_clean_arm(model, dictionary, clean, layer), head)

    def edit(scores: Tensor, hook: Any) -> Tensor:
        got, changed = seen.take(), scores.clone()
        with set_aside():
            return changed_scores(scores, got, changed)

    def changed_scores(scores: Tensor, got: dict[str, Tensor], changed: Tensor) -> Tensor:
        n_docs, pos = len(scores), scores.shape[-1]
        for rows, some in alike(model, layer, got):
            own = scores[rows, head]
            with torch.no_grad():
                frozen = frozen_in_pass(model, weights, some, scores[rows])
                if fixed is None:
                    taken = share(Arm(frozen, codes(dictionary, frozen.x)), head)
                else:
                    taken = fitting(fixed, scores[:, head]).expand_as(scores[:, head])[rows]
                taken = (1 - factor) * taken.to(frozen.x)
                # The model's own mask counts too (padding): masked scores are -inf, or the smallest number there is.
                allowed = frozen.mask & (own > torch.finfo(own.dtype).min / 2) & (taken != 0)
                allowed = allowed & chosen_entries(where, n_docs, pos, own.device).expand(n_docs, -1, -1)[rows]
            after = frozen.cap(before_cap(frozen, head, own).to(frozen.x) - taken).to(own.dtype)
            changed[rows, head] = torch.where(allowed, after, own)
        return changed

    return Intervention(model, seen.readers(), [(LayerHooks(layer).attn_scores, edit)])


def _clean_arm(model: Model, dictionary: Any, tokens: Tensor, layer: int) -> Arm:
    """The layer and the dictionary's codes on these tokens, as the model is without hooks."""
    with unhooked(model):
        frozen = freeze(model, tokens, layer, dictionary_hook(dictionary))
    return Arm(frozen, codes(dictionary, frozen.x))
