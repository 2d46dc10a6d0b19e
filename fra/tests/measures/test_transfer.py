"""Unseen tokens and surface variants on circuits built by hand: channels of tokens must not survive, channels of what
tokens have in common must.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fra.claim import Outcome, judge
from fra.core.coded import measure_arm
from fra.errors import CannotLoad
from fra.induction.cih import Screen
from fra.induction.outside import outside
from fra.induction.status import HeadStatus
from fra.interventions.scores import channel_share
from fra.measures.channels import q08_q16_transfer as transfer
from fra.measures.channels.q08_q16_transfer import Transferred, move_layer, tihs, unseen_evidence, variant_evidence
from fra.measures.channels.transfer_designs import ChannelSet, UnseenTokens, VariantRepeat
from fra.search.channels import Effects, measure_arms
from fra.search.search import Search
from fra.statistics.unseen import sources_for
from fra.stimuli import repeated
from fra.stimuli.designs import RepeatedSets
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
REFUTE = sources_for(Q16.level, 2)
"""Documents with which any of two channels can be shown, and any of two conditions refute."""


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


def both_layers() -> Screen:
    """The same with the layer below, where nothing is asked."""
    below = {f"L0H{h}": HeadStatus(f"L0H{h}", "not a TIH", 0.0, 0.0, 0.0, {}) for h in (0, 1)}
    return dataclasses.replace(screen(), status={**below, **screen().status})


def test_layer_0_heads_that_are_controls_are_in_no_family() -> None:
    """Whatever their status: a key there cannot know its predecessor."""
    target = SimpleNamespace(n_heads=2)
    status = {f"L{n}H{h}": HeadStatus(f"L{n}H{h}", "TIH", 0.9, 0.9, 0.9, {}) for n in (0, 1) for h in (0, 1)}
    own = dataclasses.replace(screen(), status=status, controls={"L0H0": 0.3, "L0H1": 0.1})
    assert [tihs(target, own, layer) for layer in (0, 1)] == [[], [0, 1]]
    said = outside(Q16, own, "TIH")
    assert "layer-0 head" in str(said["L0H0"].outside) and "layer-0" not in str(said["L1H0"].outside)


def moved(model, sae, discovery, arms, lags=(3, 5, 7, 9), on=None) -> dict[str, Transferred]:
    arm = measure_arm(model, sae, discovery.tokens, 1, circuit.HOOK)
    measured = {name: measure_arms(model, sae, batch, 1, circuit.HOOK) for name, batch in arms.items()}
    shown = on or ("unseen" if "unseen" in arms else "variant")
    return move_layer(Search(discovery, arm), measured, [0], ChannelSet(), measured=shown, lags=lags)


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
    # of 20 words, each in most documents: tested together, a channel must be live in sources_for(Q16.level, 20) = 80
    made = repeated.repeated_random(160, np.arange(20), circuit.N_CTX, circuit.BOS, ("words",))
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


def target_of(model: Any, sae: Any) -> Any:
    """As much of a target as is asked for; its vocabulary is patched in (`door`)."""
    return SimpleNamespace(
        model=model,
        name="words",
        n_layers=2,
        n_heads=2,
        bos=circuit.BOS,
        tokenizer=None,
        hook_for=lambda layer: circuit.HOOK,
        dictionary_for=lambda layer: (circuit.HOOK, sae),
    )


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The way in, over the circuit's 64 tokens."""
    monkeypatch.setattr(transfer, "pool_of", lambda target: np.arange(2 * PAIRED))
    monkeypatch.setattr(transfer, "variant_forms", lambda *_, **__: forms())
    return monkeypatch


SMALL16 = claim(
    "Q16",
    design=(UnseenTokens(80, REFUTE, live_documents=10, lags=(2, 3, 5, 8)), ChannelSet(floor=5), RepeatedSets()),
    n=REFUTE,
)
SMALL08 = claim("Q08", design=(VariantRepeat(50, 24), ChannelSet(floor=5), RepeatedSets()), n=24)


def test_unseen_is_the_half_that_was_not_searched(door: pytest.MonkeyPatch) -> None:
    """Through the door: a head that matches tokens, whose every channel is one token's, keeps nothing of them there."""
    own = transfer.unseen_tokens(target_of(tokens_circuit(), circuit.dictionary()), both_layers(), SMALL16)["L1H0"]
    assert own.mean("seen") > 3.0
    assert np.abs(own.together["unseen"]).max() < 1e-6
    assert np.abs(own.single.nats).max() < 1e-6  # channel by channel, too
    assert own.rows.sum() / len(own.rows) < 20 and len(own.sources) == REFUTE
    verdict = judge(SMALL16, unseen_evidence(SMALL16, screen(), {"L1H0": own})["L1H0"])
    assert verdict.outcome is Outcome.REFUTED, verdict.reason
    assert verdict.decided is not None and verdict.decided.name == "share kept"


