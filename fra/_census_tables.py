"""Tables of chosen query features by chosen key features, summed over a corpus of documents: three ways to the same.

Position parts. Without rotation F_ij(t,s) = c_i(t) c_j(s) G_ij, so that sum_{t,s} W(t,s) F_ij = G_ij (F_q^T W F_k)_ij:
the second factor is the same for every head (unless a QK-norm gives each head gains of its own).
Stripes. Only pairs t - s = k count, so that small blocks, [live at t, live at s], are added; with rotation in closed
form, <R_t u, R_s v> = <R_k u, R_0 v>.
Entry blocks. Anything else: all terms of one document and head in blocks, summed first over key entries of one feature
(segment sums), then over query entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from fra._census_blocks import WORK_BYTES, Side, by_slot, reduce_blocks, segments
from fra._census_corpus import Corpus, Part
from fra._census_observe import Layer

Kind = Literal["sum", "abs", "max", "count", "contrast", "sensitivity", "mass"]
"""What a table holds; "contrast", "sensitivity" and "mass" are explained in `fra.census`."""
Where = Literal["all", "stripe", "off"]

_ROWS_AT_ONCE = 2048
_NARROWEST = 16
_SCANNED_AT_ONCE = 1 << 17
"""Numbers in one tile of `Tables.rows`: few enough to stay in a cache, so that a running threshold rises early."""


def add_at(table: Num[Tensor, " n"], at: Int[Tensor, " m"], values: Num[Tensor, " m"]) -> None:
    """table[at] += values with repeated indices, in an order that does not change from run to run."""
    if table.is_cuda:
        table.index_put_((at,), values, accumulate=True)  # sorts; index_add_ would use atomics there
    else:
        table.index_add_(0, at, values)


def count_dtype(corpus: Corpus) -> torch.dtype:
    """float32 holds whole numbers up to 2**24 exactly; no channel is counted more often than there are pairs."""
    return corpus.value.dtype if float(corpus.length.double().pow(2).sum()) < 2**24 else torch.int64


def check_total(table: Tensor, expected: Float[Tensor, ""]) -> None:
    """Raises ArithmeticError where a table of terms of one sign does not add up to what it was made of."""
    found = table.sum(0).double().sum()
    if not bool((found - expected).abs() <= 1e-4 * expected.abs()):
        raise ArithmeticError(f"a table of channels adds up to {float(found):.7g} and not to {float(expected):.7g}.")


@dataclass(frozen=True)
class Tables:
    """Makes tables over chosen features: `q_ids` in rows, `k_ids` in columns, each ascending."""

    layer: Layer
    corpus: Corpus
    q_ids: Int[Tensor, " q"]
    k_ids: Int[Tensor, " k"]
    _kept: dict[tuple[Kind, Where], Tensor] = field(default_factory=dict)

    @property
    def turns(self) -> bool:
        """Whether a channel's coupling depends on the offset."""
        return self.layer.rotary is not None

    @cached_property
    def _q_slot(self) -> Int[Tensor, " d_sae"]:
        return self._slots(self.q_ids)

    @cached_property
    def _k_slot(self) -> Int[Tensor, " d_sae"]:
        return self._slots(self.k_ids)

    def _slots(self, ids: Tensor) -> Tensor:
        slots = torch.full((self.layer.d_sae,), -1, device=self.corpus.device)
        slots[ids] = torch.arange(len(ids), device=ids.device)
        return slots

    def _empty(self, kind: Kind) -> Tensor:
        dtype = count_dtype(self.corpus) if kind == "count" else self.corpus.value.dtype
        fill = -torch.inf if kind == "max" else 0.0
        return torch.full((len(self.q_ids), len(self.k_ids)), fill, dtype=dtype, device=self.corpus.device)

    def rows(self, kind: Kind, where: Where, head: int) -> Iterator[tuple[slice, Num[Tensor, "rows k"]]]:
        """The finished numbers of one head, some query features at a time. Where no channel is jointly live: 0, and
        -inf for "max".
        """
        width = max(1, _SCANNED_AT_ONCE // max(1, len(self.k_ids)))
        tiles = (slice(low, min(low + width, len(self.q_ids))) for low in range(0, len(self.q_ids), width))
        if kind == "count":
            whole = self.positions("count", where, None)
        elif self.turns or kind in ("max", "mass"):
            whole = self._terms(kind, where, head)
        else:
            whole = self.positions(kind, where, head)
            q, k = self._directions(head)
            for tile in tiles:
                coupling = q[tile] @ k.mT
                yield tile, (coupling.abs_() if kind == "abs" else coupling).mul_(whole[tile])
            return
        for tile in tiles:
            yield tile, whole[tile]

    def positions(self, kind: Kind, where: Where, head: int | None) -> Num[Tensor, "q k"]:
        """F_q^T W F_k: what multiplies the coupling, or the counts; kept for the next head where it is the same."""
        if kind == "abs" and not self.corpus.signed:
            kind = "sum"
        shared = kind == "count" or (kind != "sensitivity" and self.corpus.gain_q is None)
        key = (kind, where)
        if shared and key in self._kept:
            return self._kept[key]
        if where == "stripe" and kind in ("sum", "abs", "count"):
            found = self._on_stripes(kind, head, turned=False)
        else:
            found = self._everywhere(kind, where, head)
        if shared:
            self._kept[key] = found
        return found

    def _terms(self, kind: Kind, where: Where, head: int) -> Num[Tensor, "q k"]:
        if where == "stripe" and kind in ("sum", "abs", "max"):
            return self._on_stripes(kind, head, turned=True)
        return self._entry_blocks(kind, where, head)

    def _everywhere(self, kind: Kind, where: Where, head: int | None) -> Num[Tensor, "q k"]:
        table = self._empty(kind)
        expected = self.corpus.value.new_zeros((), dtype=torch.float64)
        for part in self.corpus.parts(_ROWS_AT_ONCE):
            q_value, k_value = self._values(part, kind, head)
            order, bounds = by_slot(self._q_slot[part.feature], len(self.q_ids))
            rows, weight = part.padded_row[order], q_value[order]
            k_slot = self._k_slot[part.feature]
            weigh = self._weigh(part, kind, where, head)
            n_rows = part.n_docs * part.n_pos
            width = max(_NARROWEST, WORK_BYTES // (n_rows * table.itemsize))
            for low in range(0, len(self.k_ids), width):
                high = min(low + width, len(self.k_ids))
                mine = ((k_slot >= low) & (k_slot < high)).nonzero()[:, 0]
                keys = k_value.new_zeros(n_rows, high - low)
                keys[part.padded_row[mine], k_slot[mine] - low] = k_value[mine]
                reached = weigh(keys.view(part.n_docs, part.n_pos, -1)).view(n_rows, -1)
                table[:, low:high] += segments(reached, rows, bounds, weight).to(table.dtype)
            expected += self._total(part, q_value, k_value, weigh)
        if kind in ("sum", "abs", "count") and not self.corpus.signed:
            check_total(table, expected)
        return table

    def _total(self, part: Part, q_value: Tensor, k_value: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum of the table of one part, from sums over the features of each position."""
        sums = []
        for slot, value in ((self._q_slot, q_value), (self._k_slot, k_value)):
            asked = slot[part.feature] >= 0
            rows = value.new_zeros(part.n_docs * part.n_pos)
            add_at(rows, part.padded_row, value * asked)
            sums.append(rows.view(part.n_docs, part.n_pos, 1))
        return (sums[0].double() * weigh(sums[1]).double()).sum()

    def _values(self, part: Part, kind: Kind, head: int | None) -> tuple[Tensor, Tensor]:
        if kind == "count":
            ones = torch.ones_like(self.corpus.value[part.entries])
            return ones, ones
        q, k = (part.coefficient(gain, head) for gain in (self.corpus.gain_q, self.corpus.gain_k))
        return (q.abs(), k.abs()) if kind == "abs" else (q, k)

    def _weigh(self, part: Part, kind: Kind, where: Where, head: int | None) -> Callable[[Tensor], Tensor]:
        """Sends keys [docs, pos, k] to sum_s W(t,s) keys(s)."""
        if kind in ("sum", "abs", "count") and where == "all" and self.layer.weights.window is None:
            return _prefix
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

    def _on_stripes(self, kind: Kind, head: int | None, turned: bool) -> Num[Tensor, "q k"]:
        """Sums, absolute sums, maxima or counts over t - s = k: products of coefficients, or whole terms (`turned`)."""
        n_q, n_k = len(self.q_ids), len(self.k_ids)
        table = self._empty(kind).new_zeros(n_q * n_k + 1)  # the last cell takes what is not asked for
        if kind == "max":
            table.fill_(-torch.inf)
        directions = self._directions(head) if turned and head is not None else None
        for part in self.corpus.parts(_ROWS_AT_ONCE):
            q_value, k_value = self._values(part, kind, head)
            for q_row, k_row in self._stripe_rows(part):
                at_q, live_q = self._entries_of(part, q_row)
                at_k, live_k = self._entries_of(part, k_row)
                q, k = q_value[at_q][..., None], k_value[at_k][..., None]
                q_slot, k_slot = self._q_slot[part.feature[at_q]], self._k_slot[part.feature[at_k]]
                if directions is not None:
                    q, k = q * directions[0][q_slot], k * directions[1][k_slot]
                    if self.layer.rotary is not None:
                        ahead = q_row - k_row  # both rows are of one document
                        q = self.layer.rotary.rotate(q.transpose(0, 1), ahead).transpose(0, 1)
                        k = self.layer.rotary.rotate(k.transpose(0, 1), torch.zeros_like(ahead)).transpose(0, 1)
                terms = q @ k.mT
                known_q, known_k = live_q & (q_slot >= 0), live_k & (k_slot >= 0)
                cell = q_slot[:, :, None] * n_k + k_slot[:, None, :]
                cell = cell.masked_fill(~(known_q[:, :, None] & known_k[:, None, :]), n_q * n_k)
                terms = terms.abs() if kind == "abs" else terms
                if kind == "max":
                    table.scatter_reduce_(0, cell.flatten(), terms.flatten(), "amax")
                else:
                    add_at(table, cell.flatten(), terms.flatten().to(table.dtype))
        return table[:-1].view(n_q, n_k)

    def _stripe_rows(self, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows (within the part) of queries and keys on the stripes, in groups whose busiest row is about as wide."""
        starts = self.corpus.row_start
        q_rows, k_rows = [], []
        for doc in range(part.first, part.stop):
            first, stop = starts[doc] - part.rows.start, starts[doc + 1] - part.rows.start
            for offset in self.corpus.stripes[doc]:
                if offset < (self.layer.weights.window or stop):
                    q_rows.append(torch.arange(first + offset, stop))
                    k_rows.append(torch.arange(first, stop - offset))
        if not q_rows:
            return
        q_row, k_row = torch.cat(q_rows), torch.cat(k_rows)
        per_row = self.corpus.entry_start[part.rows.start : part.rows.stop + 1].diff()
        busiest = torch.maximum(per_row[q_row], per_row[k_row])
        grade = busiest.double().log2().ceil().long()
        for level in torch.unique(grade[busiest > 0]).tolist():
            chosen = ((grade == level) & (busiest > 0)).nonzero()[:, 0]
            at_once = max(1, WORK_BYTES // (8 * 4**level))
            for some in chosen.split(at_once):
                yield q_row[some].to(self.corpus.device), k_row[some].to(self.corpus.device)

    def _entries_of(self, part: Part, rows: Int[Tensor, " n"]) -> tuple[Int[Tensor, "n w"], Tensor]:
        """Entries (within the part) of some rows, side by side, and which of them are there."""
        bounds = self._bounds(part)
        first, count = bounds[rows], bounds[rows + 1] - bounds[rows]
        beside = torch.arange(int(count.max()), device=rows.device)
        last = max(0, part.entries.stop - part.entries.start - 1)
        return (first[:, None] + beside).clamp(max=last), beside < count[:, None]

    def _bounds(self, part: Part) -> Tensor:
        return (self.corpus.entry_start[part.rows.start : part.rows.stop + 1] - part.entries.start).to(
            self.corpus.device
        )

    def _directions(self, head: int) -> tuple[Tensor, Tensor]:
        """Queries (times the scale) of `q_ids` and keys of `k_ids`, before rotation."""
        return self.layer.directions("query", head, self.q_ids), self.layer.directions("key", head, self.k_ids)

    def _entry_blocks(self, kind: Kind, where: Where, head: int) -> Num[Tensor, "q k"]:
        table = self._empty(kind)
        flat = table.view(-1)
        directions = self._directions(head)
        plain = kind in ("sum", "abs", "max") and where == "all" and self.layer.weights.window is None
        for doc in range(len(self.corpus.number)):
            part = Part(self.corpus, doc, doc + 1)
            values = self._values(part, "sum", head)
            slots = self._q_slot[part.feature], self._k_slot[part.feature]
            q, k = (self._side(part, *of) for of in zip(slots, values, directions, strict=True))
            if not len(q.pos) or not len(k.pos):
                continue
            weights = None if plain else self.weights(part, kind, where, head)[0]
            found = reduce_blocks(q, k, kind, weights).flatten()
            cells = (q.live[:, None] * len(self.k_ids) + k.live).flatten()  # none twice, so that no order matters
            flat[cells] = torch.maximum(flat[cells], found) if kind == "max" else flat[cells] + found
        return table

    def _side(self, part: Part, slot: Tensor, value: Tensor, direction: Tensor) -> Side:
        asked = (slot >= 0).nonzero()[:, 0]
        pos, slot = part.padded_row[asked], slot[asked]
        vector = direction[slot] * value[asked, None]
        rotary = self.layer.rotary
        return Side(pos, slot, vector if rotary is None else rotary.rotate(vector, pos), part.n_pos)


def _prefix(keys: Float[Tensor, "docs pos k"]) -> Float[Tensor, "docs pos k"]:
    """Sums over each position and all before it, in place."""
    if keys.is_cuda:
        return keys.cumsum(1)
    for pos in range(1, keys.shape[1]):  # on a CPU a hundred times faster than cumsum along a dimension not the last
        keys[:, pos] += keys[:, pos - 1]
    return keys
