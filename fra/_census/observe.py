"""Runs documents through a model and a dictionary, in batches, and keeps the live entries of one attention layer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fra._census.corpus import Corpus
from fra.architectures.architecture import ANGLES, Model, Rotary, Side
from fra.architectures.known import architecture_of, check_layer_and_head, one_document
from fra.architectures.passes import seen
from fra.core.frozen import assemble, folded, freeze, qk_gain, read_hooks
from fra.core.weights import QKWeights, qk_weights
from fra.dictionaries.codes import ROWS_AT_ONCE, check_dictionary, codes, dictionary_hook, encoded_rows
from fra.errors import FraError
from fra.stimuli.padding import padded

TOKENS_AT_ONCE = 2048
"""Tokens in one forward pass (one document at least)."""
_FEATURES_AT_ONCE = 4096
_CHECKED_TOKENS = 256
"""Of one document, on which the model's own scores are compared."""


@dataclass(frozen=True)
class Layer:
    """The query and key maps of one layer as they read a dictionary's features."""

    weights: QKWeights
    decoder: Float[Tensor, "d_sae d_model"]
    rotary: Rotary | None

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.weights.W_q.shape[0]

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.weights.W_q.shape[2]

    @property
    def d_sae(self) -> int:
        """Features of the dictionary."""
        return self.decoder.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.decoder.dtype

    def directions(self, side: Side, head: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_head"]:
        """Features as the head's queries (times the score's scale) or keys, before rotation."""
        if side == "query":
            return self.decoder[features] @ (self.weights.W_q[head] * self.weights.scale)
        return self.decoder[features] @ self.weights.W_k[head]

    def both_directions(
        self, heads: Sequence[int], features: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "heads n d_head"], Float[Tensor, "heads n d_head"]]:
        """`directions` of several heads, queries and keys, in one product: the decoder's rows are fetched once."""
        w, chosen = self.weights, list(heads)
        found = self._read(torch.cat((w.W_q[chosen] * w.scale, w.W_k[chosen])), features)
        return found[: len(chosen)], found[len(chosen) :]

    def _read(
        self, maps: Float[Tensor, "maps d_model d_head"], features: Int[Tensor, " n"]
    ) -> Float[Tensor, "maps n d_head"]:
        flat = maps.transpose(0, 1).flatten(1)
        found = maps.new_empty(len(maps), len(features), self.d_head)
        for low in range(0, len(features), _FEATURES_AT_ONCE):
            some = self.decoder[features[low : low + _FEATURES_AT_ONCE]] @ flat
            found[:, low : low + _FEATURES_AT_ONCE] = some.view(len(some), len(maps), -1).transpose(0, 1)
        return found

    def mask(self, n_pos: int) -> Bool[Tensor, "pos pos"]:
        """True where the key may be attended."""
        return self.weights.mask(n_pos)

    def patterns(self, corpus: Corpus, doc: int, head: int) -> Float[Tensor, "pos pos"]:
        """One head's attention on one document of the corpus, from its kept inputs."""
        assert corpus.inputs is not None
        rows = slice(corpus.row_start[doc], corpus.row_start[doc + 1])
        x, n_pos = corpus.inputs[rows][None], rows.stop - rows.start
        ones = x.new_ones(1, self.n_heads, n_pos)
        square = x.new_zeros(1).expand(1, self.n_heads, n_pos, n_pos)
        gains = tuple(ones if gain is None else gain[None, :, rows] for gain in (corpus.gain_q, corpus.gain_k))
        frozen = assemble(self.weights, x, ones[:, 0], (gains[0], gains[1]), self.rotary, square, square)
        return frozen.attention(frozen.scores(head))[0]


