"""Swapped tokens: what predictors are given, what is counted, and that a perfect prediction scores 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fra.dictionaries.tokens import TokenDictionary
from fra.errors import FraError
from fra.measures.scores.designs import Swapping
from fra.measures.scores.layer import FEATURES, CarriedLayer, Sets, observe, texts
from fra.measures.scores.q22_pair_means import PairMeans, Places, places
from fra.measures.scores.q22_picture import swap_picture
from fra.measures.scores.q22_scene import READINGS, SwapScene, exchanged, scene
from fra.measures.scores.q22_swaps import PREDICTORS, by_document, draw, frequent, telling, told, tune
from fra.plot.drawings import numbers
from fra.tests import models
from fra.tests.measures.test_carried import layer as tiny_layer
from fra.tests.measures.test_carried import sets

KINDS = {
    "gpt2": "blocks.0.ln1.hook_normalized",
    "llama": "blocks.0.hook_resid_pre",
    "gemma2": "blocks.0.hook_resid_pre",
}


def first_layer(kind: str) -> CarriedLayer:
    """Layer 0, where a token changes nothing but its own position's input."""
    hook = KINDS[kind]
    return CarriedLayer(models.tiny(kind), models.tiny_sae(hook), sets(), 0, hook, seed_parts=("t", kind))


