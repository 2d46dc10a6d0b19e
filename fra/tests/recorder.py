"""Keeps the samples that the claims' tests rest on, one file a condition; the plugin is fra/tests/record.py.

Nothing is computed otherwise than without it: `fra.verdicts.decide.corrected`, through which every condition goes, is
called as it is, and what it was given is noted. Beside it stands the status of heads.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fra.statistics.stats import ClusterMeans, seed_of
from fra.tests.samples import Decision, Member, Sample, save
from fra.verdicts.decide import WHOLE, Number, Sampled, corrected, may_refute

STATUS = "status"
"""The claim that stands for the families themselves: which heads are token induction heads (fra.induction.status)."""


class Recorder:
    """Everything that was decided between `install` and `remove`."""

    def __init__(self) -> None:
        self.found: list[Decision] = []
        self._judged: dict[str, set[str]] = {}
        self._parts: dict[int, tuple[str, ...]] = {}
        self._undo: list[Callable[[], None]] = []

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Record while the block runs."""
        self.install()
        try:
            yield self
        finally:
            self.remove()

    def install(self) -> None:
        """Wrap what decides. Imports the status of heads, and with it torch."""
        from fra.induction.status import classify
        from fra.verdicts.claim import Evidence

        self._wrap(corrected, self._corrected)
        self._wrap(classify, self._classify)
        self._wrap(seed_of, lambda given, seed: self._parts.__setitem__(seed, given["parts"]))
        made = Evidence.__post_init__

        @functools.wraps(made)
        def noting(evidence: Evidence) -> None:
            made(evidence)
            names = {c.name for conditions in evidence.candidates.values() for c in conditions}
            self._judged.setdefault(evidence.claim.id, set()).update(names)

        setattr(Evidence, "__post_init__", noting)  # noqa: B010
        self._undo.append(lambda: setattr(Evidence, "__post_init__", made))

    def remove(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()

    def decisions(self) -> list[Decision]:
        """What was decided."""
        return [replace(d, judged=d.claim == STATUS or d.name in self._judged.get(d.claim, ())) for d in self.found]

    def _corrected(self, given: dict[str, Any], result: Any) -> None:
        claim, columns = given["claim"], given["columns"]
        for column in columns:
            above = isinstance(column, Sampled) and claim.above_of(column.name)
            samples = _samples(column, above) if isinstance(column, Sampled) else None
            if samples is None or all(sample.kind == "number" for sample in samples.values()):
                continue
            sign = 1.0 if above else -1.0
            bounded = column.bounded
            if bounded is not None and not above:
                bounded = -bounded[1], -bounded[0]
            self.found.append(
                Decision(
                    claim.id,
                    column.name,
                    0.0 if column.shares is not None else sign * claim.bar_of(column.name),
                    claim.level,
                    max(may_refute(claim, columns), 1),
                    samples,
                    column.simultaneous,
                    bounded,
                    column.linearised,
                )
            )

    def _classify(self, given: dict[str, Any], result: Any) -> None:
        means, design = given["means"], given["design"]
        stimulus = self._parts.get(means.seed, ("", ""))[1]
        for what, bar, sign in (("a TIH", design.tih_at_least, 1.0), ("not a TIH", design.not_tih_at_most, -1.0)):
            samples = {(WHOLE, ""): _sample(means, sign)}
            self.found.append(
                Decision(STATUS, f"{what}, {stimulus}", sign * bar, design.level, 1, samples, simultaneous=True)
            )

    def _wrap(self, original: Any, note: Callable[[dict[str, Any], Any], None]) -> None:
        """Put a function that notes in the place of `original`, under whatever name a module of fra holds it."""
        signature = inspect.signature(original)

        @functools.wraps(original)
        def noting(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            note(dict(signature.bind(*args, **kwargs).arguments), result)
            return result

        _replace(original, noting)
        self._undo.append(lambda: _replace(noting, original))


def _samples(column: Sampled, above: bool) -> dict[Member, Sample] | None:
    """The samples of a condition; None where one is of another kind than can be drawn again."""
    sign = 1.0 if above else -1.0
    found: dict[Member, Sample] = {}
    for head, own in column.samples.items():
        several = own if isinstance(own, Mapping) else dict(enumerate(own)) if isinstance(own, Sequence) else {"": own}
        for part, one in several.items():
            if not isinstance(one, ClusterMeans | Number):
                return None
            found[head, str(part) if len(several) > 1 else ""] = _sample(one, sign)
    return found


def _sample(given: ClusterMeans | Number, sign: float) -> Sample:
    """A sample of E, or of -E: "below a bar" said as "above"."""
    if isinstance(given, Number):
        return Sample(np.full((1, 1), sign * given.estimate), np.ones((1, 1)), kind="number")
    return Sample(sign * given.sums, given.counts, given.seed)


def _replace(old: Any, new: Any) -> None:
    """In every module of fra that is imported; one imported later takes what stands in the module that defines it. This
    module keeps what it wraps.
    """
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "fra" and module is not None and name != __name__:
            for held in [held for held, value in vars(module).items() if value is old]:
                setattr(module, held, new)


def save_all(recorder: Recorder, folder: Path) -> None:
    """Every decision."""
    for decision in recorder.decisions():
        save(decision, folder)
