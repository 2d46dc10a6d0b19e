"""How often the claims about CIH channels and sets say SUPPORTED where nothing is there, and how strong a planted head
must be before they do.

`python -m fra.tests.nulls > fra/tests/NULLS.md` (`make calibrate`) measures on the embedded target; its layers keep
their documents, dictionary and weights, but for what the null takes away. What was measured is kept in `--kept`, a line
a null, so that a run that was cut short goes on. `--short` prints what README says of NULLS.md, and measures nothing.
Tests of the same at small size: test_cih_nulls.py, test_cih_circuit.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from fra.claim import Claim, judge
from fra.core.coded import Arm
from fra.core.frozen import FrozenLayer
from fra.induction import cih
from fra.induction.status import HeadStatus
from fra.measures.channels import q04_q05_sets
from fra.search.channels import Arms, measure_arms, shifted_keys
from fra.search.designs import Plantings
from fra.search.nulls import draw_atoms, random_atoms, random_rotation, scramble, stretch_to_match
from fra.search.screen import LayerScreen
from fra.statistics import stats
from fra.statistics.stats import clopper_pearson, seed_of
from fra.stimuli import repeated as stimuli
from fra.stimuli import sets as document_sets
from fra.stimuli.designs import RepeatedSets
from fra.targets import target as target_module
from fra.targets.target import Target, load_target
from fra.tests import circuit, claims
from fra.tests.induction.test_cih_circuit import MANY, screened

Sets = dict[str, Arms]
"""Discovery, confirmation and sets documents."""
SETS, CHANNELS = claims.claim("Q04"), claims.claim("Q05")
POWERED = claims.claim("Q05", n=MANY["confirmation"])
NO_PLANTING = dataclasses.replace(
    CHANNELS, design=tuple(Plantings(tries=0) if isinstance(p, Plantings) else p for p in CHANNELS.design)
)
"""Where nothing is there, what counts is SUPPORTED: no power is asked for, and so nothing is refuted."""
DESIGN = RepeatedSets(status=1)
PAGE = Path(__file__).with_name("NULLS.md")
ROLES = {"Q04": "TIH", "Q05": "not a TIH"}


def measured(target: Target, layer: int, batches: Mapping[str, stimuli.Batch]) -> Sets:
    """The layer on the three sets of documents."""
    hook, sae = target.dictionary_for(layer)
    names = ("discovery", "confirmation", "sets")
    return {name: measure_arms(target.model, sae, batches[name], layer, hook) for name in names}


def scrambled(own: Sets, generator: torch.Generator) -> Sets:
    """Every head's key map turned by a random rotation of its own and stretched to the head's spread."""
    frozen = own["discovery"].repeated.frozen
    turns = [random_rotation(frozen.W_k.shape[-1], generator, frozen.W_k) for _ in range(frozen.n_heads)]
    stretches = [stretch_to_match(frozen, head, turn) for head, turn in enumerate(turns)]

    def turned(layer: FrozenLayer) -> FrozenLayer:
        for head, (turn, stretch) in enumerate(zip(turns, stretches, strict=True)):
            layer = scramble(layer, head, turn, stretch)
        return layer

    return _changed(own, lambda arm: Arm(turned(arm.frozen), arm.codes))


def with_random_atoms(own: Sets, generator: torch.Generator) -> Sets:
    """Random directions for features, codes by matching pursuit at equal L0."""
    decoder = own["discovery"].repeated.codes.decoder
    atoms = draw_atoms(len(decoder), generator, decoder)
    return _changed(own, lambda arm: random_atoms(arm, atoms))


def another_stripe(own: Sets, generator: torch.Generator) -> Sets:
    """The stripe of a lag at which nothing is repeated, the same for all documents that have it."""
    shift = int(torch.randint(4, 13, (), generator=generator))  # below 16 - 2, so that every document has it
    return {
        name: dataclasses.replace(
            arms, batch=dataclasses.replace(arms.batch, row_key=shifted_keys(arms.batch, shift)[0])
        )
        for name, arms in own.items()
    }


def _changed(own: Sets, change: Callable[[Arm], Arm]) -> Sets:
    return {name: Arms(arms.batch, change(arms.repeated), change(arms.control)) for name, arms in own.items()}


NULLS: dict[str, Callable[[Sets, torch.Generator], Sets]] = {
    "scrambled heads": scrambled,
    "random atoms": with_random_atoms,
    "another stripe": another_stripe,
}


def verdicts(sets: Sets, heads: Sequence[int], claim: Claim, seed: str) -> Iterator[str]:
    """Verdicts of one claim on heads of a layer that are all said to be of its family."""
    chosen_on, role = sets["discovery"], ROLES[claim.id]
    layer = chosen_on.repeated.frozen.layer
    own_layer = LayerScreen(
        chosen_on.batch,
        chosen_on.repeated,
        sets["confirmation"],
        sets["sets"],
        control=chosen_on.control,
        seed_parts=("null", seed),
        tih=heads if role == "TIH" else [],
    )
    found = cih.screen_layer(own_layer, heads)
    names = [f"L{layer}H{head}" for head in heads]
    status = {name: HeadStatus(name, role, 0.0, 0.0, 0.0, {}) for name in names}
    screen = cih.Screen("null", "repeated_random", status, found, {}, str, layers=lambda _: own_layer)
    of_family = q04_q05_sets.set_evidence if claim.id == "Q04" else q04_q05_sets.channel_evidence
    for own in of_family(claim, screen).values():
        yield judge(claim, own).outcome.value


def rates(target: Target, seeds: Sequence[int], layers: Sequence[int] | None, nulls: Sequence[str], kept: Path) -> None:
    """Measure every null that is not kept yet, and keep it. Every seed has documents of its own."""
    done = {name for name, _ in _lines(kept)}
    layers = layers or [layer for layer in range(1, target.n_layers) if target_module.has_dictionary(target, layer)]
    for seed in seeds:
        stats.use_seed(seed)
        batches = document_sets.documents(target, "repeated_random", DESIGN)
        for layer in layers:
            names = {null: f"{null}, layer {layer}, seed {seed}" for null in nulls}
            if done >= set(names.values()):
                continue
            own = measured(target, layer, batches)
            for null, name in names.items():
                if name in done:
                    continue
                print(name, file=sys.stderr, flush=True)
                sets = NULLS[null](own, torch.Generator().manual_seed(seed_of(name) % 2**63))
                words = {
                    c.id: Counter(verdicts(sets, range(own["discovery"].repeated.frozen.n_heads), c, name))
                    for c in (SETS, NO_PLANTING)
                }
                with kept.open("a") as file:
                    file.write(json.dumps([name, words]) + "\n")
    stats.use_seed(0)


def _lines(kept: Path) -> list[tuple[str, dict[str, dict[str, int]]]]:
    """What was measured: the null's name, and verdicts by claim."""
    return [tuple(json.loads(line)) for line in kept.read_text().splitlines()] if kept.exists() else []


