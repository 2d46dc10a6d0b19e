"""Keeps the samples that the claims' tests rest on, one file a condition; the plugin is fra/tests/record.py.

Nothing is computed otherwise than without it: functions that decide a condition are wrapped, called as they are, and
what they were given is noted. Which claim a sample belongs to is known from its seed (digest of the claim first).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fra.tests.samples import Decision, Sample, save

if TYPE_CHECKING:
    from fra.claim import Claim

STATUS = "status"
"""The claim that stands for the families themselves: which heads are token induction heads (fra.induction)."""
RANKS = "ranks"


class Recorder:
    """Everything that was decided between `install` and `remove`."""

    def __init__(self, claims: Iterable[Claim] = ()) -> None:
        self.by_digest = {claim.digest: claim for claim in claims}
        self.current: str | None = None
        """The claim whose test runs, for what has no seed of its own."""
        self.found: list[Decision] = []
        self.ranks: list[tuple[str, float, np.ndarray]] = []
        """Ranks among nulls: claim, observed, draws."""
        self._judged: dict[str, set[str]] = {}
        self._parts: dict[int, tuple[str, ...]] = {}
        self._inside = 0
        self._asked: dict[int, tuple[Any, float]] = {}
        self._decided: set[int] = set()
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
        """Wrap what decides. Imports the modules, and with them torch."""
        from fra.verdicts import bounds, claim, jackknife, pooled, stats
        from fra.verdicts import conditions as conditions_module

        self._wrap(stats.seed_of, self._seed_of, always=True)
        self._wrap(stats.rank_p, self._rank_p, always=True)
        for function, note in (
            (conditions_module.two_sided, self._two_sided),
            (bounds.columns_tested, self._columns_tested),
            (pooled.worst, self._worst),
            (conditions_module.condition, self._condition),
            (jackknife.conditions, self._jackknife),
        ):
            self._wrap(function, note)
        means = stats.ClusterMeans
        self._wrap_method(means, "__init__", self._made)
        for side in ("p_above", "p_below", "lower", "upper"):
            self._wrap_method(means, side, functools.partial(self._ask, side))
        self._wrap_method(claim.Evidence, "__post_init__", self._evidence)

    def remove(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()

    def decisions(self) -> list[Decision]:
        """What was decided, and what was asked of a sample outside the functions that decide, which is grouped here."""
        every = [*self.found, *self._inline()]
        return [replace(d, judged=d.claim == STATUS or d.name in self._judged.get(d.claim, ())) for d in every]

    # what is noted -------------------------------------------------------------------------------------------------

    def _two_sided(self, given: dict[str, Any], result: Any) -> None:
        samples = {h: self._sample(m) for h, m in given["means"].items()}
        claim = self._claim_of(next(iter(given["means"].values())))
        rest = {name: given[name] for name in ("name", "level", "share", "simultaneous")}
        self.found.append(Decision("two_sided", claim, bar=float(given["bar"]), samples=samples, **rest))

    def _columns_tested(self, given: dict[str, Any], result: Any) -> None:
        claim, name = given["claim"], given["name"]
        self.found.append(
            Decision(
                "two_sided",
                claim.id,
                name,
                claim.bars.get(name, claim.bar),
                claim.level,
                given["n_conditions"],
                {h: self._sample(m) for h, m in result[1].items()},
                bool(given.get("many", False)),
                bounded=given.get("bounded"),
            )
        )

    def _worst(self, given: dict[str, Any], result: Any) -> None:
        measured = given["measured"]
        numbers = {h: m for h, m in measured.means.items() if isinstance(m, float)}
        means = {h: m for h, m in measured.means.items() if not isinstance(m, float)}
        if means:
            claim = self._claim_of(next(iter(means.values())))
            samples = {h: self._sample(m) for h, m in means.items()}
            d = Decision("worst", claim, measured.name, measured.bar, given["level"], given["tests"], samples)
            self.found.append(replace(d, above=measured.above, numbers=numbers))

    def _condition(self, given: dict[str, Any], result: Any) -> None:
        """One candidate, no family: `two_sided` with one head."""
        m = given["means"]
        claim, sample = self._claim_of(m), {"all": self._sample(m)}
        self.found.append(Decision("two_sided", claim, given["name"], given["bar"], given["level"], 1, sample))

    def _jackknife(self, given: dict[str, Any], result: Any) -> None:
        samples = {}
        for h, j in given["found"].items():
            n = len(j.left_out)
            pseudo = j.left_out.mean() + (n - 1) * (j.left_out.mean() - j.left_out)
            samples[h] = Sample(pseudo[:, None], np.ones((n, 1)), least=j.least)
        share = int(given.get("share", 1))
        claim = self.current or "?"
        self.found.append(Decision("jackknife", claim, given["name"], given["bar"], given["level"], share, samples))

    def _rank_p(self, given: dict[str, Any], result: Any) -> None:
        draws = np.asarray(given["null"], dtype=np.float64).ravel()
        self.ranks.append((self.current or "?", float(given["observed"]), draws))

    def _seed_of(self, given: dict[str, Any], result: Any) -> None:
        self._parts[result] = given["parts"]

    def _evidence(self, given: Any) -> None:
        names = {c.name for conditions in given.candidates.values() for c in conditions}
        self._judged.setdefault(given.claim.id, set()).update(names)

    def _made(self, means: Any, sums: Any, counts: Any = None, **_: Any) -> None:
        table = np.asarray(sums, dtype=np.float64)
        table = table[:, None] if table.ndim == 1 else table
        n = np.ones_like(table) if counts is None else np.asarray(counts, dtype=np.float64).reshape(table.shape)
        means.recorded = Sample(table.copy(), n.copy(), means.seed)

    def _ask(self, side: str, means: Any, value: Any, simultaneous: bool = True) -> None:
        parts = self._parts.get(means.seed, ("",))
        wanted = ("lower", "upper") if parts[-1] == "status" else ("p_above", "p_below")
        if not self._inside and side in wanted:
            self._asked[id(means)] = means, float(np.ravel(value)[0])

    # -----------------------------------------------------------------------------------------------------------------

    def _inline(self) -> Iterator[Decision]:
        """Samples asked for a p outside the deciding functions: Q12, whose conditions are corrected as one head's of
        three, Q17, which holds ratios below a bar, and the status of heads.
        """
        from fra.induction.status import NOT_TIH_AT_MOST, TIH_AT_LEAST

        groups: dict[tuple[str, str], dict[str, tuple[Any, float]]] = {}
        for means, bar in self._asked.values():
            if id(means.recorded) in self._decided:  # asked again: a false discovery rate, say
                continue
            parts = self._parts.get(means.seed, ("",))
            if parts[-1] == "status" and len(parts) == 3:
                for what, at, sign in (("a TIH", TIH_AT_LEAST, 1.0), ("not a TIH", NOT_TIH_AT_MOST, -1.0)):
                    name, sample = f"{what}, {parts[1]}", _turned(means.recorded, sign)
                    yield Decision("two_sided", STATUS, name, sign * at, 0.05, 1, {"all": sample}, simultaneous=True)
                continue
            claim = self.by_digest.get(parts[0])
            if claim is not None and parts[-1] in self._judged.get(claim.id, ()):
                head = parts[2] if len(parts) > 3 else "all"
                groups.setdefault((claim.id, parts[-1]), {})[head] = means, bar
        for (claim_id, name), heads in groups.items():
            claim = next(c for c in self.by_digest.values() if c.id == claim_id)
            sign = 1.0 if claim.above else -1.0
            samples = {h: _turned(m.recorded, sign) for h, (m, _) in heads.items()}
            bar = sign * next(iter(heads.values()))[1]
            share = 1 + len(claim.bars) - ("gate: copied-token logit" in claim.bars)
            yield Decision("two_sided", claim_id, name, bar, claim.level, share, samples)

    def _claim_of(self, means: Any) -> str:
        parts = self._parts.get(means.seed, ("",))
        claim = self.by_digest.get(parts[0])
        return claim.id if claim is not None else self.current or "?"

    def _sample(self, means: Any) -> Sample:
        sample: Sample = means.recorded
        self._decided.add(id(sample))
        return sample

    def _wrap(self, original: Any, note: Callable[[dict[str, Any], Any], None], always: bool = False) -> None:
        """Put a function that notes in the place of `original`, under whatever name a module of fra holds it. Of
        functions within each other the outermost decides, and is noted; always: whoever calls, from any thread.
        """
        signature = inspect.signature(original)

        @functools.wraps(original)
        def noting(*args: Any, **kwargs: Any) -> Any:
            self._inside += not always
            try:
                result = original(*args, **kwargs)
            finally:
                self._inside -= not always
            if always or not self._inside:
                note(dict(signature.bind(*args, **kwargs).arguments), result)
            return result

        _replace(original, noting)
        self._undo.append(lambda: _replace(noting, original))

    def _wrap_method(self, owner: type, name: str, note: Callable[..., None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def noting(this: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(this, *args, **kwargs)
            note(this, *args, **kwargs)
            return result

        setattr(owner, name, noting)
        self._undo.append(lambda: setattr(owner, name, original))


def _turned(sample: Sample, sign: float) -> Sample:
    """The sample of E, or of -E: "below a bar" said as "above"."""
    return Sample(sign * sample.sums, sample.counts, sample.seed)


def _replace(old: Any, new: Any) -> None:
    """In every module of fra that is imported; one imported later takes what stands in the module that defines it."""
    for module in [m for name, m in list(sys.modules.items()) if name.split(".")[0] == "fra" and m is not None]:
        for name in [name for name, value in vars(module).items() if value is old]:
            setattr(module, name, new)


def save_all(recorder: Recorder, folder: Path) -> None:
    """Every decision, and the ranks in a folder of their own."""
    for decision in recorder.decisions():
        save(decision, folder)
    save_ranks(recorder, folder / RANKS)


def save_ranks(recorder: Recorder, folder: Path) -> None:
    """The nulls that something was ranked among, a file a claim."""
    by_claim: dict[str, list[tuple[float, np.ndarray]]] = {}
    for claim, observed, draws in recorder.ranks:
        by_claim.setdefault(claim, []).append((observed, draws))
    folder.mkdir(parents=True, exist_ok=True)
    for claim, several in by_claim.items():
        arrays = {f"draws {k}": draws for k, (_, draws) in enumerate(several)}
        np.savez_compressed(folder / f"{claim}.npz", observed=np.array([o for o, _ in several]), **arrays)
