"""Unseen tokens and surface variants on circuits built by hand: channels of tokens must not survive, channels of what
tokens have in common must.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fra.claim import Outcome, judge
from fra.core.coded import measure_arm
from fra.errors import CannotLoad
from fra.induction.channels import measure_arms
from fra.induction.cih import Screen
from fra.induction.outside import outside
from fra.induction.search import Search
from fra.induction.status import HeadStatus
from fra.measures.channels.q08_q16_transfer import Transferred, move_layer, tihs, unseen_evidence, variant_evidence
from fra.stimuli import repeated, variants
from fra.stimuli.variants import (
    Forms,
    VariantSets,
    disjoint_halves,
    surface_forms,
    token_matches,
    variant_forms,
    variant_repeat,
)
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.models import build_tokenizer

PAIRED = 32
"""Token v and token v + PAIRED are two forms of one word."""
Q08, Q16 = claim("Q08"), claim("Q16")


FACTOR = 0.8 + 0.4 * torch.arange(PAIRED) / PAIRED
"""Strength of each word's channel, as a share of the circuit's: documents must differ for anything to be tested."""


def tokens_circuit():
    """The induction circuit with a strength of its own for every word."""
    model = circuit.model()
    with torch.no_grad():
        model.blocks[1].attn.W_Q[0, : 2 * PAIRED] *= FACTOR.repeat(2)[:, None]
    return model


def words_circuit():
    """The same, but L1H0 matches words: token v and v + PAIRED write and read the same direction."""
    model = tokens_circuit()
    attention = model.blocks[1].attn
    v = torch.arange(PAIRED)
    with torch.no_grad():
        for weight, start in ((attention.W_Q, 0), (attention.W_K, circuit.PREVIOUS)):
            weight[0, start + PAIRED + v] = weight[0, start + v]
    return model


def words_dictionary():
    """One feature for a word, in the token's and in the previous token's block, live on both of its forms."""
    sae = circuit.dictionary()
    v = torch.arange(PAIRED)
    with torch.no_grad():
        for start in (0, circuit.PREVIOUS):
            sae.W_enc[start + PAIRED + v, start + v] = 1.0
            sae.W_enc[:, start + PAIRED + v] = 0.0
            sae.W_dec[start + v, start + v] = 0.5
            sae.W_dec[start + v, start + PAIRED + v] = 0.5
    return sae


def screen() -> Screen:
    status = {f"L1H{h}": HeadStatus(f"L1H{h}", s, 0.0, 0.0, 0.0, {}) for h, s in ((0, "TIH"), (1, "not a TIH"))}
    return Screen("words", "repeated_random", status, {}, {}, str)


def test_layer_0_heads_that_are_controls_are_in_no_family() -> None:
    """Whatever their status: a key there cannot know its predecessor."""
    target = SimpleNamespace(n_heads=2)
    status = {f"L{n}H{h}": HeadStatus(f"L{n}H{h}", "TIH", 0.9, 0.9, 0.9, {}) for n in (0, 1) for h in (0, 1)}
    own = dataclasses.replace(screen(), status=status, controls={"L0H0": 0.3, "L0H1": 0.1})
    assert [tihs(target, own, layer) for layer in (0, 1)] == [[], [0, 1]]
    said = outside(Q16, own, "TIH")
    assert "layer-0 head" in str(said["L0H0"].outside) and "layer-0" not in str(said["L1H0"].outside)


def moved(model, sae, discovery, arms, lags=(3, 5, 7, 9)) -> dict[str, Transferred]:
    arm = measure_arm(model, sae, discovery.tokens, 1, circuit.HOOK)
    measured = {name: measure_arms(model, sae, batch, 1, circuit.HOOK) for name, batch in arms.items()}
    return move_layer(Search(discovery, arm), measured, [0], single=True, lags=lags)


@pytest.fixture(scope="module")
def halves() -> tuple[repeated.Batch, repeated.Batch, repeated.Batch]:
    """Over tokens 0..63, so that the halves cut across the words' forms."""
    made = disjoint_halves(40, 40, np.arange(2 * PAIRED), circuit.N_CTX, circuit.BOS, ("halves",))
    return made


def test_halves_share_no_token_and_pair_by_period(halves) -> None:
    def passages(batch: repeated.Batch) -> set[int]:
        return {int(t) for row, p in zip(batch.tokens, batch.periods, strict=True) for t in row[1 : p + 1]}

    assert not (passages(halves[0]) | passages(halves[1])) & passages(halves[2])
    assert passages(halves[1]) <= passages(halves[0])
    assert bool((halves[1].periods == halves[2].periods).all())


def swapped(batch: repeated.Batch) -> repeated.Batch:
    """Every token replaced by the other form of its word."""

    def other(tokens: torch.Tensor) -> torch.Tensor:
        return torch.where(tokens < 2 * PAIRED, (tokens + PAIRED) % (2 * PAIRED), tokens)

    return dataclasses.replace(batch, tokens=other(batch.tokens), control=other(batch.control))


