"""Tables of query features by key features, summed over a corpus of documents.

Without rotation F_ij(t,s) = c_i(t) c_j(s) G_ij, so that sum_{t,s} W(t,s) F_ij = G_ij (F_q^T W F_k)_ij: the second
factor, the position part, is the same for every head (unless a QK-norm gives each head gains of its own). So it is
with rotation on one offset t - s = k, where G_ij is <R_k u_i, R_0 v_j>. Position parts are made here, by block of key
features: W F_k is dense in rows and a block's columns, and F_q^T adds up its rows, one for each entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from fra._census.corpus import Corpus, Part
from fra._census.observe import Layer
from fra.core.blocks import WORK_BYTES, Side, add_at, reduce_blocks, segments

Kind = Literal["sum", "abs", "max", "count", "contrast", "sensitivity", "mass"]
"""What a table holds; "contrast", "sensitivity" and "mass" are explained in `fra.census`."""
Where = Literal["all", "stripe", "off"]

ROWS_AT_ONCE = 2048
COLUMNS_AT_ONCE = 512
"""Of W F_k: wide enough for the sums along entries, few enough to stay in a cache."""
LOOPED_FROM = 1 << 11


def count_dtype(corpus: Corpus) -> torch.dtype:
    """float32 holds whole numbers up to 2**24 exactly; no channel is counted more often than there are pairs."""
    return corpus.value.dtype if float(corpus.length.double().pow(2).sum()) < 2**24 else torch.int64


def shared(kind: Kind, corpus: Corpus) -> bool:
    """Whether a position part is the same for every head."""
    return kind == "count" or (kind != "sensitivity" and corpus.gain_q is None)


class _Sorted(NamedTuple):
    """The asked entries of one part on one side, by feature."""

    entry: Int[Tensor, " n"]
    """Index of the entry within the part."""
    row: Int[Tensor, " n"]
    """doc * n_pos + pos."""
    slot: Int[Tensor, " n"]
    bounds: Int[Tensor, " slots_and_end"]
    looked_up: list[int]
    """`bounds` on the CPU: one look at the device, then loops need none."""

    def first(self, n_slots: int) -> _Sorted:
        """Those of the first features alone."""
        n = self.looked_up[n_slots]
        return _Sorted(self.entry[:n], self.row[:n], self.slot[:n], self.bounds[: n_slots + 1], self.looked_up)


class _Asked(NamedTuple):
    """The asked entries of one document on one side, by position."""

    entry: Int[Tensor, " n"]
    slot: Int[Tensor, " n"]
    side: Side


class Tables:
    """Makes tables over chosen features: `q_ids` in rows, `k_ids` in columns, each in any order."""

    def __init__(self, layer: Layer, corpus: Corpus, q_ids: Int[Tensor, " q"], k_ids: Int[Tensor, " k"]):
        self.layer, self.corpus, self.q_ids, self.k_ids = layer, corpus, q_ids, k_ids
        self._totals: list[tuple[Tensor, Tensor]] = []
        self._memory: list[Tensor] = []

    @cached_property
    def _parts(self) -> list[tuple[Part, _Sorted, _Sorted]]:
        found = []
        same = self.q_ids is self.k_ids
        for part in self.corpus.parts(ROWS_AT_ONCE):
            q = self._sorted(part, self._slots[0], len(self.q_ids))
            found.append((part, q, q if same else self._sorted(part, self._slots[1], len(self.k_ids))))
        return found

    @cached_property
    def _slots(self) -> tuple[Tensor, Tensor]:
        """Place of each feature of the dictionary among those asked for on each side, -1 elsewhere."""
        found = []
        for ids in (self.q_ids, self.k_ids):
            slots = torch.full((self.layer.d_sae,), -1, dtype=torch.int32, device=self.corpus.device)
            slots[ids] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
            found.append(slots)
        return found[0], found[1]

    def _sorted(self, part: Part, slots: Tensor, n: int) -> _Sorted:
        slot, entry = slots[part.feature].sort(stable=True)
        bounds = torch.searchsorted(slot, torch.arange(n + 1, dtype=torch.int32, device=slot.device))
        looked_up = bounds.tolist()
        asked = slice(looked_up[0], None)  # what is not asked for comes first
        first = looked_up[0]
        return _Sorted(
            entry[asked].int(),
            part.padded_row[entry[asked]].int(),
            slot[asked],
            (bounds - first).int(),
            [bound - first for bound in looked_up],
        )

    def _reused(self, at: int, kind: Kind, n_rows: int, n_columns: int) -> Tensor:
        """An empty table in memory that is kept: fresh pages for every block cost more than what is added up there."""
        n = n_rows * n_columns
        if at == len(self._memory):
            self._memory.append(self.corpus.value.new_empty(n))
        elif len(self._memory[at]) < n:
            self._memory[at] = self.corpus.value.new_empty(n)
        return self._memory[at][:n].view(n_rows, n_columns).fill_(-torch.inf if kind == "max" else 0.0)

    def positions(
        self,
        kind: Kind,
        where: Where,
        head: int | None,
        keys: slice,
        offset: int | None = None,
        n_first: int | None = None,
    ) -> Num[Tensor, "q keys"]:
        """F_q^T W F_k for some of the key features, and all query features or the first of them: what multiplies the
        coupling, or the counts. offset: of the stripes only that one.
        """
        if kind == "abs" and not self.corpus.signed:
            kind = "sum"
        n, n_q = keys.stop - keys.start, len(self.q_ids) if n_first is None else n_first
        dtype = count_dtype(self.corpus) if kind == "count" else self.corpus.value.dtype
        table = None
        if len(self._parts) != 1 or n > COLUMNS_AT_ONCE:
            table = torch.zeros(n_q, n, dtype=dtype, device=self.corpus.device)
        expected = found = self.corpus.value.new_zeros((), dtype=torch.float64)
        checked = kind in ("sum", "abs", "count") and not self.corpus.signed
        for part, every, k in self._parts:
            q = every.first(n_q)
            q_value, k_value = self._values(part, kind, head)
            weigh = self._weigh(part, kind, where, head, offset)
            weight = None if q_value is None else q_value[q.entry]
            n_rows = part.n_docs * part.n_pos
            if checked:
                q_rows = self._row_sums(part, q, weight)
            # Fewer columns where rows are many, but no fewer than vector units like.
            width = max(64, min(COLUMNS_AT_ONCE, WORK_BYTES // (n_rows * 4)))
            for low in range(keys.start, keys.stop, width):
                high = min(low + width, keys.stop)
                mine = slice(k.looked_up[low], k.looked_up[high])
                of_keys = self.corpus.value.new_zeros(n_rows, high - low)
                value = of_keys.new_ones(()) if k_value is None else k_value[k.entry[mine]]
                of_keys[k.row[mine], k.slot[mine] - low] = value
                of_keys = of_keys.view(part.n_docs, part.n_pos, -1)
                if checked:
                    sums = of_keys.sum(-1, keepdim=True)
                    expected = expected + (q_rows * weigh(sums).flatten()).sum(dtype=torch.float64)
                reached = weigh(of_keys).view(n_rows, -1)
                sums = segments(reached, q.row, q.bounds, weight)
                if table is None:
                    table = sums.to(dtype)
                else:
                    table[:, low - keys.start : high - keys.start] += sums.to(dtype)
        table = torch.zeros(n_q, n, dtype=dtype, device=self.corpus.device) if table is None else table
        if checked:
            found = table.sum(0).double().sum()
            self._totals.append((found, expected))
        return table

    def check(self) -> None:
        """Raises ArithmeticError where tables of terms of one sign do not add up to what they were made of. One look
        at the device for all of them.
        """
        if self._totals:
            found, expected = (torch.stack(column) for column in zip(*self._totals, strict=True))
            self._totals = []
            wrong = ~((found - expected).abs() <= 1e-4 * expected.abs())
            if bool(wrong.any()):
                raise ArithmeticError(
                    f"a table of channels adds up to {float(found[wrong][0]):.7g} and not to "
                    f"{float(expected[wrong][0]):.7g}."
                )

    def _row_sums(self, part: Part, q: _Sorted, weight: Tensor | None) -> Tensor:
        rows = self.corpus.value.new_zeros(part.n_docs * part.n_pos)
        add_at(rows, q.row.long(), rows.new_ones(()).expand(len(q.row)) if weight is None else weight)
        return rows

    def _values(self, part: Part, kind: Kind, head: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Coefficients of the entries on both sides; None for ones."""
        if kind == "count":
            return None, None
        q, k = (part.coefficient(gain, head) for gain in (self.corpus.gain_q, self.corpus.gain_k))
        return (q.abs(), k.abs()) if kind == "abs" else (q, k)

    def _weigh(
        self, part: Part, kind: Kind, where: Where, head: int | None, offset: int | None
    ) -> Callable[[Tensor], Tensor]:
        """Sends keys [docs, pos, k] to sum_s W(t,s) keys(s); may use up what it is given."""
        window = self.layer.weights.window
        if kind in ("sum", "abs", "count"):
            if where == "all" and window is None:
                return prefix
            if where == "stripe":
                stripes = [[k for k in ks if k < (window or part.n_pos) and offset in (None, k)] for ks in part.stripes]
                return lambda keys: _shifted(keys, stripes)
        weights = self.weights(part, kind, where, head)
        return lambda keys: weights @ keys

    def weights(self, part: Part, kind: Kind, where: Where, head: int | None) -> Float[Tensor, "docs pos pos"]:
        """W(t,s), zero where masked: what a linear reduction multiplies terms by. The pattern itself for "mass"."""
        mask = self.layer.mask(part.n_pos).to(self.corpus.value.dtype)
        if kind in ("sum", "abs", "max", "count"):
            if where == "all":
                return mask.expand(part.n_docs, -1, -1)
            stripe = part.on_stripe()
            return mask * (stripe if where == "stripe" else 1 - stripe)
        if kind == "contrast":
            # A row that lies on several stripes is compared with its mean once for each.
            stripe = part.on_stripe() * mask
            return stripe - stripe.sum(-1, keepdim=True) * mask / mask.sum(-1, keepdim=True)
        assert head is not None
        pattern = torch.zeros(part.n_docs, part.n_pos, part.n_pos, dtype=mask.dtype, device=mask.device)
        for doc in range(part.n_docs):
            n_pos = int(self.corpus.length[part.first + doc])
            pattern[doc, :n_pos, :n_pos] = self.layer.patterns(self.corpus, part.first + doc, head)
        if kind == "mass":
            return pattern
        on_stripe = pattern * part.on_stripe()
        return on_stripe - on_stripe.sum(-1, keepdim=True) * pattern

    def terms(
        self,
        sources: Sequence[tuple[Kind, int]],
        where: Where,
        keys: slice,
        sides: Mapping[int, tuple[Float[Tensor, "all_q d_head"], Float[Tensor, "all_k d_head"]]],
        n_first: int | None = None,
    ) -> dict[tuple[Kind, int], Float[Tensor, "q keys"]]:
        """The finished numbers of some reductions and heads from their single terms, a document at a time: what has no
        position part; of all query features or the first of them. sides: each head's directions of all query and key
        features. The next call writes over them.
        """
        k_ids, q_ids = self.k_ids[keys], self.q_ids[:n_first]
        tables = {source: self._reused(at, source[0], len(q_ids), len(k_ids)) for at, source in enumerate(sources)}
        kinds_of: dict[int, list[Kind]] = {}
        for kind, head in tables:
            kinds_of.setdefault(head, []).append(kind)
        small = len(q_ids) * len(k_ids) < 2**31
        for doc in range(len(self.corpus.number)):
            part = Part(self.corpus, doc, doc + 1)
            q_asked, k_asked = self._asked(part, 0, slice(0, len(q_ids))), self._asked(part, 1, keys)
            if not len(q_asked.entry) or not len(k_asked.entry):
                continue
            if all(kind != "max" for kind, _ in tables) and 4 * len(q_asked.side.live) > 3 * len(q_asked.slot):
                q_asked = q_asked._replace(side=q_asked.side.by_entry(q_asked.slot))
            # The same for every head.
            cells = (q_asked.side.live[:, None] * len(k_ids) + k_asked.side.live).flatten()
            cells = cells.int() if small else cells
            weights: dict[Kind, Tensor | None] = {}
            for head, kinds in kinds_of.items():
                q = self._with_head(part, q_asked, self.corpus.gain_q, head, sides[head][0])
                k = self._with_head(part, k_asked, self.corpus.gain_k, head, sides[head][1][keys])
                alike: list[Kind] = [kind for kind in kinds if kind in ("sum", "abs", "max")]
                groups = [alike] if alike else []
                groups += [[kind] for kind in kinds if kind not in alike]
                for some in groups:
                    weighed: Kind = "sum" if some is alike else some[0]  # alike: the same for every head, too
                    if some is not alike or weighed not in weights:
                        weights[weighed] = self._term_weights(part, weighed, where, head)
                    found = reduce_blocks(q, k, some, weights[weighed])
                    for kind in some:
                        flat, values = tables[kind, head].view(-1), found[kind].flatten()
                        if kind == "max":
                            flat[cells] = torch.maximum(flat[cells], values)
                        else:
                            add_at(flat, cells, values)
        for (kind, _), table in tables.items():
            if kind == "max":
                table.masked_fill_(table == -torch.inf, 0.0)
        return tables

    def _term_weights(self, part: Part, kind: Kind, where: Where, head: int) -> Tensor | None:
        if kind in ("sum", "abs", "max") and where == "all" and self.layer.weights.window is None:
            return None
        return self.weights(part, kind, where, head)[0]

    def _asked(self, part: Part, side: int, among: slice) -> _Asked:
        slot = self._slots[side][part.feature]
        entry = ((slot >= among.start) & (slot < among.stop)).nonzero()[:, 0]
        pos, slot = part.padded_row[entry], slot[entry].long() - among.start
        return _Asked(entry, slot, Side(pos, slot, self.corpus.value.new_empty(len(pos), 0), part.n_pos))

    def _with_head(
        self, part: Part, asked: _Asked, gain: Tensor | None, head: int, direction: Float[Tensor, "ids d_head"]
    ) -> Side:
        vector = direction[asked.slot] * part.coefficient(gain, head)[asked.entry, None]
        rotary = self.layer.rotary
        return asked.side.with_vectors(vector if rotary is None else rotary.rotate(vector, asked.side.pos))


def prefix(keys: Float[Tensor, "docs pos k"]) -> Float[Tensor, "docs pos k"]:
    """Sums over each position and all before it, perhaps in place."""
    n_docs, n_pos, width = keys.shape
    if keys.is_cuda or width == 1:
        return keys.cumsum(1)
    if n_docs * width < LOOPED_FROM and n_pos <= 256:
        return keys.new_ones(n_pos, n_pos).tril_() @ keys
    for pos in range(1, n_pos):  # on a CPU a hundred times faster than cumsum along a dimension not the last
        keys[:, pos] += keys[:, pos - 1]
    return keys


def _shifted(keys: Float[Tensor, "docs pos k"], stripes: list[list[int]]) -> Float[Tensor, "docs pos k"]:
    """For each document the sum of keys at its offsets before."""
    reached = torch.zeros_like(keys)
    for doc, offsets in enumerate(stripes):
        for offset in offsets:
            reached[doc, offset:] += keys[doc, : keys.shape[1] - offset]
    return reached
