"""Effects of channels, the search and the nulls against their plain definitions, on every kind of head."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fra
from fra.architectures.architecture import Rotary
from fra.core.coded import Arm, measure_arm
from fra.core.frozen import FrozenLayer
from fra.errors import FraError
from fra.search import terms
from fra.search.best_effect import best_effect, mean_effect, restricted, upper_bounds
from fra.search.channels import Arms, HeadOnArms, evenly, few_arms, measure_arms, shifted_keys
from fra.search.nulls import (
    draw_atoms,
    matching_pursuit,
    random_atoms,
    random_rotation,
    row_spread,
    scramble,
    stretch_to_match,
)
from fra.search.search import Search
from fra.search.stripe_blocks import stripe_blocks
from fra.stimuli import repeated as stimuli
from fra.tests.models import D_VOCAB, tiny, tiny_sae

HEAD = 2
KINDS = {"gpt2": 1, "llama": 1, "gemma2": 0, "qwen3": 1, "pythia": 1}
"""The layer used of each: tiny gemma2's layer 1 has a window shorter than any repeat."""


def hook(kind: str) -> str:
    return f"blocks.{KINDS[kind]}.hook_resid_pre"


def documents(n: int = 6, seed: int = 0) -> stimuli.Batch:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(n):
        period = int(rng.integers(6, 13))
        made.append(stimuli.repeat(rng.choice(np.arange(1, D_VOCAB), period, replace=False), 0, rng, str(number)))
    return stimuli.Batch.of(made)


def arms(kind: str) -> Arms:
    return measure_arms(tiny(kind), tiny_sae(hook(kind)), documents(), KINDS[kind], hook(kind))


def plain_scores(kind: str, tokens: torch.Tensor, head: int = HEAD) -> fra.ResolvedHead:
    return fra.resolve(tiny(kind), tiny_sae(hook(kind)), tokens, KINDS[kind], head)


def plain_odds(resolved, scores: torch.Tensor, t: int, key: int) -> float:
    attention = resolved.frozen.cap(scores.double()[t, : t + 1])
    attention = attention.masked_fill(scores[t, : t + 1] == -torch.inf, -torch.inf).softmax(-1)
    others = attention.clone()
    others[key] = 0
    return float(attention[key].log() - others.sum().log())


def plain_effect(kind: str, batch: stimuli.Batch, pairs: list[tuple[int, int]]) -> np.ndarray:
    """[document] sums of dL(repeated) - dL(control) and rows, straight from the definition and `fra.resolve`'s
    channel maps.
    """
    sums, rows = np.zeros(len(batch)), np.zeros(len(batch))
    for d in range(len(batch)):
        sides = [plain_scores(kind, tokens[d]) for tokens in (batch.tokens, batch.control)]
        lives = [[set(r.codes.feature[r.codes.row == t].tolist()) for t in range(r.n_pos)] for r in sides]
        period = int(batch.periods[d])
        maps = [torch.stack([r.channel(i, j).double() for i, j in pairs]).sum(0) for r in sides]
        for t in range(period + 1, 2 * period + 1):
            key = t - period + 1
            on = [any(i in live[t] for i, _ in pairs) for live in lives]
            rows[d] += any(on)
            for sign, r, F, there in zip((1, -1), sides, maps, on, strict=True):
                if there:
                    S = r.scores().double()
                    sums[d] += sign * (plain_odds(r, S, t, key) - plain_odds(r, S - F, t, key))
    return np.stack([sums, rows])


