"""Which channels carry brackets, quotes and names: an exploratory report without a verdict.

    python -m fra.structured TARGET [-n DOCUMENTS] [-o FILE.json]

Generated sentences have a position at which something ought to be looked up (a bracket to be closed, a quotation to be
closed, the name that was not repeated) and the key at which it stands. For every head of a layer with a dictionary: its
attention from the one to the other, less that in the same sentence with another token at the key, and the channels that
contribute most to the score of that key, centred over the row. Nothing is tested: the sentences are few and alike, and
heads and channels are chosen and shown on the same ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fra.core.coded import Arm, measure_arm, pair_couplings
from fra.core.threads import each
from fra.errors import FraError
from fra.statistics.stats import seed_of
from fra.stimuli.padding import padded
from fra.targets.target import has_dictionary, load_target
from fra.verdicts.files import check_writable, write_text
from fra.verdicts.shown import print_anything

if TYPE_CHECKING:
    from fra.targets.target import Target

KINDS = ("brackets", "quotes", "names")
_NAMES = ("John", "Mary", "Tom", "Anna", "James", "Lucy", "Paul", "Jane", "George", "Emma")
_NOUNS = ("door", "letter", "horse", "river", "table", "window", "garden", "book", "lamp", "road")
_ADJECTIVES = ("old", "small", "dark", "long", "white", "good")
_PLACES = ("house", "town", "street", "garden", "church", "sea")


@dataclass(frozen=True)
class Structured:
    """Sentences of one kind, each with the position that looks up, the key, and the token that replaces the key."""

    kind: str
    tokens: Int[Tensor, "batch pos"]
    control: Int[Tensor, "batch pos"]
    query: Int[Tensor, " batch"]
    key: Int[Tensor, " batch"]


def structured(target: Target, kind: str, n: int) -> Structured:
    """n generated sentences of one kind. Raises FraError for an unknown kind, or a sentence beyond the context."""
    if kind not in KINDS:
        raise FraError(f"there is no structured stimulus {kind!r}: use {', '.join(KINDS)}.")
    rng = np.random.default_rng(seed_of(target.name, "structured", kind))
    rows, controls, queries, keys = [], [], [], []
    for _ in range(n):
        noun, other = rng.choice(_NOUNS, 2, replace=False)
        adjective, place = rng.choice(_ADJECTIVES), rng.choice(_PLACES)
        first, second = rng.choice(_NAMES, 2, replace=False)
        before, looked_up, instead, after = {
            "brackets": (f"The {noun}", " (", ",", f"which was a {adjective} {other} of the {place}"),
            "quotes": (f"{first} looked at the {noun}.", ' "', " And", f"It is a {adjective} {other} of the {place},"),
            "names": (f"When {second} and", f" {first}", " they", f" went to the {place}, {second} gave a {noun} to"),
        }[kind]
        start = [] if target.bos is None else [target.bos]
        head, key, tail = (target.encode(part) for part in (before, looked_up, after))
        rows.append([*start, *head, *key, *tail])
        controls.append([*start, *head, *([target.encode(instead)[0]] * len(key)), *tail])
        queries.append(len(rows[-1]) - 1)
        keys.append(len(start) + len(head) + len(key) - 1)
    length = max(map(len, rows))
    if length > int(target.model.cfg.n_ctx):
        raise FraError(f"the sentences have up to {length} tokens, more than the model's context.")
    tokens, others = (padded([torch.tensor(row) for row in lists], length) for lists in (rows, controls))
    return Structured(kind, tokens, others, torch.tensor(queries), torch.tensor(keys))


def strongest_channels(arm: Arm, head: int, made: Structured, n: int = 5) -> list[dict[str, Any]]:
    """The channels with the largest mean contribution to the score of the key, less their mean over the row's keys.

    Where a head rotates, the other keys are weighed with the coupling at the key's own lag: what the feature has there
    beyond elsewhere, not how far from it the others stand.
    """
    total: dict[tuple[int, int], float] = {}
    codes, (_, length) = arm.codes, arm.codes.shape
    q_all, k_all = arm.coefficients("query", head), arm.coefficients("key", head)
    for doc in range(len(made.tokens)):
        t, s = int(made.query[doc]), int(made.key[doc])
        row = codes.row - doc * length
        at_query, keys = torch.nonzero(row == t)[:, 0], torch.nonzero((row >= 0) & (row <= t))[:, 0]
        at_key = torch.nonzero(row == s)[:, 0]
        i, j = codes.feature[at_query], codes.feature[at_key]
        # what a key feature has at the key, less its mean over the keys of the row
        mean = torch.zeros(len(codes.decoder), device=i.device).index_add_(0, codes.feature[keys], k_all[keys].float())
        excess = k_all[at_key] - mean[j] / (t + 1)
        pairs = torch.cartesian_prod(i, j).view(-1, 2)
        G = pair_couplings(arm, head, pairs, torch.tensor([t - s], device=i.device))[:, 0].view(len(i), len(j))
        values = q_all[at_query][:, None] * excess * G
        best = values.flatten().topk(min(40, values.numel()))
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            pair = (int(i[place // len(j)]), int(j[place % len(j)]))
            total[pair] = total.get(pair, 0.0) + value / len(made.tokens)
    order = sorted(total, key=lambda pair: (-total[pair], pair))[:n]
    return [{"channel": f"{i} -> {j}", "nats": round(total[i, j], 4)} for i, j in order]


def _row(made: Structured, arm: Arm, control: Arm, head: int) -> dict[str, Any]:
    """What one head does on one kind."""
    at = torch.arange(len(made.query), device=arm.frozen.x.device)
    query, key = made.query.to(at.device), made.key.to(at.device)
    there, without = (float(a.frozen.pattern[at, head, query, key].mean()) for a in (arm, control))
    return {
        "kind": made.kind,
        "head": f"L{arm.frozen.layer}H{head}",
        "attention": round(there, 4),
        "difference": round(there - without, 4),
        "channels": strongest_channels(arm, head, made),
    }


@torch.no_grad()
def report(target: Target, n: int = 24) -> list[dict[str, Any]]:
    """A row for each kind and head, the largest difference of attention first."""
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        made = structured(target, kind, n)
        for layer in range(target.n_layers):
            if not has_dictionary(target, layer):
                continue
            hook, sae = target.dictionary_for(layer)
            arm, control = (measure_arm(target.model, sae, t, layer, hook) for t in (made.tokens, made.control))
            rows += each(partial(_row, made, arm, control), range(target.n_heads), arm.frozen.x.device)
    return sorted(rows, key=lambda row: (KINDS.index(row["kind"]), -row["difference"]))


def run(target: str = "mini", *, n: int = 24, output: Path | None = None) -> None:
    """Print the strongest heads of every kind with their channels; all rows as JSON into `output` where it is given.

    n: sentences of each kind. Raises FraError as `load_target` and `structured` do, for n below 1, and where the file
    cannot be written.
    """
    if n < 1:
        raise FraError(f"-n is {n}: at least one sentence is needed.")
    if output is not None:
        check_writable(output)  # before anything is measured
    rows = report(load_target(target), n)
    if output is not None:
        write_text(json.dumps(rows, indent=1) + "\n", output)
    print("exploratory: chosen and shown on the same sentences, nothing is tested\n")
    for kind in KINDS:
        print(kind)
        for row in [row for row in rows if row["kind"] == kind][:5]:
            channels = ", ".join(f"{c['channel']} ({c['nats']:+.2f})" for c in row["channels"][:3])
            print(
                f"  {row['head']:6} attention {row['attention']:.3f}, difference {row['difference']:+.3f}: {channels}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; exit 2 on bad input."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m fra.structured", description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", nargs="?", default="mini")
    parser.add_argument("-n", type=int, default=24, help="sentences of each kind")
    parser.add_argument("-o", "--output", metavar="FILE.json", type=Path, help="also write the rows as JSON")
    try:
        run(**vars(parser.parse_args(arguments)))
    except FraError as error:
        print(f"fra.structured: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
