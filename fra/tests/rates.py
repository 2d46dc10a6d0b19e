"""The tables of FAMILIES.md: false-positive rates and power of every claim that rests on resampled documents.

`python -m fra.tests.rates build/samples > fra/tests/FAMILIES.md`, after `pytest claims -p fra.tests.record`
(`make calibrate` does both).
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from fra.statistics.stats import Floats, clopper_pearson, seed_of
from fra.tests.recorder import STATUS
from fra.tests.replay import N_BOOT, STRENGTHS, Counts, Replay, as_recorded
from fra.tests.samples import Decision, Member, label, load_all

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
    candidates = [s.sums.shape[1] for s in d.members.values()]
    low, high = min(candidates), max(candidates)
    many = "" if high == 1 else f" x {high}" if low == high else f" x {low} to {high}"
    documents = sorted({len(s.sums) for s in d.members.values()})
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
            marks = " (far end)" if c.far else ""
            outlying = c.outlying[np.isfinite(c.outlying)]
            _row(
                (
                    claim,
                    d.name + marks,
                    *_size(d),
                    f"{np.median(outlying):.2f}, {outlying.max():.2f}" if len(outlying) else "-",
                    f"{d.bar + 0.0:g}",
                    _rate(int(c.above.max()), c.draws),
                    f"{100 * c.heads_above.mean() / c.draws:.1f}",
                    _rate(c.below, c.draws) if claim != STATUS else "-",
                    f"{100 * d.nominal:.1f}" if claim != STATUS else "-",
                    f"{100 * c.covered / c.draws:.1f}",
                )
            )


def table_of_shares(found: dict[str, Replay]) -> None:
    """Rates by how much of the spread is one document's, in the head where it is most."""
    _head("one document's share, at most", "conditions", "wrongly met, %", "wrongly refuted, of the nominal rate")
    edges = (0.25, 0.4, 0.6, 1.0)
    every = [c for claim, replay in found.items() if claim != STATUS for c in replay.counts]
    shares = np.array([np.max(c.outlying, initial=0.0, where=np.isfinite(c.outlying)) for c in every])
    for low, high in zip((-1.0, *edges), edges, strict=False):
        some = [c for c, share in zip(every, shares, strict=True) if low < share <= high]
        if some:
            met = np.mean([100 * c.above.max() / c.draws for c in some])
            refuted = np.mean([c.below / c.draws / c.decision.nominal for c in some])
            _row((high, len(some), f"{met:.1f}", f"{refuted:.1f} times"))


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
                    f"{c.decision.bar + 0.0:g}",
                    _spread(by_head(c, c.detectable)) if known else "-",
                    *(f"{100 * c.power(k):.0f}" if known else "-" for k in STRENGTHS),
                    _spread(strength),
                    len(c.decision.members) - len(strength) or "",
                )
            )


def _where(c: Counts, met: bool) -> str:
    """The head that errs most often, how much of its spread one document makes and how often that one was not drawn,
    and where the condition is met (or refuted) as recorded, so that a verdict may rest on it.
    """
    wrong, d = (c.heads_above if met else c.heads_below), c.decision
    worst = int(wrong.argmax())
    own = c.outlying[c.heads == worst]
    name = label(list(d.members)[worst])
    said = f"most often {name} ({100 * wrong[worst] / c.draws:.1f})" if len(d.members) > 1 else name
    if np.isfinite(own).any():
        unseen = c.unseen[0 if met else 1, worst] / wrong[worst]
        said += f", {np.nanmax(own):.0%} of whose spread is one document, missing in {unseen:.0%} of these draws"
    found = as_recorded(d)
    heads = [  # every candidate of a head must fail
        h
        for h, own in found.items()
        if (any(x.holds(d.level) for x in own) if met else all(x.fails(d.level) for x in own))
    ]
    if not heads:
        return f"{said}; as recorded, {'met' if met else 'refuted'} nowhere"
    far = distances(c)
    nearest = min(heads, key=lambda h: far[h])
    name = label(nearest)
    of = f"at {len(heads)}, of which {name} is the nearest to its bar" if len(heads) > 1 else f"at {name}"
    return f"{said}; as recorded, {'met' if met else 'refuted'} {of}, {far[nearest]:.1f} detectable effects away"


def distances(c: Counts) -> dict[Member, float]:
    """How far every head's mean lies from the bar, in units of the effect that is found in 80 % of the draws: of its
    candidates the nearest.
    """
    apart = np.abs(c.estimate - c.decision.bar) / np.where(np.isfinite(c.strength), c.strength, np.nan)
    return {h: float(np.nanmin(apart[c.heads == k], initial=np.inf)) for k, h in enumerate(c.decision.members)}


