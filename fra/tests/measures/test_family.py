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
from fra.attribution.head_outputs import Live
from fra.claim import Claim, Evidence, Outcome, judge
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
    planted,
    specific,
)
from fra.measures.families import rows as rows_of_heads
from fra.measures.families.designs import (
    ContextFeatures,
    FamilySelection,
    NeedingFeatures,
    OwnScale,
    PlantedTokens,
    Prefixes,
    UpstreamPrompts,
)
from fra.measures.families.families import Families, LayerFamilies, attribution_shares
from fra.stimuli import repeated
from fra.stimuli.padding import Texts
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.families import HOOK, WRONG, families, layer, needing_both, repeater
from fra.tests.intervening import TOKENS, double
from fra.tests.models import random_tokens, tiny, tiny_sae
from fra.verdicts import bounds


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


def test_matches_are_all_that_are_alike_up_to_twenty_and_none_is_of_the_head() -> None:
    s = made().selections[0]
    shares, counts = attribution_shares(made().found)
    rows, design = counts.numpy(), FamilySelection()
    pool = np.flatnonzero((rows >= design.least_rows) & (shares[:, 0].numpy() < design.control_share))
    sizes = set()
    for feature, matches in zip(s.features, s.matches, strict=True):
        alike = pool[(2 * rows[pool] >= rows[feature]) & (rows[pool] <= 2 * rows[feature])]
        assert set(matches) <= set(alike)
        assert len(set(matches)) == len(matches) == min(len(alike), design.matches)
        assert not set(matches) & set(range(circuit.D_VOCAB)), "a match that the induction head brings about"
        sizes.add(len(matches))
    assert max(sizes) == design.matches
    assert set(s.token_of) == set(s.matched(np.arange(len(s.features))))
    few = dataclasses.replace(design, matches=3)
    less = layer()
    less.selecting = few
    for own, more in zip(less.selections[0].matches, s.matches, strict=True):
        assert own.tolist() == more[:3].tolist()  # the first of them raise the token most


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


def halves() -> tuple[planted.Planting, planted.Planting]:
    """Both halves of the circuit's planted documents."""
    first, second = made().choosing, made().measured
    assert first is not None
    assert second is not None
    return first, second


def test_the_halves_share_no_document() -> None:
    first, second = ({tuple(p.document.tokens.tolist()) for p in half.documents} for half in halves())
    assert not first & second
    for half in halves():
        for token in made().selections[0].tokens:
            assert len(half.holding(int(token))) == (token != circuit.BOS) * PlantedTokens().repeats


def test_activations_before_planted_tokens_by_a_loop() -> None:
    for half in halves():
        features = half.features[[0, 3, 11, -1]]
        seen = attribution.observe(made().model, made().dictionary, half.texts.documents())
        acts = made().dictionary.encode(seen.z.flatten(2)).detach().numpy()
        rows = [
            (n, p.document.period + index, index, token)
            for n, p in enumerate(half.documents)
            for token, index in sorted(p.planted.items(), key=lambda item: item[1])
        ]
        doc, pos, tokens = half.seconds
        assert list(zip(doc, pos, tokens, strict=True)) == [(n, at, token) for n, at, _, token in rows]
        truth = np.stack([acts[n, at, features] for n, at, _, _ in rows])
        np.testing.assert_allclose(half.before_seconds(features), truth, rtol=1e-6)
        for number, at, index, token in rows:
            row = half.texts.tokens[number]
            assert int(row[at + 1]) == int(row[index + 1]) == token
            assert half.before["second"][number, at] == half.before["first"][number, index] == token
        assert (half.before["first"] >= 0).sum() == (half.before["second"] >= 0).sum() == len(rows)


