"""What a claim's tests rest on, as files: the sample behind every condition, and how the condition was decided.

`fra.tests.recorder` writes them while claims run, `fra.tests.replay` draws from them. An .npz each, nothing pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fra.errors import FraError
from fra.verdicts.stats import Floats

SUFFIX = ".npz"


@dataclass(frozen=True)
class Sample:
    """Sums and counts [n_clusters, n_candidates] as `fra.stats.ClusterMeans` was given them.

    Of a jackknife: pseudo-values [n_sources, 1], whose mean is the estimate, and ones.
    """

    sums: Floats
    counts: Floats
    seed: int = 0
    least: float = 0.0
    """Of a jackknife: the smallest standard error that is believed."""


@dataclass(frozen=True)
class Decision:
    """One condition of a claim for its whole family, as it was decided."""

    kind: str
    """Which function decides: `two_sided` (fra.verdicts.conditions), `worst` (fra.verdicts.pooled) or `jackknife`
    (fra.verdicts.jackknife)."""
    claim: str
    name: str
    bar: float
    level: float
    share: int
    """Conditions any one of which may refute, as the function was told."""
    samples: Mapping[str, Sample]
    """By head, or by dictionary."""
    simultaneous: bool = False
    above: bool = True
    """False: the claim says effect < bar. `two_sided` knows nothing of it: its sample then has its sign turned."""
    bounded: tuple[float, float] | None = None
    """The range of a document's value, where the exact bounds of `fra.verdicts.bounds` may take over."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Dictionaries in which every document gives the same number (`worst`)."""
    judged: bool = True
    """False: it stands beside the verdict and decides nothing."""

    @property
    def tests(self) -> int:
        """By how much the refuting direction is corrected (Bonferroni)."""
        return self.share * (len(self.samples) + len(self.numbers))


def save(decision: Decision, folder: Path) -> Path:
    """Write one decision; the same decision has the same file name."""
    about = asdict(replace(decision, samples={}))
    del about["samples"]
    about["members"] = [{"name": h, "seed": str(s.seed), "least": s.least} for h, s in decision.samples.items()]
    arrays = {}
    for k, sample in enumerate(decision.samples.values()):
        arrays[f"sums {k}"], arrays[f"counts {k}"] = sample.sums, sample.counts
    text = json.dumps(about, sort_keys=True)
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{decision.claim} {decision.name}").strip("-")
    path = folder / f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # nothing half-written under its own name
    with part.open("wb") as file:
        np.savez_compressed(file, about=np.array(text), **arrays)
    part.replace(path)
    return path


def load(path: Path) -> Decision:
    """Read one decision. Raises FraError for a file that is none."""
    try:
        with np.load(path, allow_pickle=False) as found:
            about: dict[str, Any] = json.loads(str(found["about"]))
            members = about.pop("members")
            samples = {
                m["name"]: Sample(found[f"sums {k}"], found[f"counts {k}"], int(m["seed"]), m["least"])
                for k, m in enumerate(members)
            }
    except (OSError, ValueError, KeyError) as error:
        raise FraError(f"{path} is no recorded sample: {error}") from error
    if about["bounded"] is not None:
        about["bounded"] = tuple(about["bounded"])
    return Decision(**about, samples=samples)


def load_all(folder: Path) -> list[Decision]:
    """Every decision of a folder, by claim and file name. Raises FraError where there is none."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise FraError(f"{folder} holds no recorded samples; `pytest claims -p fra.tests.record` writes them")
    return [load(file) for file in files]