def live_pairs(found: Arms, n: int) -> torch.Tensor:
    """Pairs live together somewhere on the induction stripe."""
    batch, dense = found.batch, found.repeated.codes.dense()
    q = dense[batch.row_doc, batch.row_pos] != 0
    k = dense[batch.row_doc, batch.row_key] != 0
    together = (q.double().T @ k.double()).flatten().topk(n).indices
    return torch.stack([together // q.shape[1], together % q.shape[1]], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_those_of_the_definition(kind: str) -> None:
    found = arms(kind)
    pairs = live_pairs(found, 3)
    head = HeadOnArms(found, HEAD)
    effects, together = head.channels(pairs), head.removed_together(pairs)
    for n, (i, j) in enumerate(pairs.tolist()):
        truth = plain_effect(kind, found.batch, [(i, j)])
        assert np.abs(truth[0]).max() > 1e-4, "a test of nothing: the channel does nothing"
        np.testing.assert_allclose(effects.nats[:, n], truth[0], atol=2e-5)
        np.testing.assert_array_equal(effects.rows[:, n], truth[1])
    truth = plain_effect(kind, found.batch, [tuple(pair) for pair in pairs.tolist()])
    np.testing.assert_allclose(together.nats[:, 0], truth[0], atol=5e-5)


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_channels_of_one_feature_go_together(kind: str, side: Literal["query", "key"]) -> None:
    found = arms(kind)
    column = 0 if side == "query" else 1
    feature = int(live_pairs(found, 1)[0, column])
    head = HeadOnArms(found, HEAD)
    others = torch.unique(torch.cat([arm.codes.feature for arm in head.sides]))
    pairs = torch.stack([torch.full_like(others, feature), others], 1)
    pairs = pairs if side == "query" else pairs.flip(1)
    alone = head.marginal(side, feature)
    truth = plain_effect(kind, found.batch, [tuple(pair) for pair in pairs.tolist()])
    assert np.abs(truth[0]).max() > 1e-3, "a test of nothing: the feature does nothing"
    np.testing.assert_allclose(alone.nats[:, 0], truth[0], atol=5e-5)
    np.testing.assert_array_equal(alone.rows[:, 0], truth[1])
    together = head.removed_together(pairs)
    for name in ("nats", "attention", "contrast", "rows", "covered"):
        np.testing.assert_allclose(getattr(alone, name), getattr(together, name), atol=5e-5)


@pytest.mark.parametrize("kind", ["llama", "pythia"])
def test_terms_a_few_at_a_time_add_up_to_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = arms(kind)
    pairs, head = live_pairs(found, 40), HeadOnArms(found, HEAD)
    whole = head.removed_together(pairs)
    row_of = torch.full((found.batch.tokens.numel(),), -1)
    rows = found.batch.row_doc * found.batch.tokens.shape[1] + found.batch.row_pos
    row_of[rows] = torch.arange(len(rows))
    monkeypatch.setattr(terms, "AT_ONCE", 60)
    few = list(terms.few_at_once(found.repeated, found.batch, row_of, pairs))
    assert len(few) > 3 and torch.equal(torch.cat(few), pairs)
    sizes = [len(terms.terms_of(found.repeated, HEAD, found.batch, row_of, some).F) for some in few]
    assert max(sizes) < 60 + len(rows) * 12, "one pair's more than asked for at most"
    parts = head.removed_together(pairs)
    for name in ("nats", "attention", "contrast", "rows", "covered"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-5)
    nothing = head.removed_together(pairs[:0])
    assert not nothing.nats.any() and not nothing.rows.any()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "pythia"])
def test_a_raised_coupling_is_raised_at_every_offset(kind: str) -> None:
    found = arms(kind)
    stripe = Search(found.batch, found.repeated, HEAD).stripes((0,), floor=2)[0]
    which = torch.tensor([1, 3])
    plain, raised = (stripe.values(found.repeated, HEAD, which, raised=up) for up in (0.0, 0.7))
    torch.testing.assert_close(plain, stripe.values(found.repeated, HEAD)[which])
    for number, (i, j) in enumerate(stripe.pairs[which].tolist()):
        truth = 0.0
        for d in range(len(found.batch)):
            dense, mask = found.repeated.codes.dense()[d].double(), found.repeated.frozen.mask
            sigma = found.repeated.frozen.sigma.expand(found.batch.tokens.shape)[d].double()
            q, k, period = dense[:, i] / sigma, dense[:, j] / sigma, int(found.batch.periods[d])
            for t in range(period + 1, 2 * period + 1):
                truth += 0.7 * float(q[t] * (k[t - period + 1] - k[mask[t]].mean()))
        assert float(raised[number] - plain[number]) == pytest.approx(truth, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("d_head", [8, 12])
def test_a_rotation_is_its_parts_times_the_turns(adjacent: bool, d_head: int) -> None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.arange(20.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.11, 0.02])
    both = angles.repeat_interleave(2, 1) if adjacent else angles.repeat(1, 2)
    rotary = Rotary(1.2 * both.cos(), 1.2 * both.sin(), adjacent)  # stretched contexts scale both
    u, v = torch.randn(2, 7, d_head, generator=generator, dtype=torch.float64)
    for t, s in ((0, 0), (5, 5), (19, 2), (11, 10)):
        at = [torch.full((7,), pos) for pos in (t, s)]
        truth = (rotary.rotate(u, at[0]) * rotary.rotate(v, at[1])).sum(-1)
        found = rotary.relative(u, v) @ rotary.turns(torch.tensor([t - s]))[0]
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_search_ranks_by_its_definition(kind: str) -> None:
    """M = sum over documents and rows of F_ij(t, s*) - mean_{u <= t} F_ij(t, u), from the channel maps themselves."""
    found = arms(kind)
    stripe = Search(found.batch, found.repeated, HEAD).stripes((0,), floor=2)[0]
    pairs, values = stripe.strongest(found.repeated, HEAD, 4)
    for (i, j), value in zip(pairs.tolist(), values.tolist(), strict=True):
        truth, together = 0.0, set()
        for d in range(len(found.batch)):
            resolved = plain_scores(kind, found.batch.tokens[d])
            F, mask = resolved.channel(i, j).double(), resolved.frozen.mask
            period = int(found.batch.periods[d])
            for t in range(period + 1, 2 * period + 1):
                truth += float(F[t, t - period + 1] - F[t][mask[t]].mean())
                if float(F[t, t - period + 1]) != 0:
                    together.add(d)
        assert abs(truth - value) < 1e-4 * max(1.0, abs(truth))
        assert len(together) >= 2