def test_behaviour_counts_hits_and_false_fires() -> None:
    s, half = made().selections[0], halves()[1]
    own = planted.behaviour(half, s.features, s.tokens)
    there = own.features != circuit.BOS  # a special token is never planted, and its feature not tested
    assert bool((own.repeats == 12 * there).all())
    passes = own.passes(PlantedTokens())
    assert not passes[~there].any()
    wrong = np.isin(own.features, WRONG) & there
    assert wrong.sum() == len(WRONG)
    right = there & ~wrong
    assert bool((own.hits[there] == 12).all())  # every one fires before the second occurrence
    assert bool((own.firsts[wrong] == 12).all())  # those fire before the first, too
    assert bool((own.firsts[right] == 0).all())
    assert bool((own.hits_by_document.sum(1) == own.hits).all())
    assert bool((own.sourced_by_document[right] == own.hits_by_document[right]).all())
    assert bool((passes == right).all())


def test_behaviour_of_any_pairs_by_a_loop() -> None:
    s, half = made().selections[0], halves()[1]
    rng = np.random.default_rng(0)
    pairs = sorted({(int(rng.choice(half.features)), int(rng.choice(s.tokens))) for _ in range(60)})
    table = np.asarray(pairs)[rng.permutation(len(pairs))]
    got = planted.behaviour(half, table[:, 0], table[:, 1])
    seen = attribution.observe(made().model, made().dictionary, half.texts.documents())
    acts = made().dictionary.encode(seen.z.flatten(2)).detach().numpy()
    assert got.hits.sum() > 0 and got.firsts.sum() > 0
    for k, (feature, token) in enumerate(table.tolist()):
        at = [(n, p.document.period, p.planted[token]) for n, p in enumerate(half.documents) if token in p.planted]
        hits = [n for n, period, index in at if acts[n, period + index, feature] > 0]
        assert got.repeats[k] == len(at)
        assert np.flatnonzero(got.hits_by_document[k]).tolist() == hits
        assert got.firsts[k] == sum(acts[n, index, feature] > 0 for n, _, index in at)


def test_a_hit_is_sourced_where_the_earlier_token_contributes_most() -> None:
    s, half = made().selections[0], halves()[1]
    feature = int(s.features[20])
    moved = half.source.clone()
    mine = torch.nonzero((half.live.feature == feature) & (moved >= 0))[:, 0]
    moved[mine[:5]] += 1  # the token after it, as an off-by-one would have it
    other = dataclasses.replace(half, source=moved)
    before, after = (planted.behaviour(h, s.features, s.tokens).sourced_by_document[20].sum() for h in (half, other))
    assert (before, after) == (12, 7)


def test_scales_are_medians_before_own_tokens() -> None:
    s, (first, _) = made().selections[0], halves()
    live, rng = first.live, np.random.default_rng(0)
    kept = torch.from_numpy(rng.random(len(live)) < 0.8)
    some = live.where(kept)
    some = dataclasses.replace(some, value=torch.from_numpy(rng.uniform(1, 9, len(some))))
    half = dataclasses.replace(first, live=some, source=first.source[kept])
    features, tokens = s.features[9:14], s.tokens[9:14]
    at = zip(some.doc.tolist(), some.pos.tolist(), some.feature.tolist(), some.value.tolist(), strict=True)
    values = {(d, p, f): v for d, p, f, v in at}
    truth = [
        np.median(
            [
                values.get((n, p.document.period + p.planted[t], f), 0.0)
                for n, p in enumerate(half.documents)
                if t in p.planted
            ]
        )
        for f, t in zip(features.tolist(), tokens.tolist(), strict=True)
    ]
    np.testing.assert_allclose(planted.scales(half, features, tokens), truth, rtol=1e-6)
    assert len(set(truth)) == len(truth)


def weaker(of: LayerFamilies, by: float) -> LayerFamilies:
    """All activations in the measured half so many times as large."""
    half = of.measured
    assert half is not None
    of.__dict__["measured"] = dataclasses.replace(half, live=dataclasses.replace(half.live, value=half.live.value * by))
    return of


def test_what_is_strong_is_told_by_the_other_half() -> None:
    """Activations that are all a little short of half the scale are not strong, whatever they are among themselves."""
    for by, strong in ((0.45, 0.0), (0.55, 1.0)):
        of = weaker(layer(), by)
        own, *_ = d07_behaviour.knowing(of, 0, OwnScale())
        assert own.tolist() == [strong] * len(own)
        d08 = d08_context.specificity_evidence(claim("D08"), families(of))["L1H0"]
        assert conditions(d08)["missed"].effect == pytest.approx(1 - strong)


