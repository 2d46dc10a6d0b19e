"""Head outputs of one layer on a batch of documents, and what they contribute to a dictionary's features: by head, by
source position, by both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra.architectures.architecture import Model
from fra.architectures.face import face, facing
from fra.architectures.known import architecture_of, check_layer_and_head, check_tokens, place_of, working_dtype
from fra.core.frozen import read_hooks
from fra.core.output import by_head, check_output, check_written, output_map
from fra.dictionaries.codes import dictionary_hook
from fra.dictionaries.encoder import Encoder, check_features, encode, encoder, head_output_layer
from fra.dictionaries.hooks import LayerHooks, is_attention_output
from fra.errors import FraError
from fra.stimuli.padding import Texts
from fra.verdicts.shown import as_html

_ROWS_AT_ONCE = 1024
_ENTRIES_AT_ONCE = 2048
_FEATURES_AT_ONCE = 128
_LARGEST = 2**31
"""Numbers in the largest tensor that is made on demand (8 GiB of float32)."""


@dataclass(frozen=True)
class Live:
    """The features that fire, sorted by document, position and feature; padding is left out."""

    doc: Int[Tensor, " n_live"]
    pos: Int[Tensor, " n_live"]
    feature: Int[Tensor, " n_live"]
    value: Float[Tensor, " n_live"]
    """The dictionary's activation."""

    def __len__(self) -> int:
        return len(self.doc)

    def where(self, chosen: Bool[Tensor, " n_live"]) -> Live:
        """Some of them."""
        return Live(self.doc[chosen], self.pos[chosen], self.feature[chosen], self.value[chosen])


