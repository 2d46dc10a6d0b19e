"""Independent work on small tensors, one thread a core: a head's tensors are too small for torch to share one
between cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
_MOST = 8


def each(
    work: Callable[[Item], Result], items: Iterable[Item], device: torch.device, threads: int | None = None
) -> list[Result]:
    """`work` of every item, in order. Every item is computed by one thread alone, so that the results do not depend on
    their number: `threads`, or one a core where None.

    On a GPU the items run one after the other: the kernels would only queue.
    """
    if device.type != "cpu":
        return [work(item) for item in items]
    own = torch.get_num_threads()
    if own == threads == 1:
        return [work(item) for item in items]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(_MOST, threads or os.cpu_count() or 1)) as pool:
            return list(pool.map(torch.no_grad()(work), items))
    finally:
        torch.set_num_threads(own)


def ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Every item with `work` of it, in order; the next one is being worked on, by one thread, while the caller uses
    this one.
    """
    left = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = [(item, pool.submit(work, item)) for item in islice(left, 1)]
        while coming:
            ((item, done),) = coming
            result = done.result()
            coming = [(following, pool.submit(work, following)) for following in islice(left, 1)]
            yield item, result
