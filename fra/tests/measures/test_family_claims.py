"""What the claims about families say of hand-built ones, either way; nothing that is chosen sees what is measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fra import attribution, interventions
from fra.attribution import planted
from fra.claim import Outcome, judge
from fra.errors import FraError
from fra.interventions import patching
from fra.measures.families import (
    d07_behaviour,
    d08_context,
    d09_d10_paths,
    d11_patching,
    d12_turned_off,
    d13_polysemantic,
    d14_prefix,
    measures,
)
from fra.measures.families import rows as rows_of_heads
from fra.measures.families.designs import ContextFeatures, NeedingFeatures, Prefixes
from fra.measures.families.families import Families, LayerFamilies
from fra.statistics import bounds
from fra.stimuli.designs import PlantedTokens
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.families import (
    WRONG,
    conditions,
    families,
    layer,
    needing_both,
    repeater,
    upstream_claim,
    whole,
    with_design,
)

FAMILY_CLAIMS = {
    "D07": d07_behaviour.behaviour_evidence,
    "D07.token": d07_behaviour.token_evidence,
    "D08": d08_context.specificity_evidence,
    "D09": d09_d10_paths.own_token_evidence,
    "D10": d09_d10_paths.path_evidence,
    "D11": d11_patching.upstream_evidence,
    "D12": d12_turned_off.ablation_evidence,
}


def test_the_circuit_has_a_family_and_its_claims_say_so() -> None:
    for name in ("D07", "D07.token", "D09", "D12"):
        found = FAMILY_CLAIMS[name](claim(name), whole())
        verdict = judge(claim(name), found["L1H0"])
        assert verdict.outcome is Outcome.SUPPORTED, f"{name}: {verdict.reason}"
        assert judge(claim(name), found["L1H1"]).outcome is Outcome.NOT_APPLICABLE
    d07 = conditions(FAMILY_CLAIMS["D07"](claim("D07"), whole())["L1H0"])
    assert d07["over matched features"].effect == d07["share that passes"].effect  # no match passes
    d11 = d11_patching.upstream_evidence(upstream_claim(), whole())["L1H0"]
    assert d11.detail["previous-token head"] == "L0H0"
    assert d11.detail["share by noising"]["L0H0"] == pytest.approx(1)
    assert d11.detail["share by noising"]["L0H1"] == pytest.approx(0)
    assert d11.detail["share by denoising"]["L0H0"] == pytest.approx(1)
    assert [conditions(d11)[name].effect for name in ("noising", "denoising", "over other heads")] == pytest.approx(
        [1, 1, 1]
    )
    d08 = d08_context.specificity_evidence(claim("D08"), whole())["L1H0"]
    assert [c.name for c in conditions(d08).values() if not c.holds(0.05)] == ["missed"]  # it misses nothing
    d13 = d13_polysemantic.polysemantic_evidence(claim("D13"), whole())["L1H0"]
    assert d13.undecided == "no feature of the selection fails induction for sure"
    paths = FAMILY_CLAIMS["D10"](claim("D10"), whole())["L1H0"]
    assert conditions(paths)["share of the direct path"].effect == pytest.approx(1)  # there is no MLP


def test_features_that_say_something_repeats_pass_the_published_test_and_know_no_token() -> None:
    both = layer(sae=repeater())
    features = both.selections[0].features
    keep = np.flatnonzero((features >= 10) & (features < 40))
    s = both.selections[0]
    fields = {name: getattr(s, name)[keep] for name in ("features", "tokens", "shares", "rows")}
    both.__dict__["selections"] = {
        0: dataclasses.replace(s, **fields, matches=tuple(s.matches[k] for k in keep.tolist()))
    }
    found = families(both)
    d07 = d07_behaviour.behaviour_evidence(claim("D07"), found)["L1H0"]
    assert judge(claim("D07"), d07).outcome is Outcome.SUPPORTED
    token = judge(claim("D07.token"), d07_behaviour.token_evidence(claim("D07.token"), found)["L1H0"])
    assert token.outcome is Outcome.REFUTED, token.reason
    d08 = d08_context.specificity_evidence(claim("D08"), found)["L1H0"]
    assert judge(claim("D08"), d08).outcome is not Outcome.SUPPORTED
    assert conditions(d08)["precision of strong activations"].effect < 0.3


def test_what_another_head_turns_off_as_well_refutes() -> None:
    both = layer(n=150, sae=needing_both())
    assert len(both.family(0)) >= 10, "they pass the behaviour test, and draw most from the induction head"
    found = d12_turned_off.ablation_evidence(claim("D12"), families(both))["L1H0"]
    own = conditions(found)
    assert own["turned off by mean ablation"].effect > 0.95
    assert own["over other heads, at equal change"].effect < 0.1
    assert judge(claim("D12"), found).outcome is Outcome.REFUTED
    alone = d12_turned_off.ablation_evidence(claim("D12"), whole())["L1H0"]
    assert conditions(alone)["over other heads, at equal change"].effect > 0.95


def test_few_features_are_no_family_and_the_row_says_what_it_would_take() -> None:
    small = layer()
    s = small.selections[0]
    keep = np.flatnonzero(np.isin(s.features, [2, 3, *WRONG]))
    fields = {name: getattr(s, name)[keep] for name in ("features", "tokens", "shares", "rows")}
    small.__dict__["selections"] = {
        0: dataclasses.replace(s, **fields, matches=tuple(s.matches[k] for k in keep.tolist()))
    }
    assert len(small.family(0)) == 2
    for name, build in FAMILY_CLAIMS.items():
        verdict = judge(claim(name), build(claim(name), families(small))["L1H0"])
        assert verdict.outcome is Outcome.INCONCLUSIVE
        if name == "D07":
            assert "6 features draw most" in verdict.reason
        else:
            assert "2 of 6 selected features make a family, where 10 are needed" in verdict.reason
            assert "about 30 features" in verdict.reason


def test_another_design_than_the_survey_is_refused() -> None:
    of = with_design(claim("D09"), PlantedTokens(repeats=5))
    with pytest.raises(FraError, match="another PlantedTokens"):
        d09_d10_paths.own_token_evidence(of, whole())


def test_the_direct_path_is_a_share_of_both_and_its_difference_on_own_tokens_is_signed() -> None:
    some = layer()
    assert some.measured is not None
    n, pos = 60, 5
    rng = np.random.default_rng(0)
    direct, mlp = (torch.from_numpy(rng.normal(m, 1, (2, n, pos))) for m in (0.5, 0.2))
    fires = torch.from_numpy(rng.random((2, n, pos)) < 0.6)
    right = torch.from_numpy(rng.random((2, n, pos)) < 0.4)
    ones = torch.ones(n, pos, dtype=torch.bool)
    doc = torch.arange(n)
    some.ablated["L1H0", claim("D10").designed(d09_d10_paths.AblatedPairs)] = tuple(  # type: ignore[assignment]
        measures.Ablated(
            measures.PathChanges(direct[k], mlp[k], direct[k], fires[k], ones, torch.zeros(n, pos, dtype=torch.long)),
            doc,
            right[k],
            len(some.measured.documents),
        )
        for k in (0, 1)
    )
    own = conditions(d09_d10_paths.path_evidence(claim("D10"), families(some))["L1H0"])
    size = [direct[k][fires[k]].abs().sum() / (direct[k].abs() + mlp[k].abs())[fires[k]].sum() for k in (0, 1)]
    assert own["share of the direct path"].effect == pytest.approx(float(size[0]))
    assert own["over matched features"].effect == pytest.approx(float(size[0] - size[1]))
    there = fires[0] & right[0]
    assert own["direct less MLP, own token"].effect == pytest.approx(float((direct[0] - mlp[0])[there].mean()))


def chosen(of: LayerFamilies) -> dict[str, Any]:
    """Everything that the claims about the layer choose, and their tuned numbers."""
    s = of.selections[0]
    passed = of.family(0)
    assert of.choosing is not None
    context = d08_context.context_features(of, ContextFeatures(least_rows=5))
    features = np.arange(circuit.D_VOCAB, 2 * circuit.D_VOCAB)
    cuts = d08_context.upper_cuts(of.found, features, d08_context.first_copies(of.discovery), 0.8)
    return {
        "selection": [s.features, s.tokens, s.shares, *s.matches],
        "family": [passed],
        "scales": [planted.scales(of.choosing, s.features[passed], s.tokens[passed])],
        "context": [part for kind in context.values() for part in kind],
        "upper": [cuts],
        "failing": list(d13_polysemantic.needing(of, 0, NeedingFeatures(least_documents=1))),
        "means": [measures.head_means(of.found).numpy()],
    }


def other_half(of: LayerFamilies, seed: str) -> None:
    """Exchanges the planted documents that are measured."""
    of.target.name = seed
    s = of.selections[0]
    measured = of.plant("measured", {*s.tokens.tolist(), *s.token_of.values()})
    of.__dict__["measured"] = measured
    of.target.name = "circuit"


def test_exchanging_what_is_measured_moves_nothing_that_is_chosen() -> None:
    sae = needing_both()
    one, two = layer(sae=sae), layer(sae=sae, measured="something else")
    other_half(two, "other")
    assert not torch.equal(one.documents.tokens, two.documents.tokens)
    for name, parts in chosen(one).items():
        for a, b in zip(parts, chosen(two)[name], strict=True):
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), name
    bare = layer(sae=sae)
    for name in ("observed", "measured"):
        bare.__dict__[name] = None  # whatever looks there while it chooses has nothing to look at
    bare.documents = None  # type: ignore[assignment]
    for name, parts in chosen(bare).items():
        for a, b in zip(parts, chosen(one)[name], strict=True):
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), name
    rows = {}
    for which, of in (("one", one), ("two", two)):
        found = families(of)
        values: list[torch.Tensor] = []
        real = measures.turned_off

        def spy(dictionary: Any, seen: Any, at: Any, head: int, value: Any, kept: Any = values, run: Any = real) -> Any:
            if isinstance(value, torch.Tensor):
                kept.append(value.clone())
            return run(dictionary, seen, at, head, value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(d12_turned_off, "turned_off", spy)
            d12 = d12_turned_off.ablation_evidence(claim("D12"), found)["L1H0"]
        d11 = d11_patching.upstream_evidence(upstream_claim(), found)["L1H0"]
        rows[which] = (
            [v.tolist() for v in values],
            d12.detail["the other head, by discovery documents"],
            d12.detail["turned off by each at equal change, on discovery documents"],
            d11.detail["previous-token head"],
            d11.detail["the other head that does most, on other prompts"],
        )
        assert len(values) == 3  # the mean, zero, and the mean for the matches
        torch.testing.assert_close(values[0], of.found.z[:, 1:][of.found.real[:, 1:]].mean(0)[0])
    assert rows["one"] == rows["two"]


def test_a_feature_that_fails_and_needs_the_head_shows_its_loss() -> None:
    """Features that fire wherever the induction head tells their token, match or not, are measured where induction has
    nothing to match: there the head tells nothing, and putting it out costs nothing.
    """
    one = layer()
    design = NeedingFeatures(least_documents=1)
    s, half = one.selections[0], one.choosing
    assert half is not None
    own = planted.behaviour(half, s.features, s.tokens)
    quiet = dataclasses.replace(
        half, live=half.live.where(half.live.feature != 20), source=half.source[half.live.feature != 20]
    )
    one.__dict__["choosing"] = quiet
    fails, some = d13_polysemantic.needing(one, 0, design)
    assert s.features[fails].tolist() == [20]  # 0 of 12: the upper bound is 0.22
    assert own.hits[fails].tolist() == [12]
    of = with_design(claim("D13"), design)
    found = d13_polysemantic.polysemantic_evidence(of, families(one))["L1H0"]
    if not len(some):
        assert "none of them fires on a token that is new" in str(found.undecided)
        return
    texts = d13_polysemantic.natural(one, design)
    mean = measures.head_means(one.found)[0]
    with torch.no_grad():
        clean = patching.losses(one.model(texts.tokens), texts.tokens)
        with interventions.set_output(one.model, mean, layer=1, head=0):
            after = patching.losses(one.model(texts.tokens), texts.tokens)
        acts = one.dictionary.encode(attribution.observe(one.model, one.dictionary, texts.documents()).z.flatten(2))
    rows = (acts[:, :-1, 20] > 0) & measures.unseen_rows(texts.tokens)[:, :-1]
    rows[:, 0] = False
    (row,) = [r for r in found.detail["features"] if r["feature"] == "20"]
    assert row["rows"] == int(rows.sum())
    if row["rows"]:
        assert row["loss (nats)"] == pytest.approx(float((after - clean)[rows].mean()), abs=1e-5)


def attention(slope_first: tuple[float, ...], slope_rest: tuple[float, ...]) -> d14_prefix.PrefixAttention:
    """Heads whose attention grows by one slope on the examples that choose and by another on those measured."""
    design, rng = claim("D14").designed(Prefixes), np.random.default_rng(0)
    k = np.arange(design.longest)
    parts = [
        np.asarray(slopes)[:, None, None] * k + 0.3 + rng.normal(0, 0.01, (len(slopes), n, design.longest))
        for slopes, n in ((slope_first, design.chosen), (slope_rest, design.measured))
    ]
    at = np.concatenate(parts, axis=1)
    return d14_prefix.PrefixAttention([f"L1H{h}" for h in range(len(at))], at, at[..., -1] - 0.2, at[..., -1])


def test_heads_are_compared_that_other_examples_choose() -> None:
    of = claim("D14")
    found = d14_prefix.evidence_of(of, "t", attention((0.05, 0.03, 0.01), (0.01, 0.03, 0.05)))
    assert (found.detail["long"], found.detail["short"]) == ("L1H0", "L1H2")
    assert conditions(found)["slope difference"].effect == pytest.approx(-0.04, abs=2e-3)
    assert found.n == of.designed(Prefixes).measured
    alike = d14_prefix.evidence_of(of, "t", attention((0.05, 0.03, 0.01), (0.05, 0.03, 0.01)))
    assert conditions(alike)["slope difference"].holds(of.level)


def test_without_another_head_there_is_no_control() -> None:
    made = layer()
    made.heads = [0, 1]
    s = made.selections[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d13_polysemantic, "needing", lambda *_: (np.arange(2), np.arange(2)))
        d13 = d13_polysemantic.polysemantic_evidence(claim("D13"), families(made))["L1H0"]
    assert len(s.features)
    assert "no other to compare with" in str(d13.undecided)
    alone = families()
    one = dataclasses.replace(alone, status={h: s for h, s in alone.status.items() if h != "L0H1"})
    assert "one head stands upstream" in str(d11_patching.upstream_evidence(claim("D11"), one)["L1H0"].undecided)


def test_an_unselected_layer_has_nothing_to_say() -> None:
    other = layer(strength=0.0)
    found = families(other)
    for name, build in (("D07", d07_behaviour.behaviour_evidence), ("D12", d12_turned_off.ablation_evidence)):
        outcome = judge(claim(name), build(claim(name), found)["L1H0"]).outcome
        assert outcome in (Outcome.INCONCLUSIVE, Outcome.REFUTED)


def test_conditions_that_are_shares_are_said_as_shares() -> None:
    rng = np.random.default_rng(0)
    total, part = rng.normal(4, 0.5, 40), rng.normal(3, 0.5, 40)
    of = claim("D11", bars={}, worth={}, condition="noising", gates={})

    def measure(_: LayerFamilies, head: int) -> rows_of_heads.HeadNumbers:
        return rows_of_heads.HeadNumbers(
            {"noising": bounds.above_share(part, total, 0.5)},
            [f"{k:02}" for k in range(40)],
            40,
            shares={"noising": (float(part.mean()), float(total.mean()))},
        )

    (own,) = rows_of_heads.per_head(of, whole(), measure)["L1H0"].candidates["the family"]
    assert own.effect == pytest.approx(part.mean() / total.mean())
    assert own.bar == 0.5 and own.holds(0.05) and own.low > 0.5


def any_target(**fields: Any) -> Families:
    return Families("none", {}, {}, np.arange(50), **fields)


def test_no_heads_is_no_row() -> None:
    assert d07_behaviour.behaviour_evidence(claim("D07"), any_target()) == {}
    said = d14_prefix.prefix_evidence(claim("D14"), None, any_target())  # type: ignore[arg-type]
    assert judge(claim("D14"), said).outcome is Outcome.CANNOT_RUN