@facing
@dataclass(frozen=True)
class HeadOutputs:
    """One layer's head outputs on a batch of documents, patterns and the dictionary's normalisation frozen; made by
    `fra.attribution.observe`.

    z[t,h] = sum_s A_h(t,s) v[s,h] with the model's own values (b_V and the norm's bias included, key-value heads
    repeated over their groups), and pre-activation = sum_h z[t,h] . W_enc[h] (times a frozen gain) + a constant: both
    sums are exact. Of a dictionary at hook_attn_out, W_O[h] W_enc stands for W_enc[h], b_O through W_enc is part of the
    constant, and the scale of a norm after attention (Gemma 2 and 3) of the gain.
    """

    encoder: Encoder
    z: Float[Tensor, "batch pos n_heads d_head"]
    values: Float[Tensor, "batch pos n_heads d_head"]
    pattern: Float[Tensor, "batch n_heads q_pos k_pos"]
    gain: Float[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    """False on padding."""
    live: Live
    written: Float[Tensor, "batch pos d_model"] | None = None
    """What attention writes (hook_attn_out), of a dictionary there; None at attn.hook_z."""

    def __repr__(self) -> str:
        batch, pos = self.real.shape
        return (
            f"HeadOutputs({batch} documents of at most {pos} positions, {self.n_heads} heads, "
            f"{len(self.live)} live entries of {self.encoder.d_sae} features)"
        )

    def _repr_html_(self) -> str:
        n_pos = int(self.real.sum())
        facts = {
            "documents": f"{len(self.real)} ({n_pos} positions)",
            "heads": self.n_heads,
            "features": self.encoder.d_sae,
            "live entries": f"{len(self.live)} ({len(self.live) / n_pos:.1f} a position)",
        }
        return as_html("HeadOutputs", facts)

    @property
    def n_heads(self) -> int:
        """Heads of the layer."""
        return self.z.shape[2]

    @property
    def x(self) -> Float[Tensor, "batch pos n_parts width"]:
        """What stands at the dictionary's hook: head outputs, or what attention writes as one part."""
        return self.z if self.written is None else self.written[:, :, None]

    def bias(
        self, features: Int[Tensor, " n_features"]
    ) -> Float[Tensor, " n_features"] | Float[Tensor, "batch pos n_features"]:
        """The part of the pre-activation that no head brings: [n_features], the same at every position, of a dictionary
        at attn.hook_z; [batch, pos, n_features] at hook_attn_out, where b_O is part of it and the gain multiplies that.
        """
        check_features(features, self.encoder.d_sae)
        bias, b_O = self.encoder.bias[features], self.encoder.b_O
        return bias if b_O is None else self.gain[..., None] * b_O[features] + bias

    def entries_bias(self, at: Live) -> Float[Tensor, " n_live"]:
        """`bias` of chosen entries (document, position, feature)."""
        bias, b_O = self.encoder.bias[at.feature], self.encoder.b_O
        return bias if b_O is None else self.gain[at.doc, at.pos] * b_O[at.feature] + bias

    def pre_activation(self, features: Int[Tensor, " n_features"]) -> Float[Tensor, "batch pos n_features"]:
        """What the dictionary's activation function sees (of a gated dictionary: of its magnitudes)."""
        return self.by_head(features).sum(2) + self.bias(features)

    def by_head(self, features: Int[Tensor, " n_features"]) -> Float[Tensor, "batch pos n_heads n_features"]:
        """DFA by head: z[t,h] . W_enc[h,:,f] times the gain. Summed over heads, plus `bias`: the pre-activation."""
        check_features(features, self.encoder.d_sae)
        self._fits(self.z[..., 0].numel() * len(features), "features")
        parts = torch.einsum("bthd,hdf->bthf", self.z, self.encoder.weight[:, :, features])
        return parts * self.gain[..., None, None]

    def by_source(
        self, features: Int[Tensor, " n_features"], head: int | str | None = None
    ) -> Float[Tensor, "batch q_pos k_pos n_features"]:
        """DFA by source position: A_h(t,s) v[s,h] . W_enc[h,:,f] times the gain, summed over heads, or of one head.

        Summed over k_pos: `by_head`, summed over heads or of that head. For many features use `sources` or
        `strongest_sources`. Raises FraError where the result would not fit.
        """
        check_features(features, self.encoder.d_sae)
        batch, _, pos, _ = self.pattern.shape
        self._fits(batch * pos * pos * len(features), "features or documents")
        heads = range(self.n_heads) if head is None else [self._head(head)]
        found = self.z.new_zeros(batch, pos, pos, len(features))
        for h in heads:
            read = self.values[:, :, h] @ self.encoder.weight[h][:, features]
            found += self.pattern[:, h, :, :, None] * read[:, None]
        return found * self.gain[:, :, None, None]

    def entries_by_head(self, at: Live) -> Float[Tensor, "n_live n_heads"]:
        """DFA by head of chosen entries (document, position, feature)."""
        weight = self.encoder.weight.permute(2, 0, 1)
        parts = [
            (self.z[at.doc[some], at.pos[some]] * weight[at.feature[some]]).sum(-1)
            for some in _slices(len(at), _ENTRIES_AT_ONCE)
        ]
        found = torch.cat(parts) if parts else self.z.new_zeros(0, self.n_heads)
        return found * self.gain[at.doc, at.pos, None]

    def sources(
        self, at: Live, head: Int[Tensor, " n_live"] | int | str | None = None
    ) -> Float[Tensor, "n_live k_pos"]:
        """DFA by source of chosen entries, summed over heads, or of one head (the same for all, or one for each).

        Nothing larger than the result and [n_heads, k_pos, features live in one document] is made.
        """
        self._fits(len(at) * self.pattern.shape[-1], "entries")
        found = self.z.new_zeros(len(at), self.pattern.shape[-1])
        if isinstance(head, (int, str)):
            head = torch.full((len(at),), self._head(head), device=self.z.device)
        for doc, which in self._by_document(at):
            features, column = torch.unique(at.feature[which], return_inverse=True)
            read = self._read(doc, features)  # [n_features, n_heads, k_pos]
            attention = self.pattern[doc].transpose(0, 1)  # [q_pos, n_heads, k_pos]
            for some in _slices(len(which), _ENTRIES_AT_ONCE):
                here, pos, col = which[some], at.pos[which[some]], column[some]
                if head is None:
                    found[here] = torch.einsum("nhk,nhk->nk", attention[pos], read[col])
                else:
                    found[here] = attention[pos, head[here]] * read[col, head[here]]
        return found * self.gain[at.doc, at.pos, None]

    def top_sources(
        self, at: Live, n: int = 1, head: Int[Tensor, " n_live"] | int | str | None = None
    ) -> tuple[Int[Tensor, "n_live n"], Float[Tensor, "n_live n"]]:
        """(key positions, contributions) of the n largest sources of chosen entries, largest first; -inf where a
        position has fewer keys. Streams over entries.
        """
        k_pos = self.pattern.shape[-1]
        n = min(n, k_pos)
        pos = torch.zeros(len(at), n, dtype=torch.long, device=self.z.device)
        value = self.z.new_zeros(len(at), n)
        every = torch.arange(k_pos, device=self.z.device)
        for _, which in self._by_document(at):
            part = Live(at.doc[which], at.pos[which], at.feature[which], at.value[which])
            chosen = head[which] if isinstance(head, Tensor) else head
            found = self.sources(part, chosen).masked_fill(every > part.pos[:, None], -torch.inf)
            value[which], pos[which] = found.topk(n, dim=-1)
        return pos, value

    def strongest_sources(
        self, features: Int[Tensor, " n_features"], n: int = 1
    ) -> tuple[Int[Tensor, "batch q_pos n_features n"], Float[Tensor, "batch q_pos n_features n"]]:
        """(key positions, contributions) of the n largest sources at *every* position, whether a feature fires or not;
        streams over documents and features, so that [batch, q_pos, k_pos, n_features] is never made.
        """
        check_features(features, self.encoder.d_sae)
        batch, _, pos, _ = self.pattern.shape
        n = min(n, pos)
        where = torch.zeros(batch, pos, len(features), n, dtype=torch.long, device=self.z.device)
        value = self.z.new_zeros(batch, pos, len(features), n)
        after = torch.ones(pos, pos, dtype=torch.bool, device=self.z.device).triu(1)
        for doc in range(batch):
            attention = (self.pattern[doc] * self.gain[doc, :, None]).permute(2, 1, 0)  # [k_pos, q_pos, n_heads]
            for some in _slices(len(features), _FEATURES_AT_ONCE):
                read = self._read(doc, features[some]).permute(2, 1, 0)  # [k_pos, n_heads, features]
                found = (attention @ read).permute(1, 2, 0).masked_fill(after[:, None], -torch.inf)
                if n == 1:
                    value[doc, :, some, 0], where[doc, :, some, 0] = found.max(-1)
                else:
                    value[doc, :, some], where[doc, :, some] = found.topk(n, dim=-1)
        return where, value

    def _read(self, doc: int, features: Tensor) -> Float[Tensor, "n_features n_heads k_pos"]:
        """v[s,h] . W_enc[h,:,f] in one document."""
        values = self.values[doc].permute(1, 2, 0)  # [n_heads, d_head, k_pos]
        weight = self.encoder.weight[:, :, features].transpose(1, 2)  # [n_heads, n_features, d_head]
        return (weight @ values).transpose(0, 1).contiguous()

    def _by_document(self, at: Live) -> Iterator[tuple[int, Tensor]]:
        for doc in torch.unique(at.doc).tolist():
            yield doc, torch.nonzero(at.doc == doc)[:, 0]

    def _head(self, head: int | str) -> int:
        if isinstance(head, str):
            head = place_of(self.encoder.layer, head)[1]
        if not 0 <= head < self.n_heads:
            raise FraError(f"head {head} is out of range: the layer has {self.n_heads} heads, 0 to {self.n_heads - 1}.")
        return head

    def _fits(self, numbers: int, fewer: str) -> None:
        if numbers > _LARGEST:
            raise FraError(
                f"the result would hold {numbers:.2g} numbers, more than {_LARGEST:.2g}: ask for fewer {fewer}."
            )


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def padded(tokens: Tensor | Sequence[Tensor]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """One rectangle of documents [pos], [batch, pos], or a list of [pos] of unequal length (filled up on the right with
    their own first token, which causal attention never lets reach a real row), and where it is real.

    Raises FraError for anything else.
    """
    documents = list(tokens) if not isinstance(tokens, Tensor) or tokens.ndim == 2 else [tokens]
    wrong = [doc for doc in documents if doc.ndim != 1 or doc.is_floating_point() or len(doc) == 0]
    if wrong or not documents:
        what = f"{wrong[0].dtype} of shape {list(wrong[0].shape)}" if wrong else "nothing"
        raise FraError(f"tokens must be integer ids: [pos], [batch, pos] or a list of [pos], none empty; not {what}.")
    texts = Texts.of(documents, [""] * len(documents))
    return texts.tokens, texts.real


@face
@torch.no_grad()
def observe(model: Model, sae: Any, tokens: Tensor | Sequence[Tensor]) -> HeadOutputs:
    """Runs the documents and reads the head outputs at the dictionary's hook, with values and patterns.

    tokens: [pos], [batch, pos], or a list of [pos] of unequal length. One pass over all of them: give a large corpus in
    parts. Raises FraError for a dictionary that is neither of head outputs (attn.hook_z) nor of what attention writes
    (hook_attn_out) or does not fit the model, for tokens that do not fit it, and where hook_z is not pattern times
    values (gated attention) or hook_attn_out not hook_z through W_O.
    """
    layer = head_output_layer(sae)
    check_layer_and_head(model, layer)
    rows, real = padded(tokens)
    check_tokens(model, rows)
    own, hooks = architecture_of(model), LayerHooks(layer)
    home, dtype = own.device, working_dtype(model)
    names = {"z": hooks.z, "v": hooks.v, "pattern": hooks.pattern}
    if through := is_attention_output(dictionary_hook(sae)):
        names["written"] = hooks.attn_out
        if own.norm_after(layer) is not None:
            names["post_scale"] = hooks.post_scale
    got = read_hooks(model, rows.to(home), layer, names)
    pattern = got["pattern"].to(dtype)
    n_heads = pattern.shape[1]
    batch, pos = rows.shape
    z = by_head(got["z"], n_heads).to(dtype)
    values = got["v"].reshape(batch, pos, -1, z.shape[-1]).to(dtype)
    values = values.repeat_interleave(n_heads // values.shape[2], dim=2)
    made = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
    so = "its outputs cannot be attributed to source positions"
    check_output(own, f"layer {layer}", made, z, values, so)
    home_real = real.to(home)
    if not through:
        found = encoder(sae, z)
        return HeadOutputs(found, z, values, pattern, found.gain(z), home_real, live_features(sae, z, home_real))
    written = got["written"].to(dtype)
    x = written[:, :, None]
    read = encoder(sae, x)
    W_O, b_O, scale = output_map(own, layer, got.get("post_scale"), dtype)
    check_written(own, layer, z, W_O, b_O, scale, written)
    gain = read.gain(x) / scale
    return HeadOutputs(
        read.through(W_O, b_O), z, values, pattern, gain, home_real, live_features(sae, x, home_real), written
    )


def live_features(sae: Any, x: Float[Tensor, "batch pos n_parts width"], real: Bool[Tensor, "batch pos"]) -> Live:
    """What fires in the dictionary on what stands at its hook."""
    pos = real.shape[1]
    flat = x.flatten(0, 1)
    rows, features, values = [], [], []
    for some in _slices(len(flat), _ROWS_AT_ONCE):
        acts = encode(sae, flat[some])
        at, feature = acts.nonzero(as_tuple=True)
        rows.append(at + some.start)
        features.append(feature)
        values.append(acts[at, feature])
    row, feature, value = torch.cat(rows), torch.cat(features), torch.cat(values)
    kept = real.flatten()[row]
    row = row[kept]
    return Live(row // pos, row % pos, feature[kept], value[kept])