@pytest.mark.parametrize(("shift", "floor"), [(0, 2), (3, 3), (3, 4)])
def test_search_is_exhaustive(shift: int, floor: int) -> None:
    """Every pair jointly live on a stripe in enough documents is there, with its number of documents."""
    found = arms("gpt2")
    stripe = Search(found.batch, found.repeated).stripes((shift,), floor=floor)[shift]
    dense, batch = found.repeated.codes.dense(), found.batch
    keys, used = shifted_keys(batch, shift)
    counted: dict[tuple[int, int], set[int]] = {}
    for d, t, s in zip(batch.row_doc.tolist(), batch.row_pos.tolist(), keys.tolist(), strict=True):
        if not used[d]:
            continue
        for i in dense[d, t].nonzero()[:, 0].tolist():
            for j in dense[d, s].nonzero()[:, 0].tolist():
                counted.setdefault((i, j), set()).add(d)
    truth = {pair: len(where) for pair, where in counted.items() if len(where) >= floor}
    assert truth, "a test of nothing: no pair is live often enough"
    assert truth == {tuple(pair): n for pair, n in zip(stripe.pairs.tolist(), stripe.documents.tolist(), strict=True)}


@pytest.mark.parametrize(("kind", "spread"), [("gpt2", 1.0), ("gpt2", 5.0), ("llama", 1.0)])
@pytest.mark.parametrize("some", [False, True], ids=["all documents", "some"])
def test_the_best_effect_is_the_largest_of_all(kind: str, spread: float, some: bool) -> None:
    """Bounds spare channels their exact effect and change no maximum; with large scores as with small ones."""
    batch = documents(40)
    found = measure_arms(tiny(kind), tiny_sae(hook(kind)), batch, KINDS[kind], hook(kind))
    found = Arms(batch, *(arm.with_weights(stretched(arm, spread)) for arm in (found.repeated, found.control)))
    pairs, kept = live_pairs(found, 60), torch.arange(40) % 3 > 0 if some else None
    for keys in (batch.row_key, shifted_keys(batch, 3)[0]):
        on = HeadOnArms(found, HEAD).on_stripe(keys)
        exact = mean_effect(restricted(on.channels(pairs), kept))
        assert np.isfinite(exact).sum() > 10, "a test of nothing: hardly a channel is live often enough"
        assert best_effect(on, pairs, kept) == exact.max()
        bounds = upper_bounds(on, pairs, kept)
        assert (bounds >= exact).all()
        if kind == "gpt2" and spread == 1:
            assert (bounds < exact.max()).mean() > 0.25, "bounds that spare nothing are no use"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_few_documents_have_what_they_have_among_all(kind: str) -> None:
    found = arms(kind)
    pairs, index = live_pairs(found, 5), torch.tensor([1, 2, 5])
    few = few_arms(found, index)
    assert few.batch.sources == ("1", "2", "5")
    assert bool((few.batch.tokens == found.batch.tokens[index]).all())
    whole, part = (HeadOnArms(each, HEAD) for each in (found, few))
    assert np.abs(whole.removed_together(pairs).nats).max() > 1e-4, "a test of nothing: the channels do nothing"
    for effects, own in (
        (whole.channels(pairs), part.channels(pairs)),
        (whole.removed_together(pairs), part.removed_together(pairs)),
    ):
        np.testing.assert_allclose(effects.nats[index], own.nats, atol=1e-6)
        np.testing.assert_array_equal(effects.rows[index], own.rows)


def test_documents_are_chosen_evenly() -> None:
    assert evenly(10, 5, torch.device("cpu")).tolist() == [0, 2, 4, 6, 8]
    assert evenly(3, 5, torch.device("cpu")).tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scores_on_rows_are_those_of_the_head(kind: str) -> None:
    found = arms(kind)
    on = HeadOnArms(found, HEAD)
    for rows, arm in zip(on.row_scores, on.sides, strict=True):
        truth = arm.frozen.scores(HEAD)[found.batch.row_doc, found.batch.row_pos]
        torch.testing.assert_close(rows, truth, atol=1e-5, rtol=1e-5)


def stretched(arm: Arm, by: float) -> FrozenLayer:
    return replace(arm.frozen, W_k=by * arm.frozen.W_k, b_k=by * arm.frozen.b_k)