def counted(kept: Path) -> dict[tuple[str, str], Counter[str]]:
    """Verdicts by null and claim."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for name, by_claim in _lines(kept):
        for claim, words in by_claim.items():
            counts.setdefault((name.split(",")[0], claim), Counter()).update(words)
    return counts


def table(kept: Path) -> Iterator[str]:
    """The table of false verdicts."""
    yield "| null | claim | heads | SUPPORTED | at most (95 %) | REFUTED | INCONCLUSIVE |"
    yield "|---|---|---|---|---|---|---|"
    for (null, claim), words in counted(kept).items():
        n, wrong = words.total(), words["SUPPORTED"]
        high = f"{clopper_pearson(wrong, n, 0.05)[1]:.3f}"
        yield f"| {null} | {claim} | {n} | {wrong} | {high} | {words['REFUTED']} | {words['INCONCLUSIVE']} |"


def short(page: str) -> str:
    """What README says of the table in NULLS.md: of which nulls, how many heads, how many SUPPORTED, and what share of
    such heads that may stand for.
    """
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    rows = [(row[1], row[3], row[2], row[4], row[0]) for row in cells if row[1] in ROLES]
    alike: dict[tuple[str, ...], list[str]] = {}
    for *told, null in rows:
        alike.setdefault(tuple(told), []).append(null)
    said = [
        f"{claim} says SUPPORTED of {wrong} of {n} heads each of {', '.join(nulls)} (at most {high} of all such heads)"
        for (claim, wrong, n, high), nulls in alike.items()
    ]
    return f"Where nothing is there, {'; '.join(said)}."


def power(strengths: Sequence[float]) -> None:
    """Print what the claims say of the hand-built circuit's head, by the strength of its only channels."""
    print("| strength (nats) | set effect (nats) | Q04 | expressed channels | Q05's test |\n|---|---|---|---|---|")
    for strength in strengths:
        print(f"circuit of {strength} nats", file=sys.stderr, flush=True)
        found = screened(circuit.model(strength), sizes=MANY)
        cells: list[object] = [strength]
        for claim in (SETS, POWERED):
            status = dataclasses.replace(found.status["L1H0"], status=ROLES[claim.id])
            one = dataclasses.replace(
                found, status=found.status | {"L1H0": status}, heads={"L1H0": found.heads["L1H0"]}
            )
            of_family = q04_q05_sets.set_evidence if claim.id == "Q04" else q04_q05_sets.channel_evidence
            own = of_family(claim, one)["L1H0"]
            verdict = judge(claim, own)
            shown = f"{verdict.headline.effect:.2f}" if claim.id == "Q04" else own.detail["expressed"]
            cells += [shown, verdict.outcome.value]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


