"""Figures of build/bench.json as a table: `python -m fra.tests.bench.table build/bench.json... [-o FILE.md]`.

Several files are the parts of one run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def rows(found: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    info = [one["extra_info"] for one in found["benchmarks"]]
    cpu = found["machine_info"]["cpu"].get("brand_raw", found["machine_info"].get("machine", "unknown"))
    lines = [
        f"Measured {found['datetime'][:10]} on {cpu}.",
        "",
        "| work | against | threads | work, ms | base, ms | ratio | reach | reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in (one for one in info if "row" in one):
        ratio, unit = one["work_s"] / one["base_s"], 1e6 if "bytes" in one["row"] else 1e-3
        shown, reach = f"{ratio:.2f}", f"at most {one['reach']:g}"
        if one["reach"] < 0.5:
            shown, reach = f"{1 / ratio:.1f}x faster", f"at least {1 / one['reach']:.0f}x"
        sizes = f"{one['work_s'] / unit:.1f} | {one['base_s'] / unit:.1f}"
        reached = "yes" if ratio <= one["reach"] else "no"
        lines.append(
            f"| {one['row']} | {one['against']} | {one['threads']} | {sizes} | {shown} | {reach} | {reached} |"
        )
    lines += ["", "| sums: cost in | exponent | expected at most | seconds |", "|---|---|---|---|"]
    for one in (one for one in info if "exponent" in one):
        taken = ", ".join(f"{second:.3g}" for second in one["seconds"])
        name = one["grows"] + (", RoPE" if one["rotary"] else "")
        lines.append(f"| {name} | {one['exponent']:.2f} | {one['expected']:g} | {taken} |")
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    parts = [json.loads(path.read_text()) for path in given.json]
    whole = {**parts[0], "benchmarks": [one for part in parts for one in part["benchmarks"]]}
    text = "\n".join(rows(whole)) + "\n"
    print(text)
    if given.output is not None:
        given.output.write_text(text)


if __name__ == "__main__":
    main()
