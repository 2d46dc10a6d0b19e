"""The whole screen on a hand-built induction circuit: it must say yes where a channel was written down, and nowhere
else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from fra.claim import Evidence, Outcome, judge
from fra.induction import cih
from fra.induction.status import head_status
from fra.measures.channels import q04_q05_sets as evidence_for
from fra.measures.channels.details import best_channel
from fra.plot.drawings import numbers
from fra.report.pictures import BEST
from fra.search.channels import Effects, HeadOnArms, few_arms, measure_arms
from fra.search.designs import Plantings
from fra.search.nulls import row_spread
from fra.search.power import ChannelBars, count_found
from fra.search.screen import LayerScreen
from fra.statistics.rules import RULES
from fra.stimuli import repeated
from fra.tests import circuit
from fra.tests.claims import claim
from fra.verdicts import decide
from fra.verdicts.decide import Planted, means_of

Sizes = Mapping[str, int]
SIZES: Sizes = {"status": 64, "discovery": 60, "confirmation": 90, "sets": 60}
"""Enough for four heads' status and for a set; a channel is live in about three documents of eight, and with so few
none of fifty can be told from zero.
"""
MANY: Sizes = {**SIZES, "confirmation": 300}
"""Enough for channels, too."""
CIH_SET, CIH_CHANNEL = claim("Q04"), claim("Q05", n=MANY["confirmation"])


def layer_one(
    model, sae=None, off_by: int = 0, measured: str = "circuit", sizes: Sizes = SIZES
) -> tuple[LayerScreen, repeated.Batch]:
    """Layer 1 of a circuit on repeated random documents, and the status documents; `off_by` moves the stripe, as a bug
    would. `measured`: the seed of the documents that are measured.
    """
    batches, start = {}, 0
    for name, n in sizes.items():
        seed = measured if name in ("confirmation", "sets") else "circuit"
        made = repeated.repeated_random(sum(sizes.values()), np.arange(48), circuit.N_CTX, circuit.BOS, (seed,))
        batch = repeated.Batch.of(made[start : start + n])
        batches[name] = dataclasses.replace(batch, row_key=batch.row_key + off_by)
        start += n
    sae = circuit.dictionary() if sae is None else sae
    arms = {
        name: measure_arms(model, sae, batches[name], 1, circuit.HOOK) for name in ("discovery", "confirmation", "sets")
    }
    chosen_on = arms.pop("discovery")
    layer = LayerScreen(
        batches["discovery"],
        chosen_on.repeated,
        *arms.values(),
        control=chosen_on.control,
        seed_parts=("circuit",),
        tih=[0],
    )
    return layer, batches["status"]


def screened(model, sae=None, off_by: int = 0, sizes: Sizes = SIZES) -> cih.Screen:
    """The screen of layer 1 of a circuit."""
    layer, batch = layer_one(model, sae, off_by, sizes=sizes)
    status = head_status(model, batch, target="circuit", stimulus="repeated_random")
    heads = cih.screen_layer(layer, [0, 1])
    return cih.Screen("circuit", "repeated_random", status, heads, sizes, str, layers=lambda _: layer)


def expected_effect() -> float:
    """What the removal of everything planted does, by hand: the repeated arm loses STRENGTH at the induction key,
    the control arm loses it at the key after the token's other place, one of the t keys that compete with the
    induction key.
    """
    pool = repeated.repeated_random(sum(MANY.values()), np.arange(48), circuit.N_CTX, circuit.BOS, ("circuit",))
    rows = [t for doc in pool[-MANY["sets"] :] for t in range(doc.period + 1, 2 * doc.period + 1)]
    removed = (
        circuit.STRENGTH * (1 - 0.01) ** 2
    )  # the dictionary's threshold leaves a hundredth of each side to the error term
    left = np.exp(circuit.STRENGTH - removed)
    return float(np.mean([removed + np.log((t - 1 + np.exp(circuit.STRENGTH)) / (t - 1 + left)) for t in rows]))


@pytest.fixture(scope="module")
def found() -> cih.Screen:
    return screened(circuit.model(), sizes=MANY)


PAGE = "https://www.neuronpedia.org/circuit/1-res"


@pytest.fixture(scope="module")
def linked(found: cih.Screen) -> tuple[dict[str, Evidence], dict[str, Evidence]]:
    """What is measured of sets and of channels, with links."""
    own = dataclasses.replace(found, pages={1: PAGE})
    return evidence_for.set_evidence(CIH_SET, own), evidence_for.channel_evidence(CIH_CHANNEL, own, family="TIH")


def test_token_level_status_is_what_was_built(found: cih.Screen) -> None:
    assert found.status["L1H0"].status == "TIH"
    assert found.status["L1H0"].contrast > 0.9
    assert {found.status[h].status for h in ("L0H0", "L0H1", "L1H1")} == {"not a TIH"}
    assert found.status["L0H0"].stripes["previous"] > 0.99


def test_planted_set_is_supported(linked) -> None:
    evidence, _ = linked
    assert [head for head, own in evidence.items() if own.cannot is None and own.outside is None] == ["L1H0"]
    verdict = judge(CIH_SET, evidence["L1H0"])
    assert verdict.outcome is Outcome.SUPPORTED, verdict.reason
    assert abs(verdict.headline.effect - expected_effect()) < 0.02
    assert abs(evidence["L1H0"].detail["feature-feature share of the stripe contrast"] - 1) < 0.05


def test_exactly_the_planted_channels_are_expressed(linked) -> None:
    evidence = linked[1]["L1H0"]
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


def test_rows_show_the_same_example_with_links_where_the_dictionary_has_an_id(found: cih.Screen, linked) -> None:
    shown = found.heads["L1H0"].example
    for evidence in (own["L1H0"] for own in linked):
        picture = evidence.detail[BEST]
        assert picture["pages"] == [f"{PAGE}/{feature}" for feature in shown.pair]
        assert picture["tokens"] == [str(token) for token in shown.tokens]
        assert picture["query tokens"][0].startswith(f"'{shown.pair[0]}' x"), "the feature is live on its token alone"
        rows = picture["maps"][f"channel {shown.pair[0]} -> {shown.pair[1]} (nats)"]
        t, s = np.unravel_index(shown.contribution.argmax(), shown.contribution.shape)
        assert numbers(rows[t])[s] == pytest.approx(circuit.STRENGTH * 0.99**2, rel=5e-3)
        assert evidence.detail["best channels"][0]["pages"][0].startswith(f"{PAGE}/")
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
    n = SIZES["status"]
    made = repeated.repeated_random(n, np.arange(48), circuit.N_CTX, circuit.BOS, ("control",))
    batch = repeated.Batch.of([dataclasses.replace(doc, tokens=doc.control) for doc in made])
    status = head_status(circuit.model(), batch, target="circuit", stimulus="repeated_random")
    assert status["L1H0"].status != "TIH"
    assert status["L1H0"].stripes["induction"] < 0.05


def test_random_atoms_are_not_supported(found: cih.Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """No dictionary of random atoms finds a set in the circuit, and where one did as well as the own features, the
    claim would not be SUPPORTED.
    """
    layer = found.layer_of("L1H0")
    own, atoms = layer.over_atoms[0]
    assert len(atoms) == 20
    assert len(set(atoms)) == 20
    assert max(atoms) < 0.5 < 5 < own
    monkeypatch.setitem(layer.over_atoms, 0, (own, [*atoms[:-1], own]))
    verdict = judge(CIH_SET, evidence_for.set_evidence(CIH_SET, found)["L1H0"])
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.decided.name == "over random atoms"


# ---- nulls of a head are that head's own, and each of them counts


def test_a_head_that_its_scrambles_reach_is_not_supported(found: cih.Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control must be asked: two scrambles in three that have the head's own effect are enough to deny it."""
    layer = found.layer_of("L1H0")
    own, real = layer.own_set(0), layer.scrambled_set
    assert own > 10 * max(real(0, k) for k in range(5))
    monkeypatch.setattr(layer, "scrambled_set", lambda head, k: own if k % 3 else real(head, k))
    evidence = evidence_for.set_evidence(CIH_SET, found)["L1H0"]
    assert judge(CIH_SET, evidence).outcome is Outcome.INCONCLUSIVE
    assert evidence.detail["draws of the nulls"] < 12, "what is settled is drawn for no longer"
    best = layer.scrambled_best
    monkeypatch.setattr(layer, "scrambled_best", lambda head, k: 100.0 if k % 3 else best(head, k))
    channels = evidence_for.channel_evidence(CIH_CHANNEL, found, family="TIH")["L1H0"]
    assert judge(CIH_CHANNEL, channels).outcome is not Outcome.SUPPORTED


