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
from fra.claim import Condition, Outcome, judge
from fra.core.coded import measure_arm
from fra.induction.channels import measure_arms
from fra.induction.cih import Screen
from fra.induction.search import Search
from fra.induction.status import HeadStatus
from fra.measures.channels import q20_seeds
from fra.measures.channels.q20_seeds import AcrossSeeds, Found, across, measure, nearest, seeds_evidence, shared
from fra.stimuli import repeated
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.models import model_folder
from fra.tests.tiny_targets import NORMALIZED, refused, signed_axes, write_target, write_text
from fra.verdicts.conditions import weakest
from fra.verdicts.decide import means_of

CLAIM = claim("Q20")


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


def found(dictionaries, monkeypatch: pytest.MonkeyPatch) -> dict[str, AcrossSeeds]:
    monkeypatch.setattr(q20_seeds, "RANDOM_EFFECTS", 24)  # for time: the least rank p is 0.04
    model = circuit.model()
    strengths = 0.8 + 0.4 * torch.arange(circuit.D_VOCAB) / circuit.D_VOCAB
    with torch.no_grad():
        model.blocks[1].attn.W_Q[0, : circuit.D_VOCAB] *= strengths[:, None]
    made = repeated.repeated_random(90, np.arange(48), circuit.N_CTX, circuit.BOS, ("seeds",))
    discovery, confirmation = repeated.collate(made[:50]), repeated.collate(made[50:])
    searches, arms = [], []
    for sae in dictionaries:
        searches.append(Search(discovery, measure_arm(model, sae, discovery.tokens, 1, circuit.HOOK)))
        arms.append(measure_arms(model, sae, confirmation, 1, circuit.HOOK))
    return across(searches, arms, [0], ("seeds",))


def test_a_permuted_dictionary_has_the_same_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [torch.randperm(circuit.D_MODEL, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    dictionaries = [permuted(order) for order in orders]
    matched = nearest(dictionaries[0].W_dec.detach(), dictionaries[1].W_dec.detach())
    assert bool((orders[1][matched] == orders[0]).all())
    results = found(dictionaries, monkeypatch)
    own = results["L1H0"]
    for (_, to), nats in own.translated.items():
        assert nats == pytest.approx(own.own[to].together, rel=0.05)
    assert own.shared.min() > 0.8
    assert own.shared_random.max() < 0.2
    assert [len(random) for random in own.random.values()] == [4] * 6
    assert max(float(random.sum(1).max()) for random in own.random.values()) < 0.5 * own.own[0].together.sum()
    verdict = judge(CLAIM, seeds_evidence(CLAIM, screen(), results, None)["L1H0"])
    assert verdict.outcome is Outcome.SUPPORTED, verdict.reason


def test_unrelated_dictionaries_do_not_share_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    results = found([circuit.dictionary(), rotated(1), rotated(2)], monkeypatch)
    assert results["L1H0"].shared.max() < 0.3
    verdict = judge(CLAIM, seeds_evidence(CLAIM, screen(), results, None)["L1H0"])
    assert verdict.outcome is not Outcome.SUPPORTED


def numbers(own: list[float], kept: float, random: float) -> dict[str, AcrossSeeds]:
    """Three dictionaries whose sets are worth so many nats a row, with noise over 30 documents of ten rows."""
    rng = np.random.default_rng(7)

    def nats(mean: float) -> np.ndarray:
        return 10 * (mean + 0.2 * rng.standard_normal(30))

    both = [(a, b) for a in range(3) for b in range(3) if a != b]
    return {
        "L1H0": AcrossSeeds(
            tuple(Found(np.zeros((1, 2), dtype=int), nats(mean)) for mean in own),
            {pair: nats(kept) for pair in both},
            {pair: np.stack([nats(random + 0.02 * rng.standard_normal()) for _ in range(34)]) for pair in both},
            np.full(6, 0.9),
            np.full(999, 0.01),
            np.full(30, 10.0),
            tuple(str(k) for k in range(30)),
        )
    }


def conditions(found: dict[str, AcrossSeeds]) -> dict[str, Condition]:
    (own,) = seeds_evidence(CLAIM, screen(), found, None)["L1H0"].candidates.values()
    return {c.name: c for c in own}


def test_every_seed_is_tested_and_the_worst_decides() -> None:
    fine, poor, near = (
        conditions(numbers([2.0, second, 1.5], 1.5, 0.1))["set of every seed"] for second in (1.2, 0.2, 0.5)
    )
    assert fine.holds(0.05) and not fine.fails(0.05)
    assert poor.fails(0.05) and poor.effect == pytest.approx(0.2, abs=0.1)
    assert not near.holds(0.05) and not near.fails(0.05)
    # three seeds at the bar: the least of them lies below it by selection, and is tested as one of three
    (own,) = numbers([0.5, 0.5, 0.5], 1.5, 0.1).values()
    raw = [
        means_of(CLAIM, "circuit", "L1H0", f"set of seed {k}", f.together, own.rows, own.sources).p_below(0.5, False)[0]
        for k, f in enumerate(own.own, 1)
    ]
    found = conditions({"L1H0": own})["set of every seed"]
    assert found.p_refute == pytest.approx(min(1.0, min(raw) * (2 + 3)))


def test_conditions_said_as_one_hold_where_all_do_and_fail_where_one_does() -> None:
    one = Condition("a", 0.9, 0.6, 1.2, 0.5, p=0.01, p_refute=1.0)
    other = Condition("b", 0.3, 0.1, 0.4, 0.5, p=0.9, p_refute=0.02)
    unknown = Condition("c", float("nan"), -np.inf, np.inf, 0.5, p=1.0, p_refute=1.0)
    assert weakest([one, one]).holds(0.05)
    assert weakest([one, other]).fails(0.05) and weakest([other, one]).low == 0.1
    for both in ([one, unknown], [unknown, one]):
        assert not weakest(both).finite


def test_random_matchings_are_a_distribution() -> None:
    above, within = (conditions(numbers([2.0, 2.0, 2.0], 1.5, random)) for random in (1.0, 1.49))
    assert above["rank among random matchings"].p == pytest.approx(1 / (1 + 204))
    assert above["rank among random matchings"].holds(0.05) and above["over random matching"].holds(0.05)
    assert above["over random matching"].effect == pytest.approx(0.5, abs=0.1)
    assert not within["rank among random matchings"].holds(0.05)


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
