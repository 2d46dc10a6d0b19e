"""What is measured on families, against the model's own hooks and by loops."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as sps

from fra import attribution, interventions
from fra.attribution.head_outputs import Live
from fra.interventions import patching
from fra.measures.families import (
    d08_context,
    d09_d10_paths,
    d11_patching,
    d13_polysemantic,
    d14_prefix,
    measures,
)
from fra.measures.families.designs import (
    ContextFeatures,
    NeedingFeatures,
    Prefixes,
    UpstreamPrompts,
)
from fra.measures.families.families import LayerFamilies
from fra.statistics import bounds
from fra.stimuli import repeated
from fra.stimuli.padding import Texts
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.families import (
    HOOK,
    conditions,
    families,
    halves,
    layer,
    made,
    upstream_claim,
    whole,
    with_design,
)
from fra.tests.intervening import TOKENS, double
from fra.tests.models import random_tokens, tiny, tiny_sae


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
    controls, firsts = set(), 0
    for doc, k, match in pairs.tolist():
        fires = set(half.live.feature[half.live.doc == doc].tolist())
        assert int(s.tokens[k]) in half.documents[doc].planted
        assert int(s.features[k]) in fires
        assert match in s.matches[k] and match in fires
        controls.add(match)
        firsts += match == next(int(m) for m in s.matches[k] if int(m) in fires)
    assert len(controls) > 20
    assert firsts < 40, "the matched feature is not drawn among all that fire"
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
    after_nine = layer(n=90)
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
    assert by_name["precision of upper activations"].effect > 0.7  # it fires on the word itself, too
    assert by_name["over permuted documents"].effect > 0.2
    assert (
        0 < by_name["over permuted positions"].effect < by_name["over permuted documents"].effect
    )  # passages are short


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


def test_natural_documents_are_one_of_each_source_and_none_of_discovery() -> None:
    one = layer()
    texts = d13_polysemantic.natural(one, NeedingFeatures())
    assert len(set(texts.sources)) == len(texts) == 20
    one.discovery = dataclasses.replace(one.discovery, sources=("measurement-03",) * len(one.discovery))
    assert "measurement-03" not in d13_polysemantic.natural(one, NeedingFeatures()).sources
    assert len(d13_polysemantic.natural(one, NeedingFeatures(documents=7))) == 7
    assert all(int(row[0]) == circuit.BOS for row in texts.tokens)


def test_the_difference_of_ratio_means_is_linearised() -> None:
    rng = np.random.default_rng(0)
    (a, b), (n_a, n_b) = rng.normal(2, 1, (2, 40)), rng.integers(1, 9, (2, 40)).astype(float)
    values, one = bounds.difference(a, n_a, b, n_b)
    assert values.sum() / one.sum() == pytest.approx(a.sum() / n_a.sum() - b.sum() / n_b.sum())
    draws = rng.integers(0, 40, (4000, 40))
    truth = (a[draws].sum(1) / n_a[draws].sum(1) - b[draws].sum(1) / n_b[draws].sum(1)).std()
    assert values.std() / 40**0.5 == pytest.approx(truth, rel=0.1)