def token_documents(documents: Any) -> list[Tensor]:
    """The documents as tensors. Raises FraError for what is no list of token documents."""
    if isinstance(documents, str):
        raise FraError("documents is one text: give a list of documents, each as the ids of target.tokens(text).")
    one = isinstance(documents, (Tensor, np.ndarray)) and documents.ndim < 2
    if not hasattr(documents, "__len__") or one:
        what = f"of shape {list(documents.shape)}" if one else f"a {type(documents).__name__}"
        raise FraError(f"documents is {what}: give a list of documents, each the 1-D token ids of one text.")
    if not len(documents):
        raise FraError("there are no documents: give a list of 1-D tensors of token ids.")
    found = []
    for number, tokens in enumerate(documents):
        if isinstance(tokens, (int, np.integer)):
            raise FraError("documents is a list of single token ids: give a list of documents, [tokens] for one.")
        if hasattr(tokens, "__len__") and len(tokens) == 0:
            raise FraError(f"document {number} is empty: leave it out.")
        try:
            found.append(one_document(tokens))
        except FraError as error:
            raise FraError(f"document {number}: {error}") from error
    return found


def stripe_lists(documents: Sequence[Tensor], stripes: Sequence[int | Sequence[int]] | None) -> list[list[int]]:
    """The offsets of each document, ascending. Raises FraError where they do not fit the documents."""
    if stripes is None:
        return [[] for _ in documents]
    if len(stripes) != len(documents):
        raise FraError(f"there are {len(stripes)} stripes for {len(documents)} documents: give one for each.")
    lists = []
    for number, (tokens, given) in enumerate(zip(documents, stripes, strict=True)):
        offsets = sorted({int(given)} if isinstance(given, int) else {int(offset) for offset in given})
        if offsets and not (offsets[0] >= 0 and offsets[-1] < len(tokens)):
            raise FraError(
                f"stripe {offsets[0] if offsets[0] < 0 else offsets[-1]} of document {number} is no offset "
                f"t - s within its {len(tokens)} tokens."
            )
        lists.append(offsets)
    return lists


class Observer:
    """Reads the live entries of documents off one attention layer."""

    def __init__(self, model: Model, sae: Any, layer: int, longest: Int[Tensor, " pos"], keep_inputs: bool):
        """Raises FraError for a model, dictionary, layer or `longest` document that cannot be resolved."""
        check_dictionary(sae)
        check_layer_and_head(model, layer)
        self.model, self.sae, self.keep_inputs = model, sae, keep_inputs
        hook = dictionary_hook(sae)
        # The model's own scores are reproduced, and the dictionary's sum, on the longest document before the rest.
        sample = freeze(model, longest[None, :_CHECKED_TOKENS], layer, hook)
        decoder = codes(sae, sample.x[:, :ROWS_AT_ONCE]).decoder
        weights = qk_weights(model, layer, hook, sample.x.dtype)
        self.layer = Layer(folded(weights), decoder, sample.rotary)
        self._raw = weights
        self._own = architecture_of(model)
        self._names = self._own.input_hooks(layer, hook)
        if self.layer.rotary is not None and len(longest) > len(self.layer.rotary.cos):
            self.layer = replace(self.layer, rotary=self._rotation(longest))

    def _rotation(self, tokens: Tensor) -> Rotary | None:
        """The rotation of one document run alone."""
        tokens = tokens[None]
        got = read_hooks(self.model, tokens, self._raw.layer, self._names)
        return self._own.rotary(self._raw.layer, got, tokens.shape[1], self.layer.dtype)

    def check_rotation(self, shortest: Int[Tensor, " pos"]) -> None:
        """Raises FraError where the shortest document is rotated by other angles than the longest: all share one table,
        and shorter ones run in a batch with longer ones.
        """
        if self.layer.rotary is not None and not same_angles(self._rotation(shortest), self.layer.rotary):
            raise FraError(_LENGTHS)

    @torch.no_grad()
    def observe(self, documents: Sequence[Tensor], numbers: Sequence[int], stripes: Sequence[Sequence[int]]) -> Corpus:
        """The entries of some documents, run as one batch padded on the right; padding is dropped before anything else
        is computed.
        """
        length = torch.tensor([len(tokens) for tokens in documents])
        home, like = self.layer.decoder.device, self.layer.decoder
        n_pos = int(length.max())
        batch = padded([tokens.long() for tokens in documents])
        turned = {} if self.layer.rotary is None else self._own.rotary_hooks(self._raw.layer)
        asked = {k: v for k, v in self._names.items() if k in turned or k not in ANGLES}
        got = seen(self.model, batch, self._raw.layer, asked)
        if turned and not same_angles(
            self._own.rotary(self._raw.layer, got, n_pos, self.layer.dtype), self.layer.rotary
        ):
            raise FraError(_LENGTHS)
        real = (torch.arange(n_pos) < length[:, None]).to(home)
        x = got["x"].to(like)[real]
        sigma = got["sigma"].to(like)[..., 0][real] if "sigma" in got else x.new_ones(len(x))
        row, feature, value = live_entries(self.sae, x)
        inputs = x / sigma[:, None]
        gain_q, gain_k = self._gains(inputs)
        return Corpus(
            number=torch.tensor(list(numbers)),
            length=length,
            n_offsets=torch.tensor([len(offsets) for offsets in stripes]),
            offset=torch.tensor([offset for offsets in stripes for offset in offsets], dtype=torch.long),
            per_row=torch.bincount(row, minlength=len(x)).int(),
            feature=feature.int(),
            value=value / sigma[row],
            gain_q=gain_q,
            gain_k=gain_k,
            inputs=inputs if self.keep_inputs else None,
        )

    def _gains(self, inputs: Float[Tensor, "rows d_model"]) -> tuple[Tensor | None, Tensor | None]:
        """The QK-norm's gains [n_heads, rows], queries and keys; None without one."""
        if self._raw.norm_q is None and self._raw.norm_k is None:
            return None, None
        query, key = (qk_gain(self._raw, side, inputs[None])[0] for side in ("query", "key"))
        return query, key

    def nothing(self) -> Corpus:
        """The corpus of no documents."""
        inputs = self.layer.decoder.new_empty(0, self.layer.decoder.shape[1])
        whole, (gain_q, gain_k) = torch.empty(0, dtype=torch.long), self._gains(inputs)
        ids = torch.empty(0, dtype=torch.int32, device=inputs.device)
        return Corpus(
            number=whole,
            length=whole,
            n_offsets=whole,
            offset=whole,
            per_row=ids,
            feature=ids,
            value=inputs[:, 0],
            gain_q=gain_q,
            gain_k=gain_k,
            inputs=inputs if self.keep_inputs else None,
        )

    def fingerprint(self) -> str:
        """sha256 of what, beside documents, decides the entries and couplings: weights, dictionary, precision."""
        w = self.layer.weights
        state = [(name, tensor) for name, tensor in sorted(self.sae.state_dict().items())]
        return _digest(
            [f"{w.layer} {w.hook_name} {w.scale} {w.softcap} {w.window} {self.layer.dtype} {self.keep_inputs}"],
            [w.W_q, w.W_k, w.b_q, w.b_k, *(tensor for _, tensor in state)],
        )


