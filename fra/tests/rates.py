"""The tables of FAMILIES.md: false-positive rates and power of every claim that rests on resampled documents.

`python -m fra.tests.rates build/samples > fra/tests/FAMILIES.md`, after `pytest claims -p fra.tests.record`
(`make calibrate` does both).
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from fra.stats import Floats, clopper_pearson, rank_p, seed_of
from fra.tests.record import RANKS, STATUS
from fra.tests.replay import STRENGTHS, Counts, Replay, as_recorded
from fra.tests.samples import Decision, load_all

LEVEL = 0.05


def by_claim(decisions: Iterable[Decision]) -> dict[str, list[Decision]]:
    """Decisions that a verdict rests on, by claim, in the catalogue's order: Q, D, B."""
    found: dict[str, list[Decision]] = {}
    for d in decisions:
        if d.judged:
            found.setdefault(d.claim, []).append(d)

    def place(claim: str) -> tuple[object, ...]:
        chapter = "QDB".find(claim[0]) if claim != STATUS else -1
        return chapter, *(int(x) if x.isdigit() else x for x in re.split(r"(\d+)", claim)[1:])

    return {claim: found[claim] for claim in sorted(found, key=place)}


def replayed(decisions: Sequence[Decision], draws: int) -> Replay:
    """One claim, drawn and decided."""
    replay = Replay(decisions, draws)
    replay.run(seed_of("replay", decisions[0].claim))
    replay.forget()
    print(f"{decisions[0].claim}: {replay.draws} draws", file=sys.stderr, flush=True)
    return replay


def _rate(k: int, n: int) -> str:
    low, high = clopper_pearson(k, n, 0.025)
    return f"{100 * k / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]" if n else "-"


def _row(cells: Iterable[object]) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _head(*titles: str) -> None:
    _row(titles)
    print("|" + "---|" * len(titles))


def _size(d: Decision) -> tuple[str, str]:
    """Heads (or dictionaries) with their candidates, and documents."""
    candidates = [s.sums.shape[1] for s in d.samples.values()]
    low, high = min(candidates), max(candidates)
    many = "" if high == 1 else f" x {high}" if low == high else f" x {low} to {high}"
    documents = sorted({len(s.sums) for s in d.samples.values()})
    return f"{len(candidates)}{many}", " to ".join(map(str, sorted({documents[0], documents[-1]})))


def table_of_claims(found: dict[str, Replay]) -> None:
    """One row a claim: the condition that is most often met wrongly, and refutations by whichever condition."""
    _head("claim", "conditions", "draws", "met wrongly, worst condition, %", "REFUTED wrongly, by any condition, %")
    for claim, replay in found.items():
        worst = max(replay.counts, key=lambda c: int(c.above.max()))
        refuted = _rate(replay.refuted, replay.draws) if claim != STATUS else "-"
        _row((claim, len(replay.counts), replay.draws, _rate(int(worst.above.max()), worst.draws), refuted))


def table_of_conditions(found: dict[str, Replay]) -> None:
    """Rates of every condition."""
    titles = ("claim", "condition", "heads", "documents", "one document's share", "bar", "wrongly met, %", "a head, %")
    _head(*titles, "wrongly refuted, %", "nominal", "bounds that hold, %")
    for claim, replay in found.items():
        for c in replay.counts:
            d = c.decision
            marks = (" (jackknife)" if d.kind == "jackknife" else "") + (" (far end)" if c.far else "")
            outlying = c.outlying[np.isfinite(c.outlying)]
            _row(
                (
                    claim,
                    d.name + marks,
                    *_size(d),
                    f"{np.median(outlying):.2f}, {outlying.max():.2f}" if len(outlying) else "-",
                    f"{d.bar:g}",
                    _rate(int(c.above.max()), c.draws),
                    f"{100 * c.heads_above.mean() / c.draws:.1f}",
                    _rate(c.below, c.draws) if claim != STATUS else "-",
                    f"{100 * LEVEL / d.share:.1f}" if claim != STATUS else "-",
                    f"{100 * c.covered / c.draws:.1f}",
                )
            )


def by_head(c: Counts, values: Floats) -> Floats:
    """The median candidate of every head that has one."""
    heads = [values[c.heads == h] for h in np.unique(c.heads)]
    return np.array([np.median(v[np.isfinite(v)]) for v in heads if np.isfinite(v).any()])


def _spread(values: Floats) -> str:
    if not len(values):
        return "-"
    low, middle, high = (f"{x:.3g}" for x in (values.min(), np.median(values), values.max()))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def table_of_power(found: dict[str, Replay]) -> None:
    """What is found, how often."""
    titles = [f"found at {k:g} of it, %" for k in STRENGTHS]
    _head("claim", "condition", "bar", "detectable above it", *titles, "found in 80 %", "heads in which never")
    for claim, replay in found.items():
        for c in replay.counts:
            if not c.needed:
                continue
            strength = by_head(c, c.strength)
            known = len(by_head(c, c.detectable)) > 0
            _row(
                (
                    claim,
                    c.decision.name,
                    f"{c.decision.bar:g}",
                    _spread(by_head(c, c.detectable)) if known else "-",
                    *(f"{100 * c.power(k):.0f}" if known else "-" for k in STRENGTHS),
                    _spread(strength),
                    len(c.decision.samples) - len(strength) or "",
                )
            )


