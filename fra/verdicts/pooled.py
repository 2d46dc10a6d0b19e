"""Claims that speak about every head-output dictionary of a target at once: each of them must hold, any may refute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fra.statistics import stats
from fra.statistics.stats import by_source
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import WHOLE, Beside, Number, Sampled, decide

NO_HEAD_OUTPUT_DICTIONARY = "the target has no dictionary of head outputs (blocks.L.attn.hook_z)"


@dataclass(frozen=True)
class ByDictionary:
    """One condition's numbers, by dictionary: ratio means over documents, sources as clusters."""

    name: str
    means: Mapping[str, stats.ClusterMeans | Number]


def clustered(
    sums: np.ndarray, counts: np.ndarray, sources: Sequence[str], seed_parts: Sequence[str]
) -> stats.ClusterMeans:
    """The ratio mean sum / count over documents [n_documents], sources as clusters."""
    return stats.ClusterMeans(by_source(sums, sources), by_source(counts, sources), seed=stats.seed_of(*seed_parts))


def clustered_or_number(
    sums: np.ndarray, counts: np.ndarray, sources: Sequence[str], seed_parts: Sequence[str]
) -> stats.ClusterMeans | Number:
    """The same, or the ratio itself where all documents that have rows agree on it to rounding."""
    ratios = sums[counts > 0] / counts[counts > 0]
    if len(ratios) and float(np.ptp(ratios)) <= 1e-9 * float(np.abs(ratios).max()):
        return Number(float(ratios.mean()))
    return clustered(sums, counts, sources, seed_parts)


def differences(
    own: tuple[np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray],
    sources: Sequence[str],
    seed_parts: Sequence[str],
) -> stats.ClusterMeans:
    """The mean over documents of one ratio less another, each a (sums, counts) [n_documents]; documents in which either
    has no rows are left out.
    """
    both = (own[1] > 0) & (other[1] > 0)
    ratios = [np.divide(sums, counts, out=np.zeros(len(sums)), where=both) for sums, counts in (own, other)]
    return clustered(ratios[0] - ratios[1], both.astype(float), sources, seed_parts)


def evidence(
    claim: Claim, measured: Sequence[ByDictionary], detail: Mapping[str, Any], head: str | None = None
) -> Evidence:
    """One row's evidence: all of these conditions, of all dictionaries."""
    row = WHOLE if head is None else head
    columns = [Sampled(name=each.name, samples={row: each.means}) for each in measured]
    return decide(claim, columns, {row: Beside(candidates=("every dictionary",), detail=detail)}, q_over=())[row]


def by_dictionary(measured: Sequence[ByDictionary], level: float) -> dict[str, dict[str, list[float]]]:
    """[estimate, lower, upper] of every condition and dictionary, for the detail; bounds one-sided at `level`."""
    return {
        each.name: {
            hook: [float(np.ravel(x)[0]) for x in (m.estimate, m.lower(level, False), m.upper(level, False))]
            for hook, m in each.means.items()
        }
        for each in measured
    }