def test_pairs_of_activations_as_mann_and_whitney_count_them() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 30).astype(float), rng.integers(0, 9, 50).astype(float)
    assert d07_behaviour.stats_of_pairs(a, b) == pytest.approx(sps.mannwhitneyu(a, b).statistic / (30 * 50))


def test_knowing_by_a_loop() -> None:
    both = layer(sae=repeater())
    first, second = both.choosing, both.measured
    assert first is not None and second is not None
    passed = both.family(0)
    features, tokens = both.selections[0].features[passed], both.selections[0].tokens[passed]
    own, others, above, knows = d07_behaviour.knowing(both, 0, OwnScale())
    scale = planted.scales(first, features, tokens)
    acts = (
        both.dictionary.encode(attribution.observe(both.model, both.dictionary, second.texts.documents()).z.flatten(2))
        .detach()
        .numpy()
    )
    for k in (0, 9, 12, 30):
        mine, theirs = [], []
        for n, p in enumerate(second.documents):
            for token, index in p.planted.items():
                value = acts[n, p.document.period + index, features[k]]
                (mine if token == tokens[k] else theirs).append(value >= 0.5 * scale[k])
        assert own[k] == pytest.approx(np.mean(mine))
        assert others[k] == pytest.approx(np.mean(theirs))
    repeats = (features >= 10) & (features < 40)
    assert 20 < repeats.sum() < len(features)
    assert bool((knows == ~repeats).all()), "what fires for any repeat knows no token"
    assert bool((others[repeats] > 0.4).all())
    assert bool((above[~repeats] > 0.9).all())


def test_ablated_heads_are_those_of_the_models_own_hooks() -> None:
    at_hand = made()
    at, _ = measures.firing(at_hand.observed, np.arange(2 * circuit.D_VOCAB))
    for head in (0, 1):
        value = measures.head_means(at_hand.found)[head]
        with interventions.set_output(at_hand.model, value, layer=1, head=head), torch.no_grad():
            z = at_hand.model.run_with_cache(at_hand.documents.tokens, names_filter=[HOOK])[1][HOOK]
        gone = at_hand.dictionary.encode(z.flatten(2))[at.doc, at.pos, at.feature] == 0
        found = measures.turned_off(at_hand.dictionary, at_hand.observed, at, head, value)
        assert torch.equal(found, gone)
        assert 0 < int(gone.sum()) < len(gone)


def test_another_head_is_moved_until_the_output_has_changed_as_much() -> None:
    rng = torch.Generator().manual_seed(0)
    W_O, z = torch.randn(4, 8, 32, generator=rng), torch.randn(20, 4, 8, generator=rng)
    means = torch.randn(4, 8, generator=rng)
    z[3, 2] = means[2]
    value = measures.equal_change(W_O, z, means, 1, 2)
    wanted = ((means[1] - z[:, 1]) @ W_O[1]).norm(dim=-1)
    moved = (value - z[:, 2]) @ W_O[2]
    kept = torch.arange(20) != 3
    torch.testing.assert_close(moved.norm(dim=-1)[kept], wanted[kept])
    along = torch.nn.functional.cosine_similarity(value - z[:, 2], means[2] - z[:, 2], dim=-1)
    torch.testing.assert_close(along[kept], torch.ones(19))
    assert torch.equal(value[3], z[3, 2])


def test_rows_can_each_have_a_value_of_their_own() -> None:
    at_hand = made()
    at, _ = measures.firing(at_hand.observed, np.arange(0, circuit.D_VOCAB, 3))

    def swapped(z: torch.Tensor) -> torch.Tensor:
        return z[:, 0].roll(1, dims=-1) + z[:, 1]

    found = measures.turned_off(at_hand.dictionary, at_hand.observed, at, 0, swapped)
    for k in range(0, len(at), 7):
        z = at_hand.observed.z[at.doc[k], at.pos[k]].clone()
        z[0] = swapped(z[None])[0]
        with torch.no_grad():
            assert bool(found[k]) == (float(at_hand.dictionary.encode(z.flatten()[None])[0, at.feature[k]]) == 0)


