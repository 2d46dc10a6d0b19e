"""The statistics of D04, D05, D06 and D16 on firings whose answer is known by construction."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as sps

from fra.attribution.head_outputs import HeadOutputs, Live, padded
from fra.attribution.raised_tokens import raised_tokens
from fra.claim import Claim, Condition, Outcome, judge
from fra.dictionaries.encoder import Encoder
from fra.measures.head_outputs import corpus as head_output_corpus
from fra.measures.head_outputs import (
    d04_heads,
    d05_sources,
    d06_norms,
    d16_groups,
    firing_sources,
)
from fra.measures.head_outputs.corpus import Documents, HeadFirings
from fra.measures.head_outputs.designs import (
    Alive,
    Dominance,
    GroupLikeness,
    OwnTokens,
)
from fra.stimuli import repeated
from fra.tests.claims import claim
from fra.tests.head_firings import D_HEAD, N_HEADS, Z, blocks_of, firings_of, made_up
from fra.tests.models import ARCHITECTURES, random_tokens, tiny, tiny_sae
from fra.verdicts.decide import Beside, Number, Sampled, decide
from fra.verdicts.pooled import ByDictionary, clustered, clustered_or_number, evidence


def test_shuffled_blocks_keep_norms_and_leave_no_block_in_place() -> None:
    weight = torch.randn(N_HEADS, D_HEAD, 50, dtype=torch.float64)
    encoder = Encoder(Z, 1, weight, torch.zeros(50, dtype=torch.float64), "none")
    shuffled = head_output_corpus.shuffled(encoder, 3).weight
    torch.testing.assert_close(shuffled.norm(dim=1), weight.norm(dim=1))
    unit, own = (torch.nn.functional.normalize(x, dim=1) for x in (shuffled, weight))
    match = torch.einsum("hdf,gdf->fhg", unit, own) > 1 - 1e-9
    assert bool((match.sum(2) == 1).all()) and not bool(match.diagonal(dim1=1, dim2=2).any())
    assert torch.equal(head_output_corpus.shuffled(encoder, 3).weight, shuffled)
    assert not torch.equal(head_output_corpus.shuffled(encoder, 4).weight, shuffled)


def test_squares_and_shares_by_hand() -> None:
    firings = made_up(blocks_of([0, 1, 2, 3, 0, 1]))
    squares = firings.squares()
    by_head = firings.outputs.by_head(torch.arange(6))
    expected = torch.zeros_like(squares)
    for doc, pos, feature in zip(
        firings.live.doc.tolist(), firings.live.pos.tolist(), firings.live.feature.tolist(), strict=True
    ):
        assert pos > 0
        expected[doc, feature] += by_head[doc, pos, :, feature] ** 2
    torch.testing.assert_close(squares, expected)
    torch.testing.assert_close(firings.summed_squares(), expected.sum(0))
    division = d04_heads.divide(firings, Alive())
    assert division.top.tolist() == [0, 1, 2, 3, 0, 1]
    torch.testing.assert_close(division.share, expected.sum(0) / expected.sum((0, 2))[:, None])
    sums, counts = d04_heads.top_share(made_up(blocks_of([0, 1, 2, 3, 0, 1]), seed=1), division)
    assert float(sums.sum() / counts.sum()) > 0.8
    part = firings.part([7, 2])
    torch.testing.assert_close(part.squares(), squares[[7, 2]])
    assert part.documents.sources == ("s7", "s2")
    assert torch.equal(part.documents.tokens, firings.documents.tokens[[7, 2]])


def test_control_features_fire_as_densely_where_they_are_largest() -> None:
    firings = made_up(blocks_of([0, 1, 2, 3, 0, 1]))
    control = firings.under(head_output_corpus.shuffled(firings.outputs.encoder, 0))
    o = control.outputs
    pre = o.pre_activation(torch.arange(6))
    fires = [torch.zeros(12, 30, 6, dtype=torch.bool) for _ in range(2)]
    for mark, each in zip(fires, (firings, control), strict=True):
        mark[each.live.doc, each.live.pos, each.live.feature] = True
    assert torch.equal(fires[0].sum(2), fires[1].sum(2)) and not torch.equal(*fires)
    kept, left = (pre.masked_fill(~m, f) for m, f in ((fires[1], torch.inf), (~fires[1], -torch.inf)))
    assert bool((kept.min(2).values >= left.max(2).values).all())
    torch.testing.assert_close(control.live.value, pre[control.live.doc, control.live.pos, control.live.feature])
    torch.testing.assert_close(control.by_head, o.entries_by_head(control.live))


def test_every_part_of_the_documents_has_a_shuffle_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before, measured = made_up(blocks_of([0, 1, 2, 3] * 4), seed=1), made_up(blocks_of([0, 1, 2, 3] * 4))
    sources = [f"s{k % 8}" for k in range(12)]
    dealt = d04_heads.groups(sources, 3, seed=0)
    assert sorted(k for some in dealt for k in some) == list(range(12))
    by_draw = [{sources[k] for k in some} for some in dealt]
    assert sum(map(len, by_draw)) == 8 == len(set.union(*by_draw)), "a source is in two draws"
    assert len(d04_heads.groups(sources, 20, seed=0)) == 8
    seeds: list[int] = []
    own = head_output_corpus.shuffled

    def spied(encoder: Encoder, seed: int) -> Encoder:
        seeds.append(seed)
        return own(encoder, seed)

    monkeypatch.setattr(d04_heads, "shuffled", spied)
    control = d04_heads.under_shuffles(before, measured, dealt, Alive(), Dominance(), ("x",))
    assert len(set(seeds)) == 3
    for some, seed in zip(dealt, seeds, strict=True):
        encoder = own(before.outputs.encoder, seed)
        division = d04_heads.divide(before.under(encoder), Alive())
        sums, counts = d04_heads.top_share(measured.under(encoder), division)  # all documents under this draw
        np.testing.assert_allclose(control.share[0][some], sums[some])
        np.testing.assert_allclose(control.share[1][some], counts[some])


def test_spread_features_that_move_the_same_tokens_agree() -> None:
    heads = blocks_of([0] * 6, size=2.0)
    heads[1] = heads[0]
    heads[:, :, 3:] *= 1.01
    firings = made_up(heads)
    o = firings.outputs
    alike = o.pattern.clone()
    alike[:, 1] = alike[:, 0]
    values = o.values.clone()
    values[:, :, 1] = values[:, :, 0]
    same = dataclasses.replace(firings, outputs=dataclasses.replace(o, values=values, pattern=alike))
    ones = torch.ones(6, dtype=torch.float64)
    for each, low, high in ((same, 0.999, 1.0), (firings, 0.0, 0.6)):
        share = torch.tensor([[0.45, 0.44, 0.06, 0.05]] * 6, dtype=torch.float64)
        division = d04_heads.Division(torch.arange(6), share, ones, torch.tensor([1, 2, 3, 4, 5, 6]))
        (sums, counts), n = d04_heads.agreement(each, division, Dominance())
        assert n == 6 and low <= sums.sum() / counts.sum() <= high
        fired = torch.bincount(each.live.feature, minlength=6).double() / torch.arange(1, 7)
        assert counts.sum() == pytest.approx(float(fired.sum()))
    dominated = d04_heads.Division(torch.arange(6), torch.eye(4)[[0] * 6].double(), ones, ones.long())
    assert d04_heads.agreement(firings, dominated, Dominance())[1] == 0


def test_rank_correlations_are_scipys() -> None:
    a, b = torch.randn(20, 8), torch.randn(20, 8)
    expected = [sps.spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(d06_norms.rank_correlations(a, b).numpy(), expected, atol=1e-12)
    a[:, 2:], b[:, [0, 1, 3, 4, 5, 6]] = 0, 0  # a block-diagonal dictionary has one head, or few
    expected = [sps.spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(d06_norms.rank_correlations(a, b).numpy(), expected, atol=1e-12)
    assert not bool(d06_norms.rank_correlations(torch.zeros(3, 8), b[:3]).any())


def test_norms_are_correlated_by_document_and_controls_drawn_for_each_feature_in_each() -> None:
    g = torch.Generator().manual_seed(0)
    squares = torch.rand(1, 40, 8, generator=g).expand(30, 40, 8).clone()  # thirty times the same document
    squares[:, 30:] = 0  # does not fire
    squares[3, 5:] = 0  # fires elsewhere
    norms = torch.rand(40, 8, generator=g)
    sums, count = d06_norms.correlations(squares, norms, 0)
    assert count.tolist() == [30.0] * 3 + [5.0] + [30.0] * 26
    for doc in (0, 3):
        expected = [sps.spearmanr(squares[doc, f], norms[f]).statistic for f in range(int(count[doc]))]
        assert sums["own"][doc] == pytest.approx(sum(expected))
    same = np.delete(np.arange(30), 3)
    assert len(set(sums["own"][same].round(9).tolist())) == 1
    for control in ("permuted", "another"):
        assert len(set(sums[control][same].round(9).tolist())) > 20, "one draw for all documents"
    # permuted norms agree with nothing: a mean correlation of 0 with a variance of 1 / (heads - 1)
    drawn = sums["permuted"][same] / 30
    assert abs(drawn.mean()) < 4 * (1 / 7 / 30 / 29) ** 0.5
    assert drawn.std(ddof=1) == pytest.approx((1 / 7 / 30) ** 0.5, rel=0.5)
    again = d06_norms.correlations(squares, norms, 0)[0]
    assert again["permuted"].tolist() == sums["permuted"].tolist()
    # another feature that fires in the document: never itself, any of the others
    doc = torch.tensor([0, 0, 0, 1, 2, 2])
    seen: dict[int, set[int]] = {k: set() for k in range(6)}
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        for k, other in enumerate(d06_norms.another(doc, generator).tolist()):
            seen[k].add(other)
    assert seen == {0: {1, 2}, 1: {0, 2}, 2: {0, 1}, 3: {-1}, 4: {5}, 5: {4}}


def test_pairs_that_fire_together_are_counted_as_by_hand() -> None:
    live = (torch.rand(3, 11, 9) < 0.4).double()
    pairs = np.array([[0, 1], [4, 8], [1, 5]])
    both, either = d16_groups.together(live, pairs)
    for doc in range(3):
        assert both[doc] == sum(int((live[doc, :, i] * live[doc, :, j]).sum()) for i, j in pairs)
        assert either[doc] == sum(int(((live[doc, :, i] + live[doc, :, j]) > 0).sum()) for i, j in pairs)


def chosen_by_hand(n: int = 200) -> d16_groups.ChosenGroups:
    g = torch.Generator().manual_seed(0)
    share = torch.rand(n, N_HEADS, generator=g)
    share = share / share.sum(1, keepdim=True)
    count = torch.arange(1, n + 1) ** 2
    division = d04_heads.Division(torch.arange(n), share, torch.ones(n), count)
    jaccard = torch.rand(n, n, generator=g)
    jaccard = ((jaccard + jaccard.T) / 2).fill_diagonal_(-1)
    return d16_groups.ChosenGroups(division, jaccard.double().numpy(), count.double().log().numpy())


def test_a_heads_group_and_its_controls_by_hand() -> None:
    chosen = chosen_by_hand()
    share, top = chosen.division.share, chosen.division.top
    own = d16_groups.own_features(chosen.division, 2, 20)
    assert len(own) == 20 and bool((top[own] == 2).all())
    assert float(share[own, 2].min()) >= float(share[:, 2].masked_fill(top != 2, 0).sort().values[-20])
    assert len(d16_groups.own_features(chosen.division, 2, 10**6)) == int((top == 2).sum())
    pairs = d16_groups.likest_pairs(chosen, own, 10)
    every = sorted(((chosen.jaccard[i, j], i, j) for k, i in enumerate(own) for j in own[k + 1 :]), reverse=True)
    assert {frozenset(pair) for pair in pairs.tolist()} == {frozenset((i, j)) for _, i, j in every[:10]}
    near = d16_groups.alike_in_rate(chosen, own, 2, len(own) + 5)
    drawn, again = (d16_groups.random_heads(near, 5, np.random.default_rng(k)) for k in (0, 1))
    assert set(drawn.tolist()) != set(again.tolist())
    assert len(drawn) == 20 == len(set(drawn.tolist())) and bool((top[drawn] != 2).all())
    sorted_rates = [np.sort(chosen.rate[each]) for each in (drawn, own)]
    assert np.median(np.abs(sorted_rates[0] - sorted_rates[1])) < 0.5


def in_groups(together: bool, n_docs: int, seed: int, n: int = 48) -> HeadFirings:
    """Features of four heads, each of one head alone, that fire in 8 % of positions: in pairs of one head together, or
    in pairs of two heads. Decoder directions play no part.
    """
    g = torch.Generator().manual_seed(seed)
    n_pos = 40
    fires = torch.rand(n_docs, n_pos, n // 2, generator=g) < 0.08
    fires = fires.repeat_interleave(2, 2)  # 0 and 1 fire together, 2 and 3, ...
    fires[:, 0] = False
    feature_head = torch.arange(n) // 2 % N_HEADS if together else torch.arange(n) % N_HEADS
    z = torch.ones(n_docs, n_pos, N_HEADS, D_HEAD, dtype=torch.float64)
    blocks = torch.zeros(N_HEADS, D_HEAD, n, dtype=torch.float64)
    blocks[feature_head, :, torch.arange(n)] = 1.0
    doc, pos, feature = fires.nonzero(as_tuple=True)
    live = Live(doc, pos, feature, torch.ones(len(doc), dtype=torch.float64))
    real = torch.ones(n_docs, n_pos, dtype=torch.bool)
    encoder = Encoder(Z, 1, blocks, torch.zeros(n, dtype=torch.float64), "none")
    pattern = torch.eye(n_pos, dtype=torch.float64).expand(n_docs, N_HEADS, -1, -1)
    o = HeadOutputs(encoder, z, z, pattern, real.to(z), real, live)
    tokens = torch.ones(n_docs, n_pos, dtype=torch.long)
    return HeadFirings(Documents(tokens, real, tuple(f"s{k}" for k in range(n_docs)), list(tokens)), o, live)


@pytest.mark.parametrize("grouped", [True, False])
def test_groups_within_a_head_are_found_and_groups_across_heads_are_not(grouped: bool) -> None:
    own = claim("D16")
    before, measured = in_groups(grouped, 30, 1), in_groups(grouped, 60, 2)
    chosen = d16_groups.choose(before, Alive())
    live = d16_groups.fires(measured, chosen.division.alive)
    sources = measured.documents.sources
    group = d16_groups.group_of(chosen, live, sources, 1, 10.0, GroupLikeness(pairs=4), ("x",))
    assert group is not None
    mean = d16_groups.excess(own, "made up", "L1H1", group, sources)
    row = decide(own, [Sampled(name=own.condition, samples={"L1H1": mean})], {"L1H1": Beside()})["L1H1"]
    assert judge(own, row).outcome is (Outcome.SUPPORTED if grouped else Outcome.REFUTED), row
    if grouped:
        assert {tuple(sorted(pair)) for pair in group.pairs.tolist()} <= {(k, k + 1) for k in range(0, 48, 2)}
        assert group.own[0].sum() == group.own[1].sum()


def test_every_source_has_controls_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before, measured = in_groups(True, 30, 1), in_groups(True, 6, 2)
    chosen = d16_groups.choose(before, Alive())
    live = d16_groups.fires(measured, chosen.division.alive)
    seen: list[frozenset[int]] = []
    own = d16_groups.random_heads

    def spied(*given: Any) -> Any:
        drawn = own(*given)
        seen.append(frozenset(drawn.tolist()))
        return drawn

    monkeypatch.setattr(d16_groups, "random_heads", spied)
    design = GroupLikeness(features=6, draws=2)
    assert d16_groups.group_of(chosen, live, ("a", "b", "b", "c", "d", "e"), 1, 5.0, design, ("x",))
    assert len(seen) == 10 == len(set(seen))


def test_sources_of_a_firing_by_hand() -> None:
    firings = made_up(blocks_of([0, 1, 2]), n_docs=4, n_pos=12)
    o = firings.outputs
    tokens = torch.randint(0, 4, (4, 12))
    own = torch.tensor([1, 2, 3])
    found = firing_sources.sources(o, tokens, firings.live, own[firings.live.feature], 1)
    every = o.by_source(torch.arange(3), 1)
    for k in range(0, len(firings.live), 5):
        doc, t, f = (int(x[k]) for x in (firings.live.doc, firings.live.pos, firings.live.feature))
        c = every[doc, t, : t + 1, f] ** 2
        seen = tokens[doc, : t + 1]
        share = {token: float(c[seen == token].sum() / c.sum()) for token in range(4)}
        mine = int(own[f])
        assert float(found.attribution[k]) == pytest.approx(share[mine], abs=1e-9)
        assert float(found.attention[k]) == pytest.approx(
            float(o.pattern[doc, 1, t, : t + 1][seen == mine].sum()), abs=1e-9
        )
        assert float(found.frequency[k]) == pytest.approx(float((seen == mine).double().mean()), abs=1e-6)
        others = [share[int(token)] for token in seen if int(token) != mine]
        assert float(found.another[k]) == pytest.approx(float(np.mean(others)) if others else 0.0, abs=1e-9)


def test_the_rise_is_the_slope_of_the_quarters() -> None:
    rng = np.random.default_rng(0)
    quarter, doc = rng.integers(0, 4, 400), rng.integers(0, 12, 400)
    share = 0.2 + 0.1 * quarter + 0.01 * rng.normal(size=400)
    values = d05_sources.rise(share, quarter, doc, 12, 4)
    means = [share[quarter == q].mean() for q in range(4)]
    assert values.mean() == pytest.approx(3 * np.polyfit(range(4), means, 1)[0])
    assert np.isnan(d05_sources.rise(share, np.zeros(400, dtype=int), doc, 12, 4)).all()


OWN = tuple(range(1, 9))


"""Own tokens of eight features."""


def planted_firings(
    seed: str, of_token: bool = True
) -> tuple[list[repeated.PlantedDocument], HeadOutputs, torch.Tensor]:
    """Planted documents under a head that attends from every second-copy row to the induction key, and eight features:
    each fires strongly where the attended token is its own, or, of_token = False, at random places; and weakly in half
    of all positions.
    """
    planted = repeated.repeated_planted(OWN, np.arange(20, 200), 80, 0, ("made up", seed), repeats=100)
    tokens = padded([p.document.tokens for p in planted])[0]
    n, pos = tokens.shape
    g = torch.Generator().manual_seed(len(seed))
    pattern = torch.eye(pos, dtype=torch.float64).repeat(n, 2, 1, 1)
    for k, p in enumerate(planted):
        period = p.document.period
        for t in range(period + 1, 2 * period + 1):
            pattern[k, 0, t] = 0
            pattern[k, 0, t, t - period + 1] = 1
    values = torch.zeros(n, pos, 2, 8, dtype=torch.float64)
    own = tokens[:, :, None] == torch.tensor(OWN)
    values[:, :, 0] = (own if of_token else torch.rand(n, pos, 8, generator=g) < 0.15).double()
    values[:, :, 0] += 0.2 * torch.rand(n, pos, 8, generator=g, dtype=torch.float64)
    if of_token:  # no attention, no firing: in the first copy every position attends to itself
        for k, p in enumerate(planted):
            pattern[k, 0, : p.document.period + 1] = 0
            pattern[k, 0, : p.document.period + 1, 0] = 1
    blocks = torch.zeros(2, 8, 8, dtype=torch.float64)
    blocks[0] = 10 * torch.eye(8)
    o = firings_of(blocks, values, pattern, tokens, -1.0).outputs
    real = torch.arange(pos) < torch.tensor([len(p.document.tokens) for p in planted])[:, None]
    kept = o.live.where(real[o.live.doc, o.live.pos])
    return planted, dataclasses.replace(o, live=kept, real=real), tokens


def test_which_features_know_their_token_by_hand() -> None:
    planted, o, _ = planted_firings("learnt")
    features, design = torch.arange(8), OwnTokens()
    known = d05_sources.known_features(o, planted, features, torch.tensor(OWN), design)
    assert known.features.tolist() == list(range(8)) and known.attributed == 8
    pre = o.pre_activation(features).clamp(min=0)
    for f, token in enumerate(OWN):
        places = [(k, p.document.period + p.planted[token]) for k, p in enumerate(planted) if token in p.planted]
        assert len(places) == 100
        before = [float(pre[k, t, f]) for k, t in places]
        assert float(known.median[f]) == pytest.approx(sorted(before)[49])  # the lower middle one of 100
        fired = pre[:, 1:, f][o.real[:, 1:]]
        edges = np.quantile(fired[fired > 0].numpy(), [0.25, 0.5, 0.75])
        np.testing.assert_allclose(known.edges[f], edges)
    # a feature on another's token, one that fires everywhere, and one that never fires know nothing
    turned = d05_sources.known_features(o, planted, features, torch.tensor(OWN).roll(1), design)
    assert not len(turned.features)
    every = dataclasses.replace(o, live=dataclasses.replace(o.live, value=torch.ones_like(o.live.value)))
    assert not len(
        d05_sources.known_features(every, planted, features, torch.tensor(OWN), OwnTokens(share=0.0)).features
    )
    at = Live(*(torch.zeros(4, dtype=torch.long) for _ in range(3)), torch.tensor([0.1, 0.2, 5.0, 9.0]))
    some = dataclasses.replace(known, edges=np.array([[1.0, 4.0, 6.0]] * 8))
    assert d05_sources.quarters(some, np.zeros(4, dtype=int), at).tolist() == [0, 0, 2, 3]


def test_firings_are_asked_for_sources_where_the_own_token_could_be_one() -> None:
    planted, o, tokens = planted_firings("learnt")
    known = d05_sources.known_features(o, planted, torch.arange(8), torch.tensor(OWN), OwnTokens())
    at, column, (every, _) = d05_sources.firings_of(o, tokens, known)
    expected = [
        (d, t, f)
        for d, t, f in zip(every.doc.tolist(), every.pos.tolist(), every.feature.tolist(), strict=True)
        if OWN[f] in tokens[d, : t + 1].tolist()
    ]
    assert list(zip(at.doc.tolist(), at.pos.tolist(), at.feature.tolist(), strict=True)) == expected
    assert 0 < len(at) < len(every) and torch.equal(column, at.feature)


@pytest.mark.parametrize("of_token", [True, False])
def test_sources_that_are_the_own_token_are_found_and_others_are_not(of_token: bool) -> None:
    own = claim("D05", n=1000)
    planted, o, _ = planted_firings("learnt")
    known = d05_sources.known_features(o, planted, torch.arange(8), torch.tensor(OWN), own.designed(OwnTokens))
    measured, o, tokens = planted_firings("measured", of_token)
    sources = [p.document.source for p in measured]
    values, detail = d05_sources.numbers(own, "made up", "L1H0", known, o, tokens, sources)
    row = decide(own, d05_sources.columns(own, {"L1H0": values}), {"L1H0": Beside()})["L1H0"]
    assert judge(own, row).outcome is (Outcome.SUPPORTED if of_token else Outcome.REFUTED), row
    if of_token:
        strong = sum(len(p.planted) for p in measured)  # every second occurrence, and no more
        assert detail["of these, with the own token in the text so far"] == strong == detail["strong firings"]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_raised_token_is_what_the_models_logits_say(kind: str) -> None:
    """The feature's decoder added to hook_z with the rest of the model frozen: MLP outputs and scales held."""
    model: Any = tiny(kind, torch.float64)
    sae = tiny_sae(Z, dtype="float64", reshape_activations="hook_z")
    tokens = random_tokens(6)[None]
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens)
        held = [
            (n, lambda old, hook, n=n: clean[n]) for n in model.hook_dict if n.endswith("hook_scale") and n in clean
        ]
        held += [("blocks.1.hook_mlp_out", lambda old, hook: clean["blocks.1.hook_mlp_out"])] * (
            "blocks.1.hook_mlp_out" in clean
        )
        own = raised_tokens(model, sae)
        for feature in (0, 40, 95):
            add = sae.W_dec[feature].detach()

            def put(z: torch.Tensor, hook: Any, add: torch.Tensor = add) -> torch.Tensor:
                return z + 1e-3 * add.view(z.shape[2:])

            with model.hooks(fwd_hooks=held):
                before = model(tokens)
            with model.hooks(fwd_hooks=[*held, (Z, put)]):
                after = model(tokens)
            assert int((after - before)[0, -1].argmax()) == int(own[feature])


