"""An SAE's codes of an activation: what is active, the bias and the error, exactly additive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, GatedSAE, JumpReLUSAE, StandardSAE, TopKSAE
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from fra.dictionaries.blockdiag import BlockDiagonalSAE
from fra.dictionaries.hooks import attention_input_layer
from fra.errors import FraError

__all__ = ["Codes", "attention_input_layer", "check_dictionary", "codes", "dictionary_hook"]

# Decoding is linear, and encoding one position looks at no other: BatchTopK is saved as JumpReLU; AbsTopK is a TopKSAE.
_LINEAR_DECODERS = (StandardSAE, GatedSAE, TopKSAE, JumpReLUSAE, BlockDiagonalSAE)
ROWS_AT_ONCE = 1024


class EntryIndex:
    """The entries of a code, findable by feature and document."""

    def __init__(self, codes: Codes) -> None:
        batch, pos = codes.shape
        key = codes.feature * batch + codes.row // pos
        self._batch = batch
        self._key, self._order = key.sort(stable=True)  # within a document entries stay in order of position

    def of(self, feature: Int[Tensor, " n"], doc: Int[Tensor, " n"] | None = None) -> tuple[Tensor, Tensor]:
        """(which, entry): for each of n features, in one document or in all, the entries where it is live, by
        position.
        """
        low = feature * self._batch + (0 if doc is None else doc)
        high = low + (self._batch - 1 if doc is None else 0)
        start = torch.searchsorted(self._key, low)
        count = torch.searchsorted(self._key, high, right=True) - start
        which = torch.repeat_interleave(torch.arange(len(feature), device=feature.device), count)
        within = torch.arange(len(which), device=feature.device) - (count.cumsum(0) - count)[which]
        return which, self._order[start[which] + within]


@dataclass(frozen=True)
class Codes:
    """x = (sum_i value_i decoder_i) + bias + error, exactly; `value` is the feature's activation times the dictionary's
    gain at that position.
    """

    row: Int[Tensor, " n"]
    """Index into the flattened [batch * pos]; entries are sorted by row, then feature."""
    feature: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    decoder: Float[Tensor, "d_sae d_model"]
    """Effective: unit rows where the SAE rescales by decoder norm."""
    bias: Float[Tensor, "batch pos d_model"]
    error: Float[Tensor, "batch pos d_model"]
    shape: tuple[int, int]
    """(batch, pos)"""

    @cached_property
    def index(self) -> EntryIndex:
        """The entries, findable by feature and document."""
        return EntryIndex(self)

    def dense(self) -> Float[Tensor, "batch pos d_sae"]:
        """The values as one dense tensor."""
        full = self.value.new_zeros(self.shape[0] * self.shape[1], self.decoder.shape[0])
        full[self.row, self.feature] = self.value
        return full.view(*self.shape, -1)


def dictionary_hook(sae: Any) -> str:
    """The hook that the dictionary was trained at, from its metadata. Raises FraError where it says none."""
    hook_name = sae.cfg.metadata.hook_name
    if not hook_name:
        raise FraError("the dictionary does not say which hook it was trained at: set sae.cfg.metadata.hook_name.")
    return str(hook_name)


def neuronpedia(sae: Any) -> str | None:
    """The address on Neuronpedia below which the dictionary's features have pages; None where it has no id there."""
    name = getattr(sae.cfg.metadata, "neuronpedia_id", None)
    return f"https://www.neuronpedia.org/{name}" if name else None


def check_kind(sae: Any) -> None:
    """Raises FraError for what is no SAELens dictionary with a linear decoder: transcoders, temporal and
    matching-pursuit dictionaries, crosscoders, SAEs in training, unknown classes.
    """
    if not isinstance(sae, SAE):
        raise FraError(
            f"{type(sae).__name__} is not a SAELens dictionary: load "
            "one with sae_lens.SAE.load_from_disk or from_pretrained."
        )
    kind = sae.cfg.architecture()
    if isinstance(sae, TrainingSAE):
        raise FraError(
            f"this {kind!r} dictionary is still in training form: save it "
            "with save_inference_model and load it with SAE.load_from_disk."
        )
    if not isinstance(sae, _LINEAR_DECODERS):
        raise FraError(
            f"a dictionary of architecture {kind!r} cannot be resolved: it does not write a position as a "
            "sum of its own active features; use a standard, gated, TopK, JumpReLU or BatchTopK dictionary."
        )


def check_dictionary(sae: Any, *, hook_name: str | None = None) -> None:
    """Refuses, by name, what is no dictionary of an attention input with a linear decoder.

    hook_name: the hook at which the dictionary is about to be used, if it must be that one.
    Raises FraError for head-output (`hook_z`) dictionaries, transcoders, temporal and matching-pursuit dictionaries,
    crosscoders, SAEs in training, unknown classes, activation scaling that was not folded in, and a dictionary of
    another hook.
    """
    check_kind(sae)
    k, d_sae = getattr(sae.cfg, "k", None), int(sae.cfg.d_sae)
    if sae.cfg.architecture() == "topk" and k is not None and not 0 < k <= d_sae:
        raise FraError(
            f"the dictionary keeps k = {k} of {d_sae} features: give it a k from 1 to {d_sae} in its config."
        )
    trained_at = dictionary_hook(sae)
    if sae.cfg.reshape_activations == "hook_z":
        raise FraError(
            f"the dictionary at {trained_at!r} is one of head outputs "
            "(reshape_activations='hook_z'), not of an attention input."
        )
    attention_input_layer(trained_at)
    if hook_name is not None and hook_name != trained_at:
        raise FraError(
            f"the dictionary was trained at {trained_at!r} and is "
            f"used at {hook_name!r}: use the dictionary of that hook."
        )
    check_scaling(sae)