INTRODUCTION = """# Calibration of the claims about CIH channels and sets

Made by `make calibrate` ({seeds} seed(s) of every null on the embedded target, `repeated_random`, {layers}).
A null keeps documents, dictionary and weights but for what it takes away; all of a layer's heads are said to be TIHs
for Q04 and no TIHs for Q05, so that each is tested. Every seed has documents of its own; the heads of one seed and
layer share theirs: the bound (Clopper-Pearson, one-sided) takes them for independent and is somewhat too low. Nothing
is planted here, so that Q05 refutes nothing.

## Where nothing is there
"""

STRENGTHS = """
## Where something was planted

The hand-built circuit: one head, whose score is `strength` nats from a token to the key after its earlier place and
zero elsewhere. Its 48 channels are the whole of it. "Q05's test" asks for an expressed channel, whatever the head's
status.
"""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="mini")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3], help="seeds of every null")
    parser.add_argument("--nulls", nargs="+", choices=tuple(NULLS), default=tuple(NULLS), help="default: all")
    parser.add_argument("--layers", type=int, nargs="*", help="default: all above 0 that have a dictionary")
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.25, 0.5, 1, 1.5, 2, 3, 4, 8])
    parser.add_argument("--kept", type=Path, default=Path("build/nulls.jsonl"), help="where measurements are kept")
    parser.add_argument("--short", action="store_true", help="print what README says, and measure nothing")
    args = parser.parse_args()
    if args.short:
        print(short(PAGE.read_text()))
        return
    args.kept.parent.mkdir(parents=True, exist_ok=True)
    layers = f"layers {args.layers}" if args.layers else "layers above 0"
    print(INTRODUCTION.format(seeds=len(args.seeds), layers=layers))
    if args.seeds:
        rates(load_target(args.target), args.seeds, args.layers, args.nulls, args.kept)
        print("\n".join(table(args.kept)))
    print(STRENGTHS)
    power(args.strengths)


if __name__ == "__main__":
    main()