def size_of_rank(draws: Floats) -> float:
    """How often a draw ranks in the upper 5 % of the others: the size of a rank among exchangeable nulls."""
    others = [rank_p(draws[k], np.delete(draws, k)) <= LEVEL for k in range(len(draws))]
    return float(np.mean(others)) if others else float("nan")


def table_of_ranks(folder: Path) -> None:
    """Claims that rank among nulls."""
    _head("claim", "ranks taken", "draws", "a draw among the others at or below 5 %, %")
    for file in sorted(folder.glob("*.npz")):
        with np.load(file, allow_pickle=False) as given:
            observed = given["observed"]
            nulls = [given[f"draws {k}"] for k in range(len(observed))]
        distinct = list({draws.tobytes(): draws for draws in nulls if len(draws) > 1}.values())[:40]
        sizes = [100 * size_of_rank(draws[np.isfinite(draws)]) for draws in distinct]
        lengths = [len(draws) for draws in distinct]
        if lengths:
            span = f"{min(lengths)}" if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)}"
            _row((file.stem, len(observed), span, f"{np.mean(sizes):.1f}"))


def _where(c: Counts, wrong: np.ndarray, met: bool) -> str:
    """The head that errs most often, how much of its spread one document makes, and where the condition is met (or
    refuted) as recorded, so that a verdict may rest on it.
    """
    worst = int(wrong.argmax())
    own = c.outlying[c.heads == worst]
    share = f", where one document makes {np.nanmax(own):.0%} of the spread" if np.isfinite(own).any() else ""
    said = f"most often {list(c.decision.samples)[worst]} ({100 * wrong[worst] / c.draws:.1f}){share}"
    d = c.decision
    if d.kind == "jackknife":
        return said
    found = as_recorded(d)
    heads = [h for h, own in found.items() if any(x.holds(d.level) if met else x.fails(d.level) for x in own)]
    return f"{said}; {'met' if met else 'refuted'} as recorded: {', '.join(heads) or 'nowhere'}"


def too_often(found: dict[str, Replay]) -> None:
    """Every condition whose interval lies above its nominal rate, in either direction, and those that only may."""
    clear, perhaps = [], []
    for claim, replay in found.items():
        for c in replay.counts:
            d = c.decision
            rates = [("met", int(c.above.max()), LEVEL, c.heads_above)]
            if claim != STATUS:
                rates.append(("refuted", c.below, LEVEL / d.share, c.heads_below))
            for side, k, nominal, wrong in rates:
                line = f"{claim}, {d.name}, wrongly {side}: {_rate(k, c.draws)}, nominal {100 * nominal:.1f}"
                if clopper_pearson(k, c.draws, 0.025)[0] > nominal:
                    clear.append(f"- **{line}**; {_where(c, wrong, side == 'met')}")
                elif k / c.draws > nominal:
                    perhaps.append(line)
    n = sum((1 + (claim != STATUS)) * len(replay.counts) for claim, replay in found.items())
    print(f"Above its nominal rate with the whole interval: {len(clear)} of {n} rates.\n")
    print("\n".join(clear or ["- none"]))
    print(f"\nAbove it, which chance may have done: {len(perhaps)} rates.\n")
    print("\n".join(f"- {line}" for line in perhaps or ["none"]))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where fra.tests.record left its samples")
    parser.add_argument("--draws", type=int, default=300, help="draws a claim; fewer where it has many candidates")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    claims = by_claim(load_all(args.folder))
    with ProcessPoolExecutor(args.jobs) as pool:
        of = list(pool.map(replayed, claims.values(), [args.draws] * len(claims)))
    found = dict(zip(claims, of, strict=True))
    print(INTRODUCTION.format(draws=args.draws, date=datetime.date.today().isoformat()))
    print("## By claim\n")
    table_of_claims(found)
    print("\n## Too often\n")
    too_often(found)
    print(f"\n{READING}\n## By condition\n")
    table_of_conditions(found)
    print(f"\n{POWERS}")
    table_of_power(found)
    print(f"\n{RANKED}")
    table_of_ranks(args.folder / RANKS)
    print(f"\n{WITHOUT}", end="")


INTRODUCTION = """# Calibration of the claims

Made by `make calibrate` on {date} (`python -m fra.tests.rates build/samples --draws {draws}`; samples of `mini`).
"""
READING = ""
POWERS = "## Power\n"
RANKED = "## Ranks among nulls\n"
WITHOUT = ""


if __name__ == "__main__":
    main()