def test_rows_of_tokens_that_are_new_by_a_loop() -> None:
    tokens = torch.stack([random_tokens(20, seed) % 6 for seed in (3, 4)])
    seen_before = [[t in row[:n] for n, t in enumerate(row)] for row in tokens.tolist()]
    assert measures.unseen_rows(tokens).logical_not().tolist() == seen_before


def test_specificity_on_planted_documents_by_a_loop() -> None:
    noisy = layer(sae=repeater())
    half = noisy.measured
    assert half is not None
    s = noisy.selections[0]
    which = np.flatnonzero(np.isin(s.features, [2, 15, 33, 42]))
    features, tokens = s.features[which], s.tokens[which]
    scale = np.array([0.7, 0.1, 0.12, 0.6])
    got = specific.planted_specificity(half, features, tokens, scale, 0.9)
    seen = attribution.observe(noisy.model, noisy.dictionary, half.texts.documents())
    acts = noisy.dictionary.encode(seen.z.flatten(2)).detach().numpy().astype(float)
    truth = {name: np.zeros(len(half.documents)) for name in vars(got)}
    for k, token in enumerate(tokens.tolist()):
        rows = {n: p.document.period + p.planted[token] for n, p in enumerate(half.documents) if token in p.planted}
        for n, row in rows.items():
            strong_there = False
            for t in range(1, half.texts.lengths[n]):
                a = acts[n, t, features[k]] / scale[k]
                truth["mass"][n] += a
                truth["mass_right"][n] += a * (t == row)
                if a >= 0.9:
                    strong_there |= t == row
                    truth["strong"][n] += 1
                    truth["right"][n] += t == row
                    others = [m for m in rows if m != n and half.texts.lengths[m] > t]
                    truth["elsewhere"][n] += sum(rows[m] == t for m in others) / max(1, len(others))
            truth["wanted"][n] += 1
            truth["missed"][n] += not strong_there
    for name, values in truth.items():
        np.testing.assert_allclose(getattr(got, name), values, rtol=1e-5, err_msg=name)
    assert 0 < got.right.sum() < got.strong.sum()
    assert got.elsewhere.sum() > 0


@pytest.mark.parametrize(("kind", "at_layer"), [("gpt2", 0), ("gpt2", 1), ("gemma2", 0)])
def test_path_changes_are_those_of_the_interventions(kind: str, at_layer: int) -> None:
    model, sae = tiny(kind), tiny_sae(f"blocks.{at_layer}.attn.hook_z")
    o = attribution.observe(model, sae, TOKENS)
    features = torch.unique(o.live.feature)[:6].numpy()
    live = o.live.where(o.live.pos > 0)
    docs = [(d, f) for d in range(len(TOKENS)) for f in features if bool(((live.doc == d) & (live.feature == f)).any())]
    pairs = np.asarray(docs[:10])
    assert len(pairs) >= 4
    second = np.roll(pairs[:, 1], 1)
    second[1] = -1  # this one has none in the other arm
    texts = Texts.of(list(TOKENS), [""] * len(TOKENS))
    arms = measures.path_changes(
        model, sae, at_layer, live, texts, pairs[:, 0], np.stack([pairs[:, 1], second], axis=1)
    )
    acts = sae.encode(o.z.flatten(2)).to_dense()
    before = patching.losses(model(TOKENS), TOKENS)
    for found, ids in zip(arms, (pairs[:, 1], second), strict=True):
        for number, (doc, feature) in enumerate(zip(pairs[:, 0].tolist(), ids.tolist(), strict=True)):
            if feature < 0:
                assert not found.total[number].any() and not found.mlp[number].any() and not found.fires[number].any()
                continue
            tokens = TOKENS[doc : doc + 1]
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
            fires = acts[doc, :-1, feature] > 0
            fires[0] = False
            assert torch.equal(found.fires[number], fires)
            assert torch.equal(found.next_token[number], tokens[0, 1:])
    assert float(arms[0].total.abs().max()) > 1e-4


