"""Which features are selected on a hand-built induction head, and what they do before planted tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats as sps

from fra import attribution
from fra.attribution import planted
from fra.measures.families import d07_behaviour, d08_context, specific
from fra.measures.families.designs import FamilySelection, OwnScale
from fra.measures.families.families import LayerFamilies, attribution_shares
from fra.stimuli import repeated
from fra.stimuli.designs import PlantedTokens
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.families import (
    WRONG,
    conditions,
    families,
    halves,
    layer,
    made,
    repeater,
)
from fra.tests.intervening import TOKENS
from fra.tests.models import tiny, tiny_sae


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
