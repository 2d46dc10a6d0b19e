"""The whole screen on a hand-built induction circuit: it must say yes where a channel was written down, and nowhere
else.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fra.claim import Outcome, judge
from fra.core.coded import measure_arm
from fra.induction import cih
from fra.induction.channels import measure_arms
from fra.induction.status import head_status
from fra.measures.channels import q04_q05_sets as evidence_for
from fra.measures.channels.details import best_channel
from fra.report.drawings import numbers
from fra.report.pictures import BEST
from fra.stimuli import repeated
from fra.tests import circuit
from fra.tests.claims import claim

SIZES = {"status": 24, "discovery": 60, "confirmation": 90, "sets": 30}
CIH_SET, CIH_CHANNEL = claim("Q04", n=100), claim("Q05", n=100)


def screened(model, sae=None, off_by: int = 0) -> cih.Screen:
    """The screen of layer 1 of a circuit on repeated random documents; `off_by` moves the stripe, as a bug would."""
    pool = np.arange(48)
    made = repeated.repeated_random(sum(SIZES.values()), pool, circuit.N_CTX, circuit.BOS, ("circuit",))
    batches, start = {}, 0
    for name, n in SIZES.items():
        batch = repeated.Batch.of(made[start : start + n])
        batches[name] = dataclasses.replace(batch, row_key=batch.row_key + off_by)
        start += n
    status = head_status(model, batches["status"], target="circuit", stimulus="repeated_random")
    sae = circuit.dictionary() if sae is None else sae
    discovery = measure_arm(model, sae, batches["discovery"].tokens, 1, circuit.HOOK)
    arms = [measure_arms(model, sae, batches[name], 1, circuit.HOOK) for name in ("confirmation", "sets")]
    heads = cih.screen_layer(batches["discovery"], discovery, *arms, [0, 1], seed_parts=("circuit",), tih=[0])
    return cih.Screen("circuit", "repeated_random", status, heads, SIZES, str)


def expected_effect() -> float:
    """What the removal of everything planted does, by hand: the repeated arm loses STRENGTH at the induction key,
    the control arm loses it at the key after the token's other place, one of the t keys that compete with the
    induction key.
    """
    pool = repeated.repeated_random(sum(SIZES.values()), np.arange(48), circuit.N_CTX, circuit.BOS, ("circuit",))
    rows = [t for doc in pool[-SIZES["sets"] :] for t in range(doc.period + 1, 2 * doc.period + 1)]
    removed = (
        circuit.STRENGTH * (1 - 0.01) ** 2
    )  # the dictionary's threshold leaves a hundredth of each side to the error term
    left = np.exp(circuit.STRENGTH - removed)
    return float(np.mean([removed + np.log((t - 1 + np.exp(circuit.STRENGTH)) / (t - 1 + left)) for t in rows]))


@pytest.fixture(scope="module")
def found() -> cih.Screen:
    return screened(circuit.model())


def test_token_level_status_is_what_was_built(found: cih.Screen) -> None:
    assert found.status["L1H0"].status == "TIH"
    assert found.status["L1H0"].contrast > 0.9
    assert {found.status[h].status for h in ("L0H0", "L0H1", "L1H1")} == {"not a TIH"}
    assert found.status["L0H0"].stripes["previous"] > 0.99


def test_planted_set_is_supported(found: cih.Screen) -> None:
    evidence = evidence_for.set_evidence(CIH_SET, found)
    assert [head for head, own in evidence.items() if own.cannot is None and own.outside is None] == ["L1H0"]
    verdict = judge(CIH_SET, evidence["L1H0"])
    assert verdict.outcome is Outcome.SUPPORTED, verdict.reason
    assert abs(verdict.headline.effect - expected_effect()) < 0.02
    assert abs(evidence["L1H0"].detail["feature-feature share of the stripe contrast"] - 1) < 0.05


def test_exactly_the_planted_channels_are_expressed(found: cih.Screen) -> None:
    evidence = evidence_for.channel_evidence(CIH_CHANNEL, found, family="TIH")["L1H0"]
    expressed = {name for name, conditions in evidence.candidates.items() if all(c.holds(0.05) for c in conditions)}
    measured = {f"{v} -> {circuit.PREVIOUS + v}" for v in range(48)}
    assert expressed, [str(c) for c in next(iter(evidence.candidates.values()))]
    assert expressed <= measured
    assert expressed == measured & set(evidence.candidates), sorted(measured & set(evidence.candidates) - expressed)
    assert len(expressed) >= 30
    effects = [conditions[0].effect for name, conditions in evidence.candidates.items() if name in measured]
    assert np.abs(np.array(effects) - expected_effect()).max() < 0.2
    assert judge(CIH_CHANNEL, evidence).outcome is Outcome.SUPPORTED


def test_the_example_shows_the_channel_where_it_was_planted(found: cih.Screen) -> None:
    """STRENGTH nats from each place of the token to each key after it, nothing elsewhere."""
    shown = found.heads["L1H0"].example
    assert shown is not None
    token, previous = shown.pair
    assert previous == circuit.PREVIOUS + token
    tokens = shown.tokens
    expected = np.zeros((len(tokens), len(tokens)))
    for t in np.flatnonzero(tokens == token):
        for s in range(1, t + 1):
            expected[t, s] = circuit.STRENGTH * (1 - 0.01) ** 2 * (tokens[s - 1] == token)
    assert expected.any()
    assert np.abs(shown.contribution - expected).max() < 0.05
    assert np.abs(shown.pattern.sum(1) - 1).max() < 1e-5


def test_rows_show_the_same_example_with_links_where_the_dictionary_has_an_id(found: cih.Screen) -> None:
    page = "https://www.neuronpedia.org/circuit/1-res"
    linked = dataclasses.replace(found, pages={1: page})
    shown = found.heads["L1H0"].example
    for evidence in (
        evidence_for.set_evidence(CIH_SET, linked)["L1H0"],
        evidence_for.channel_evidence(CIH_CHANNEL, linked, family="TIH")["L1H0"],
    ):
        picture = evidence.detail[BEST]
        assert picture["pages"] == [f"{page}/{feature}" for feature in shown.pair]
        assert picture["tokens"] == [str(token) for token in shown.tokens]
        assert picture["query tokens"][0].startswith(f"'{shown.pair[0]}' x"), "the feature is live on its token alone"
        rows = picture["maps"][f"channel {shown.pair[0]} -> {shown.pair[1]} (nats)"]
        t, s = np.unravel_index(shown.contribution.argmax(), shown.contribution.shape)
        assert numbers(rows[t])[s] == pytest.approx(circuit.STRENGTH * 0.99**2, rel=5e-3)
        assert evidence.detail["best channels"][0]["pages"][0].startswith(f"{page}/")
    assert "pages" not in evidence_for.set_evidence(CIH_SET, found)["L1H0"].detail[BEST]
    assert best_channel(dataclasses.replace(found, heads={}), "L1H0") == {}


def test_a_head_without_weights_is_not_supported(found: cih.Screen) -> None:
    evidence = evidence_for.channel_evidence(CIH_CHANNEL, found)["L1H1"]
    assert judge(CIH_CHANNEL, evidence).outcome is not Outcome.SUPPORTED


def test_a_stripe_off_by_one_finds_no_induction_head() -> None:
    """Key t - P instead of t - P + 1: the bug that takes duplicate-token heads for induction heads."""
    wrong = screened(circuit.model(), off_by=-1)
    assert wrong.status["L1H0"].status == "not a TIH"
    assert all(own.outside for own in evidence_for.set_evidence(CIH_SET, wrong).values())


def test_control_documents_have_no_induction_head() -> None:
    """Control against control: nothing is repeated, and the circuit's own induction head does not attend to the
    stripe.
    """
    made = repeated.repeated_random(40, np.arange(48), circuit.N_CTX, circuit.BOS, ("control",))
    batch = repeated.Batch.of([dataclasses.replace(doc, tokens=doc.control) for doc in made])
    status = head_status(circuit.model(), batch, target="circuit", stimulus="repeated_random")
    assert status["L1H0"].status != "TIH"
    assert status["L1H0"].stripes["induction"] < 0.05


def test_random_atoms_are_not_supported(found: cih.Screen) -> None:
    """The circuit's own set with random atoms for features does not reach the bar."""
    screen = found.heads["L1H0"]
    assert len(screen.atom_effects) == 2
    for effects in screen.atom_effects:
        assert effects.nats.sum() / max(effects.rows.sum(), 1) < 0.5
    atoms = dataclasses.replace(screen, set_effects={**screen.set_effects, 50: screen.atom_effects[0]})
    swapped = dataclasses.replace(found, heads={**found.heads, "L1H0": atoms})
    own = evidence_for.set_evidence(CIH_SET, swapped)["L1H0"]
    assert judge(CIH_SET, own).outcome is not Outcome.SUPPORTED