def test_a_scramble_has_the_heads_spread_wherever_it_is_measured(found: cih.Screen) -> None:
    layer = found.layer_of("L1H0")
    for head in (0, 1):
        own = row_spread(layer.confirmation.repeated.frozen, head)
        for which in ("channels", "sets"):
            on, pairs = layer.scrambled(head, 3, which)
            assert len(pairs) > 30
            turned = on.sides[0].frozen
            same_documents = layer.confirmation.repeated.frozen.x
            again = dataclasses.replace(layer.confirmation.repeated.frozen, W_k=turned.W_k, b_k=turned.b_k)
            assert again.x is same_documents
            assert row_spread(again, head) == pytest.approx(own, rel=1e-4)
            plain = HeadOnArms(layer.few_confirmation if which == "channels" else layer.sets, head)
            assert float((on.row_scores[0] - plain.row_scores[0]).nan_to_num(0, 0, 0).abs().max()) > 0.1


def test_draws_of_a_head_depend_on_that_head_and_their_number_alone(found: cih.Screen) -> None:
    """Neither on which were drawn before, nor on what the layer's other heads are."""
    layer = found.layer_of("L1H0")
    first = [(layer.scrambled_set(0, k), layer.scrambled_best(0, k)) for k in (0, 1, 2)]
    assert len(set(first)) == 3
    layer.scrambled_set(1, 7), layer.scrambled_best(1, 1)
    assert [(layer.scrambled_set(0, k), layer.scrambled_best(0, k)) for k in (2, 0, 1)] == [first[k] for k in (2, 0, 1)]
    model = circuit.model()
    with torch.no_grad():
        model.blocks[1].attn.W_K[1] *= 40
        model.blocks[1].attn.W_Q[1] += 0.1
    other, _ = layer_one(model, sizes=MANY)
    assert [(other.scrambled_set(0, k), other.scrambled_best(0, k)) for k in (0, 1, 2)] == first


