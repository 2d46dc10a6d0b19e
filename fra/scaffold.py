"""A new claim: its file, with a fixture that measures, and a test that plants an effect and its absence.
`fra new-claim X02 "title"`
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

from fra.errors import FraError
from fra.verdicts.files import write_text

_ID = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,19}")
_LONGEST = 90
"""Characters of a title, so that lines stay within 120."""

CLAIM_FILE = '''"""@ID@: @TITLE@

H0: E <= @BAR@ nat, with E (replace: what is measured, in which unit, over which positions) the mean over query rows
t >= 1 of what `effect` makes of a head's feature-feature scores. Control: the row's own mean, which softmax ignores.
Bar: @BAR@ nat (say why an effect of this size is worth a name).
"""

import pytest

import fra
from fra.claim import Claim, family, parse_head

CLAIM = Claim(
    id="@ID@",
    title=@TITLE_LITERAL@,
    h0="E <= @BAR@ nat",
    bar=@BAR@,
    statistic="@STATISTIC@/1",
    stimuli=("natural",),
    n=120,
)


def effect(scores):
    """One document's number for one head, of its feature-feature scores [q_pos, k_pos], zero above the diagonal.

    Replace this: as it stands, how much more the first token is looked at than a row's keys are on average.
    """
    row_mean = scores.sum(1) / scores.new_ones(len(scores)).cumsum(0)
    return float((scores[:, 0] - row_mean)[1:].mean())


@pytest.fixture(scope="module")
def evidence(target):
    documents = target.documents()[: CLAIM.n]
    samples = {head: [] for head in target.resolvable}
    for document in documents:
        tokens = target.tokens(document.text, 128)
        for name, values in samples.items():
            layer, head = parse_head(name)
            _, sae = target.dictionary_for(layer)
            values.append(effect(fra.resolve(target.model, sae, tokens, layer, head).blocks()["feature", "feature"]))
    return family(CLAIM, samples, sources=[document.source for document in documents], target=target.name)


def test_@LOWER@(head, target, evidence, verdict):
    target.hook_for(parse_head(head)[0])  # CANNOT_RUN where the target has no dictionary of that layer
    verdict(evidence.get(head))
'''

TEST_FILE = '''"""@ID@ says yes where its effect is planted, and no where it is planted that there is none."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fra.claim import family, judge

FILE = Path(__file__).resolve().parent / @RELATIVE@
N_POS = 24


@pytest.fixture(scope="module")
def claim():
    spec = importlib.util.spec_from_file_location("claim_@LOWER@", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planted(strength, seed):
    """Scores of a head as noise, and `strength` nat more at the first key (replace this with the effect you mean)."""
    scores = torch.randn(N_POS, N_POS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores[:, 0] += strength
    return scores.tril()


@pytest.mark.parametrize(("times_the_bar", "outcome"), [(4.0, "SUPPORTED"), (0.0, "REFUTED")])
def test_what_is_planted_is_said(claim, times_the_bar, outcome):
    own = claim.CLAIM
    documents = range(own.n)
    samples = {"L0H0": [claim.effect(planted(times_the_bar * own.bar, seed)) for seed in documents]}
    evidence = family(own, samples, sources=[f"document {n}" for n in documents], target="planted")
    assert judge(own, evidence["L0H0"]).outcome == outcome


def test_what_is_measured_is_what_is_planted(claim):
    none, some = (claim.effect(planted(strength, 0)) for strength in (0.0, 3.0))
    assert some - none == pytest.approx(@EXPECTED@, abs=1e-9)
'''


def new_claim(name: str, title: str, claims: Path, tests: Path, *, bar: float = 0.5) -> tuple[Path, Path]:
    """Write a claim file into `claims` and the test of its measure into `tests`; returns both paths.

    Raises FraError for an id that is none or that a file of the folder declares already, an empty title, a folder of
    tests within that of the claims (every test there is a claim's), and files that are there.
    """
    if not _ID.fullmatch(name):
        raise FraError(f"{name!r} is no claim's id: give a letter and up to 19 letters and digits, as X02.")
    title = " ".join(title.split()).rstrip(".")
    if not title:
        raise FraError("the title is empty: say in a sentence what is claimed.")
    if len(title) > _LONGEST:
        raise FraError(f"the title has {len(title)} characters: say it in {_LONGEST}.")
    if any(character in title for character in '\\\\"'):
        raise FraError("the title stands in a docstring: leave quotation marks and backslashes out of it.")
    if not claims.is_dir():
        raise FraError(f"there is no folder {claims}: run this where claims/ lies, or name it with --claims.")
    inside = claims.resolve()
    if tests.resolve() == inside or inside in tests.resolve().parents:
        raise FraError(
            f"{tests} lies in {claims}, where every test is a claim's own: name another folder with --tests."
        )
    for file in sorted(claims.rglob("test_*.py")):
        if f'id="{name}"' in file.read_text(encoding="utf-8"):
            raise FraError(f"{name} is declared by {file}: take another id.")
    paths = claims / f"test_{name.lower()}.py", tests / f"test_{name.lower()}_planted.py"
    for path in paths:
        if path.exists():
            raise FraError(f"{path} is there already: nothing is overwritten.")
    tests.mkdir(parents=True, exist_ok=True)
    relative = _relative(paths[0].resolve(), tests.resolve())
    filled = {
        "ID": name,
        "LOWER": name.lower(),
        "TITLE": title,
        "TITLE_LITERAL": f'"{title}"',
        "BAR": f"{bar:g}",
        "STATISTIC": re.sub(r"\\W+", "_", title.lower()).strip("_")[:40].rstrip("_") or name.lower(),
        "RELATIVE": " / ".join(f'"{part}"' for part in relative),
        "EXPECTED": "sum(3.0 - 3.0 / (t + 1) for t in range(1, N_POS)) / (N_POS - 1)",
    }
    for path, template in zip(paths, (CLAIM_FILE, TEST_FILE), strict=True):
        text = re.sub(r"@([A-Z_]+)@", lambda found: filled[found[1]], template)
        ast.parse(text)
        write_text(text, path)
    return paths


def _relative(file: Path, folder: Path) -> tuple[str, ...]:
    """The way from a folder to a file, part by part."""
    return Path(os.path.relpath(file, folder)).parts