def test_pairs_are_of_documents_that_hold_the_token_and_controls_are_matches_that_fire_there() -> None:
    s, half = made().selections[0], halves()[1]
    family = made().family(0)
    pairs = d09_d10_paths.chosen_pairs(half, s, family, 60, ("x",))
    assert len(pairs) == 60
    assert len(set(pairs[:, 0])) > 50  # a document of its own, as far as there are so many
    assert len(set(pairs[:20, 0])) == 20
    assert set(pairs[:, 1]) == set(family[:60])
    controls = set()
    for doc, k, match in pairs.tolist():
        fires = set(half.live.feature[half.live.doc == doc].tolist())
        assert int(s.tokens[k]) in half.documents[doc].planted
        assert int(s.features[k]) in fires
        assert match in s.matches[k] and match in fires
        controls.add(match)
    assert len(controls) > 20
    again = d09_d10_paths.chosen_pairs(half, s, family, 60, ("y",))
    assert not np.array_equal(again, pairs)
    every = d09_d10_paths.chosen_pairs(half, s, family[:2], 60, ("x",))
    assert sorted(map(tuple, every[:, :2].tolist())) == sorted(
        (int(d), int(k)) for k in family[:2] for d in half.holding(int(s.tokens[k]))
    )


def test_patching_upstream_is_each_prompts_own() -> None:
    model, sae = double("gpt2"), tiny_sae("blocks.1.attn.hook_z", dtype="float64")
    o = attribution.observe(model, sae, TOKENS)
    given = d11_patching.prompts(
        np.array([3, 7]), np.array([40, 41]), np.arange(1, 300), 0, 50, UpstreamPrompts(), ("x",)
    )
    assert len(given.clean) == 50
    for row, other, at, feature in zip(given.clean, given.corrupted, given.at.tolist(), given.feature, strict=True):
        assert int(row[at]) == {3: 40, 7: 41}[int(feature)]
        assert int(row[at - 1]) == int(row[-1])
        assert torch.nonzero(row != other)[:, 0].tolist() == [at - 1]
        assert len(set(row.tolist())) == len(row) - 1
    few = d11_patching.Prompts(*(part[:6] for part in (given.clean, given.corrupted, given.at, given.feature)))
    got = d11_patching.patch_upstream(model, o, few, ("MLP", "L0H2"))
    assert set(got.denoised) == {"MLP", "L0H2"}
    assert set(d11_patching.patch_upstream(model, o, few, noise=["L0H1"]).noised) == {"L0H1"}
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


def test_the_other_head_is_chosen_on_prompts_of_its_own() -> None:
    seen: list[set[tuple[int, ...]]] = []
    real = d11_patching.patch_upstream

    def spy(model: Any, observed: Any, given: Any, *rest: Any, **named: Any) -> Any:
        seen.append({tuple(row) for row in given.clean.tolist()})
        return real(model, observed, given, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d11_patching, "patch_upstream", spy)
        d11_patching.upstream_evidence(upstream_claim(), whole())
    first, second = seen
    design = UpstreamPrompts()
    assert (len(first), len(second)) == (design.chosen, design.measured)
    assert not first & second