def brute(own: CarriedLayer, made: SwapScene, head: int) -> np.ndarray:
    """Squared change of the model's own pattern, one swap at a time: rows s and s + 1, and later rows with weights."""
    out, stride = [], made.swaps.stride
    every = zip(made.swaps.doc, made.swaps.at, made.swaps.before, made.swaps.after, strict=True)
    for turn, (doc, at, before, after) in enumerate(every):
        n = made.swaps.texts.lengths[int(doc)]
        name = f"blocks.{own.layer}.attn.hook_pattern"
        rows = [own.model.run_with_cache(ids[None, :n])[1][name][0, head] for ids in (before, after)]
        by_row = (rows[1] - rows[0]).double().square().sum(-1)
        assert float(by_row[: int(at)].sum()) < 1e-9, "nothing changes before the swap"
        later = by_row[int(at) + 2 :]
        out.append(float(by_row[int(at) : int(at) + 2].sum() + stride * later[turn % stride :: stride].sum()))
    return np.array(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_scores_one(kind: str) -> None:
    """With the true inputs at s and s + 1 both readings give the model's own new pattern, and the total change is that
    of two runs of the model.
    """
    own = first_layer(kind)
    frozen, measured = own.frozen, own.sets.measured
    swaps = draw(measured, np.arange(1, models.D_VOCAB), 2, ("7",), frozen.x.device, 3)
    got = observe(own.model, swaps.after, 0, own.hook_name, ("x", "sigma", "pattern"))
    y_after = got["x"] / got["sigma"] if "sigma" in got else got["x"]
    sigma = frozen.sigma[..., None]
    every = torch.arange(len(swaps.at))[:, None]
    near = torch.stack((swaps.at, swaps.at + 1), dim=1)
    nothing = TokenDictionary(
        torch.arange(2), *frozen.x.new_zeros(2, 32), *frozen.x.new_zeros(2, 2, 32), torch.ones(2, 2) > 0
    )
    made = scene(own, frozen, torch.zeros_like(frozen.x), swaps, {"features": nothing, "activations": nothing})
    made.inputs["true"] = frozen.x / sigma, y_after[every, near]
    for head in (0, 3):
        truth = made.truth(head)
        before, after = made.predicted("true", head)
        expected = brute(own, made, head)
        for reading in made.responses(truth, before, after, centred=False):
            total, cross, square = reading
            np.testing.assert_allclose(total, expected, rtol=1e-3, atol=1e-7)
            np.testing.assert_allclose(cross, total, rtol=2e-3, atol=1e-6)
            np.testing.assert_allclose(square, total, rtol=2e-3, atol=1e-6)
        none = made.responses(truth, before, before, centred=False)[READINGS.index("added")]
        assert np.abs(none[2]).max() < 1e-9, "no change predicted where none is said"
        swap, query, key = swaps.changed
        assert bool(((query >= swaps.at[swap]) & (key <= query) & (query < swaps.lengths[swap])).all())
        made.inputs["features"] = made.inputs["true"]
        shown = swap_picture(made, head, expected, READINGS.index("put in place"), 1.0, str)
        assert shown is not None
        looks_like_the_model(own, made, head, int(expected.argmax()), shown)


def looks_like_the_model(own: CarriedLayer, made: SwapScene, head: int, best: int, shown: dict[str, Any]) -> None:
    """A picture against two runs of the model; every row that it shows, and at least the swapped one and the next."""
    n, at = int(made.swaps.lengths[best]), int(made.swaps.at[best])
    assert shown["tokens"] == [str(t) for t in made.swaps.before[best, :n].tolist()]
    name = f"blocks.{own.layer}.attn.hook_pattern"
    runs = [ids[best : best + 1, :n] for ids in (made.swaps.before, made.swaps.after)]
    before, after = (own.model.run_with_cache(ids)[1][name][0, head].numpy() for ids in runs)
    told = [
        np.array([np.pad(numbers(row), (0, n - len(numbers(row)))) for row in rows]) for rows in shown["maps"].values()
    ]
    rows = np.flatnonzero(np.abs(told[1]).sum(1) > 0)
    assert {at, at + 1} & set(rows.tolist())
    assert rows.min() >= at
    change = after - before
    faint = 0.03 * np.abs(change).max()
    assert np.abs(told[0] - before).max() < 0.03
    assert np.abs(told[1] - change)[rows].max() <= 1.01 * faint
    assert np.abs(told[2] - told[1]).max() <= 1.01 * faint, "with the true inputs, what is foretold is what happens"


def test_row_centred_scores_may_be_put_in_place() -> None:
    """The attention map's predictions are of row-centred scores: the true ones give the true pattern where the rest of
    the row stays (its mean is then another, which softmax forgets only if all keys move: only whole rows are exact).
    """
    own = first_layer("gpt2")
    swaps = draw(own.sets.measured, np.arange(1, models.D_VOCAB), 1, ("3",), own.frozen.x.device)
    got = observe(own.model, swaps.after, 0, own.hook_name, ("pattern", "scores"))
    zero = torch.zeros_like(own.frozen.x)
    words = torch.arange(models.D_VOCAB)
    blank = own.frozen.x.new_zeros
    table = TokenDictionary(words, *blank(2, 32), *blank(2, len(words), 32), torch.ones(2, len(words)) > 0)
    made = scene(own, own.frozen, zero, swaps, {"features": table, "activations": table})
    swap, query, key = swaps.changed
    scores = got["scores"].masked_fill(~own.frozen.mask, 0.0)[:, 1]
    count = own.frozen.mask.sum(-1)
    after = (scores - (scores.sum(-1) / count)[..., None])[swap, query, key]
    truth = made.truth(1)
    total, cross, _ = made.responses(truth, torch.zeros_like(after), after, centred=True)[
        READINGS.index("put in place")
    ]
    assert cross.sum() > 0.9 * total.sum()


def test_what_stands_at_a_swap_is_what_tokens_tell() -> None:
    """At s the new token's direction for the old one's, at s + 1 the same of the previous token's."""
    words = torch.arange(5)
    generator = torch.Generator().manual_seed(0)
    first, mean, *_ = torch.randn(2, 3, generator=generator)
    current, previous = torch.randn(2, 5, 3, generator=generator)
    table = TokenDictionary(words, first, mean, current, previous, torch.ones(2, 5) > 0)
    own = texts([("a", [0, 1, 2, 3, 4])], 5)
    swaps = draw(own, np.array([1, 2, 3, 4]), 1, ("1",), torch.device("cpu"))
    s, new, old = int(swaps.at), int(swaps.after[0, swaps.at[0]]), int(swaps.before[0, swaps.at[0]])
    assert 1 <= s <= 3 and new != old
    assert (swaps.before != swaps.after).sum() == 1
    y = torch.randn(1, 5, 3, generator=generator)
    found = exchanged(y, table, swaps)
    torch.testing.assert_close(found[0, 0], y[0, s] + current[new] - current[old])
    torch.testing.assert_close(found[0, 1], y[0, s + 1] + previous[new] - previous[old])


def seen_places(n_docs: int, n_pos: int, n_vocab: int, seed: int) -> tuple[Places, torch.Tensor]:
    """All causal places of random documents."""
    tokens = torch.tensor(np.random.default_rng(seed).integers(0, n_vocab, (n_docs, n_pos)))
    doc, query, key = torch.ones(n_docs, n_pos, n_pos).tril().nonzero(as_tuple=True)
    return places(tokens, doc, query, key), tokens


def test_pair_means_find_planted_habits() -> None:
    """Scores by lag, key token and an earlier occurrence come back on other documents; position alone finds the lag."""
    n_vocab = 15
    rng = np.random.default_rng(0)
    by_lag, by_key = torch.tensor(rng.normal(0, 1, 40)), torch.tensor(rng.normal(0, 1, n_vocab))

    def score(p: Places) -> torch.Tensor:
        behind = (p.before_key == p.at_query) & (p.key > 0)
        return by_lag[p.query - p.key] + by_key[p.at_key] + 3.0 * behind

    seen, _ = seen_places(80, 16, n_vocab, 1)
    asked, tokens = seen_places(3, 16, n_vocab, 2)
    assert bool((asked.before_key == -1).eq(asked.key == 0).all())
    assert int(asked.before_key[-1]) == int(tokens[2, 14])
    whole = PairMeans(seen, [asked], n_vocab)
    noisy = score(seen) + torch.tensor(rng.normal(0, 0.3, len(seen.key)))
    late = asked.key > 0
    truth = score(asked)[late]
    (lag_only,), (found,) = whole.predict(noisy.float())
    assert float((found[late] - truth).square().mean() / truth.var()) < 0.05
    centred = (by_lag[asked.query - asked.key] + by_key.mean())[late]
    assert np.corrcoef(lag_only[late], centred)[0, 1] > 0.95
    strange = Places(asked.query + 50, asked.key, asked.at_query + 90, asked.at_key + 90, asked.before_key + 90)
    _, (unknown,) = PairMeans(seen, [strange], 400).predict(noisy.float())
    by_match = unknown[(strange.key > 0)].unique()
    assert len(by_match) <= 4, "a place of which nothing is known has at most the mean of its match"


def sums_of(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """[3, n_docs] total, cross, square of changes [n_docs, n]."""
    return np.stack([(truth**2).sum(1), (truth * predicted).sum(1), (predicted**2).sum(1)])


def test_what_is_told_is_r2_and_never_below_minus_three() -> None:
    """R2 of each document where no more is foretold than happens; bounded whatever is foretold; 1 for the truth, 0 for
    no change, no number where nothing happens.
    """
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (200, 30)) * np.exp(rng.normal(0, 3, (200, 1)))
    close = truth + rng.normal(0, 0.4, (200, 30)) * np.abs(truth).mean(1, keepdims=True)
    small = 0.7 * close
    assert (np.square(small).sum(1) < np.square(truth).sum(1)).all()
    r2 = 1 - np.square(truth - small).sum(1) / np.square(truth).sum(1)
    np.testing.assert_allclose(told(sums_of(truth, close), 0.7, 1e-12), r2, rtol=1e-9)
    wild = truth * np.exp(rng.normal(0, 6, (200, 1))) * rng.choice([-1, 1], (200, 1))
    scores = told(sums_of(truth, wild), 1.0, 1e-12)
    assert scores.min() >= -3 - 1e-9 and scores.max() <= 1 + 1e-9
    np.testing.assert_allclose(told(sums_of(truth, -truth), 1.0, 1e-12), -3)
    assert np.allclose(told(sums_of(truth, truth), 1.0, 1e-12), 1)
    assert np.allclose(told(sums_of(truth, wild), 0.0, 1e-12), 0)
    assert np.isnan(told(sums_of(truth, wild), 1.0, 1e30)).all()


def test_the_reading_and_the_factor_tell_most_on_average() -> None:
    """The better reading with the factor nearest the planted one, documents counting alike; what points away, and what
    no document shows, is "no change".
    """
    rng, design = np.random.default_rng(0), Swapping()
    truth = rng.normal(0, 1, (40, 50)) * np.exp(rng.normal(0, 2, (40, 1)))
    close, far = 2.5 * truth + 0.1 * rng.normal(0, 1, (40, 50)) * np.abs(truth), rng.normal(0, 1, (40, 50))
    reading, factor = tune([sums_of(truth, far), sums_of(truth, close)], design)
    assert (reading, factor) == (1, 0.4)
    scores = [told(sums_of(truth, close), f, design.least).mean() for f in design.factors]
    assert design.factors[int(np.argmax(scores))] == 0.4
    away = sums_of(truth, -close)
    assert tune([away, away], design) == (0, 0.0)
    nothing = sums_of(0 * truth, close)
    assert tune([nothing, nothing], design) == (0, 0.0)
    large = np.where(np.arange(40)[:, None] == 0, 1e4, 1.0)
    first_is_twice = np.where(np.arange(40)[:, None] == 0, 2.0, 0.5)
    _, factor = tune([sums_of(large * truth, large * truth / first_is_twice)], design)
    assert factor == 0.5, "one document with a large change does not choose for all"


def test_the_claim_runs_on_a_tiny_model() -> None:
    """Every head gets leads over the three controls, one number a document, equal for equal seeds."""
    own = tiny_layer("gpt2", 90, 30)
    design = Swapping()
    found = telling(own, design)
    assert list(found) == [f"L1H{head}" for head in range(4)]
    for measured in found.values():
        assert list(measured.sums) == ["over token-pair means", "over token dictionary", "over position only"]
        for name, values in measured.sums.items():
            assert values.shape == measured.counts[name].shape == (30,)
            assert np.abs(values).max() <= 4
            assert (measured.counts[name] == 1).all()
            told_of = measured.detail["told of the change in attention"]
            assert values.mean() == pytest.approx(told_of[FEATURES] - told_of[name.removeprefix("over ")])
    again = telling(tiny_layer("gpt2", 90, 30), design)
    assert all(np.array_equal(found[h].sums[c], again[h].sums[c]) for h in found for c in found[h].sums)
    with pytest.raises(FraError, match="fewer than 2 tokens"):
        frequent(own.sets.measured.first(1))


def with_measured(own: CarriedLayer, n: int | None) -> CarriedLayer:
    """The layer with only the first n measured documents, or with others altogether."""
    if n is None:
        rng = np.random.default_rng(17)
        measured = texts([(f"o{k}", [0, *rng.integers(1, 30, 12 + k).tolist()]) for k in range(7)], 20)
    else:
        measured = own.sets.measured.first(n)
    other = Sets(measured, own.sets.selection, own.sets.estimation)
    return CarriedLayer(own.model, own.sae, other, 1, own.hook_name, seed_parts=own.seed_parts[:-1])


def test_predictors_are_tuned_on_other_documents() -> None:
    """With the measured documents exchanged for others, every predictor's reading and factor stay; with fewer of them,
    the ones that are left have the numbers that they had.
    """
    own = tiny_layer("gpt2", 90, 30)
    design = Swapping(factors=tuple(k / 50 for k in range(101)))
    found = telling(own, design)
    exchanged_for, fewer = telling(with_measured(own, None), design), telling(with_measured(own, 6), design)
    assert {str(m.detail["readings and factors"][FEATURES]) for m in found.values()} != {"added, times 0"}
    for head, measured in found.items():
        assert list(measured.detail["readings and factors"]) == list(PREDICTORS)
        assert exchanged_for[head].detail["readings and factors"] == measured.detail["readings and factors"]
        for name, values in measured.sums.items():
            np.testing.assert_allclose(fewer[head].sums[name], values[:6], rtol=1e-3, atol=1e-4)


def test_swaps_are_summed_by_their_document() -> None:
    """Documents too short for a swap have none."""
    made = texts([("a", [0, 1, 2, 3]), ("b", [0, 1]), ("c", [0, 4, 3, 2])], 4)
    swaps = draw(made, np.array([1, 2, 3, 4]), 2, ("x",), torch.device("cpu"))
    assert swaps.doc.tolist() == [0, 0, 2, 2]
    sums = by_document(np.array([[1.0, 2, 4, 8], [0, 1, 0, 1], [1, 1, 1, 1]]), swaps)
    assert sums.tolist() == [[3, 0, 12], [1, 0, 1], [2, 0, 2]]
    alone = draw(made.first(1), np.array([1, 2, 3, 4]), 2, ("x",), torch.device("cpu"))
    assert torch.equal(alone.after, swaps.after[:2])