def test_channels_of_words_work_on_unseen_tokens_and_channels_of_tokens_do_not() -> None:
    made = repeated.repeated_random(100, np.arange(PAIRED), circuit.N_CTX, circuit.BOS, ("words",))
    discovery, seen = repeated.collate(made[:60]), repeated.collate(made[60:])
    arms = {"seen": seen, "unseen": swapped(seen)}
    words = moved(words_circuit(), words_dictionary(), discovery, arms, lags=tuple(range(2, 26)))
    assert words["L1H0"].mean("seen") == pytest.approx(words["L1H0"].mean("unseen"), rel=1e-3)
    # by hand, as in test_cih_circuit: both arms lose the strength at one key, which only in the repeated arm is s*
    rows = seen.row_pos.numpy()
    strength = circuit.STRENGTH * FACTOR[seen.tokens[seen.row_doc, seen.row_pos]].numpy()
    removed = strength * 0.99**2
    expected = removed + np.log((rows - 1 + np.exp(strength)) / (rows - 1 + np.exp(strength - removed)))
    assert words["L1H0"].mean("unseen") == pytest.approx(expected.mean(), abs=0.02)
    evidence = unseen_evidence(Q16, screen(), words)
    assert judge(Q16, evidence["L1H0"]).outcome is Outcome.SUPPORTED
    assert evidence["L1H1"].outside is not None
    tokens = moved(tokens_circuit(), circuit.dictionary(), discovery, arms, lags=tuple(range(2, 26)))
    assert abs(tokens["L1H0"].mean("unseen")) < 1e-6
    verdict = judge(Q16, unseen_evidence(Q16, screen(), tokens)["L1H0"])
    assert verdict.outcome is Outcome.REFUTED, verdict.reason


def forms() -> Forms:
    """Every pair of forms, with neighbours that are other words' tokens."""
    v = np.arange(2 * PAIRED)
    variant = (v + PAIRED) % (2 * PAIRED)
    near = np.stack([(v + k) % (2 * PAIRED) for k in range(1, 13)], axis=1)
    return Forms(v % PAIRED, v, variant, near, np.zeros(near.shape), {int(t): int(t) % PAIRED for t in v})


@pytest.fixture(scope="module")
def sets() -> VariantSets:
    return variant_repeat(50, 50, forms(), circuit.N_CTX, circuit.BOS, ("variants",))


def test_the_four_arms_are_what_they_say(sets: VariantSets) -> None:
    same, variant = sets.arms["same"], sets.arms["variant"]
    at = variant.row_doc, variant.row_pos
    first = variant.tokens[variant.row_doc, variant.row_pos - variant.periods[variant.row_doc]]
    assert bool(((variant.tokens[at] - first).abs() == PAIRED).all())
    assert bool((same.tokens[at] == first).all())
    assert token_matches(same) == 1.0
    for name in ("variant", "unrelated", "neighbour"):
        assert token_matches(sets.arms[name]) == 0.0 or name == "neighbour"
        assert bool((sets.arms[name].tokens[:, 1:17] == same.tokens[:, 1:17]).all())
        assert bool((sets.arms[name].control[:, 1:17] == same.control[:, 1:17]).all())
    for doc, period in enumerate(variant.periods.tolist()):
        words = same.tokens[doc, 1 : period + 1] % PAIRED
        unrelated = sets.arms["unrelated"].tokens[doc, period + 1 : 2 * period + 1] % PAIRED
        assert not set(words.tolist()) & set(unrelated.tolist())


@pytest.mark.parametrize("build", ["words", "tokens"])
def test_channels_of_words_survive_variants_and_channels_of_tokens_do_not(sets: VariantSets, build: str) -> None:
    made = (words_circuit(), words_dictionary()) if build == "words" else (tokens_circuit(), circuit.dictionary())
    verdict = judge(Q08, variant_evidence(Q08, screen(), moved(*made, sets.discovery, sets.arms), sets)["L1H0"])
    assert (verdict.outcome is Outcome.SUPPORTED) == (build == "words"), verdict.reason


def test_an_effect_that_neighbours_have_too_is_not_supported(sets: VariantSets) -> None:
    """Surface-robust is not enough: with the variants' effect in the neighbours' place, the control denies it."""
    found = moved(words_circuit(), words_dictionary(), sets.discovery, sets.arms)
    own = found["L1H0"]
    alike = dataclasses.replace(own, together={**own.together, "neighbour": own.together["variant"]})
    evidence = variant_evidence(Q08, screen(), {"L1H0": alike}, sets)["L1H0"]
    assert evidence.detail["surface-robust (without the controls)"] is True
    assert judge(Q08, evidence).outcome is not Outcome.SUPPORTED


def test_forms_are_read_from_the_tokenizer() -> None:
    pieces = ["The", "\u0120the", "\u0120The", "er", "ER", "\u0120x", "X", "\u2581cat", "cat", "12", "\u012012"]
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda i: pieces[i])
    assert surface_forms(tokenizer, range(len(pieces))) == {"the": [0, 1, 2], "cat": [7, 8]}


def test_neighbours_have_the_variants_cosine_and_are_no_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "FEWEST_FORMS", 2)
    pieces = [*(f"\u0120w{chr(97 + k)}" for k in range(6)), *(f"w{chr(97 + k)}" for k in range(6))]
    rng = np.random.default_rng(0)
    W_E = rng.normal(size=(12, 3))
    found = variant_forms(SimpleNamespace(convert_ids_to_tokens=lambda i: pieces[i]), np.arange(12), W_E)

    def cosine(a: int, b: int) -> float:
        return float(W_E[a] @ W_E[b] / np.linalg.norm(W_E[a]) / np.linalg.norm(W_E[b]))

    assert len(found.token) > 0
    for token, variant, near, gap in zip(found.token, found.variant, found.neighbours, found.gap, strict=True):
        assert variant % 6 == token % 6
        for n, g in zip(near, gap, strict=True):
            if n >= 0:
                assert n % 6 != token % 6
                assert abs(cosine(n, token) - cosine(variant, token)) == pytest.approx(g, abs=1e-12)
                assert g <= 0.05


def test_a_vocabulary_without_variants_cannot_run() -> None:
    with pytest.raises(CannotLoad, match="case or leading-space variants"):
        variant_forms(build_tokenizer(), np.arange(1, 300), np.eye(300, 8))