def test_prefixes_are_the_same_examples_and_end_where_they_should() -> None:
    e = d14_prefix.prefix_examples(np.arange(64), 64, Prefixes(chosen=10, measured=20), ("x",))
    longest = Prefixes().longest
    rows = [row.tolist() for row in e.tokens[4]]
    key = int(e.key[4])
    for k, row in enumerate(rows, 1):
        assert row[-k:] == row[key - k : key]
        assert row[:-longest] == rows[0][:-longest]
        assert k == longest or row[-k - 1] != row[key - k - 1]
        assert len(set(row)) == len(row) - k
    apart = [torch.nonzero(part[4] != e.tokens[4, -1])[:, 0].tolist() for part in (e.before, e.unrelated)]
    assert apart[0] == [len(rows[0]) - 2]
    assert key < apart[1][0] < len(rows[0]) - longest
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
    anywhere, near = (d08_context.after_word(tokens == 2, some, 10) for some in (None, stops))
    for b, row in enumerate(tokens.tolist()):
        for t in range(40):
            assert bool(anywhere[b, t]) == (2 in row[:t])
            back = [u for u in range(max(0, t - 10), t) if row[u] == 2 and 7 not in row[u + 1 : t + 1]]
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
    design = ContextFeatures(near=3)  # passages are short: four tokens back is far
    kinds = d08_context.context_features(after_nine, design)
    features, words = kinds["long-range"]
    assert features.tolist() == [circuit.D_VOCAB + 9]
    assert words.tolist() == [9]
    assert not len(kinds["local"][0])
    few = d08_context.context_evidence(with_design(claim("D08.context"), design), families(after_nine), "long-range")
    assert str(few.undecided).startswith("1 long-range context features were found")
    of = with_design(claim("D08.context", gates={"features": 1}, min_sources=10), design)
    found = d08_context.context_evidence(of, families(after_nine), "long-range")
    by_name = conditions(found)
    assert by_name["precision of upper activations"].effect > 0.8  # it fires on the word itself, too
    assert by_name["over permuted documents"].effect > 0.2
    assert by_name["over permuted positions"].effect > 0.2
    assert by_name["over permuted positions"].low > 0.05


def with_design(of: Claim, design: Any) -> Claim:
    """The claim with another design of that class."""
    return dataclasses.replace(of, design=tuple(design if type(d) is type(design) else d for d in of.design))


def upstream_claim() -> Claim:
    """D11 with prompts for which the circuit has tokens enough."""
    return with_design(claim("D11"), UpstreamPrompts(length=14))


def conditions(found: Evidence) -> dict[str, Any]:
    """Of the only candidate, by name."""
    (own,) = found.candidates.values()
    return {c.name: c for c in own}


def context_layer(after: bool, n: int = 300, length: int = 60) -> LayerFamilies:
    """Documents in which word 7 stands once, and a feature that fires after it, or as often anywhere."""
    rng, home = np.random.default_rng(0), made()
    parts = []
    for name in ("discovery", "documents"):
        tokens = rng.integers(10, 60, (n, 2 * length + 1))
        at = rng.integers(1, length + 1, n)
        tokens[np.arange(n), at] = 7
        row = np.arange(length + 1)
        fires = ((row > at[:, None]) if after else (row > 0)) & (rng.random((n, length + 1)) < 0.3)
        doc, pos = (torch.from_numpy(x) for x in np.nonzero(fires))
        empty = [torch.zeros(0, dtype=torch.long) for _ in range(4)]
        batch = repeated.Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(tokens),
            torch.full((n,), length),
            *empty,
            tuple(f"{name}-{k}" for k in range(n)),
        )
        live = Live(doc, pos, torch.zeros_like(doc), torch.from_numpy(rng.uniform(1, 2, len(doc))).float())
        parts.append((batch, dataclasses.replace(home.found, live=live)))
    fake = LayerFamilies(home.target, 1, [0], parts[0][0], parts[1][0], home.pool)
    fake.__dict__.update(found=parts[0][1], observed=parts[1][1])
    return fake


@pytest.mark.parametrize("kind", ["long-range", "local"])
def test_a_feature_that_fires_anywhere_gains_nothing_over_permuted_positions(kind: str) -> None:
    effects = {}
    for after in (True, False):
        fake = context_layer(after)
        columns = d08_context.context_numbers(fake, np.array([0]), np.array([7]), kind, ContextFeatures())
        effects[after] = {name: float(sums.sum() / counts.sum()) for name, (sums, counts) in columns.items()}
    anywhere = effects[False]["over permuted positions"]
    assert abs(anywhere) < 0.06
    if kind == "long-range":
        assert effects[True]["precision of upper activations"] == 1.0
        assert effects[False]["precision of upper activations"] > 0.4  # the word stands before half of all rows
        assert effects[False]["over permuted documents"] == pytest.approx(0, abs=0.06)
        assert effects[True]["over permuted positions"] > 0.2


