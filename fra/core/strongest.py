"""The n strongest of very many rows that come in batches or in tiles of a table, exactly."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor


class Strongest:
    """The n rows of largest key, of rows that come in batches (all of them where n is None); ties go to the smaller
    code.
    """

    def __init__(self, n: int | None):
        self._n = n
        self._kept: list[tuple[Tensor, ...]] = []
        self._n_kept = self._sorted = 0
        self.threshold = -torch.inf
        """Rows with a smaller key need not be offered."""
        self._last_code = -1
        """Of the row at the threshold: an equal key with a larger code comes too late."""

    def expect(self, threshold: float) -> None:
        """Tells beforehand what n rows are known to reach, which will all be offered."""
        self.threshold, self._last_code = threshold, torch.iinfo(torch.int64).max

    def expect_some(self, keys: Num[Tensor, "rows columns"]) -> None:
        """The same from some of the cells that will be offered; those below zero are none."""
        if self._n is not None and self.threshold == -torch.inf and self._n <= keys.numel():
            lowest = float(keys.flatten().topk(self._n).values[-1])
            if lowest > 0:
                # Products in tiles of another shape may differ in their last bits.
                self.expect(lowest * (1 - 1e-4))

    def offer(self, key: Float[Tensor, " m"], code: Int[Tensor, " m"], *more: Tensor) -> None:
        """Rows with their keys, int64 codes (unique over all batches) and further columns."""
        if self._n is not None and len(key) > self._n:
            keep = key >= key.topk(self._n).values[-1]
            key, code, *rest = (column[keep] for column in (key, code, *more))
            more = tuple(rest)
        self._kept.append(tuple(column.cpu() for column in (key, code, *more)))
        self._n_kept += len(key)
        # Sorted anew only when half as many again have come, so that it costs little whatever n is.
        first = self._sorted == 0
        if self._n is not None and self._n_kept >= self._n * (1.0 if first else 1.5):
            self._kept = [self._ordered(self._n)]
            self._n_kept = self._sorted = len(self._kept[0][0])
            self.threshold, self._last_code = float(self._kept[0][0][-1]), int(self._kept[0][1][-1])

    def offer_tile(
        self,
        values: Num[Tensor, "rows columns"],
        row_code: Int[Tensor, " rows"],
        column_code: Int[Tensor, " columns"],
        count: Num[Tensor, "rows columns"] | None,
        least: int,
    ) -> None:
        """Cells of a table by |value|, each with the code row_code + column_code (in any order) and its count. Cells
        counted less than `least` times are none; where nothing was counted, those that are zero.
        """
        if self._n is not None and values.device.type != "cpu":
            self.offer_unseen(values, row_code, column_code, count, least)
            return
        if self.threshold > 0:
            # With a good threshold few tiles, and few rows of those, hold anything as strong.
            low, high = values.aminmax()
            if max(float(high), -float(low)) < self.threshold:
                return
            highest = torch.maximum(values.amax(1), -values.amin(1))
            early = row_code + column_code.min() < self._last_code
            some = ((highest > self.threshold) | (early & (highest == self.threshold))).nonzero()[:, 0]
            if not len(some):
                return
            values, row_code = values[some], row_code[some]
            count = None if count is None else count[some]
        size = values.abs()
        strong = size >= self.threshold
        strong &= (values != 0) if count is None else (count >= least)
        if self._n is not None and self.threshold <= 0 and self._n < size.numel():
            strong &= size >= size.masked_fill(~strong, -1).flatten().topk(self._n).values[-1]
        row, column = strong.nonzero(as_tuple=True)
        value, code = values[row, column], row_code[row] + column_code[column]
        number = torch.zeros_like(code) if count is None else count[row, column].long()
        key = value.abs().double()
        if self._n is not None and self.threshold > 0:
            keep = (key > self.threshold) | (code < self._last_code)
            key, code, value, number = key[keep], code[keep], value[keep], number[keep]
        if len(key) or not self._kept:
            self.offer(key, code, value, number)

    def offer_unseen(
        self, values: Tensor, row_code: Tensor, column_code: Tensor, count: Tensor | None, least: int
    ) -> None:
        """The same without a look at any number, which would make a GPU wait: every tile is sorted, stably, so that
        ties go to the smaller code; cells that are none sink to the end with the key -inf.
        """
        rows, columns = row_code.argsort(), column_code.argsort()
        row_code, column_code, values = row_code[rows], column_code[columns], values[rows][:, columns]
        count = None if count is None else count[rows][:, columns]
        dead = (values == 0) if count is None else (count < least)
        key = values.abs() if values.is_floating_point() else values.abs().double()
        key, at = key.masked_fill(dead, -torch.inf).flatten().sort(descending=True, stable=True)
        key, at = key[: self._n], at[: self._n]
        code = row_code[at // len(column_code)] + column_code[at % len(column_code)]
        number = torch.zeros_like(code) if count is None else count.flatten()[at].long()
        self._kept.append((key, code, values.flatten()[at], number))
        self._kept = [self._ordered(self._n)]

    def result(self) -> tuple[Tensor, ...]:
        """Key, code and further columns, strongest first, on the CPU."""
        columns = tuple(column.cpu() for column in self._ordered(self._n))
        there = columns[0] > -torch.inf
        return tuple(column[there] for column in columns)

    def _ordered(self, n: int | None) -> tuple[Tensor, ...]:
        columns = tuple(torch.cat(parts) for parts in zip(*self._kept, strict=True))
        order = columns[1].argsort()
        order = order[columns[0][order].argsort(descending=True, stable=True)][:n]
        return tuple(column[order] for column in columns)