def check_scaling(sae: Any) -> None:
    """Raises FraError for activation scaling that was not folded into the dictionary's weights."""
    scaling = sae.cfg.normalize_activations
    if scaling in ("expected_average_only_in", "covariance_whitening"):
        fold = (
            "fold_activation_norm_scaling_factor"
            if scaling == "expected_average_only_in"
            else "fold_activation_whitening"
        )
        raise FraError(
            f"the dictionary at {dictionary_hook(sae)!r} was trained on rescaled activations ({scaling}) and "
            f"the scale is not folded into its weights, so its codes would be wrong: call sae.{fold}(...) "
            "once (SAE.from_pretrained and SAELens' trainer do; SAE.load_from_disk does not)."
        )


def gain_and_offset(sae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """g_t and m_t of the run-time normalisation of the rows that were just encoded: what it makes of one and of zero on
    the way out.

    SAELens keeps them as state between encoding and decoding; asking for them clears it, as decoding would.
    """
    wide = like.dtype if like.device.type == "mps" else torch.float64
    probe = torch.tensor([0.0, 1.0], dtype=wide, device=sae.W_dec.device)[:, None, None].expand(2, len(like), 1)
    zero, one = sae.run_time_activation_norm_fn_out(probe)
    return (one - zero).to(like), zero.to(like)


def encoded_rows(
    sae: Any, flat: Float[Tensor, "rows d_model"]
) -> Iterator[tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"], Tensor, Tensor]]:
    """Row, feature and value (the activation times the dictionary's gain there) of every live feature, by row, then
    feature, with gain and offset of each row; in blocks of rows, because encoding is dense, [rows, d_sae].

    Raises FraError where a code is not finite.
    """
    for start in range(0, len(flat), ROWS_AT_ONCE):
        part = flat[start : start + ROWS_AT_ONCE]
        acts = sae.encode(part.to(sae.W_dec.device))
        acts = acts.to_dense() if acts.is_sparse else acts
        gain, offset = gain_and_offset(sae, part)
        at, live = acts.to(flat.device).nonzero(as_tuple=True)
        value = acts.to(flat.device)[at, live].to(flat) * gain[at, 0]
        if not bool(value.isfinite().all()):
            raise FraError(
                f"the codes of the dictionary at {dictionary_hook(sae)!r} "
                "hold NaN or infinity: check its weights and the model's."
            )
        yield at + start, live, value, gain, offset


def decoded(
    row: Int[Tensor, " n"], feature: Int[Tensor, " n"], value: Float[Tensor, " n"], decoder: Tensor, n_rows: int
) -> Float[Tensor, "n_rows d_model"]:
    """What active entries, sorted by row, add up to: sum_i value_i decoder_i of every row."""
    first = torch.searchsorted(row, torch.arange(n_rows, device=row.device))
    return torch.nn.functional.embedding_bag(feature, decoder, first, mode="sum", per_sample_weights=value)


@torch.no_grad()
def codes(sae: Any, x: Float[Tensor, "batch pos d_model"]) -> Codes:
    """The dictionary's codes of `x` (the activation at its hook).

    The error is what features and bias leave of x, in x's own precision, so the three always sum to x. Raises FraError
    for a dictionary that check_dictionary refuses, of another width, with non-finite weights, or none of whose features
    is live.
    """
    check_dictionary(sae)
    batch, pos, width = x.shape
    if width != sae.cfg.d_in:
        raise FraError(
            f"the dictionary at {dictionary_hook(sae)!r} has width {sae.cfg.d_in} and the activation there has "
            f"{width}: it belongs to another model."
        )
    decoder = sae.W_dec.detach().to(x)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # A dead feature may have a row of zeros: it adds nothing, whatever its norm.
        decoder = decoder / decoder.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(decoder.dtype).tiny)
    b_dec = sae.b_dec.detach().to(x)
    if not bool(decoder.isfinite().all() and b_dec.isfinite().all()):
        raise FraError(f"the weights of the dictionary at {dictionary_hook(sae)!r} hold NaN or infinity.")
    flat = x.flatten(0, 1)
    row, feature, value, bias = [], [], [], []
    for at, live, values, gain, offset in encoded_rows(sae, flat):
        row.append(at)
        feature.append(live)
        value.append(values)
        bias.append(gain * b_dec + offset)
    rows, features, values = torch.cat(row), torch.cat(feature), torch.cat(value)
    if len(rows) == 0:
        raise FraError(
            f"no feature of the dictionary at {dictionary_hook(sae)!r} is live on any of the {len(flat)} positions (L0 "
            f"is zero): wrong weights or hook."
        )
    error = flat - torch.cat(bias) - decoded(rows, features, values, decoder, len(flat))
    return Codes(rows, features, values, decoder, torch.cat(bias).view_as(x), error.view_as(x), (batch, pos))