def test_positions_are_permuted_within_each_document_and_draw() -> None:
    rows = d08_context.first_copies(made().documents)
    assert rows.sum(1).tolist() == made().documents.periods.tolist()
    draws = d08_context.permuted_rows(rows, 20, ("x",))
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 20
    for to in draws[:3]:
        assert torch.equal(to.sort(1).values, torch.arange(rows.shape[1]).expand_as(to))
        assert torch.equal(to[~rows], torch.arange(rows.shape[1]).expand_as(to)[~rows])
        same = [a[r].tolist() == b[r].tolist() for a, b, r in zip(to[:-1], to[1:], rows[1:], strict=True)]
        assert not all(same)
    moved = torch.stack([d[0] for d in d08_context.permuted_rows(rows, 300, ("y",))])
    own = torch.nonzero(rows[0])[:, 0]
    for at in own[:3]:
        counts = torch.bincount(moved[:, at], minlength=rows.shape[1])[own]
        assert float(sps.chisquare(counts.numpy()).pvalue) > 1e-4  # every row is as likely


# ---- verdicts


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
    d08 = judge(claim("D08"), d08_context.specificity_evidence(claim("D08"), found)["L1H0"])
    assert d08.outcome is Outcome.REFUTED
    assert conditions(d08.evidence)["precision of strong activations"].effect < 0.3


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
    n, pos = 24, 5
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


# ---- what is chosen never sees what is measured


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


def test_natural_documents_are_one_of_each_source_and_none_of_discovery() -> None:
    one = layer()
    texts = d13_polysemantic.natural(one, NeedingFeatures())
    assert len(set(texts.sources)) == len(texts) == 20
    one.discovery = dataclasses.replace(one.discovery, sources=("measurement-03",) * len(one.discovery))
    assert "measurement-03" not in d13_polysemantic.natural(one, NeedingFeatures()).sources
    assert len(d13_polysemantic.natural(one, NeedingFeatures(documents=7))) == 7
    assert all(int(row[0]) == circuit.BOS for row in texts.tokens)


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


def test_the_difference_of_ratio_means_is_linearised() -> None:
    rng = np.random.default_rng(0)
    (a, b), (n_a, n_b) = rng.normal(2, 1, (2, 40)), rng.integers(1, 9, (2, 40)).astype(float)
    values, one = bounds.difference(a, n_a, b, n_b)
    assert values.sum() / one.sum() == pytest.approx(a.sum() / n_a.sum() - b.sum() / n_b.sum())
    draws = rng.integers(0, 40, (4000, 40))
    truth = (a[draws].sum(1) / n_a[draws].sum(1) - b[draws].sum(1) / n_b[draws].sum(1)).std()
    assert values.std() / 40**0.5 == pytest.approx(truth, rel=0.1)


def test_conditions_that_are_shares_are_said_as_shares() -> None:
    rng = np.random.default_rng(0)
    whole, part = rng.normal(4, 0.5, 40), rng.normal(3, 0.5, 40)
    of = claim("D11", bars={}, worth={}, condition="noising", gates={})

    def measure(_: LayerFamilies, head: int) -> rows_of_heads.HeadNumbers:
        return rows_of_heads.HeadNumbers(
            {"noising": bounds.above_share(part, whole, 0.5)},
            [f"{k:02}" for k in range(40)],
            40,
            shares={"noising": (float(part.mean()), float(whole.mean()))},
        )

    (own,) = rows_of_heads.per_head(of, whole_of(), measure)["L1H0"].candidates["the family"]
    assert own.effect == pytest.approx(part.mean() / whole.mean())
    assert own.bar == 0.5 and own.holds(0.05) and own.low > 0.5


def whole_of() -> Families:
    """The circuit's families under another name, where a test calls something else `whole`."""
    return whole()


def any_target(**fields: Any) -> Families:
    return Families("none", {}, {}, np.arange(50), **fields)


def test_no_heads_is_no_row() -> None:
    assert d07_behaviour.behaviour_evidence(claim("D07"), any_target()) == {}
    said = d14_prefix.prefix_evidence(claim("D14"), None, any_target())  # type: ignore[arg-type]
    assert judge(claim("D14"), said).outcome is Outcome.CANNOT_RUN