def too_often(found: dict[str, Replay]) -> None:
    """Every condition whose interval lies above its nominal rate, in either direction, and those that only may."""
    clear, perhaps = [], []
    for claim, replay in found.items():
        for c in replay.counts:
            d = c.decision
            rates = [("met", int(c.above.max()), LEVEL)]
            if claim != STATUS:
                rates.append(("refuted", c.below, d.nominal))
            for side, k, nominal in rates:
                line = f"{claim}, {d.name}, wrongly {side}: {_rate(k, c.draws)}, nominal {100 * nominal:.1f}"
                if clopper_pearson(k, c.draws, 0.025)[0] > nominal:
                    clear.append(f"- **{line}**; {_where(c, side == 'met')}")
                elif k / c.draws > nominal:
                    perhaps.append(line)
    n = sum((1 + (claim != STATUS)) * len(replay.counts) for claim, replay in found.items())
    print(
        f"Above its nominal rate with the whole interval: {len(clear)} of {n} rates. "
        "(A detectable effect: what is found above"
    )
    print(
        "the bar in 80 % of the draws; a head skewed upwards can lie much nearer below its bar and be told from it.)\n"
    )
    print("\n".join(clear or ["- none"]))
    print(f"\nAbove it, which chance may have done: {len(perhaps)} rates.\n")
    print(textwrap.fill("; ".join(perhaps) or "none", 118, break_long_words=False, break_on_hyphens=False))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where fra.tests.record left its samples")
    parser.add_argument("--draws", type=int, default=200, help="draws a claim")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    claims = by_claim(load_all(args.folder))
    with ProcessPoolExecutor(args.jobs) as pool:
        of = list(pool.map(replayed, claims.values(), [args.draws] * len(claims)))
    report(dict(zip(claims, of, strict=True)), args.draws)


def report(found: dict[str, Replay], draws: int) -> None:
    """Print FAMILIES.md."""
    print(INTRODUCTION.format(draws=draws, n_boot=N_BOOT - 1, date=datetime.date.today().isoformat()))
    print("## By claim\n")
    table_of_claims(found)
    print("\n## Too often\n")
    too_often(found)
    print(f"\n{SHARES}")
    table_of_shares(found)
    print("\n## By condition\n")
    table_of_conditions(found)
    print(f"\n{POWERS}")
    table_of_power(found)
    print(f"\n{WITHOUT}", end="")


INTRODUCTION = """# Calibration of the claims

Made by `make calibrate` on {date}: `python -m fra.tests.rates build/samples --draws {draws}`, from the samples that
`pytest claims -p fra.tests.record` keeps while the claims run on `mini`. Of `fra.stats` alone: CALIBRATION.md; of Q04
and Q05 with their whole search under three nulls: NULLS.md.

How often is a claim wrong on samples such as it really has? The sources of a claim's documents are taken for the
population. As many are drawn with replacement, the same ones for all heads and conditions. Effects are moved by a
constant, so that the population's mean lies exactly at the bar at every head and candidate, and the decider decides
again, with the claim's own corrections. Every other condition counts as met beyond doubt: then every head of the family
hangs on this one, the hardest case for Holm over the heads. A condition that is then found beyond its bar anywhere in
its family is *wrongly met*, and the claim would be SUPPORTED wrongly: in 5 % at most. One that is found short of it is
*wrongly refuted*: in 5 % over the number of conditions any of which may refute ("nominal"), and a claim by any of them
in 5 %. Brackets: Clopper-Pearson, 95 %. (Effects multiplied by a constant, and not moved, give the same numbers: the
tests are studentised.)

What this shows, and what it does not:

- The rates are *upper bounds of wrong verdicts*. REFUTED also needs power 0.8, and that every candidate of the head
  fails; and a family of which each head lies exactly at its bar is the worst there is. A head far from the bar is in no
  danger.
- The population has no more sources than the claim had, so every draw lacks a third of them. Where *one source is
  unlike all others*, a third of all draws do not hold it, look tight, and decide wrongly; no test can see what is not
  there. Whether text at large has one such source in a hundred nobody knows: the rate says what happens if it has.
  What shows in none of the sources is not simulated at all.
- It is about the last step alone, from samples to a decision. Selection, search and wrong controls come before it.
- Resamples: {n_boot} or some more instead of 9,999, chosen so that no test is coarser than its level; a little less
  power, the same size.
- "far end": a share near the end of its range cannot be moved to the bar; some documents, by chance, lie at the far end
  of the range instead. Conditions "effect < bar" are shown with their sign turned. Of claims about several dictionaries
  at once, one at a time is at its bar, and the larger rate is shown. "status": which heads are token induction heads.
"""
SHARES = """## One document

By how much of the squared deviations from the mean is one document's, in the head where that is most (of thirty equal
ones each would have 0.03 on average; the largest of thirty normal ones has about 0.2).
"""
POWERS = """## Power

`detectable`: the effect, counted from the bar and in the bar's unit, that `fra.stats.detectable` says this sample
finds with power 0.8 at Holm's first step; then how often effects half, once and twice as large were found, and the
effect that was found in 80 % of the draws. Medians over heads (lowest to highest), of a head's candidates its median
one. "Never": heads in which more than a fifth of the draws have no lower bound at all (next to no variance, or no
rows); where values have a range, exact bounds stand in there, which are not counted here.
"""
WITHOUT = """## Claims without a rate

Exact numbers, which do not vary from document to document; what must break for them to be believed:

| claim | control |
|---|---|
| Q01, Q18 | each kind of term left out in turn; Q01 the scale too; Q18 norms without signs |
| Q19 | an unmasked patch must change earlier logits, and every intervention must change something |
| Q13, Q13.bias | another direction must move the scores; the same vector must move feature x bias |
| S01 | the derivative without the row's mean must miss the finite difference |
| D02, D03, D17 | each head, bias or kind of term left out; rows of the pattern mixed up |
| B01, B02 | dense matrices with zeros must not come down to 1 / n_heads; features of dense dictionaries must change |

Other tests, which are not counted here: Q06 (heads counted against scrambles; percentiles over resampled documents),
D07 and D07.token (features counted: Clopper-Pearson and Fisher, which take features for independent; D07's source is
above), B06 (percentiles over resampled sources; planted heads for power).

Nothing was decided on `mini`, so that there is no sample: D05 (no head knows enough induction features), D15 (too few
of its names are single tokens).
"""


if __name__ == "__main__":
    main()