def claim_of(**fields: Any) -> Claim:
    given = {"id": "T01", "title": "t", "h0": "h", "bar": 0.5, "statistic": "t/1", "stimuli": ("natural",), "n": 120}
    return Claim(**(given | fields))


def test_the_worst_dictionary_decides() -> None:
    rng = np.random.default_rng(1)
    sources = [f"s{k}" for k in range(120)]
    means = {
        name: clustered(level + 0.05 * rng.normal(size=120), np.ones(120), sources, (name,))
        for name, level in (("good", 0.9), ("bad", 0.3))
    }

    def pooled(bar: float, given: dict[str, Any], above: bool = True) -> Condition:
        own = claim_of(condition="share", bar=bar, above=above)
        return evidence(own, [ByDictionary("share", given)], {}).candidates["every dictionary"][0]

    both = pooled(0.5, means)
    assert both.fails(0.05) and not both.holds(0.05)
    assert both.effect == pytest.approx(0.3, abs=0.03) and both.high < 0.5
    alone = pooled(0.5, {"good": means["good"]})
    assert alone.holds(0.05) and alone.low > 0.5
    below = pooled(0.5, means, above=False)
    assert below.fails(0.05) and below.effect == pytest.approx(0.9, abs=0.03)
    fixed = clustered_or_number(24.0 * np.ones(120), np.ones(120), sources, ("L0",))
    assert fixed == Number(24.0)
    for bar, holds in ((25.0, True), (23.0, False)):
        number = pooled(bar, {"topk": fixed}, above=False)
        assert number.p is None and number.holds(0.05) == holds and number.fails(0.05) != holds
    mixed = pooled(0.5, {"good": means["good"], "block": Number(1.0)})
    assert mixed.holds(0.05) and mixed.effect == alone.effect
    found = evidence(claim_of(condition="share"), [ByDictionary("share", means)], {})
    assert judge(found.claim, found).outcome == Outcome.REFUTED and found.n == 120
