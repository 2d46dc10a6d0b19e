"""Disjoint sets of documents, cut by source: what is chosen on documents of one source is never measured on it."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np

from fra.statistics.stats import seed_of

_FEWEST = 10
"""Sources that a set where something is chosen is spread over, at least, where there are so many."""


def disjoint(
    sources: Sequence[Hashable],
    sizes: Mapping[str, int],
    measured: Collection[str],
    seed_parts: Sequence[str],
    least: Mapping[str, int] | None = None,
) -> dict[str, list[int]]:
    """Indices of the documents of each set, by name, ascending; no source has documents in two sets.

    sources: of every document. sizes: documents that each set would have, in the order in which they are filled; where
    there is less text, all shrink alike. measured: sets whose numbers are quoted: these get as many sources as there
    are, in proportion to their sizes, one document of each first, and further ones of the same sources only where
    sources are short. The others are filled from the sources with the most documents, so that they cost the measured
    ones few sources. least: sources that a measured set must have to be of use; where its share is smaller it gets
    them, whatever its size, unless that leaves others less than half of theirs.
    """
    rng = np.random.default_rng(seed_of(*seed_parts))
    by_source: dict[Hashable, list[int]] = {}
    for number in rng.permutation(len(sources)).tolist():
        by_source.setdefault(sources[number], []).append(number)
    wanted = sum(sizes.values())
    shrunk = {name: max(1, size * min(wanted, len(sources)) // wanted) for name, size in sizes.items()}
    left = sorted(by_source, key=lambda name: -len(by_source[name]))  # stable: equals stay in drawn order
    found: dict[str, list[int]] = {name: [] for name in sizes}
    quoted = [name for name in sizes if name in measured]
    for name in (name for name in sizes if name not in measured):
        share = max(1, -(-shrunk[name] // _FEWEST))
        while left and len(found[name]) < shrunk[name] and (len(left) > len(quoted) or not found[name]):
            found[name] += by_source[left.pop(0)][: min(share, shrunk[name] - len(found[name]))]
    order = rng.permutation(len(left)).tolist() if quoted else []
    turns = list(quoted)
    for name, needed in (least or {}).items():
        fair = len(order) * shrunk[name] // sum(shrunk[other] for other in turns)
        if fair < needed and len(turns) > 1 and 2 * (len(order) - needed) >= len(order) - fair:
            found[name] += [by_source[left[index]][0] for index in order[:needed]]
            order = order[needed:]
            turns.remove(name)
    for index in order:
        # to the set that has the least of what it would have: shares are even, and no source is left over
        needs = [name for name in turns if len(found[name]) < shrunk[name]]
        if not needs:
            break
        poorest = min(needs, key=lambda name: (len(found[name]) + 1) / shrunk[name])
        found[poorest].append(by_source[left[index]][0])
    source_of = {number: name for name, numbers in by_source.items() for number in numbers}
    for name in quoted:
        own = [source_of[number] for number in found[name]]
        more = [number for turn in range(1, len(sources)) for s in own for number in by_source[s][turn : turn + 1]]
        found[name] += more[: max(0, shrunk[name] - len(found[name]))]
    return {name: sorted(numbers) for name, numbers in found.items()}


def spread(sources: Sequence[Hashable], n: int) -> list[int]:
    """Indices of n documents from as many sources as there are, ascending: one of each source first, the sources evenly
    over the text, then a second one of each.
    """
    by_source: dict[Hashable, list[int]] = {}
    for number, source in enumerate(sources):
        by_source.setdefault(source, []).append(number)
    turns = max(map(len, by_source.values()), default=0)
    rounds = [[numbers[turn] for numbers in by_source.values() if len(numbers) > turn] for turn in range(turns)]
    chosen: list[int] = []
    for own in rounds:
        some = min(n - len(chosen), len(own))
        chosen += [own[k * len(own) // some] for k in range(some)]
    return sorted(chosen)