def test_scrambled_circuit_is_not_supported(found: cih.Screen) -> None:
    """Its key map turned by a random rotation, the circuit is no induction head, and none of its channels passes."""
    model = circuit.model()
    rotation, _ = torch.linalg.qr(
        torch.randn(circuit.D_VOCAB, circuit.D_VOCAB, generator=torch.Generator().manual_seed(0))
    )
    with torch.no_grad():
        model.blocks[1].attn.W_K[0] @= rotation
    broken = screened(model)
    assert broken.status["L1H0"].status != "TIH"
    if broken.status["L1H0"].status == "not a TIH":
        evidence = evidence_for.channel_evidence(CIH_CHANNEL, broken)["L1H0"]
        assert judge(CIH_CHANNEL, evidence).outcome is not Outcome.SUPPORTED


def test_a_dictionary_without_the_planted_features_is_not_supported() -> None:
    """With a dictionary of the token block alone, the error term carries the head: the gate says so."""
    sae = circuit.dictionary()
    with torch.no_grad():
        sae.W_enc[:, circuit.PREVIOUS :] = 0.0
    evidence = evidence_for.set_evidence(CIH_SET, screened(circuit.model(), sae))["L1H0"]
    verdict = judge(CIH_SET, evidence)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "feature-feature block carries" in verdict.reason