def test_selection_never_sees_what_is_measured(found: cih.Screen) -> None:
    """With other confirmation and sets documents the candidates and the sets are the same to the last bit, and so is
    what the search finds in scrambles; what is measured on them is not.
    """
    other, _ = layer_one(circuit.model(), measured="others", sizes=MANY)
    again = cih.screen_layer(other, [0, 1])
    for name, own in found.heads.items():
        np.testing.assert_array_equal(own.pairs, again[name].pairs)
        np.testing.assert_array_equal(own.search_value, again[name].search_value)
        assert not np.array_equal(own.effects.nats, again[name].effects.nats)
    assert found.heads["L1H0"].set_effects[50].nats.sum() != again["L1H0"].set_effects[50].nats.sum()


def test_effects_on_discovery_documents_and_on_the_few_are_those_of_these_documents(found: cih.Screen) -> None:
    """Of every candidate alone, on documents that are cut out before anything is measured."""
    layer, own = found.layer_of("L1H0"), found.heads["L1H0"]
    few = layer.ranked_on.tolist()
    assert len(few) == 100 < len(layer.confirmation.batch)
    pairs = torch.from_numpy(own.pairs)
    cut = HeadOnArms(few_arms(layer.confirmation, torch.tensor(few)), 0).channels(pairs)
    np.testing.assert_allclose(own.ranked.nats, cut.nats, atol=1e-9)
    np.testing.assert_array_equal(own.ranked.rows, cut.rows)
    assert own.discovered is not None and layer.chosen_on is not None
    assert len(own.discovered.rows) == len(layer.chosen_on.batch)
    one = HeadOnArms(layer.chosen_on, 0).removed_together(pairs[3:4])
    np.testing.assert_allclose(own.discovered.nats[:, 3], one.nats[:, 0], atol=1e-5)


def test_a_channel_is_ranked_by_as_many_documents_as_those_of_scrambles(found: cih.Screen) -> None:
    """Nineteen documents with live rows are too few for a scramble's channels, and so for the head's."""
    own, least = found.heads["L1H0"], found.layer_of("L1H0").design.least_documents
    for documents, outcome in ((least, Outcome.SUPPORTED), (least - 1, Outcome.INCONCLUSIVE)):
        kept = (own.ranked.rows > 0).cumsum(0) <= documents  # of every candidate its first live ones
        few = Effects(*(getattr(own.ranked, part.name) * kept for part in dataclasses.fields(Effects)))
        screen = dataclasses.replace(found, heads={"L1H0": dataclasses.replace(own, ranked=few)})
        evidence = evidence_for.channel_evidence(CIH_CHANNEL, screen, family="TIH")["L1H0"]
        assert judge(CIH_CHANNEL, evidence).outcome is outcome


def test_a_channel_stands_by_the_least_of_its_shares_of_the_bars() -> None:
    def effects(nats: float, attention: float, contrast: float) -> Effects:
        rows = np.array([[2.0], [0.0], [3.0]])
        return Effects(nats * rows, attention * rows, contrast * rows, rows, rows)

    for at in range(3):
        values = [10.0, 10.0, 10.0]
        values[at] = (BARS.nats, BARS.attention, BARS.contrast)[at] / 2
        assert BARS.stand(effects(*values), 0.499).tolist() == [True]
        assert BARS.stand(effects(*values), 0.501).tolist() == [False]
    nowhere = Effects(*np.zeros((5, 3, 1)))
    assert BARS.stand(nowhere, 0.25).tolist() == [False]


