"""Every dictionary of a target's study in full: L0 against loss recovered, in total and by head, as a CSV file.
`python -m fra.frontiers TARGET -o FILE.csv`

Longer than the claims of chapter B, which ask of it what they need: each head of each dictionary takes a pass of its
own. A row a dictionary (head empty) and a row a head of it. Descriptions; they test nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from fra.errors import FraError
from fra.measures.block_diagonal.designs import Study
from fra.measures.block_diagonal.frontier import NO_STUDY, Frontier, study
from fra.verdicts.files import check_writable, write_text
from fra.verdicts.shown import print_anything

COLUMNS = (
    "arm",
    "run",
    "point",
    "d_sae",
    "weights",
    "head",
    "L0",
    "explained",
    "cost",
    "cost at zero",
    "loss recovered",
)


def table(frontier: Frontier, progress: Callable[[str], None] = lambda _: None) -> pd.DataFrame:
    """COLUMNS of every dictionary of the study; costs in nats a token.

    loss recovered: 1 - cost / cost at zero; missing where a head costs nothing at zero, so that no share of it can be
    told.
    """
    rows: list[tuple[Any, ...]] = []
    at_zero, none = frontier.by_head(None), float("nan")
    whole = float(frontier.gap.sum()) / frontier.n_tokens
    for arm, run in dict.fromkeys((entry.arm, entry.run) for entry in frontier.target.spec.study):
        for number, sae in enumerate(frontier.target.study(arm, run)):
            progress(f"{arm}, run {run}: {number + 1}")
            point, by_head = frontier.measure(sae), frontier.by_head(sae)
            about = (arm, run, number + 1, point.d_sae, point.weights)
            cost = float((point.loss - frontier.clean).sum()) / frontier.n_tokens
            rows.append((*about, "", point.total, none, cost, whole, 1 - cost / whole if whole > 0 else none))
            for head in range(frontier.n_heads):
                own, zero = float(by_head[head]), float(at_zero[head])
                share = 1 - own / zero if zero > 0 else none
                rows.append((*about, f"H{head}", point.l0[head], point.explained[head], own, zero, share))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def run(
    target: str, output: Path, *, documents: int = 120, stimulus: str = "repeated_natural", device: str = "cpu"
) -> None:
    """Write the table of a target's study as CSV and say so; progress on stderr.

    documents: half of them for L0, half for the loss. Raises FraError as `load_target` does, for a target without a
    study, and where the file cannot be written.
    """
    from fra.targets.target import load_target

    frontier = study(load_target(target, device=device), Study(documents=documents), stimulus)
    if frontier is None:
        raise FraError(NO_STUDY)
    check_writable(output)  # before anything is measured
    found = table(frontier, lambda line: print(line, file=sys.stderr, flush=True))
    write_text(found.to_csv(index=False), output)
    print(f"wrote {len(found)} rows: {output}")


def main(argv: list[str] | None = None) -> int:
    """Write the table: 0, or 2 with one sentence on stderr."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m fra.frontiers", description="Frontiers of a target's study.")
    parser.add_argument("target", metavar="TARGET", help="a preset or a target file")
    parser.add_argument("-o", "--output", metavar="FILE.csv", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=120, help="half for L0, half for the loss (default: 120)")
    parser.add_argument("--stimulus", default="repeated_natural", choices=("natural", "repeated_natural"))
    parser.add_argument("--device", default="cpu")
    try:
        run(**vars(parser.parse_args(argv)))
    except FraError as error:
        print(f"fra.frontiers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
