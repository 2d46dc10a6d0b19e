"""Swapped tokens: what predictors are given, what is counted, and that a perfect prediction scores 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fra.dictionaries.tokens import TokenDictionary
from fra.errors import FraError
from fra.measures.scores.layer import CarriedLayer, observe, texts
from fra.measures.scores.q22_pair_means import PairMeans, Places, places
from fra.measures.scores.q22_picture import swap_picture
from fra.measures.scores.q22_scene import READINGS, STRIDE, SwapScene, exchanged, scene
from fra.measures.scores.q22_swaps import draw, frequent, telling, tune
from fra.report.drawings import numbers
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
    out = []
    every = zip(made.swaps.doc, made.swaps.at, made.swaps.before, made.swaps.after, strict=True)
    for turn, (doc, at, before, after) in enumerate(every):
        n = made.swaps.texts.lengths[int(doc)]
        name = f"blocks.{own.layer}.attn.hook_pattern"
        rows = [own.model.run_with_cache(ids[None, :n])[1][name][0, head] for ids in (before, after)]
        by_row = (rows[1] - rows[0]).double().square().sum(-1)
        assert float(by_row[: int(at)].sum()) < 1e-9, "nothing changes before the swap"
        later = by_row[int(at) + 2 :]
        out.append(float(by_row[int(at) : int(at) + 2].sum() + STRIDE * later[turn % STRIDE :: STRIDE].sum()))
    return np.array(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_scores_one(kind: str) -> None:
    """With the true inputs at s and s + 1 both readings give the model's own new pattern, and the total change is that
    of two runs of the model.
    """
    own = first_layer(kind)
    frozen, measured = own.frozen, own.sets.measured
    swaps = draw(measured, np.arange(1, models.D_VOCAB), 2, 7, frozen.x.device)
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
    swaps = draw(own.sets.measured, np.arange(1, models.D_VOCAB), 1, 3, own.frozen.x.device)
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
    swaps = draw(own, np.array([1, 2, 3, 4]), 1, 1, torch.device("cpu"))
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


def test_the_factor_is_least_squares() -> None:
    """The better reading, with the factor that numpy finds; a prediction that points away is dropped."""
    rng = np.random.default_rng(0)
    truth, close, far = rng.normal(0, 1, (3, 500))
    close = 3 * truth + 0.1 * close

    def sums(predicted: np.ndarray) -> np.ndarray:
        return np.stack([truth**2, truth * predicted, predicted**2])

    reading, factor = tune([sums(far), sums(close)])
    assert reading == 1
    assert factor == pytest.approx(np.linalg.lstsq(close[:, None], truth, rcond=None)[0][0])
    assert tune([sums(-close), sums(-close)])[1] == 0.0


def test_the_claim_runs_on_a_tiny_model() -> None:
    """Every head gets leads over the three controls with one weight a document; nothing is not finite."""
    own = tiny_layer("gpt2", 90, 30)
    found = telling(own)
    assert list(found) == [f"L1H{head}" for head in range(4)]
    for measured in found.values():
        assert list(measured.sums) == ["over token-pair means", "over token dictionary", "over position only"]
        for name, values in measured.sums.items():
            assert values.shape == measured.counts[name].shape == (30,)
            assert np.isfinite(values).all() and (measured.counts[name] > 0).all()
    again = telling(tiny_layer("gpt2", 90, 30))
    assert all(np.array_equal(found[h].sums[c], again[h].sums[c]) for h in found for c in found[h].sums)
    with pytest.raises(FraError, match="fewer than 2 tokens"):
        frequent(own.sets.measured.first(1))
