"""What a claim's tests rest on, as files: the sample behind every condition, and how the condition was decided.

`fra.tests.recorder` writes them while claims run, `fra.tests.replay` draws from them. An .npz each, nothing pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fra.errors import FraError
from fra.statistics.stats import Floats
from fra.verdicts.decide import WHOLE

SUFFIX = ".npz"
Member = tuple[str, str]
"""A head, and which of its several samples ("" where it has one)."""


@dataclass(frozen=True)
class Sample:
    """Sums and counts [n_clusters, n_candidates] as `fra.statistics.stats.ClusterMeans` was given them.

    Of a number in which all documents agree: itself, [1, 1].
    """

    sums: Floats
    counts: Floats
    seed: int = 0
    kind: Literal["means", "number"] = "means"


@dataclass(frozen=True)
class Decision:
    """One condition of a claim for its whole family, as `fra.verdicts.decide` was given it: effect > bar.

    A condition "effect < bar" has its sign turned; one said as a share is the linear form that is tested against zero.
    """

    claim: str
    name: str
    bar: float
    level: float
    share: int
    """Samples and conditions of the claim that may refute, each by itself."""
    samples: Mapping[Member, Sample]
    simultaneous: bool = False
    bounded: tuple[float, float] | None = None
    """The range of a document's value, where the exact bounds of `fra.statistics.bounds` may take over."""
    linearised: bool = False
    judged: bool = True
    """False: it stands beside the verdict and decides nothing."""

    @property
    def members(self) -> dict[Member, Sample]:
        """The samples that vary."""
        return {member: sample for member, sample in self.samples.items() if sample.kind != "number"}

    @property
    def heads(self) -> list[str]:
        """Heads, each once."""
        return list(dict.fromkeys(head for head, _ in self.samples))

    @property
    def parts(self) -> list[str]:
        """Which samples a head has, of those that vary."""
        return list(dict.fromkeys(part for _, part in self.members))

    @property
    def tests(self) -> int:
        """By how much the refuting direction is corrected, at most."""
        return len(self.heads) * self.share

    @property
    def nominal(self) -> float:
        """How often it may be refuted wrongly."""
        parts = len(dict.fromkeys(part for _, part in self.samples))
        return self.level * (parts / self.share)


def label(member: Member) -> str:
    """A member in words: its head, and which sample; of a claim about the whole target the sample alone."""
    head, part = member
    return part if head == WHOLE and part else f"{head} {part}".strip()


def save(decision: Decision, folder: Path) -> Path:
    """Write one decision; the same decision has the same file name."""
    about = asdict(replace(decision, samples={}))
    about["samples"] = [
        {"member": member, "seed": str(s.seed), "kind": s.kind} for member, s in decision.samples.items()
    ]
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
            about["samples"] = {
                tuple(m["member"]): Sample(found[f"sums {k}"], found[f"counts {k}"], int(m["seed"]), m["kind"])
                for k, m in enumerate(about["samples"])
            }
    except (OSError, ValueError, KeyError) as error:
        raise FraError(f"{path} is no recorded sample: {error}") from error
    if about["bounded"] is not None:
        about["bounded"] = tuple(about["bounded"])
    return Decision(**about)


def load_all(folder: Path) -> list[Decision]:
    """Every decision of a folder, by claim and file name. Raises FraError where there is none."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise FraError(f"{folder} holds no recorded samples; `pytest claims -p fra.tests.record` writes them")
    return [load(file) for file in files]
