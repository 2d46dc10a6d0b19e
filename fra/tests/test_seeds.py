"""Q20 on the hand-built circuit under dictionaries that are one another's permutation, and under unrelated ones;
[[seed]] in target files.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import fra
from fra import stimuli
from fra._channels import measure_arm, measure_arms
from fra._search import Search
from fra._seeds import AcrossSeeds, across, measure, nearest, seeds_evidence, shared
from fra.cih import Screen
from fra.claim import Claim, Outcome, judge
from fra.induction import HeadStatus
from fra.tests import circuit
from fra.tests.models import model_folder
from fra.tests.targets import NORMALIZED, refused, signed_axes, write_target, write_text

CLAIM = Claim(
    id="T20",
    title="t",
    h0="h",
    bar=0.5,
    bars={
        "set of the weakest seed": 0.5,
        "over random matching": 0.0,
        "shared channels over random matching": 0.95,
    },
    statistic="t/1",
    stimuli=("repeated_random",),
    n=64,
)


def permuted(order: torch.Tensor):
    """The circuit's dictionary with its features in another order."""
    sae = circuit.dictionary()
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc[:, order].clone())
        sae.W_dec.copy_(sae.W_dec[order].clone())
    return sae


def rotated(seed: int):
    """A dictionary of random directions: its channels are those of no other."""
    sae = circuit.dictionary()
    basis = torch.linalg.qr(
        torch.randn(circuit.D_MODEL, circuit.D_MODEL, generator=torch.Generator().manual_seed(seed))
    )
    with torch.no_grad():
        sae.W_enc.copy_(basis[0])
        sae.W_dec.copy_(basis[0].T)
    return sae


def screen() -> Screen:
    status = {"L1H0": HeadStatus("L1H0", "TIH", 0.9, 0.9, 0.9, {})}
    return Screen("circuit", "repeated_random", status, {}, {}, str)


def found(dictionaries) -> dict[str, AcrossSeeds]:
    model = circuit.model()
    strengths = 0.8 + 0.4 * torch.arange(circuit.D_VOCAB) / circuit.D_VOCAB
    with torch.no_grad():
        model.blocks[1].attn.W_Q[0, : circuit.D_VOCAB] *= strengths[:, None]
    made = stimuli.repeated_random(90, np.arange(48), circuit.N_CTX, circuit.BOS, ("seeds",))
    discovery, confirmation = stimuli.collate(made[:50]), stimuli.collate(made[50:])
    searches, arms = [], []
    for sae in dictionaries:
        searches.append(Search(discovery, measure_arm(model, sae, discovery.tokens, 1, circuit.HOOK)))
        arms.append(measure_arms(model, sae, confirmation, 1, circuit.HOOK))
    return across(searches, arms, [0], ("seeds",))


def test_a_permuted_dictionary_has_the_same_channels() -> None:
    orders = [torch.randperm(circuit.D_MODEL, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    dictionaries = [permuted(order) for order in orders]
    matched = nearest(dictionaries[0].W_dec.detach(), dictionaries[1].W_dec.detach())
    assert bool((orders[1][matched] == orders[0]).all())
    results = found(dictionaries)
    own = results["L1H0"]
    for (_, to), nats in own.translated.items():
        assert nats == pytest.approx(own.own[to].together, rel=0.05)
    assert own.shared.min() > 0.8
    assert own.shared_random.max() < 0.2
    verdict = judge(CLAIM, seeds_evidence(CLAIM, screen(), results, None)["L1H0"])
    assert verdict.outcome is Outcome.SUPPORTED, verdict.reason


def test_unrelated_dictionaries_do_not_share_channels() -> None:
    results = found([circuit.dictionary(), rotated(1), rotated(2)])
    assert results["L1H0"].shared.max() < 0.3
    verdict = judge(CLAIM, seeds_evidence(CLAIM, screen(), results, None)["L1H0"])
    assert verdict.outcome is not Outcome.SUPPORTED


def test_shared_counts_matched_pairs() -> None:
    pairs = np.array([[0, 1], [2, 3], [1, 1], [3, 0]])
    matching = np.array([5, 4, 7, 6])
    assert shared(pairs, np.array([[5, 4], [7, 5], [6, 5]]), matching, 10) == 0.5


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    for n in range(3):
        signed_axes(folder / f"sae{n}", NORMALIZED, k=12 + n)
    seeds = "\n".join(f'[[seed]]\nhook = "{NORMALIZED}"\npath = "sae{n}"' for n in range(3))
    return write_target(
        folder, model_folder("gpt2"), {NORMALIZED: folder / "sae0"}, write_text(folder / "text"), heads=seeds
    )


def test_seeds_of_a_target_file(seeded: Path) -> None:
    target = fra.load_target(seeded)
    assert target.seeds == {NORMALIZED: 3}
    assert [sae.cfg.k for sae in target.seed_dictionaries(NORMALIZED)] == [12, 13, 14]
    assert target.seed_dictionaries("blocks.0.ln1.hook_normalized") == []
    assert list(target.dictionaries) == [NORMALIZED]
    before = target.fingerprint()
    text = seeded.read_text()
    other = seeded.with_name("other.toml")
    other.write_text(text.replace('path = "sae2"', 'path = "sae1"'))
    assert fra.load_target(other).fingerprint() != before


def test_a_seed_beyond_the_layers_or_without_files_is_refused(seeded: Path) -> None:
    other = seeded.with_name("beyond.toml")
    far = '[[seed]]\nhook = "blocks.7.ln1.hook_normalized"'
    other.write_text(seeded.read_text().replace(f'[[seed]]\nhook = "{NORMALIZED}"', far))
    refused(other, "blocks.7", "beyond")
    missing = seeded.with_name("missing.toml")
    missing.write_text(seeded.read_text().replace('path = "sae2"', 'path = "nowhere"'))
    refused(missing, "nowhere")


def test_fewer_than_three_seeds_cannot_run(seeded: Path) -> None:
    few = seeded.with_name("few.toml")
    text = seeded.read_text()
    few.write_text(text[: text.rindex("[[seed]]")] + text[text.index("[text]") :])
    target = fra.load_target(few)
    assert target.seeds == {NORMALIZED: 2}
    results, cannot = measure(target, screen())
    assert results == {}
    assert cannot is not None
    assert "3 are needed" in cannot
    evidence = seeds_evidence(CLAIM, dataclasses.replace(screen()), results, cannot)
    assert judge(CLAIM, evidence["L1H0"]).outcome is Outcome.CANNOT_RUN