_LENGTHS = (
    "the model rotates positions by other angles in a longer text than in a shorter one (longrope and dynamic scaling "
    "do): take a census of texts on one side of that length, or resolve each text alone."
)


def same_angles(one: Rotary | None, other: Rotary | None) -> bool:
    """Whether two rotations are the same at all positions that both have, but for rounding."""
    if one is None or other is None:
        return one is other
    n_pos = min(len(one.cos), len(other.cos))
    return all(
        torch.allclose(a[:n_pos].double(), b[:n_pos].double(), rtol=0, atol=1e-6)
        for a, b in ((one.cos, other.cos), (one.sin, other.sin))
    )


def _digest(words: Sequence[str], tensors: Sequence[Tensor]) -> str:
    found = hashlib.sha256("\n".join(words).encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def documents_digest(documents: Sequence[Tensor], stripes: Sequence[Sequence[int]]) -> str:
    """sha256 of the tokens and stripes, in order."""
    return _digest([repr([list(offsets) for offsets in stripes])], [tokens.long() for tokens in documents])


def live_entries(
    sae: Any, x: Float[Tensor, "rows d_model"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Row, feature and value (the activation times the dictionary's gain there) of every live feature, by row, then
    feature. Raises FraError where a code is not finite.
    """
    row, feature, value = zip(*(block[:3] for block in encoded_rows(sae, x)), strict=True)
    return torch.cat(row), torch.cat(feature), torch.cat(value)


def plan(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches of document numbers of nearly equal length, shortest first: little is padded, and the same documents are
    always cut in the same way.
    """
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[number] > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