def test_other_stripes_stay_away_from_induction() -> None:
    batch = documents(8)
    for shift in range(2, 12):
        keys, kept = shifted_keys(batch, shift)
        lag = (batch.row_pos - keys)[kept[batch.row_doc]]
        period = batch.periods[batch.row_doc][kept[batch.row_doc]]
        assert bool((keys >= 1).all() and (keys <= batch.periods[batch.row_doc]).all())
        assert not bool(((lag >= period - 2) & (lag <= period + 1)).any() or (lag <= 1).any())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_add_up_to_the_stripe_contrast(kind: str) -> None:
    found = arms(kind)
    total = 0.0
    for sign, tokens in ((1, found.batch.tokens), (-1, found.batch.control)):
        rows = []
        for d in range(len(found.batch)):
            resolved = plain_scores(kind, tokens[d])
            S, period = resolved.scores().double(), int(found.batch.periods[d])
            for t in range(period + 1, 2 * period + 1):
                key = t - period + 1
                weight = resolved.frozen.cap(S[t]).masked_fill(S[t] == -torch.inf, -torch.inf)
                weight[key] = -torch.inf
                weight = weight.softmax(-1)
                rows.append(float(S[t, key] - (weight * S[t].masked_fill(weight == 0, 0)).sum()))
        total += sign * float(np.mean(rows))
    assert abs(sum(stripe_blocks(HeadOnArms(found, HEAD)).values()) - total) < 1e-4


def test_scramble_keeps_the_spread_and_loses_the_pairing() -> None:
    frozen = arms("gpt2").repeated.frozen
    rotation = random_rotation(frozen.W_k.shape[-1], torch.Generator().manual_seed(0), frozen.W_k)
    eye = torch.eye(len(rotation))
    assert float((rotation @ rotation.T - eye).abs().max()) < 1e-5
    turned = scramble(frozen, HEAD, rotation, stretch_to_match(frozen, HEAD, rotation))
    assert abs(row_spread(turned, HEAD) / row_spread(frozen, HEAD) - 1) < 1e-4
    own, other = (f.scores(HEAD)[:, f.mask] for f in (frozen, turned))
    assert abs(float(torch.corrcoef(torch.stack([own.flatten(), other.flatten()]))[0, 1])) < 0.9
    assert bool((turned.scores(0)[:, frozen.mask] == frozen.scores(0)[:, frozen.mask]).all()), (
        "another head was touched"
    )


def test_random_atoms_are_exactly_additive() -> None:
    arm = arms("gpt2").repeated
    generator = torch.Generator().manual_seed(0)
    changed = random_atoms(arm, draw_atoms(len(arm.codes.decoder), generator, arm.codes.decoder))
    codes = changed.codes
    whole = torch.einsum("bti,id->btd", codes.dense().double(), codes.decoder.double()) + codes.bias + codes.error
    assert float((whole - arm.frozen.x).abs().max()) < 1e-4
    assert int(torch.bincount(codes.row).max()) <= int(torch.bincount(arm.codes.row).max())
    assert float(codes.error.norm()) < float((arm.frozen.x - codes.bias).norm())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(2, 8), st.integers(1, 5), st.integers(0, 2**31))
def test_matching_pursuit_is_greedy(n: int, width: int, steps: int, seed: int) -> None:
    """Against the algorithm as it is written in books: take the best atom, subtract, again."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    atoms = draw_atoms(12, generator, x)
    row, atom, value = matching_pursuit(x, atoms, torch.full((n,), steps))
    dense = torch.zeros(n, 12, dtype=torch.float64)
    dense[row, atom] = value
    for number in range(n):
        left, code = x[number].clone(), torch.zeros(12, dtype=torch.float64)
        for _ in range(steps):
            best = int((atoms @ left).argmax())
            size = max(float(atoms[best] @ left), 0.0)
            code[best] += size
            left = left - size * atoms[best]
        torch.testing.assert_close(dense[number], code, atol=1e-9, rtol=0)


def test_a_window_shorter_than_the_repeat_is_refused() -> None:
    name = "blocks.1.hook_resid_pre"
    with pytest.raises(FraError, match="masks induction keys"):
        HeadOnArms(measure_arms(tiny("gemma2"), tiny_sae(name), documents(), 1, name), HEAD)


def test_arms_share_nothing_between_documents() -> None:
    """Codes and scores of a padded batch are those of each document alone."""
    batch = documents(4)
    arm = measure_arm(tiny("gpt2"), tiny_sae(hook("gpt2")), batch.tokens, 1, hook("gpt2"))
    for d in range(4):
        length = 1 + 2 * int(batch.periods[d])
        alone = plain_scores("gpt2", batch.tokens[d, :length])
        here = arm.frozen.scores(HEAD)[d, :length, :length]
        torch.testing.assert_close(here, alone.scores(), atol=1e-4, rtol=1e-4)
