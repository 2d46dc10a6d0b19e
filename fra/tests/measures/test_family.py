"""Families of features on a hand-built induction head, where every feature was written down; measures against the
model's own hooks.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as sps

from fra import attribution, interventions
from fra.claim import Condition, Outcome, judge
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
from fra.measures.families import families as families_of
from fra.measures.families import rows as rows_of_heads
from fra.measures.families.families import Families, LayerFamilies, attribution_shares
from fra.stimuli import repeated
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.families import HOOK, WRONG, families, layer
from fra.tests.intervening import TOKENS, double
from fra.tests.models import random_tokens, tiny, tiny_sae
from fra.verdicts import bounds, stats
from fra.verdicts.decide import Power, Sampled, corrected, means_of, power_of


@cache
def made() -> LayerFamilies:
    return layer()


@cache
def whole() -> Families:
    return families(made())


def test_selection_finds_the_heads_features_and_their_tokens() -> None:
    s = made().selections[0]
    assert set(s.features) < set(range(circuit.D_VOCAB)), "features of the other head were selected"
    assert np.array_equal(s.tokens, s.features)  # feature v raises token v
    assert bool((s.shares > 0.99).all())
    has = s.controls >= 0
    assert bool((s.controls[has] >= circuit.D_VOCAB).all()), "a match that the induction head brings about"
    assert len(set(s.controls[has])) == has.sum()
    rows = attribution_shares(made().found)[1].numpy()
    assert bool((rows[s.controls[has]] <= 2 * rows[s.features[has]]).all())
    assert bool((2 * rows[s.controls[has]] >= rows[s.features[has]]).all())


def test_attribution_shares_by_hand() -> None:
    model = tiny("gpt2", torch.float64)
    sae = tiny_sae("blocks.1.attn.hook_z", dtype="float64")
    o = attribution.observe(model, sae, TOKENS)
    shares, rows = attribution_shares(o)
    acts = sae.encode(o.z.flatten(2)).to_dense()
    feature = int((acts[:, 1:] > 0).sum((0, 1)).argmax())
    parts = torch.einsum("bthd,hd->bth", o.z, sae.W_enc.detach().view(4, 8, -1)[:, :, feature])
    fires = acts[:, :, feature] > 0
    fires[:, 0] = False
    squares = parts[fires].square().sum(0)
    torch.testing.assert_close(shares[feature], squares / squares.sum())
    assert int(rows[feature]) == int(fires.sum())


def test_planted_tokens_stand_where_they_are_said_to_stand() -> None:
    tokens, pool = list(range(40, 60)), np.arange(50)
    planted = repeated.repeated_planted(tokens, pool, 41, 64, ("x",), repeats=5)
    count = dict.fromkeys(tokens, 0)
    for p in planted:
        row, period = p.document.tokens.tolist(), p.document.period
        assert row[1 : period + 1] == row[period + 1 :]
        assert len(set(row[1 : period + 1])) == period
        for token, index in p.planted.items():
            assert index >= 1
            assert [n for n, t in enumerate(row) if t == token] == [index + 1, period + index + 1]
            count[token] += 1
    assert set(count.values()) == {5}
    joined = repeated.join(*(repeated.collate([p.document for p in part]) for part in (planted[:3], planted[3:])))
    for number, p in enumerate(planted):
        assert joined.tokens[number, : len(p.document.tokens)].tolist() == p.document.tokens.tolist()
        rows = joined.row_doc == number
        assert joined.row_pos[rows].tolist() == list(range(p.document.period + 1, 2 * p.document.period + 1))


def test_behaviour_counts_hits_false_fires_and_other_tokens() -> None:
    own, both, _ = made().behaviours[0]
    planted = own.features != circuit.BOS  # a special token is never planted, and its feature not tested
    assert bool((own.repeats == 12 * planted).all())
    assert not own.passes[~planted].any()
    wrong = np.isin(own.features, WRONG)[planted]
    assert wrong.sum() == len(WRONG)
    own = families_of.Behaviour(*(part[planted] for part in vars(own).values()))
    assert bool((own.hits == 12).all())  # every one fires before the second occurrence
    assert bool((own.firsts[wrong] == 12).all())  # those fire before the first, too
    assert bool((own.firsts[~wrong] == 0).all())
    assert bool((own.sourced[~wrong] == 12).all())
    assert bool((own.others[wrong] == own.other_repeats[wrong]).all())
    assert bool((own.others[~wrong] == 0).all())
    assert bool((own.passes == ~wrong).all())
    assert not both.passes.any()
    assert not (both.hits + both.firsts)[1::2].all()


def test_ablated_heads_are_those_of_the_models_own_hooks() -> None:
    at_hand = made()
    at, _ = measures.firing(at_hand.observed, np.arange(2 * circuit.D_VOCAB))
    for head in (0, 1):
        value = measures.head_means(at_hand.found)[head]
        with interventions.set_output(at_hand.model, value, layer=1, head=head), torch.no_grad():
            z = at_hand.model.run_with_cache(at_hand.documents.tokens, names_filter=[HOOK])[1][HOOK]
        gone = at_hand.dictionary.encode(z.flatten(2))[at.doc, at.pos, at.feature] == 0
        assert torch.equal(measures.turned_off(at_hand, at, head, value), gone)
        assert 0 < int(gone.sum()) < len(gone)


def test_strict_induction_by_a_loop() -> None:
    tokens = torch.stack([random_tokens(20, seed) % 6 for seed in (3, 4)])
    for wanted, found in zip((2, 5), measures.strict_induction(tokens, np.array([2, 5])), strict=True):
        for b in range(2):
            row = tokens[b].tolist()
            truth = [any(row[u] == row[t] and row[u + 1] == wanted for u in range(t)) for t in range(20)]
            assert found[b].tolist() == truth
    seen_before = [[t in row[:n] for n, t in enumerate(row)] for row in tokens.tolist()]
    assert measures.unseen_rows(tokens).logical_not().tolist() == seen_before


def test_specificity_by_a_loop() -> None:
    at_hand = made()
    features = np.array([10, 12, 21])
    proxies = list(measures.strict_induction(at_hand.documents.tokens, np.array([10, 12, 30])))
    proxies[2] = torch.rand(proxies[2].shape, generator=torch.Generator().manual_seed(0)) < 0.3  # late rows, too
    s = measures.specificity(at_hand, features, proxies)
    acts = at_hand.dictionary.encode(at_hand.observed.z.flatten(2)).detach().numpy().astype(float)
    found = at_hand.dictionary.encode(at_hand.found.z.flatten(2)).detach().numpy().astype(float)
    real, before = at_hand.observed.real.numpy(), at_hand.found.real.numpy()
    n = len(acts)
    upper, right, permuted, mass, missed, wanted, r = (np.zeros(n) for _ in range(7))
    correlations = []
    for k, feature in enumerate(features):
        there = found[:, 1:, feature][before[:, 1:]]
        cut = np.quantile(there[there > 0], 0.8)
        proxy = proxies[k].numpy() & real
        for d in range(n):
            for t in range(1, acts.shape[1]):
                a = acts[d, t, feature]
                wanted[d] += proxy[d, t]
                missed[d] += proxy[d, t] and a == 0
                if a > 0 and real[d, t]:
                    mass[d] += a / cut
                    r[d] += a / cut * proxy[d, t]
                    if a >= cut * (1 - 1e-6):
                        upper[d] += 1
                        right[d] += proxy[d, t]
                        permuted[d] += (proxy[:, t].sum() - proxy[d, t]) / (real[:, t].sum() - 1)
        rows = real.copy()
        rows[:, 0] = False
        if proxy[rows].any():
            correlations.append(np.corrcoef(acts[:, :, feature][rows], proxy[rows])[0, 1])
    for mine, theirs in (
        (s.upper, upper), (s.upper_right, right), (s.upper_permuted, permuted), (s.mass, mass), (s.mass_right, r),
        (s.missed, missed), (s.wanted, wanted),
    ):  # fmt: skip
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    assert s.correlation == pytest.approx(np.mean(correlations), abs=1e-6)


@pytest.mark.parametrize(("kind", "at_layer"), [("gpt2", 0), ("gpt2", 1), ("gemma2", 0)])
def test_path_changes_are_those_of_the_interventions(kind: str, at_layer: int) -> None:
    model, sae = tiny(kind), tiny_sae(f"blocks.{at_layer}.attn.hook_z")
    o = attribution.observe(model, sae, TOKENS)
    features = torch.unique(o.live.feature)[:6].numpy()
    pairs = measures.chosen_pairs(o, features, ("x",))
    assert len(pairs) >= 4
    found = measures.path_changes(model, sae, at_layer, o, TOKENS, pairs, features)
    acts = sae.encode(o.z.flatten(2)).to_dense()
    before = patching.losses(model(TOKENS), TOKENS)
    for number, (doc, k) in enumerate(pairs.tolist()):
        tokens, feature = TOKENS[doc : doc + 1], int(features[k])
        change = patching.ablate_features(model, [feature], sae)
        paths = (
            ("total", change),
            ("mlp", patching.into_mlp(model, change, tokens, layer=at_layer)),
            ("direct", patching.into_final(model, change, tokens, layer=at_layer)),
        )
        for name, path in paths:
            with path, torch.no_grad():
                after = patching.losses(model(tokens), tokens)[0]
            truth = (after - before[doc]).detach()
            torch.testing.assert_close(getattr(found, name)[number], truth, rtol=0, atol=2e-5)
            assert float(truth.abs().max()) > 1e-4 or at_layer == 0 or name == "mlp"
        fires = acts[doc, :-1, feature] > 0
        fires[0] = False
        assert torch.equal(found.fires[number], fires)
        assert torch.equal(found.next_token[number], tokens[0, 1:])


def test_patching_upstream_is_each_prompts_own() -> None:
    model, sae = double("gpt2"), tiny_sae("blocks.1.attn.hook_z", dtype="float64")
    o = attribution.observe(model, sae, TOKENS)
    given = d11_patching.prompts(np.array([3, 7]), np.array([40, 41]), np.arange(1, 300), 0, ("x",))
    for row, other, at, feature in zip(given.clean, given.corrupted, given.at.tolist(), given.feature, strict=True):
        assert int(row[at]) == {3: 40, 7: 41}[int(feature)]
        assert int(row[at - 1]) == int(row[-1])
        assert torch.nonzero(row != other)[:, 0].tolist() == [at - 1]
        assert len(set(row.tolist())) == len(row) - 1
    few = d11_patching.Prompts(*(part[:6] for part in (given.clean, given.corrupted, given.at, given.feature)))
    got = d11_patching.patch_upstream(model, o, few)
    for n in (0, 5):
        rows = patching.own_positions([int(few.at[n])], few.clean.shape[1])
        one, other = few.clean[n : n + 1], few.corrupted[n : n + 1]
        patch = interventions.patch_output(model, other, layer=0, head=2, rows=rows)
        with patch:
            truth = attribution.pre_activation(model, sae, one[0], few.feature[n : n + 1])[-1, 0]
        assert got.noised["L0H2"][n] == pytest.approx(float(truth), abs=1e-9)
        with patching.patch_activation(model, one, "blocks.0.hook_mlp_out", rows=rows):
            truth = attribution.pre_activation(model, sae, other[0], few.feature[n : n + 1])[-1, 0]
        assert got.denoised["MLP"][n] == pytest.approx(float(truth), abs=1e-9)
        clean = attribution.pre_activation(model, sae, one[0], few.feature[n : n + 1])[-1, 0]
        assert got.clean[n] == pytest.approx(float(clean), abs=1e-9)


def test_prefixes_are_the_same_examples_and_end_where_they_should() -> None:
    e = d14_prefix.prefix_examples(np.arange(64), 64, ("x",), n=30)
    rows = [row.tolist() for row in e.tokens[4]]
    key = int(e.key[4])
    for k, row in enumerate(rows, 1):
        assert row[-k:] == row[key - k : key]
        assert row[: -d14_prefix.LONGEST_PREFIX] == rows[0][: -d14_prefix.LONGEST_PREFIX]
        assert k == d14_prefix.LONGEST_PREFIX or row[-k - 1] != row[key - k - 1]
        assert len(set(row)) == len(row) - k
    apart = [torch.nonzero(part[4] != e.tokens[4, -1])[:, 0].tolist() for part in (e.before, e.unrelated)]
    assert apart[0] == [len(rows[0]) - 2]
    assert key < apart[1][0] < len(rows[0]) - d14_prefix.LONGEST_PREFIX
    assert len({int(k) for k in e.key}) > 3
    got = d14_prefix.prefix_attention(made().model, e, [(1, 0), (1, 1)])
    assert got.at[0].min() > 0.99
    assert got.at[1].max() < 1e-3
    assert np.abs(got.slopes()).max() < 1e-3
    line = d14_prefix.PrefixAttention(["a"], np.arange(9.0)[None, None] * 0.3 + 5, np.zeros((1, 1)), np.zeros((1, 1)))
    assert line.slopes() == pytest.approx(0.3)


def test_rows_after_a_word_by_a_loop() -> None:
    tokens = torch.stack([random_tokens(40, seed) % 12 for seed in (3, 4, 5)])
    stops = tokens == 7
    anywhere, near = d08_context.after_word(tokens, 2, None), d08_context.after_word(tokens, 2, stops)
    for b, row in enumerate(tokens.tolist()):
        for t in range(40):
            assert bool(anywhere[b, t]) == (2 in row[:t])
            back = [u for u in range(max(0, t - d08_context.NEAR), t) if row[u] == 2 and 7 not in row[u + 1 : t + 1]]
            assert bool(near[b, t]) == bool(back)
    assert 0 < int(near.sum()) < int(anywhere.sum())


def test_a_context_feature_is_found_with_its_word() -> None:
    after_nine = layer(n=40)
    token = torch.arange(circuit.D_VOCAB)
    with torch.no_grad():  # the second head attends to token 9, wherever it stood
        second = after_nine.model.blocks[1].attn
        second.W_Q[1].zero_()
        second.W_K[1].zero_()
        second.W_Q[1, token, 0] = 20.0 * circuit.D_VOCAB**0.5
        second.W_K[1, 9, 0] = 1.0
    after_nine.target.tokenizer.decode = lambda ids: f"w{ids[0]}"
    features, words = d08_context.context_features(after_nine)["long-range"]
    assert features.tolist() == [circuit.D_VOCAB + 9]
    assert words.tolist() == [9]
    assert not len(d08_context.context_features(after_nine)["local"][0])
    found = d08_context.context_evidence(claim("D08.context"), families(after_nine), "long-range")
    (conditions,) = found.candidates.values()
    by_name = {c.name: c for c in conditions}
    assert by_name["precision of the upper fifth"].effect > 0.9  # it fires on the word itself, too
    assert by_name["over permuted documents"].effect > 0.2
    none = d08_context.context_evidence(claim("D08.local"), families(after_nine), "local")
    assert judge(claim("D08.local"), none).outcome is Outcome.INCONCLUSIVE


# ---- verdicts


def test_the_circuit_has_a_family_and_its_claims_say_so() -> None:
    made_of = {
        "D07": d07_behaviour.behaviour_evidence,
        "D07.token": d07_behaviour.token_evidence,
        "D09": d09_d10_paths.own_token_evidence,
        "D10": d09_d10_paths.path_evidence,
        "D12": d12_turned_off.ablation_evidence,
    }
    for name, build in made_of.items():
        found = build(claim(name), whole())
        verdict = judge(claim(name), found["L1H0"])
        assert verdict.outcome is Outcome.SUPPORTED, f"{name}: {verdict.reason}"
        assert judge(claim(name), found["L1H1"]).outcome is Outcome.NOT_APPLICABLE
    d11 = d11_patching.upstream_evidence(claim("D11"), whole())["L1H0"].detail
    assert d11["previous-token head"] == "L0H0"
    assert d11["share by noising and denoising"]["L0H0"] == pytest.approx([1, 1])
    assert d11["share by noising and denoising"]["L0H1"] == pytest.approx([0, 0])
    d08 = d08_context.specificity_evidence(claim("D08"), whole())["L1H0"]
    assert [c.name for c in d08.candidates["the family"] if not c.holds(0.05)] == ["missed"]  # it misses nothing
    d13 = d13_polysemantic.polysemantic_evidence(claim("D13"), whole())["L1H0"]
    assert d13.undecided == "no feature of the selection fails induction for sure"


def test_what_refutes_a_family_is_tested_at_a_third_of_the_level() -> None:
    made = layer(n=6)
    own, both, n = made.behaviours[0]
    every = np.arange(len(own.hits))
    fields = {"repeats": np.full(len(every), 12), "hits": np.where(every < 1, 12, 0), "firsts": np.zeros_like(every)}
    own = dataclasses.replace(own, **fields)  # one passes
    made.__dict__["behaviours"] = {0: (own, both, n)}
    (conditions,) = d07_behaviour.behaviour_evidence(claim("D07"), families(made))["L1H0"].candidates.values()
    share, matched, *_ = conditions
    k, total = int(own.passes.sum()), int((own.repeats > 9).sum())
    assert k == 1 < total / 2
    assert share.p_refute == pytest.approx(min(1.0, 3 * sps.binom.cdf(k, total, 0.5)))
    assert share.high == pytest.approx(sps.beta.ppf(1 - 0.05 / 3, k + 1, total - k))
    assert share.low == pytest.approx(sps.beta.ppf(0.05, k, total - k + 1) if k else 0.0)
    assert share.fails(0.05) == (share.high < 0.5)
    theirs = both.passes.reshape(-1, 2).any(1)
    table = [[k, total - k], [int(theirs.sum()), int((~theirs).sum())]]
    assert matched.p_refute == pytest.approx(min(1.0, 3 * sps.fisher_exact(table, alternative="less")[1]))


def test_features_with_too_few_repeats_are_left_out() -> None:
    made = layer(n=6)
    own, both, n = made.behaviours[0]
    few = dataclasses.replace(own, repeats=np.where(np.arange(len(own.repeats)) == 0, 9, own.repeats))
    made.__dict__["behaviours"] = {0: (few, both, n)}
    found = d07_behaviour.behaviour_evidence(claim("D07"), families(made))["L1H0"]
    (repeats,) = [c for c in found.candidates["the selection"] if c.name == "repeats a feature"]
    assert repeats.effect == 12 and repeats.holds(0.05)
    assert found.detail["passed"].endswith(f"of {int((few.repeats > 9).sum())}")


def test_without_another_head_there_is_no_control() -> None:
    made = layer(n=6)
    made.heads = [0, 1]
    own, *rest = made.behaviours[0]
    made.behaviours[0] = (dataclasses.replace(own, hits=np.zeros_like(own.hits)), *rest)
    d13 = d13_polysemantic.polysemantic_evidence(claim("D13"), families(made))["L1H0"]
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


def test_the_difference_of_ratio_means_is_linearised() -> None:
    rng = np.random.default_rng(0)
    (a, b), (n_a, n_b) = rng.normal(2, 1, (2, 40)), rng.integers(1, 9, (2, 40)).astype(float)
    values, one = bounds.difference(a, n_a, b, n_b)
    assert values.sum() / one.sum() == pytest.approx(a.sum() / n_a.sum() - b.sum() / n_b.sum())
    draws = rng.integers(0, 40, (4000, 40))
    truth = (a[draws].sum(1) / n_a[draws].sum(1) - b[draws].sum(1) / n_b[draws].sum(1)).std()
    assert values.std() / 40**0.5 == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize(
    ("values", "outcome"),
    [([1.0] * 60 + [0.9], "holds"), ([0.0] * 40 + [0.03], "fails"), ([1.0] * 30, "holds"), ([1.0] * 3, "neither")],
)
def test_exact_bounds_where_nearly_all_agree(values: list[float], outcome: str) -> None:
    sample = np.asarray(values)
    of = claim("D09")
    means = {"L1H0": means_of(of, "t", "L1H0", "x", sample)}
    ((c,),) = corrected(of, [Sampled(name="x", samples=means, bounded=(0.0, 1.0))]).conditions["L1H0"]
    assert c.low <= c.effect <= c.high
    assert c.holds(0.05) == (outcome == "holds") == (c.low > 0.5)
    assert c.fails(0.05) == (outcome == "fails") == (c.high < 0.5)
    if len(set(values)) == 1:
        assert c.low == pytest.approx(0.05 ** (1 / len(values)))


def test_p_is_stepped_down_and_q_comes_from_p_before_that() -> None:
    """Four heads, of which one is rejected, one is constant and has an exact bound; and what a ledger row shows."""
    rng = np.random.default_rng(3)
    samples = {"L1H0": rng.normal(1.0, 0.1, 30), "L1H1": rng.normal(0.59, 0.2, 30), "L1H2": np.full(30, 0.9)}
    samples["L1H3"] = rng.normal(0.55, 0.2, 30)
    of = dataclasses.replace(claim("D09"), bars={"y": 0.8})
    means = {h: means_of(of, "circuit", h, "x", x) for h, x in samples.items()}
    tested = corrected(of, [Sampled(name="x", samples=means, bounded=(0.0, 1.0))])
    found, raw = {h: own[0] for h, own in tested.conditions.items()}, tested.raw
    bootstrapped = [h for h in samples if h != "L1H2"]
    assert all(raw[h] == means[h].p_above(0.5, False)[0] for h in bootstrapped)
    assert raw["L1H2"] == pytest.approx(sps.binom.sf(29, 30, 0.5 / 0.9))  # 30 of 30 reach 0.9
    assert found["L1H2"][0].p == pytest.approx(4 * raw["L1H2"])
    stepped = stats.holm([float(means[h].p_above(0.5, False)[0]) for h in samples])
    assert 0.05 < stepped[1] < 1 and 0.05 < stepped[3] < 1 and stepped[1] != stepped[3]
    for h, p in zip(samples, stepped, strict=True):
        if h != "L1H2":
            assert found[h][0].p == pytest.approx(p)
            assert found[h][0].holds(0.05) == (found[h][0].low > 0.5)

    def measure(_: LayerFamilies, head: int) -> rows_of_heads.HeadNumbers:
        parts = {name: (samples[f"L1H{head}"], np.ones(30)) for name in ("x", "y")}
        return rows_of_heads.HeadNumbers(parts, [f"{k:02}" for k in range(30)], 30, ranges={"x": (0.0, 1.0)})

    status = dict.fromkeys(samples, whole().status["L1H0"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Families, "heads", list(samples))
        patch.setattr(Families, "of", lambda self, head: (made(), int(head[-1])))
        rows = rows_of_heads.per_head(of, dataclasses.replace(whole(), status=status), measure, headline="x", null=0.0)
    expected = sps.false_discovery_control([rows[h].candidates["the family"][0].p or 0.0 for h in samples])
    assert [rows[h].q for h in samples] != pytest.approx(expected), "q of adjusted p"
    assert [rows[h].q for h in samples] == pytest.approx(sps.false_discovery_control([raw[h] for h in samples]))


def test_power_is_the_least_among_the_conditions_that_fail() -> None:
    rng = np.random.default_rng(5)
    means = {
        "sharp": stats.ClusterMeans(rng.normal(0.9, 0.1, 40), seed=0),
        "blunt": stats.ClusterMeans(rng.normal(-2.0, 1.5, 40), seed=1),
        "at zero": stats.ClusterMeans(rng.normal(-9.0, 0.1, 40), seed=2),
    }
    bars = {"sharp": 0.5, "blunt": 0.2, "at zero": 0.0}
    columns = [Sampled(name=name, samples={"x": means[name]}, bar=bar) for name, bar in bars.items()]

    def least(**fails: bool) -> float | None:
        ends = {name: (bar - 2, bar - 1) if fails.get(name) else (bar - 1, bar + 1) for name, bar in bars.items()}
        own = tuple(Condition(n, sum(ends[n]) / 2, *ends[n], bar) for n, bar in bars.items())
        return power_of(claim("D09"), Power("failing", 0.0, or_headline=True), columns, "x", [own], 2)

    powers = {n: float(stats.power_above(means[n], 0.0, bars[n], 0.025, False)[0]) for n in ("sharp", "blunt")}
    assert powers["sharp"] > 0.9 > 0.3 > powers["blunt"]
    assert least() == least(sharp=True) == powers["sharp"]
    assert least(blunt=True) == least(sharp=True, blunt=True) == powers["blunt"]
    assert least(**{"at zero": True}) is None  # there is nothing to tell a bar of zero from


def test_fishers_power_is_a_sum_over_outcomes() -> None:
    power = d07_behaviour.fisher_power(20, 20, 1, 0.5, 0.05)
    draws = np.random.default_rng(0).binomial(20, 0.5, 4000)
    p = [sps.fisher_exact([[k, 20 - k], [1, 19]], alternative="greater")[1] for k in range(21)]
    assert power == pytest.approx(np.mean(np.asarray(p)[draws] <= 0.05), abs=0.02)


def any_target(**fields: Any) -> Families:
    return Families("none", {}, {}, np.arange(50), **fields)


def test_no_heads_is_no_row() -> None:
    assert d07_behaviour.behaviour_evidence(claim("D07"), any_target()) == {}
    said = d14_prefix.prefix_evidence(claim("D14"), None, any_target())  # type: ignore[arg-type]
    assert judge(claim("D14"), said).outcome is Outcome.CANNOT_RUN
