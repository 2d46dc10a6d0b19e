"""Feature-resolved attention of one head on one document.

S(t,s) = sum over query entries at t and key entries at s of scale * <query vector, key vector>, where the entries of a
position are its live features, one bias entry and one error entry. The four-dimensional tensor of feature-feature terms
is never stored: each live entry is projected once, and every view is a product of those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.face import face, facing
from fra.architectures.known import one_document
from fra.core.channels import reduce_channels
from fra.core.frozen import FrozenLayer, Side, activations_of, freeze
from fra.core.reductions import Entries, Reduce, refuse_beyond_memory, top_terms
from fra.core.weights import Model, check_layer_and_head
from fra.dictionaries.codes import Codes, check_dictionary, codes, dictionary_hook
from fra.dictionaries.crosscoder import Crosscoder
from fra.dictionaries.texts import loudest, text_of
from fra.errors import FraError
from fra.verdicts.claim import parse_head
from fra.verdicts.shown import as_html

_PICTURED = 256
"""Tokens of a document that is drawn where its head is shown in a notebook."""
TERMS = ("feature", "bias", "error")


@face
def resolve(
    model: Model,
    sae: Any,
    tokens: Any,
    layer: int | None = None,
    head: int | str | None = None,
    *,
    slot: int | None = None,
    activations: Mapping[int, Float[Tensor, "_pos _d_model"]] | None = None,
) -> ResolvedHead:
    """Resolves the attention scores of one head into terms of a dictionary's features, exactly.

    model: TransformerBridge or HookedTransformer whose weights are processed as they were when the dictionary was
    trained. sae: a SAELens dictionary of this layer's attention input (its metadata names the hook).
    tokens: ids of one document, special tokens included, at most the model's context long: Int[Tensor, "pos"], or a
    list or array of them. layer and head: by number, or the head alone by name (head="L1H4").
    slot: of a `fra.crosscoders.Crosscoder` in place of sae, the slot that is this model at an attention input of the
    layer. activations: of a crosscoder, those of the slots of other models on these tokens, by slot; what the same
    model has at other hooks is read from it.

    What is returned (a `fra.ResolvedHead`) answers:

    >>> target = fra.load_target("mini")
    >>> _, sae = target.dictionary_for(1)
    >>> m = fra.resolve(target.model, sae, target.tokens("the cat sat, and the cat sat"), head="L1H4")
    >>> scores = m.scores()  # [q_pos, k_pos]: the model's own scores, as the sum of all terms
    >>> sum(m.blocks().values()).allclose(scores.tril(), atol=1e-3)  # by kind: features, biases, errors of either side
    True
    >>> len(m.top(10, text=True))  # the strongest terms (query, key, feature, feature), with their tokens
    10
    >>> i, j = m.channels(n=10)[["q_feature", "k_feature"]].iloc[0]  # pairs of features, summed over the document
    >>> m.channel(i, j).shape == scores.shape  # [q_pos, k_pos]: what one channel brings to each score
    True
    >>> q_features, k_features, terms = m.pair(5, 2)  # all terms of one score

    Scores are those before softcap; a softcap is not additive. LayerNorm's scale and the gain of a QK-norm are frozen
    at their values here. Raises FraError (one sentence) for what does not fit: tokens, layer, head, and dictionary
    (another kind, hook or width, nothing live).
    """
    crosscoder = sae if isinstance(sae, Crosscoder) else None
    if crosscoder is None:
        if slot is not None or activations is not None:
            raise FraError("slot and activations go with a crosscoder: leave them out.")
        check_dictionary(sae)
    elif slot is None:
        raise FraError(f"say which slot of the crosscoder this model is: slot=0 to {len(crosscoder.slots) - 1}.")
    layer, head = place_of(layer, head)
    check_layer_and_head(model, layer, head)
    ids = one_document(tokens)
    hook = dictionary_hook(sae) if crosscoder is None or slot is None else crosscoder.slot(slot).hook
    frozen = freeze(model, ids[None], layer, hook)
    if crosscoder is None or slot is None:
        found = codes(sae, frozen.x)
    else:
        found = crosscoder.codes(activations_of(crosscoder, model, ids, slot, frozen.x, activations or {}), slot)
    text = text_of(getattr(model, "tokenizer", None))
    return ResolvedHead(frozen, found, head, [text(token) for token in ids.tolist()])


def place_of(layer: int | None, head: int | str | None) -> tuple[int, int]:
    """Layer and head as numbers, from numbers or a name. Raises FraError where they do not say which, or two."""
    if isinstance(head, str):
        own, number = parse_head(head)
        if layer not in (None, own):
            raise FraError(f"head {head!r} lies in layer {own}, and layer={layer} is asked for: correct one of them.")
        return own, number
    if layer is None or head is None:
        raise FraError('say which head: layer=1, head=4, or head="L1H4".')
    return layer, head


@dataclass(frozen=True)
class SideTerms:
    """One side of the head: what each position brings to the score. The query side carries the scale."""

    entries: Entries
    bias: Float[Tensor, "pos d_head"]
    error: Float[Tensor, "pos d_head"]

    def sum(self, term: str) -> Float[Tensor, "pos d_head"]:
        """The vectors of one kind of term, summed within each position."""
        if term != "feature":
            return self.bias if term == "bias" else self.error
        return torch.zeros_like(self.bias).index_add_(0, self.entries.pos, self.entries.vector)

    def of(self, features: Int[Tensor, " n"]) -> Float[Tensor, "n pos d_head"]:
        """The vectors of chosen features, zero where they are not live."""
        entries = self.entries
        vectors = entries.vector.new_zeros(len(features), len(self.bias), entries.vector.shape[-1])
        which, at = torch.nonzero(features[:, None].to(entries.feature.device) == entries.feature, as_tuple=True)
        vectors[which, entries.pos[at]] = entries.vector[at]
        return vectors


@facing
class ResolvedHead:
    """One head's scores on one document, resolved; made by `fra.resolve`.

    `scores`, `blocks`: whole matrices. `top`, `channels`, `pair`, `channel`: what they are made of. `frozen` and
    `codes` are what it was made of, `tokens` the document's tokens as text (None where they are not known). Computed in
    double precision from what the model computed in its own; returned in the model's precision (half precisions as
    float32), tensors on its device.
    """

    def __init__(self, frozen: FrozenLayer, codes: Codes, head: int, tokens: Sequence[str] | None = None):
        self.frozen = frozen
        self.codes = codes
        self.head = head
        self.tokens = tokens

    def __repr__(self) -> str:
        return (
            f"ResolvedHead(L{self.frozen.layer}H{self.head}, {self.n_pos} positions, "
            f"{len(self.codes.row)} live entries of {self.d_sae} features)"
        )

    @property
    def name(self) -> str:
        """The head, as "L1H4"."""
        return f"L{self.frozen.layer}H{self.head}"

    def _repr_html_(self) -> str:
        from fra.plot.pictures import head_html, pattern_svg

        facts = {
            "document": f"{self.n_pos} tokens" + ("" if self.tokens is None else f": {''.join(self.tokens)[:200]}"),
            "dictionary": f"{self.d_sae} features at {self.frozen.hook_name}",
            "live entries": f"{len(self.codes.row)} ({len(self.codes.row) / self.n_pos:.1f} a token)",
        }
        if self.n_pos > _PICTURED:
            return as_html(self.name, facts | {"picture": f"m.plot(), for more than {_PICTURED} tokens"})
        tokens = [str(at) for at in range(self.n_pos)] if self.tokens is None else self.tokens
        pairs = float(self.frozen.mask.sum())
        blocks = {" · ".join(name): float(block.abs().sum()) / pairs for name, block in self.blocks().items()}
        found = self.channels(n=5, text=self.tokens is not None).to_dict("records")
        rows = [
            (row["q_feature"], row["k_feature"], f"{row.get('q_token', '')!r} → {row.get('k_token', '')!r}",
             f"{row['value']:+.3g}", row["count"])
            for row in found
        ]  # fmt: skip
        pattern = pattern_svg(self.attention().tolist(), tokens, f"{self.name}: attention")
        return head_html(self.name, facts, pattern, blocks, rows)

    def plot(self, q_pos: int | None = None, k_pos: int | None = None, *, n_channels: int = 10) -> Any:
        """A matplotlib figure of the head on this document: its pattern, one score as the sum of its blocks (that of
        `strongest_edge` where no position is given), its strongest channels; `fra.plot` has each of them alone.

        Raises FraError where matplotlib is not installed, and for positions that have no score.
        """
        from fra.plot import head

        return head(self, q_pos, k_pos, n_channels=n_channels)

    @property
    def n_pos(self) -> int:
        """Length of the document."""
        return self.frozen.x.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features of the dictionary."""
        return self.codes.decoder.shape[0]

    def scores(self) -> Float[Tensor, "q_pos k_pos"]:
        """Every term summed, before softcap; -inf where masked. `frozen.attention` of it is the model's own pattern;
        `frozen.cap` of it is hook_attn_scores where keys are attended, and no mask any more: it makes -inf finite.
        """
        q, k = (torch.stack([side.sum(term) for term in TERMS]).sum(0) for side in (self.query, self.key))
        return self._masked(q @ k.mT, -torch.inf)

    def attention(self) -> Float[Tensor, "q_pos k_pos"]:
        """The pattern that these scores make: the model's own, up to rounding."""
        return self.frozen.attention(self.scores())

    def strongest_edge(self) -> tuple[int, int]:
        """Query and key of the strongest attention to an earlier token that is not the document's first.

        Raises FraError for a document without one.
        """
        if self.n_pos < 3:
            raise FraError("the text is too short to look back in: give at least three tokens, a BOS among them.")
        pattern = self.attention().tril(-1)
        pattern[:, 0] = 0
        at = int(pattern.argmax())
        return at // self.n_pos, at % self.n_pos

    def blocks(self) -> dict[tuple[str, str], Float[Tensor, "q_pos k_pos"]]:
        """The nine sums: ("feature", "bias" or "error" of the query, the same of the key). Zero where masked; they add
        up to `scores`.
        """
        return {(a, b): self._masked(self.query.sum(a) @ self.key.sum(b).mT) for a in TERMS for b in TERMS}

    def channel(self, q_feature: int, k_feature: int) -> Float[Tensor, "q_pos k_pos"]:
        """F_ij: what query feature i and key feature j contribute to each score. Zero where masked, and where one of
        them is not live.

        Raises FraError for an id outside the dictionary.
        """
        sides = []
        for feature, side in ((q_feature, self.query), (k_feature, self.key)):
            if not 0 <= feature < self.d_sae:
                raise FraError(f"feature {feature} is out of range: the dictionary has {self.d_sae} features.")
            sides.append(side.of(torch.tensor([feature]))[0])
        return self._masked(sides[0] @ sides[1].mT)

    def pair(self, q_pos: int, k_pos: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"], Float[Tensor, "n m"]]:
        """One score's feature-feature terms: ids live at the query, ids live at the key, and their contributions.

        Raises FraError where the key is masked, or a position is outside the document.
        """
        if not (0 <= q_pos < self.n_pos and 0 <= k_pos < self.n_pos):
            raise FraError(f"positions ({q_pos}, {k_pos}) are out of range: the document has {self.n_pos} tokens.")
        if not bool(self.frozen.mask[q_pos, k_pos]):
            raise FraError(f"position {q_pos} does not attend to position {k_pos}: that key is masked.")
        q, k = self.query.entries, self.key.entries
        at_q, at_k = q.pos == q_pos, k.pos == k_pos
        return q.feature[at_q], k.feature[at_k], (q.vector[at_q] @ k.vector[at_k].mT).to(self.frozen.x)

    def top(self, n: int, by: Literal["abs", "value"] = "abs", *, text: bool = False) -> pd.DataFrame:
        """The n strongest feature-feature terms: columns q_pos, k_pos, q_feature, k_feature, value; with `text`, too,
        q_token and k_token, the tokens there.

        by: "abs" (largest magnitude first) or "value" (largest first). Ties by ids, in the order of the columns; fewer
        rows where there are fewer terms. Streams. Raises FraError for another `by`, and for n below 1.
        """
        _check_choice("by", by, ("abs", "value"))
        _check_positive("n", n)
        q, k = self.query.entries, self.key.entries
        at_q, at_k, value = top_terms(q, k, self.frozen.mask, n, by, self.frozen.x.dtype)
        columns = {
            "q_pos": q.pos[at_q],
            "k_pos": k.pos[at_k],
            "q_feature": q.feature[at_q],
            "k_feature": k.feature[at_k],
            "value": value,
        }
        found = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
        return self._with_tokens(found, found["q_pos"], found["k_pos"]) if text else found

    def _with_tokens(self, table: pd.DataFrame, q_pos: Iterable[int], k_pos: Iterable[int]) -> pd.DataFrame:
        """The table with the tokens at these positions, a row each."""
        tokens = self.tokens
        if tokens is None:
            raise FraError("the document's tokens are not known as text: leave text out, or let fra.resolve make this.")
        return table.assign(q_token=[tokens[at] for at in q_pos], k_token=[tokens[at] for at in k_pos])

    def channels(
        self, reduce: Reduce = "sum", n: int | None = None, min_count: int = 1, *, text: bool = False
    ) -> pd.DataFrame:
        """Every channel reduced over positions: columns q_feature, k_feature, value, count, strongest |value| first,
        ties by ids; with `text`, too, q_token and k_token, the token of this document on which each of the two features
        is most active.

        count: the number of attended (query, key) position pairs at which both features are live; channels below
        `min_count` are left out. reduce: "sum", "abs" (sum of magnitudes), "max" (the largest signed value), "mean"
        (sum over count), "count". n: only the n strongest; None for all live channels, refused with FraError before
        they are allocated where they would not fit. Exact either way, and streams: without rotary positions in closed
        form, (U V^T) * (F^T C F) with C the mask; else from blocks of terms.
        """
        _check_choice("reduce", reduce, get_args(Reduce))
        if n is not None:
            _check_positive("n", n)
        q, k, like = self.query.entries, self.key.entries, self.frozen.x
        found = reduce_channels(q, k, self.frozen.mask, reduce, n, min_count, self.d_sae, like.dtype)
        names = ("q_feature", "k_feature", "value", "count")
        table = pd.DataFrame({name: column.cpu().numpy() for name, column in zip(names, found, strict=True)})
        if not text:
            return table
        at = loudest(self.codes)
        return self._with_tokens(table, table["q_feature"].map(at), table["k_feature"].map(at))

    def to_sparse(self) -> Float[Tensor, "q_pos k_pos d_sae d_sae"]:
        """All feature-feature terms as one coalesced torch.sparse_coo_tensor, for small documents.

        Raises FraError, before allocating, where it would not fit.
        """
        q, k, mask = self.query.entries, self.key.entries, self.frozen.mask
        per_pos = [torch.bincount(entries.pos, minlength=self.n_pos) for entries in (q, k)]
        n_terms = int((mask * per_pos[0][:, None] * per_pos[1]).sum())
        # Four indices and a value, and as much again while they are ordered.
        refuse_beyond_memory(
            n_terms, 2 * (4 * 8 + self.frozen.x.dtype.itemsize), "terms", "use top(n) or channels(n=...)"
        )
        indices, values = [], []
        for t in range(self.n_pos):
            at_q = (q.pos == t).nonzero()[:, 0]
            at_k = mask[t][k.pos].nonzero()[:, 0]
            terms = (k.vector[at_k] @ q.vector[at_q].mT).to(self.frozen.x)
            of_k, of_q = at_k.repeat_interleave(len(at_q)), at_q.repeat(len(at_k))
            indices.append(torch.stack((q.pos[of_q], k.pos[of_k], q.feature[of_q], k.feature[of_k])))
            values.append(terms.flatten())
        size = (self.n_pos, self.n_pos, self.d_sae, self.d_sae)
        return torch.sparse_coo_tensor(
            torch.cat(indices, dim=1), torch.cat(values), size, check_invariants=False
        ).coalesce()

    def _masked(self, values: Tensor, fill: float = 0.0) -> Tensor:
        return values.to(self.frozen.x).masked_fill(~self.frozen.mask, fill)

    @cached_property
    def query(self) -> SideTerms:
        """What each position's query brings to the score, the score's scale included."""
        return self._terms("query", self.frozen.scale)

    @cached_property
    def key(self) -> SideTerms:
        """What each position's key brings to the score."""
        return self._terms("key", 1.0)

    def _terms(self, side: Side, scale: float) -> SideTerms:
        # Sums over many terms are taken in double precision, so that they do not depend on how they are cut (MPS has
        # none).
        wide = self.frozen.x.dtype if self.frozen.x.device.type == "mps" else torch.float64
        frozen, found = self.frozen.to(wide), self.codes
        W, b = frozen.weights(side, self.head)
        W, b = W * scale, b * scale
        rows = torch.arange(self.n_pos, device=b.device)
        live, slot = torch.unique(found.feature, return_inverse=True)
        direction = found.decoder[live].to(wide) @ W
        value = found.value.to(wide)
        vector = frozen.place(side, self.head, direction[slot] * value[:, None], found.row)
        coefficient = None if frozen.rotary else value * frozen.gain(side, self.head, found.row)
        bias = frozen.place(side, self.head, found.bias[0].to(wide) @ W, rows)
        bias = bias + frozen.place(side, self.head, b.expand(self.n_pos, -1), rows, scaled=False)
        error = frozen.place(side, self.head, found.error[0].to(wide) @ W, rows)
        entries = Entries(found.row, found.feature, vector, coefficient, None if frozen.rotary else direction)
        return SideTerms(entries, bias, error)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise FraError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise FraError(f"{name}={value} asks for nothing: give a positive number.")