def test_channels_are_measured_one_by_one_on_the_arm_that_is_named(halves) -> None:
    """Seen and unseen differ: by each channel's own effect, a channel of a seen token does something on seen alone."""
    arms = {"seen": halves[1], "unseen": halves[2]}
    one, other = (
        moved(tokens_circuit(), circuit.dictionary(), halves[0], arms, on=name)["L1H0"] for name in ("seen", "unseen")
    )
    assert one.single.nats.max() > 1.0 and np.abs(other.single.nats).max() < 1e-6
    assert np.array_equal(one.pairs, other.pairs)


def test_what_is_found_is_the_same_whatever_it_is_measured_on(door: pytest.MonkeyPatch) -> None:
    """Channels, and those of other lags, bit for bit, with every measured document exchanged for another."""
    target = target_of(words_circuit(), words_dictionary())
    make = transfer.disjoint_halves

    def others(n_discovery: int, n: int, *given: Any) -> Any:
        discovery, seen, unseen = make(n_discovery, n, *given)
        return discovery, unseen, seen

    first = transfer.unseen_tokens(target, both_layers(), SMALL16)["L1H0"]
    door.setattr(transfer, "disjoint_halves", others)
    second = transfer.unseen_tokens(target, both_layers(), SMALL16)["L1H0"]
    assert not np.array_equal(first.together["seen"], second.together["seen"])
    assert np.array_equal(first.pairs, second.pairs)
    assert first.at_lags.keys() == second.at_lags.keys() == set(SMALL16.designed(UnseenTokens).lags)
    assert all(np.array_equal(pairs, second.at_lags[lag]) for lag, pairs in first.at_lags.items())
    make_variants = transfer.variant_repeat

    def turned(*given: Any) -> VariantSets:
        sets = make_variants(*given)
        names = ("unrelated", "same", "variant", "neighbour")
        return dataclasses.replace(sets, arms=dict(zip(names, sets.arms.values(), strict=True)))

    door.setattr(transfer, "token_matches", lambda batch: 0.0)
    one, _ = transfer.variants(target, both_layers(), SMALL08)
    door.setattr(transfer, "variant_repeat", turned)
    two, _ = transfer.variants(target, both_layers(), SMALL08)
    assert np.array_equal(one["L1H0"].pairs, two["L1H0"].pairs)
    assert not np.array_equal(one["L1H0"].together["variant"], two["L1H0"].together["variant"])
    # and more measured documents choose no others
    more = dataclasses.replace(SMALL08, design=(VariantRepeat(50, 31), ChannelSet(floor=5), RepeatedSets()))
    door.setattr(transfer, "variant_repeat", make_variants)
    assert np.array_equal(transfer.variants(target, both_layers(), more)[0]["L1H0"].pairs, one["L1H0"].pairs)


def told(**changed: Any) -> Transferred:
    """Numbers of one head over documents of unequal length, written down."""
    rng = np.random.default_rng(3)
    rows = np.where(np.arange(REFUTE) % 4 == 0, 60.0, 10.0)
    nats = {
        name: rows * np.where(rows > 30, long, short) * rng.uniform(0.9, 1.1, REFUTE)
        for name, long, short in (
            ("seen", 4.0, 1.0),
            ("unseen", 3.0, 0.2),
            ("variant", 3.0, 0.4),
            ("neighbour", 0.5, 0.3),
            ("unrelated", 0.1, 0.2),
        )
    }
    nats["same"] = nats["seen"]
    live = np.stack([rows, rows], 1)
    single = Effects(np.stack([nats["unseen"], rows * rng.normal(0, 0.01, REFUTE)], 1), live, live, live, live)
    own = Transferred(
        np.array([[0, 1], [2, 3]]),
        nats,
        {name: v / 10 for name, v in nats.items()},
        rows,
        tuple(f"d{k}" for k in range(REFUTE)),
        single,
        {2: np.zeros((1, 2), int)},
        np.array([0.7, -0.2]),
    )
    return dataclasses.replace(own, **changed)


def test_effects_are_ratios_of_means_over_rows(sets: VariantSets) -> None:
    own = told()
    n = sum(own.rows)
    total = {name: sum(v) for name, v in own.together.items()}
    one, _ = unseen_evidence(Q16, screen(), {"L1H0": own})["L1H0"].candidates.values()
    effects = {c.name: c.effect for c in one}
    assert effects["effect on unseen tokens"] == pytest.approx(total["unseen"] / n)
    assert effects["share kept"] == pytest.approx(total["unseen"] / total["seen"])
    assert effects["over other lags"] == pytest.approx(total["unseen"] / n - 0.7)
    (one,) = variant_evidence(Q08, screen(), {"L1H0": own}, sets)["L1H0"].candidates.values()
    effects = {c.name: c.effect for c in one}
    assert effects["effect on variants"] == pytest.approx(total["variant"] / n)
    assert effects["head contrast"] == pytest.approx(total["variant"] / 10 / n)
    assert effects["over equal-cosine neighbours"] == pytest.approx((total["variant"] - total["neighbour"]) / n)
    assert effects["over an unrelated copy"] == pytest.approx((total["variant"] - total["unrelated"]) / n)


