"""Q20 on the hand-built circuit under dictionaries that are one another's permutation, and under unrelated ones;
[[seed]] in target files.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fra
from fra.claim import Condition, Outcome, judge
from fra.core.coded import measure_arm
from fra.induction.cih import Screen
from fra.induction.status import HeadStatus
from fra.measures.channels import q20_seeds
from fra.measures.channels.q20_seeds import (
    AcrossSeeds,
    Found,
    across,
    measure,
    nearest,
    one_document,
    seeds_evidence,
    shared,
)
from fra.measures.channels.transfer_designs import ChannelSet
from fra.search.channels import HeadOnArms, measure_arms
from fra.search.search import Search
from fra.statistics.unseen import sources_for
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


def strong_circuit() -> Any:
    """The circuit with a strength of its own for every token."""
    model = circuit.model()
    strengths = 0.8 + 0.4 * torch.arange(circuit.D_VOCAB) / circuit.D_VOCAB
    with torch.no_grad():
        model.blocks[1].attn.W_Q[0, : circuit.D_VOCAB] *= strengths[:, None]
    return model


MADE = repeated.repeated_random(90, np.arange(48), circuit.N_CTX, circuit.BOS, ("seeds",))


def found(dictionaries, heads=(0,), confirmation=tuple(MADE[50:])) -> dict[str, AcrossSeeds]:
    model, discovery, batch = strong_circuit(), repeated.collate(MADE[:50]), repeated.collate(confirmation)
    searches, arms = [], []
    for sae in dictionaries:
        searches.append(Search(discovery, measure_arm(model, sae, discovery.tokens, 1, circuit.HOOK)))
        arms.append(measure_arms(model, sae, batch, 1, circuit.HOOK))
    return across(searches, arms, list(heads), ChannelSet(), ("seeds",))


def permutations_of(n: int) -> list[torch.Tensor]:
    return [torch.randperm(circuit.D_MODEL, generator=torch.Generator().manual_seed(k)) for k in range(n)]


def test_a_permuted_dictionary_has_the_same_channels() -> None:
    orders = permutations_of(3)
    dictionaries = [permuted(order) for order in orders]
    matched = nearest(dictionaries[0].W_dec.detach(), dictionaries[1].W_dec.detach())
    assert bool((orders[1][matched] == orders[0]).all())
    results = found(dictionaries)
    own = results["L1H0"]
    for (_, to), nats in own.translated.items():
        assert nats == pytest.approx(own.own[to].together, rel=0.05)
    assert min(own.shared.values()) > 0.8
    nats, counts = zip(*(own.draw(number) for number in range(20)), strict=True)
    assert max(counts) < 0.2
    assert max(nats) < 0.5 * own.own[0].together.sum() / own.rows.sum()
    assert max(float(v.sum()) for v in own.random.values()) < 0.5 * own.own[0].together.sum()
    evidence = seeds_evidence(CLAIM, screen(), results, None)["L1H0"]
    verdict = judge(CLAIM, evidence)
    assert verdict.outcome is Outcome.SUPPORTED, verdict.reason
    drawn = evidence.detail["random matchings, the same for all documents"]["number"]
    assert drawn == evidence.detail["draws of the nulls"] and drawn >= 20


def test_a_random_matching_is_drawn_for_each_document_and_each_draw_of_the_null() -> None:
    """Head 1, in which every set of features does something; one document, ten times over under ten names."""
    again = [dataclasses.replace(MADE[60], source=f"copy {k}") for k in range(10)]
    own = found([permuted(order) for order in permutations_of(3)], [1], again)["L1H1"]
    for pair in own.random:
        assert np.ptp(own.translated[pair]) < 1e-6  # one and the same for all
        assert len(np.unique(own.random[pair].round(6))) == 10
    draws = [own.draw(number) for number in (0, 1, 2, 1)]
    assert draws[1] == draws[3] and len({nats for nats, _ in draws}) == 3


def test_one_document_is_what_it_is_among_the_others() -> None:
    model, sae = strong_circuit(), circuit.dictionary()
    arms = measure_arms(model, sae, repeated.collate(MADE[:6]), 1, circuit.HOOK)
    pairs = torch.tensor([[v, circuit.PREVIOUS + v] for v in range(0, 48, 2)])
    for head in (0, 1):
        together = HeadOnArms(arms, head).removed_together(pairs)
        for d in range(6):
            alone = HeadOnArms(one_document(arms, d), head).removed_together(pairs)
            for name in ("nats", "attention", "contrast", "rows", "covered"):
                assert getattr(alone, name)[0] == pytest.approx(getattr(together, name)[d], rel=1e-4, abs=1e-5), name


def test_what_is_found_is_the_same_whatever_it_is_measured_on() -> None:
    """Sets, matchings and counts, bit for bit, with the measured documents exchanged for fewer others."""
    dictionaries = [circuit.dictionary(), *(permuted(order) for order in permutations_of(2))]
    (one,), (other,) = (found(dictionaries, confirmation=MADE[a:b]).values() for a, b in ((50, 90), (52, 56)))
    assert one.sources != other.sources
    for here, there in zip(one.own, other.own, strict=True):
        assert np.array_equal(here.pairs, there.pairs)
    assert one.shared == other.shared
    for number in range(3):
        assert one.draw(number)[1] == other.draw(number)[1]
    # document by document the random matchings are the same, too, where documents are
    (few,) = found(dictionaries, confirmation=MADE[50:54]).values()
    for pair, nats in few.random.items():
        assert nats == pytest.approx(one.random[pair][:4], rel=1e-4, abs=1e-5)


def test_unrelated_dictionaries_do_not_share_channels() -> None:
    results = found([circuit.dictionary(), rotated(1), rotated(2)])
    assert max(results["L1H0"].shared.values()) < 0.3
    verdict = judge(CLAIM, seeds_evidence(CLAIM, screen(), results, None)["L1H0"])
    assert verdict.outcome is not Outcome.SUPPORTED


BOTH = [(a, b) for a in range(3) for b in range(3) if a != b]


def numbers(own: list[float], kept: float, random: float) -> dict[str, AcrossSeeds]:
    """Three dictionaries whose sets are worth so many nats a row, with noise over documents of ten rows: as many as
    any of the five samples that may refute needs to do so.
    """
    rng, n = np.random.default_rng(7), sources_for(CLAIM.level, 3 + 2)

    def nats(mean: float) -> np.ndarray:
        return 10 * (mean + 0.2 * rng.standard_normal(n))

    return {
        "L1H0": AcrossSeeds(
            tuple(Found(np.zeros((1, 2), dtype=int), nats(mean)) for mean in own),
            {pair: nats(kept) for pair in BOTH},
            dict.fromkeys(BOTH, 0.9),
            {pair: nats(random) for pair in BOTH},
            lambda number: (random + 0.02 * np.sin(number), 0.01),
            np.full(n, 10.0),
            tuple(str(k) for k in range(n)),
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
    n = 79  # RULES.draws_a_step over the level, for one head
    assert above["rank among random matchings"].p == pytest.approx(1 / (1 + n))
    assert above["rank among random matchings"].holds(0.05) and above["over random matching"].holds(0.05)
    assert above["over random matching"].effect == pytest.approx(0.5, abs=0.1)
    assert not within["rank among random matchings"].holds(0.05)
    own = numbers([2.0, 2.0, 2.0], 1.5, 1.0)
    many = {"L1H0": dataclasses.replace(own["L1H0"], draw=lambda _: (1.0, 0.95))}
    assert not conditions(many)["shared channels over random matching"].holds(0.05)


def test_effects_are_ratios_of_means_over_rows() -> None:
    """A few long documents with much to say among short ones with little."""
    rng = np.random.default_rng(2)
    rows = np.where(np.arange(32) % 4 == 0, 60.0, 10.0)
    size = rows * np.where(rows > 30, 3.0, 0.8)

    def nats(much: float) -> np.ndarray:
        return size ** (1 + much / 10) * rng.uniform(0.8, 1.2, 32)

    own = AcrossSeeds(
        tuple(Found(np.zeros((1, 2), dtype=int), nats(k)) for k in (0, 1, 2)),
        {pair: nats(-1) for pair in BOTH},
        dict.fromkeys(BOTH, 0.9),
        {pair: nats(-5) for pair in BOTH},
        lambda _: (0.0, 0.0),
        rows,
        tuple(str(k) for k in range(32)),
    )
    found = conditions({"L1H0": own})
    translated = sum(float(v[d]) for v in own.translated.values() for d in range(32)) / 6
    original = sum(float(v.together[d]) for v in own.own for d in range(32)) / 3  # each is the target twice in six
    random = sum(float(v[d]) for v in own.random.values() for d in range(32)) / 6
    assert found["share kept"].effect == pytest.approx(translated / original)
    assert found["over random matching"].effect == pytest.approx((translated - random) / rows.sum())
    least = min(float(v.together.sum()) for v in own.own)
    assert found["set of every seed"].effect == pytest.approx(least / rows.sum())


def test_a_draw_of_the_null_is_the_same_mean_as_what_it_is_held_against(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over ordered pairs of dictionaries, and a row: documents of unequal length tell it from a mean of ratios."""
    results = found([permuted(order) for order in permutations_of(3)])["L1H0"]
    given = np.linspace(1.0, 30.0, len(results.rows)) ** 2
    calls: list[int] = []

    def nats(on: Any, pairs: np.ndarray) -> np.ndarray:
        calls.append(len(calls))
        return given * len(calls)

    monkeypatch.setattr(q20_seeds, "nats_of", nats)
    value, _ = results.draw(0)
    assert len(calls) == 6
    assert value == pytest.approx(3.5 * sum(given) / sum(results.rows))
    assert len(set(results.rows)) > 3


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
    results, cannot = measure(target, screen(), CLAIM)
    assert results == {}
    assert cannot is not None
    assert "3 are needed" in cannot
    evidence = seeds_evidence(CLAIM, dataclasses.replace(screen()), results, cannot)
    assert judge(CLAIM, evidence["L1H0"]).outcome is Outcome.CANNOT_RUN
