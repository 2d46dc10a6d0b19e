"""Claims that need no training: nothing looks ahead (Q19), signed output terms add up (Q18), gauges move what they must
(Q13), sentences (S01); what must fail does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fra import interventions as iv
from fra.claim import Outcome, judge
from fra.core.coded import Arm, measure_arm
from fra.errors import CannotLoad
from fra.measures.identities import q01_q18_exactness, q13_gauges, q19_leaks, s01_sentences
from fra.measures.identities.designs import Cut
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.intervening import HEAD, LAYER, double, hook_of
from fra.tests.models import random_tokens, tiny, tiny_sae

KINDS = ["gpt2", "gemma2", "no_layernorm"]  # test_interventions_safety has every architecture
CUT = 9
DESIGN = Cut(cut=CUT)


def six(n: int = 18) -> q19_leaks.CutTexts:
    return q19_leaks.texts([random_tokens(n, seed) for seed in range(6)], CUT)


@pytest.mark.parametrize("kind", KINDS)
def test_no_intervention_looks_ahead_and_an_unmasked_patch_does(kind: str) -> None:
    found = q19_leaks.leaks(tiny(kind), tiny_sae(hook_of(kind)), six(), LAYER, [0, HEAD], DESIGN)
    for seen in found.values():
        assert len(seen.changed) >= 13 and set(seen.changed.values()) == {0}
        assert seen.inert == []
        assert seen.unmasked > 100


def test_one_leaking_intervention_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, every = tiny("gpt2"), q19_leaks.every_intervention

    def with_a_leak(*args: Any) -> dict[str, iv.Intervention]:
        made = every(*args)
        return {"zero ablation": made["zero ablation"], "mine": q19_leaks.unmasked(model, LAYER, HEAD)}

    monkeypatch.setattr(q19_leaks, "every_intervention", with_a_leak)
    seen = q19_leaks.leaks(model, tiny_sae(hook_of("gpt2")), six(), LAYER, [HEAD], DESIGN)[HEAD]
    assert seen.changed["zero ablation"] == 0 and seen.changed["mine"] == seen.unmasked > 0


def test_texts_differ_behind_the_cut_only_and_must_reach_it() -> None:
    text = six()
    assert torch.equal(text.tokens[:, :CUT], text.changed[:, :CUT])
    assert bool((text.tokens[:, CUT:] != text.changed[:, CUT:]).any(1).all())
    with pytest.raises(CannotLoad, match="too little behind position 9"):
        six(10)


def test_channels_are_those_of_one_document_and_without_any_the_layer_says_so() -> None:
    text = six()
    arm = measure_arm(tiny("gpt2"), tiny_sae(hook_of("gpt2")), text.tokens, LAYER, hook_of("gpt2"))
    pos = arm.codes.shape[1]

    def without(dead: torch.Tensor) -> Arm:
        codes = arm.codes
        fields = {name: getattr(codes, name)[~dead] for name in ("row", "feature", "value")}
        return Arm(arm.frozen, dataclasses.replace(codes, **fields))

    def live(doc: int, at: int) -> set[int]:
        return set(arm.codes.feature[arm.codes.row == doc * pos + at].tolist())

    key_of_first = arm.codes.row == CUT - 2  # the first document has nothing at this key: the second serves
    channels, features = q19_leaks.live_channels(without(key_of_first), CUT, DESIGN.a_side)
    before = channels[: len(channels) // 2]
    assert set(before[:, 0].tolist()) <= live(1, CUT - 1) and set(before[:, 1].tolist()) <= live(1, CUT - 2)
    assert set(features.tolist()) == set(channels.flatten().tolist())
    with pytest.raises(CannotLoad, match=f"no document of layer {LAYER} has live features at both positions 8 and 7"):
        q19_leaks.live_channels(without(arm.codes.row % pos == CUT - 2), CUT, DESIGN.a_side)


@pytest.mark.parametrize("kind", [*KINDS, "llama"])
def test_signed_terms_make_the_output_of_every_head(kind: str) -> None:
    found = q01_q18_exactness.output_errors(tiny(kind), tiny_sae(hook_of(kind)), random_tokens(16, 1), LAYER)
    assert len(found) == 4
    for row in found.values():
        assert max(row["z"], row["result"]) < 1e-6
        assert min(row[term] for term in q01_q18_exactness.OUTPUT_DROPPED) > 1e-3
        assert row["norms"] > 0.05


EXACT = claim("Q01", min_sources=1)


def test_a_term_that_a_head_does_not_have_is_not_asked_for() -> None:
    """The hand-built circuit has no biases: leaving them out changes nothing, which is no fault of the check."""
    tokens = torch.arange(1, 20)
    row = q01_q18_exactness.errors(circuit.model(), circuit.dictionary(), tokens, 1, 0)
    assert "query bias" not in row and row["query feature"] > 1e-3
    found = q01_q18_exactness.sums_evidence(EXACT, "L1H0", [row], ("complete",), q01_q18_exactness.DROPPED, {})
    assert judge(EXACT, found).outcome is Outcome.SUPPORTED
    (output, _) = q01_q18_exactness.output_errors(circuit.model(), circuit.dictionary(), tokens, 1).values()
    assert "bias" not in output and output["feature"] > 1e-3
    found = q01_q18_exactness.sums_evidence(
        EXACT, "L1H0", [output], ("z", "result"), q01_q18_exactness.OUTPUT_DROPPED, {}
    )
    assert judge(EXACT, found).outcome is Outcome.SUPPORTED


@pytest.mark.parametrize("nan_first", [True, False])
def test_an_error_that_is_no_number_does_not_vanish_in_a_maximum(nan_first: bool) -> None:
    rows = [{"complete": float("nan"), "scale": 1.0}, {"complete": 1e-8, "scale": 1.0}]
    found = q01_q18_exactness.sums_evidence(
        EXACT, "L0H0", rows[:: 1 if nan_first else -1], ("complete",), ("scale",), {}
    )
    assert judge(EXACT, found).outcome is Outcome.INCONCLUSIVE


def test_a_heads_result_is_its_output_through_its_own_weights() -> None:
    model = double("gpt2")
    tokens = random_tokens(16, 1)
    with torch.no_grad():
        _, out = q01_q18_exactness.own_outputs(model, tokens, LAYER, 4)
    z = iv.head_outputs(model, tokens[None], layer=LAYER, head=HEAD)[0]
    attention: Any = model.blocks[LAYER].attn
    torch.testing.assert_close(out[HEAD] - out[-1], z @ attention.W_O[HEAD].detach())
    assert float((out[0] - out[1]).abs().max()) > 1e-3


def gauged(documents: list[torch.Tensor] | None = None) -> dict[str, Any]:
    texts = [random_tokens(14, seed) for seed in range(4)] if documents is None else documents
    sae = tiny_sae(hook_of("gpt2"), dtype="float64")
    return q13_gauges.measure(double("gpt2"), sae, texts, LAYER, ("test",))


def said(found: dict[str, Any], id: str, gauge: str) -> set[Outcome]:
    own = claim(id, min_sources=2)
    return {judge(own, q13_gauges.evidence(own, gauge, found, LAYER, head)).outcome for head in range(4)}


def test_what_must_stay_decides_and_not_how_large_a_gauge_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gauged()
    assert said(found, "Q13", "mean_direction") == said(found, "Q13.bias", "key_bias") == {Outcome.SUPPORTED}
    draw = q13_gauges.draw
    with monkeypatch.context() as patch:
        patch.setattr(q13_gauges, "draw", lambda *args: 0.02 * draw(*args))
        small = gauged()
        own = claim("Q13", min_sources=2)
        moved = q13_gauges.evidence(own, "mean_direction", small, LAYER, HEAD).candidates["mean_direction"]
        assert {c.name: c.effect for c in moved}["channels without centring"] < 0.10
        assert said(small, "Q13", "mean_direction") == said(small, "Q13.bias", "key_bias") == {Outcome.SUPPORTED}


@pytest.mark.parametrize("centred", [True, False])
def test_channels_that_move_and_products_that_do_not_are_seen(monkeypatch: pytest.MonkeyPatch, centred: bool) -> None:
    whole = q13_gauges.Seen.channels
    monkeypatch.setattr(q13_gauges.Seen, "channels", lambda self, head, pairs, _: whole(self, head, pairs, centred))
    assert said(gauged(), "Q13", "mean_direction") == {Outcome.REFUTED}


def test_channels_are_chosen_without_the_measured_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.Tensor] = []
    shares = q13_gauges.shares

    def seen(before: Any, after: Any, head: int, pairs: torch.Tensor, *args: Any) -> Any:
        chosen.append(pairs)
        return shares(before, after, head, pairs, *args)

    monkeypatch.setattr(q13_gauges, "shares", seen)
    selection = [random_tokens(14, seed) for seed in range(2)]
    gauged([*selection, *(random_tokens(14, seed) for seed in (2, 3))])
    first = len(chosen)
    gauged([*selection, *(random_tokens(14, seed) for seed in (7, 8))])
    again = chosen[first:]
    assert len(again) == first > 0
    assert all(torch.equal(a, b) for a, b in zip(chosen[:first], again, strict=True))


def test_a_number_that_must_be_large_is_the_smallest_of_the_documents() -> None:
    own, names = claim("S01", min_sources=1), ("finite difference", *claim("S01").bars)
    fine = {name: 1.0 if claim("S01").above_of(name) else 0.0 for name in names} | {s01_sentences.ROUNDING: 0.0}
    for spoilt, outcome in (
        ({}, Outcome.SUPPORTED),
        ({"conservation": 1e-3}, Outcome.REFUTED),
        ({"without the row's mean": 1e-3}, Outcome.REFUTED),
        ({"finite difference": float("nan")}, Outcome.INCONCLUSIVE),
    ):
        found = s01_sentences.evidence(own, "L0H0", [fine, fine | spoilt, fine])
        assert judge(own, found).outcome is outcome


def test_one_document_that_moves_is_enough() -> None:
    found = gauged()
    moved = found["mean_direction"]
    for name in ("channels as fra", "channels without centring"):
        spoilt = [q13_gauges.Moved(m.gauge, {k: list(v) for k, v in m.by_document.items()}) for m in moved]
        for own in spoilt:
            own.by_document[name][1] = 1e-8  # too much for what must stay, too little for what must move
        assert said(found | {"mean_direction": spoilt}, "Q13", "mean_direction") == {Outcome.REFUTED}


def test_counts_of_leaks_are_held_against_the_bars() -> None:
    own = claim("Q19")
    for changed, seen, inert, outcome in (
        (0, 9, [], Outcome.SUPPORTED),
        (1, 9, [], Outcome.REFUTED),
        (0, 0, [], Outcome.REFUTED),
        (0, 9, ["remove"], Outcome.REFUTED),
    ):
        leaks = q19_leaks.Leaks({"remove": changed, "scale": 0}, seen, inert)
        assert judge(own, q19_leaks.evidence(own, "L1H2", leaks)).outcome is outcome