def test_one_other_lag_that_does_as_much_denies_and_does_not_refute() -> None:
    fine = judge(Q16, unseen_evidence(Q16, screen(), {"L1H0": told()})["L1H0"])
    assert fine.outcome is Outcome.SUPPORTED, fine.reason
    lags = np.array([0.1, told().mean("unseen") + 0.01, -1.0])
    denied = judge(Q16, unseen_evidence(Q16, screen(), {"L1H0": told(lags=lags)})["L1H0"])
    assert denied.outcome is Outcome.INCONCLUSIVE and "over other lags" in denied.reason
    unknown = judge(Q16, unseen_evidence(Q16, screen(), {"L1H0": told(lags=np.array([0.1, np.nan]))})["L1H0"])
    assert unknown.outcome is Outcome.INCONCLUSIVE


def test_sets_of_other_lags_are_measured_on_their_own_stripe(halves) -> None:
    """By hand, for a head in which every channel does something: log-odds of the key that lies `lag` further on in the
    first copy, in both arms, over all rows of the documents where that is far from the induction key.
    """
    model, sae, channels = tokens_circuit(), circuit.dictionary(), ChannelSet(size=12, floor=3)
    arm = measure_arm(model, sae, halves[0].tokens, 1, circuit.HOOK)
    seen = measure_arms(model, sae, halves[1], 1, circuit.HOOK)
    lags = (4, 7, 15)  # the last lies too near in documents of 16 and 17 tokens
    own = move_layer(Search(halves[0], arm), {"seen": seen}, [1], channels, measured="seen", lags=lags)["L1H1"]
    for lag, found in zip(lags, own.lags, strict=True):
        pairs = torch.from_numpy(own.at_lags[lag])
        assert len(pairs) == 12 and not np.array_equal(own.at_lags[lag], own.pairs)
        total, rows = 0.0, 0
        for sign, side in ((1, seen.repeated), (-1, seen.control)):
            scores = side.frozen.scores(1).double()
            after = scores - channel_share(pairs)(side, 1)
            for d, period in enumerate(halves[1].periods.tolist()):
                if not 1 < lag % period < period - 2:
                    continue
                for r in range(period):
                    t, key = period + 1 + r, 1 + (r + 1 + lag) % period
                    others = [u for u in range(t + 1) if u != key]
                    odds = [float(S[d, t, key] - S[d, t, others].logsumexp(0)) for S in (scores, after)]
                    total += sign * (odds[0] - odds[1])
                    rows += sign == 1
        assert found == pytest.approx(total / rows, rel=1e-3, abs=1e-9)
    assert np.abs(own.lags).min() > 1e-6


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


def test_neighbours_and_unrelated_words_are_drawn_anew_for_every_document(sets: VariantSets) -> None:
    """Of eleven or twelve equal ones each is taken about as often: the scatter of the control is that of documents."""
    same, near = sets.arms["same"], sets.arms["neighbour"]
    at = same.row_doc, same.row_pos
    steps = ((near.tokens[at] - same.tokens[at]) % (2 * PAIRED)).bincount(minlength=13)[1:13]
    assert int(steps.sum()) == len(same.row_doc)
    assert float(steps.min()) > 0.4 * float(steps.sum()) / 12
    first = {}
    for doc, token, other in zip(
        same.row_doc.tolist(), same.tokens[at].tolist(), near.tokens[at].tolist(), strict=True
    ):
        first.setdefault(token, {})[doc] = other
    assert all(len(set(by_doc.values())) > 2 for by_doc in first.values() if len(by_doc) >= 12)
    unrelated = sets.arms["unrelated"]
    seconds = [tuple(unrelated.tokens[d, p + 1 : p + 4].tolist()) for d, p in enumerate(unrelated.periods.tolist())]
    assert len(set(seconds)) == len(seconds)


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
    assert surface_forms(tokenizer, range(len(pieces)), 2) == {"the": [0, 1, 2], "cat": [7, 8]}


def test_neighbours_have_the_variants_cosine_and_are_no_variants() -> None:
    pieces = [*(f"\u0120w{chr(97 + k)}" for k in range(6)), *(f"w{chr(97 + k)}" for k in range(6))]
    rng = np.random.default_rng(0)
    W_E = rng.normal(size=(12, 3))
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda i: pieces[i])
    found = variant_forms(tokenizer, np.arange(12), W_E, shortest=2, within=0.05, choices=3, fewest=2)
    assert found.neighbours.shape[1] == 3

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
        variant_forms(
            build_tokenizer(), np.arange(1, 300), np.eye(300, 8), shortest=2, within=0.05, choices=12, fewest=48
        )