def test_documents_in_which_a_feature_is_live_are_counted_once_whichever_arm(found: cih.Screen) -> None:
    on = HeadOnArms(found.layer_of("L1H0").confirmation, 0)
    batch, seen = on.batch, [set() for _ in range(len(on.sides[0].codes.decoder))]
    for arm in on.sides:
        length = arm.codes.shape[1]
        for row, feature in zip(arm.codes.row.tolist(), arm.codes.feature.tolist(), strict=True):
            doc, pos = divmod(row, length)
            if bool(((batch.row_doc == doc) & (batch.row_pos == pos)).any()):
                seen[feature].add(doc)
    assert on.live_documents().tolist() == [len(own) for own in seen]


# ---- planted channels


BARS = ChannelBars(nats=0.10, attention=0.02, contrast=0.10, coverage=0.002, matched=0.95)


FEW = 30
"""Plantings: the circuit has 37 pairs that can be planted."""
FEWER = dataclasses.replace(
    CIH_CHANNEL,
    design=tuple(Plantings(planted=FEW) if isinstance(part, Plantings) else part for part in CIH_CHANNEL.design),
)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many plantings are enough for a count of power."""
    monkeypatch.setattr(decide, "RULES", dataclasses.replace(RULES, plantings=FEW))


def planted(found: cih.Screen, head: int = 1, level: float = 0.05) -> tuple[Planted, dict[str, int]]:
    s = found.heads[f"L1H{head}"]
    parts = ("nats", "attention", "contrast")
    samples = {
        part: means_of(CIH_CHANNEL, "circuit", f"L1H{head}", part, getattr(s.effects, part), s.effects.rows, s.sources)
        for part in parts
    }
    return count_found(found.layer_of("L1H0"), head, BARS, Plantings(planted=FEW), samples, 0, 1, level)


def test_a_count_of_power_has_as_many_plantings_as_the_rules_ask() -> None:
    assert Plantings().planted >= RULES.plantings


@pytest.mark.usefixtures("few")
def test_planted_channels_of_a_silent_head_are_found(found: cih.Screen) -> None:
    seen, missed = planted(found)
    assert seen.tried == FEW
    assert seen.found + sum(missed.values()) == seen.tried
    assert seen.power >= RULES.power, missed


def closed_search(layer: LayerScreen) -> tuple[str, Callable]:
    right = layer.candidates
    return "candidates", lambda *args: (right(*args)[0], torch.full((50,), 1e9))


GATES: dict[str, Callable[[LayerScreen], tuple[str, object]]] = {
    "search": closed_search,
    "discovery documents": lambda layer: ("design", dataclasses.replace(layer.design, stands=1e3)),
    "other lags": lambda layer: ("best_at_lags", lambda head, at_least: 1e9),
    "scrambled heads": lambda layer: ("scrambled_best", lambda head, k, at_least: 1e9 if k == 3 else -np.inf),
}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("gate", GATES)
def test_a_planted_channel_that_misses_one_condition_is_not_found(
    found: cih.Screen, gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = found.layer_of("L1H0")
    monkeypatch.setattr(layer, *GATES[gate](layer))
    seen, missed = planted(found)
    assert missed.get(gate, 0) > 2
    assert not seen.power >= RULES.power
    assert seen.found + sum(missed.values()) == seen.tried


@pytest.mark.usefixtures("few")
def test_planted_channels_are_not_found_at_a_level_that_no_sample_reaches(found: cih.Screen) -> None:
    seen, missed = planted(found, level=1e-7)
    assert seen.found < RULES.power * seen.tried
    assert missed["nats"] > 0


@pytest.mark.usefixtures("few")
def test_a_head_is_refuted_only_with_the_power_of_its_own_decision(
    found: cih.Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The silent head fails; whether that refutes is what its planted channels say."""
    right = judge(FEWER, evidence_for.channel_evidence(FEWER, found)["L1H1"])
    assert right.outcome is Outcome.REFUTED, right.reason
    monkeypatch.setattr(found.layer_of("L1H0"), *GATES["scrambled heads"](found.layer_of("L1H0")))
    evidence = evidence_for.channel_evidence(FEWER, found)["L1H1"]
    assert judge(FEWER, evidence).outcome is Outcome.INCONCLUSIVE
    assert evidence.detail["planted and missed, by what missed them first"]["scrambled heads"] > 2


def test_scrambled_circuit_is_not_supported(found: cih.Screen) -> None:
    """Its key map turned by a random rotation, the circuit is no induction head, and none of its channels passes."""
    model = circuit.model()
    rotation, _ = torch.linalg.qr(
        torch.randn(circuit.D_VOCAB, circuit.D_VOCAB, generator=torch.Generator().manual_seed(0))
    )
    with torch.no_grad():
        model.blocks[1].attn.W_K[0] @= rotation
    broken = screened(model, sizes=MANY)
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
