"""Properties of every view, on random layers and codes, against a dense float64 computation from the formula."""

from __future__ import annotations

import inspect
import math
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fra
from fra.core import reductions
from fra.core.frozen import FrozenLayer, Rotary
from fra.core.reductions import Entries
from fra.core.resolve import ResolvedHead
from fra.dictionaries.codes import Codes
from fra.errors import FraError
from fra.tests.bench import workloads
from fra.tests.models import D_VOCAB, random_tokens, tiny, tiny_sae

FEW = settings(max_examples=25, deadline=None)
D_MODEL, D_HEAD, N_HEADS = 10, 6, 2
REDUCTIONS = ("sum", "abs", "max", "mean", "count")


def make_head(
    seed: int,
    *,
    pos: int = 7,
    d_sae: int = 12,
    rotary: str = "none",
    window: int | None = None,
    whole_numbers: bool = False,
    dtype: torch.dtype = torch.float64,
) -> ResolvedHead:
    """A random head on random codes; some positions have no live feature. whole_numbers makes exact ties."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, generator=g, dtype=torch.float64)
        return (numbers.round() if whole_numbers else numbers).to(dtype)

    def gains(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype) if whole_numbers else draw(*shape).exp()

    acts = draw(pos, d_sae).abs() * (torch.rand(pos, d_sae, generator=g) < 0.4)
    acts[int(torch.randint(pos, (), generator=g))] = 0
    acts[0, 0] = 1.0
    row, feature = acts.nonzero(as_tuple=True)
    decoder, bias, error = draw(d_sae, D_MODEL), draw(1, pos, D_MODEL), draw(1, pos, D_MODEL)
    ahead = torch.arange(pos)[:, None] - torch.arange(pos)
    turning = None
    if rotary != "none":
        angles = torch.arange(pos)[:, None] * torch.tensor([1.0, 0.3], dtype=torch.float64)
        angles = angles.repeat_interleave(2, 1) if rotary == "adjacent" else angles.repeat(1, 2)
        turning = Rotary(angles.cos().to(dtype), angles.sin().to(dtype), rotary == "adjacent")
    frozen = FrozenLayer(
        layer=0,
        n_heads=N_HEADS,
        hook_name="blocks.0.hook_resid_pre",
        x=(acts @ decoder)[None] + bias + error,
        sigma=gains(1, pos),
        W_q=draw(N_HEADS, D_MODEL, D_HEAD),
        W_k=draw(N_HEADS, D_MODEL, D_HEAD),
        b_q=draw(N_HEADS, D_HEAD),
        b_k=draw(N_HEADS, D_HEAD),
        gain_q=gains(1, N_HEADS, pos),
        gain_k=gains(1, N_HEADS, pos),
        rotary=turning,
        scale=0.5,
        softcap=None,
        mask=(ahead >= 0) & (ahead < (window or pos)),
        model_scores=torch.zeros(1, N_HEADS, pos, pos, dtype=dtype),
        pattern=torch.zeros(1, N_HEADS, pos, pos, dtype=dtype),
    )
    return ResolvedHead(frozen, Codes(row, feature, acts[row, feature], decoder, bias, error, (1, pos)), head=1)


heads = st.builds(
    make_head,
    seed=st.integers(0, 2**31),
    pos=st.integers(1, 9),
    d_sae=st.integers(1, 14),
    rotary=st.sampled_from(["none", "halves", "adjacent"]),
    window=st.sampled_from([None, 1, 3]),
)


def dense_terms(r: ResolvedHead) -> torch.Tensor:
    """F[q_pos, k_pos, q_feature, k_feature] and nothing clever: rotation as a matrix, one position and feature after
    the other.
    """
    f, sides = r.frozen, []
    acts = r.codes.dense()[0].double()
    for W, gain in ((f.W_q[r.head], f.gain_q[0, r.head]), (f.W_k[r.head], f.gain_k[0, r.head])):
        side = torch.zeros(r.n_pos, r.d_sae, D_HEAD, dtype=torch.float64)
        for t in range(r.n_pos):
            turn = torch.eye(D_HEAD, dtype=torch.float64)
            if f.rotary is not None:
                for n in range(2):
                    a, b = (2 * n, 2 * n + 1) if f.rotary.adjacent else (n, n + 2)
                    angle = t * (1.0, 0.3)[n]
                    turn[a, a] = turn[b, b] = math.cos(angle)
                    turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
            for i in range(r.d_sae):
                vector = acts[t, i] * r.codes.decoder[i].double() / f.sigma[0, t] @ W.double() * gain[t]
                side[t, i] = turn @ vector
        sides.append(side)
    full = f.scale * torch.einsum("tid,sjd->tsij", *sides)
    return full * f.mask[:, :, None, None]


def dense_channels(r: ResolvedHead, reduce: str, min_count: int = 1) -> pd.DataFrame:
    """Aggregation of to_sparse."""
    sparse = r.to_sparse()
    frame = pd.DataFrame({"i": sparse.indices()[2], "j": sparse.indices()[3], "value": sparse.values().double()})
    groups = frame.groupby(["i", "j"])["value"]
    how = {
        "sum": groups.sum,
        "abs": lambda: groups.agg(lambda v: v.abs().sum()),
        "max": groups.max,
        "mean": groups.mean,
        "count": groups.count,
    }
    table = pd.DataFrame({"value": how[reduce]().astype(float), "count": groups.count()}).reset_index()
    return table[table["count"] >= min_count]


def same_rows(found: pd.DataFrame, truth: pd.DataFrame, ids: list[str]) -> None:
    """Equal up to the order of rows."""
    left, right = (
        frame.sort_values(ids).reset_index(drop=True) for frame in (found, truth.set_axis(found.columns, axis=1))
    )
    pd.testing.assert_frame_equal(left, right, check_dtype=False, rtol=1e-9, atol=1e-9)


@FEW
@given(heads)
def test_pair_and_to_sparse_equal_the_dense_computation(r: ResolvedHead) -> None:
    dense = dense_terms(r)
    torch.testing.assert_close(r.to_sparse().to_dense(), dense, atol=1e-10, rtol=1e-10)
    live = r.codes.dense()[0] != 0
    for t, s in r.frozen.mask.nonzero().tolist():
        q, k, values = r.pair(t, s)
        assert q.tolist() == live[t].nonzero()[:, 0].tolist()
        assert k.tolist() == live[s].nonzero()[:, 0].tolist()
        torch.testing.assert_close(values, dense[t, s][q][:, k], atol=1e-10, rtol=1e-10)


@FEW
@given(heads, st.integers(0, 13), st.integers(0, 13))
def test_channel_equals_the_dense_computation(r: ResolvedHead, i: int, j: int) -> None:
    i, j = i % r.d_sae, j % r.d_sae
    torch.testing.assert_close(r.channel(i, j), dense_terms(r)[:, :, i, j], atol=1e-10, rtol=1e-10)


@FEW
@given(heads)
def test_blocks_add_up_to_the_scores_of_the_layer(r: ResolvedHead) -> None:
    blocks = r.blocks()
    assert len(blocks) == 9
    total = torch.stack(list(blocks.values())).sum(0)
    truth = r.frozen.scores(r.head)[0]
    torch.testing.assert_close(total.masked_fill(~r.frozen.mask, -torch.inf), truth, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(r.scores(), truth, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(
        r.to_sparse().to_dense().sum((2, 3)), blocks["feature", "feature"], atol=1e-10, rtol=1e-10
    )
    assert all(bool((block[~r.frozen.mask] == 0).all()) for block in blocks.values())


@FEW
@given(heads, st.sampled_from(REDUCTIONS), st.integers(1, 4))
def test_channels_equal_the_aggregation_of_to_sparse(r: ResolvedHead, reduce: Any, min_count: int) -> None:
    found, truth = r.channels(reduce, min_count=min_count), dense_channels(r, reduce, min_count)
    same_rows(found, truth, ["q_feature", "k_feature"])
    assert found["value"].abs().is_monotonic_decreasing
    for n in (1, 3, len(truth) + 5):
        pd.testing.assert_frame_equal(r.channels(reduce, n=n, min_count=min_count), found.head(n))


@FEW
@given(heads, st.sampled_from(["abs", "value"]), st.integers(1, 200))
def test_top_is_the_head_of_all_terms(r: ResolvedHead, by: Any, n: int) -> None:
    sparse = r.to_sparse()
    truth = pd.DataFrame(
        [*sparse.indices().numpy(), sparse.values().numpy()],
        index=["q_pos", "k_pos", "q_feature", "k_feature", "value"],
    ).T
    key = truth["value"].abs() if by == "abs" else truth["value"]
    truth = truth.iloc[np.argsort(-key.to_numpy(), kind="stable")].head(n).reset_index(drop=True)
    pd.testing.assert_frame_equal(r.top(n, by), truth, check_dtype=False, rtol=1e-9, atol=1e-9)


@FEW
@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from([1, 50, 10**6]))
def test_ties_go_by_ids(seed: int, n: int, elements: int) -> None:
    # Whole numbers: products are exact and tie often, within tiles and across them, so order is a matter of ids alone.
    r = make_head(seed, whole_numbers=True)
    everything, channels = r.top(10**6), r.channels("count")
    ids = ["q_pos", "k_pos", "q_feature", "k_feature"]
    truth = everything.assign(key=-everything["value"].abs()).sort_values(["key", *ids])[ids].to_numpy().tolist()
    assert everything["value"].abs().duplicated().any()
    assert everything[ids].to_numpy().tolist() == truth
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "TILE_ELEMENTS", elements)
        assert r.top(n)[ids].to_numpy().tolist() == truth[:n]
        found = r.channels("count", n=n).to_numpy().tolist()
    ranked = channels.assign(key=-channels["value"]).sort_values(["key", "q_feature", "k_feature"])
    assert found == ranked[channels.columns].head(n).to_numpy().tolist()


@pytest.mark.parametrize("elements", [1, 10**6])
def test_a_tie_in_a_later_tile_can_come_first(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "TILE_ELEMENTS", elements)
    unit = torch.eye(2, dtype=torch.float64)
    q = Entries(torch.tensor([1, 1]), torch.tensor([0, 1]), unit, None, None)
    k = Entries(torch.tensor([0, 1]), torch.tensor([0, 0]), unit.flip(0), None, None)
    mask = torch.ones(2, 2, dtype=torch.bool).tril()
    at_q, at_k, value = reductions.top_terms(q, k, mask, 1, "abs", torch.float64)
    # Of two equal terms at query position 1, the one whose key stands at 0, although its query feature is the larger.
    assert (at_q.item(), at_k.item(), value.item()) == (1, 0, 1.0)


@pytest.mark.parametrize("by", ["abs", "value"])
def test_the_number_of_threads_changes_nothing(by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, layer = workloads.entries(1, 48, 12, 300), workloads.layer(300, 1, d_model=64, d_head=2)
    pos, feature = torch.arange(48).repeat_interleave(12), corpus.feature.long()
    every = torch.arange(300)
    sides = [layer.directions(side, 0, every)[feature] * corpus.value[:, None] for side in ("query", "key")]
    q, k = (Entries(pos, feature, vector, None, None) for vector in sides)
    mask = torch.ones(48, 48, dtype=torch.bool).tril().triu(-20)
    monkeypatch.setattr(reductions, "SAMPLED", 200)  # in two dimensions long pairs are strong pairs
    monkeypatch.setattr(reductions, "TILE_ELEMENTS", 5_000)
    terms = (q.vector @ k.vector.mT).masked_fill(~mask[pos][:, pos], -torch.inf)
    key = terms.abs().masked_fill(terms == -torch.inf, -1.0) if by == "abs" else terms
    strongest = key.flatten().topk(200)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(reductions.top_terms(q, k, mask, 200, by, torch.float32))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    at_q, at_k, value = found[0]
    assert set((at_q * len(pos) + at_k).tolist()) == set(strongest.indices.tolist())
    torch.testing.assert_close(value.abs() if by == "abs" else value, strongest.values)


@FEW
@given(heads, st.integers(1, 40))
def test_chunk_size_changes_nothing(r: ResolvedHead, elements: int) -> None:
    r = ResolvedHead(
        r.frozen.to(torch.float32),
        replace(r.codes, **{k: getattr(r.codes, k).float() for k in ("value", "decoder", "bias", "error")}),
        1,
    )
    whole = [r.top(10), r.top(10, "value"), *(r.channels(reduce, n=5) for reduce in REDUCTIONS), r.channels()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "TILE_ELEMENTS", elements)
        patch.setattr(reductions, "STRETCH", elements)
        patch.setattr(reductions, "SAMPLED", elements)
        cut = [r.top(10), r.top(10, "value"), *(r.channels(reduce, n=5) for reduce in REDUCTIONS), r.channels()]
    for left, right in zip(whole, cut, strict=True):
        pd.testing.assert_frame_equal(left, right)


@FEW
@given(heads, st.randoms(use_true_random=False))
def test_permuting_features_permutes_channels(r: ResolvedHead, random: Any) -> None:
    new = list(range(r.d_sae))
    random.shuffle(new)
    renamed = torch.tensor(new)[r.codes.feature]
    order = (r.codes.row * r.d_sae + renamed).argsort()
    decoder = torch.empty_like(r.codes.decoder)
    decoder[new] = r.codes.decoder
    permuted = ResolvedHead(
        r.frozen,
        replace(r.codes, row=r.codes.row[order], feature=renamed[order], value=r.codes.value[order], decoder=decoder),
        r.head,
    )
    truth = r.channels()
    truth[["q_feature", "k_feature"]] = np.array(new)[truth[["q_feature", "k_feature"]].to_numpy()]
    same_rows(permuted.channels(), truth, ["q_feature", "k_feature"])
    torch.testing.assert_close(permuted.scores(), r.scores())


@FEW
@given(heads, st.floats(0.1, 10))
def test_rescaling_a_feature_against_its_code_changes_nothing(r: ResolvedHead, c: float) -> None:
    scales = torch.linspace(1, c, r.d_sae, dtype=torch.float64)
    rescaled = ResolvedHead(
        r.frozen,
        replace(r.codes, value=r.codes.value / scales[r.codes.feature], decoder=r.codes.decoder * scales[:, None]),
        r.head,
    )
    torch.testing.assert_close(rescaled.to_sparse().to_dense(), r.to_sparse().to_dense(), atol=1e-10, rtol=1e-10)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["gpt2", "llama", "gemma2", "qwen3"]), st.integers(1, 18), st.integers(1, D_VOCAB - 1))
def test_what_stands_later_changes_nothing_earlier(kind: str, at: int, token: int) -> None:
    tokens = random_tokens()
    changed = tokens.clone()
    changed[at:] = token
    sae = tiny_sae("blocks.1.hook_resid_pre", dtype="float64")
    one, other = (fra.resolve(tiny(kind, torch.float64), sae, document, 1, 0) for document in (tokens, changed))
    for view in (lambda r: r.scores(), lambda r: r.blocks()["feature", "error"], lambda r: r.to_sparse().to_dense()):
        torch.testing.assert_close(view(one)[:at, :at], view(other)[:at, :at], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rotary", ["none", "halves"])
def test_a_wide_dictionary_streams(rotary: str) -> None:
    """d_sae = 65 536: pair ids pass 2**31, and no tensor of features by features is made."""
    pos, d_sae, l0, g = 96, 65_536, 24, torch.Generator().manual_seed(0)
    narrow = make_head(0, pos=pos, rotary=rotary, dtype=torch.float32)
    feature = (
        torch.stack([torch.randperm(3000, generator=g)[:l0].sort().values for _ in range(pos)]).flatten() + d_sae - 3000
    )
    codes = Codes(
        torch.arange(pos).repeat_interleave(l0),
        feature,
        torch.rand(pos * l0, generator=g),
        torch.randn(d_sae, D_MODEL, generator=g),
        narrow.codes.bias,
        narrow.codes.error,
        (1, pos),
    )
    wide = ResolvedHead(narrow.frozen, codes, 1)
    # The same with small ids.
    small = ResolvedHead(
        narrow.frozen, replace(codes, feature=feature - (d_sae - 3000), decoder=codes.decoder[-3000:]), 1
    )
    for view in (lambda r: r.top(200), *(lambda r, how=how: r.channels(how, n=200, min_count=2) for how in REDUCTIONS)):
        found, truth = view(wide), view(small)
        assert len(found) == 200
        truth[["q_feature", "k_feature"]] += d_sae - 3000
        pd.testing.assert_frame_equal(found, truth)
    strongest = wide.top(1).iloc[0]
    _, _, values = wide.pair(int(strongest.q_pos), int(strongest.k_pos))
    assert float(values.abs().max()) == pytest.approx(abs(strongest.value), rel=1e-6)
    # Against single channels, which are computed another way.
    for row in wide.channels(n=5).itertuples():
        assert float(wide.channel(row.q_feature, row.k_feature).double().sum()) == pytest.approx(row.value, rel=1e-4)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    r = make_head(1)
    n_channels, n_terms = len(r.channels()), r.to_sparse()._nnz()
    monkeypatch.setattr(reductions, "memory_budget", lambda: 1000)
    tracemalloc.start()
    with pytest.raises(FraError, match=rf"{n_channels} live channels would take {n_channels * 64:,} bytes.* pass n="):
        r.channels()
    with pytest.raises(FraError, match=rf"{n_terms} terms would take {n_terms * 80:,} bytes"):
        r.to_sparse()
    tracemalloc.stop()
    assert len(r.channels(n=3)) == 3


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (lambda r: r.channel(12, 0), "feature 12 is out of range: the dictionary has 12"),
        (lambda r: r.channel(0, -1), "feature -1 is out of range"),
        (lambda r: r.pair(0, 7), r"positions \(0, 7\) are out of range: the document has 7"),
        (lambda r: r.pair(2, 3), "position 2 does not attend to position 3"),
        (lambda r: r.top(0), "n=0 asks for nothing"),
        (lambda r: r.channels(n=-1), "n=-1 asks for nothing"),
    ],
)
def test_bad_requests_are_one_sentence(view: Any, message: str) -> None:
    with pytest.raises(FraError, match=message):
        view(make_head(0))


@pytest.mark.parametrize(("method", "option"), [("top", {"n": 1, "by": "size"}), ("channels", {"reduce": "median"})])
def test_unknown_choices_are_refused(method: str, option: dict[str, Any]) -> None:
    unchecked = inspect.unwrap(getattr(ResolvedHead, method))  # past the suite's run-time type check
    with pytest.raises(FraError, match="is unknown: choose one of"):
        unchecked(make_head(0), **option)
