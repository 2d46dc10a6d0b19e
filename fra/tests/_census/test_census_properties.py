"""Every fast path of a census equals the plain definition in float64, on random documents, codes and heads."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fra._census import corpus as census_corpus
from fra._census import dense, scan, tables
from fra._census.corpus import Corpus, concatenate
from fra._census.observe import Layer
from fra._census.result import Census
from fra.core import blocks, meetings
from fra.core.frozen import Rotary
from fra.core.strongest import Strongest
from fra.core.weights import QKWeights
from fra.tests.bench import workloads

FEW = settings(max_examples=12, deadline=None)
D_MODEL, D_HEAD, N_HEADS, D_SAE = 6, 4, 2, 7
REDUCES = ("sum", "abs", "max", "mean", "count", "contrast", "sensitivity", "mass")


def make_census(
    seed: int,
    *,
    rotary: str = "none",
    window: int | None = None,
    qk_norm: bool = False,
    signed: bool = False,
    softcap: float | None = None,
    n_docs: int = 3,
    dtype: torch.dtype = torch.float64,
) -> Census:
    """Random documents of unequal length, some positions without live features, some documents without stripes."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    longest = 9
    length = torch.randint(1, longest + 1, (n_docs,), generator=g)
    n_rows = int(length.sum())
    acts = draw(n_rows, D_SAE) if signed else draw(n_rows, D_SAE).abs()
    acts = acts * (torch.rand(n_rows, D_SAE, generator=g) < 0.4)
    acts[0, 0] = 1.0
    row, feature = acts.nonzero(as_tuple=True)
    stripes = [
        sorted({int(torch.randint(int(n), (), generator=g)) for _ in range(i % 3)}) for i, n in enumerate(length)
    ]
    stripes[-1] = stripes[-1] or [0]
    turning = None
    if rotary != "none":
        angles = torch.arange(longest)[:, None] * torch.tensor([1.0], dtype=dtype)
        angles = angles.repeat_interleave(2, 1) if rotary == "adjacent" else angles.repeat(1, 2)
        turning = Rotary(angles.cos(), angles.sin(), rotary == "adjacent")
    ones = torch.ones(D_HEAD, dtype=dtype)
    weights = QKWeights(
        layer=0,
        hook_name="blocks.0.hook_resid_pre",
        W_q=draw(N_HEADS, D_MODEL, D_HEAD),
        W_k=draw(N_HEADS, D_MODEL, D_HEAD),
        b_q=draw(N_HEADS, D_HEAD),
        b_k=draw(N_HEADS, D_HEAD),
        norm_q=(ones, 1e-6) if qk_norm else None,
        norm_k=(ones, 1e-6) if qk_norm else None,
        scale=0.4,
        softcap=softcap,
        window=window,
    )
    corpus = Corpus(
        number=torch.randperm(n_docs, generator=g),
        length=length,
        n_offsets=torch.tensor([len(offsets) for offsets in stripes]),
        offset=torch.tensor([offset for offsets in stripes for offset in offsets], dtype=torch.long),
        per_row=torch.bincount(row, minlength=n_rows).int(),
        feature=feature.int(),
        value=acts[row, feature],
        gain_q=draw(N_HEADS, n_rows).exp() if qk_norm else None,
        gain_k=draw(N_HEADS, n_rows).exp() if qk_norm else None,
        inputs=draw(n_rows, D_MODEL) / 2,
    )
    layer = Layer(weights, draw(D_SAE, D_MODEL), turning)
    return Census(layer, corpus, tuple(range(N_HEADS)), REDUCES, 1 << 30, lambda: "random")


def turned(census: Census, vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [pos, d_head] rotated to their positions, written out pair by pair."""
    rotary = census.layer.rotary
    if rotary is None:
        return vectors
    out = vectors.clone()
    n = rotary.cos.shape[1]
    first = torch.arange(0, n, 2) if rotary.adjacent else torch.arange(n // 2)
    second = first + (1 if rotary.adjacent else n // 2)
    cos, sin = rotary.cos[: len(vectors), first], rotary.sin[: len(vectors), first]
    out[:, first] = vectors[:, first] * cos - vectors[:, second] * sin
    out[:, second] = vectors[:, second] * cos + vectors[:, first] * sin
    return out


def plain(census: Census, head: int) -> list[dict[str, torch.Tensor]]:
    """For each document all terms F[t, s, i, j], where they are live, the pattern, the mask and the stripe marks."""
    corpus, w = census.corpus, census.layer.weights
    found, entry = [], 0
    starts = corpus.row_start
    for doc, offsets in enumerate(corpus.stripes):
        n_pos = starts[doc + 1] - starts[doc]
        q, k = torch.zeros(2, n_pos, D_SAE, D_HEAD, dtype=corpus.value.dtype)
        live = torch.zeros(n_pos, D_SAE, dtype=torch.bool)
        x = corpus.inputs[starts[doc] : starts[doc + 1]]
        rows_q, rows_k = x @ w.W_q[head] + w.b_q[head], x @ w.W_k[head] + w.b_k[head]
        for t in range(n_pos):
            row = starts[doc] + t
            gains = [1.0 if gain is None else gain[head, row] for gain in (corpus.gain_q, corpus.gain_k)]
            rows_q[t], rows_k[t] = rows_q[t] * gains[0], rows_k[t] * gains[1]
            for _ in range(int(corpus.per_row[row])):
                i, value = int(corpus.feature[entry]), corpus.value[entry]
                q[t, i] = value * gains[0] * w.scale * (census.layer.decoder[i] @ w.W_q[head])
                k[t, i] = value * gains[1] * (census.layer.decoder[i] @ w.W_k[head])
                live[t, i] = True
                entry += 1
        for i in range(D_SAE):
            q[:, i], k[:, i] = turned(census, q[:, i]), turned(census, k[:, i])
        ahead = torch.arange(n_pos)[:, None] - torch.arange(n_pos)
        mask = (ahead >= 0) & (ahead < (w.window or n_pos))
        scores = w.scale * turned(census, rows_q) @ turned(census, rows_k).T
        scores = scores if w.softcap is None else w.softcap * torch.tanh(scores / w.softcap)
        found.append(
            {
                "F": torch.einsum("tid,sjd->tsij", q, k),
                "live": live[:, None, :, None] & live[None, :, None, :],
                "A": scores.masked_fill(~mask, -torch.inf).softmax(-1),
                "mask": mask,
                "stripe": torch.stack([ahead == offset for offset in [-1, *offsets]]).any(0),
            }
        )
    return found


def defined(census: Census, reduce: str, head: int, where: str) -> dict[tuple[int, int], tuple[float, int]]:
    """Values and counts of all live channels, from the definition."""
    values = torch.full((D_SAE, D_SAE), -torch.inf if reduce == "max" else 0.0, dtype=census.corpus.value.dtype)
    count = torch.zeros(D_SAE, D_SAE, dtype=torch.long)
    for doc in plain(census, head):
        mask, stripe = doc["mask"], doc["stripe"]
        chosen = mask & {"all": mask, "stripe": stripe, "off": ~stripe}[where]
        seen = chosen[:, :, None, None] & doc["live"]
        count += seen.sum((0, 1))
        F, A = doc["F"], doc["A"][:, :, None, None]
        attended = F * mask[:, :, None, None]
        on_stripe = (stripe & mask)[:, :, None, None]
        match reduce:
            case "sum" | "mean":
                values += (F * seen).sum((0, 1))
            case "abs":
                values += (F * seen).abs().sum((0, 1))
            case "max":
                values = torch.maximum(values, F.masked_fill(~seen, -torch.inf).amax((0, 1)))
            case "contrast":
                mean = attended.sum(1, keepdim=True) / mask.sum(1)[:, None, None, None]
                values += ((F - mean) * on_stripe).sum((0, 1))
            case "sensitivity":
                values += (on_stripe * A * (F - (A * attended).sum(1, keepdim=True))).sum((0, 1))
            case "mass":
                values += (A * (F - (A * attended).sum(1, keepdim=True)).abs()).sum((0, 1))
    values = count.to(values) if reduce == "count" else values / count if reduce == "mean" else values
    cells = (count > 0).nonzero().tolist()
    return {(i, j): (float(values[i, j]), int(count[i, j])) for i, j in cells}


def rows_of(found: pd.DataFrame, head: int) -> dict[tuple[int, int], tuple[float, int]]:
    mine = found[found["head"] == head]
    return {(int(i), int(j)): (float(v), int(c)) for _, i, j, v, c in mine.itertuples(index=False)}


def assert_same(found: dict[Any, Any], expected: dict[Any, Any], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for cell, (value, count) in expected.items():
        assert found[cell][1] == count, cell
        assert found[cell][0] == pytest.approx(value, abs=tolerance, rel=tolerance), cell


def assert_strongest(found: dict[Any, Any], every: dict[Any, Any], n: int) -> None:
    """What was found is of `every` cell, n or all of them, and nothing stronger was left out."""
    assert len(found) == min(n, len(every))
    assert_same(found, {cell: every[cell] for cell in found})
    if len(every) > n:
        weakest = min(abs(value) for value, _ in found.values())
        left = max(abs(value) for cell, (value, _) in every.items() if cell not in found)
        assert left <= weakest * (1 + 1e-10) + 1e-12


@pytest.fixture(params=["whole", "chunked"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked: documents one at a time, a few numbers in each intermediate array; stripes by tables, which are
    otherwise sorted out channel by channel.
    """
    monkeypatch.setattr(scan.Scan, "few_pairs", lambda _: request.param == "whole")
    if request.param == "chunked":
        for module in (blocks, tables, meetings):
            monkeypatch.setattr(module, "WORK_BYTES", 200)
        monkeypatch.setattr(tables, "ROWS_AT_ONCE", 10)
        monkeypatch.setattr(tables, "COLUMNS_AT_ONCE", 64)
        monkeypatch.setattr(tables, "LOOPED_FROM", 0)


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**16),
        "rotary": st.sampled_from(["none", "halves", "adjacent"]),
        "window": st.sampled_from([None, 1, 3]),
        "qk_norm": st.booleans(),
        "signed": st.booleans(),
        "softcap": st.sampled_from([None, 0.5]),
    }
)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("where", ["all", "stripe", "off"])
@FEW
@given(shape=shapes)
def test_pairwise_reductions_are_the_definition(where: Any, shape: dict[str, Any]) -> None:
    census = make_census(**shape)
    reduces: Any = ("sum", "abs", "max", "mean", "count")
    found = census.strongest(reduces, None, where=where)
    for reduce in reduces:
        for head in range(N_HEADS):
            assert_same(rows_of(found[reduce], head), defined(census, reduce, head, where))


@pytest.mark.usefixtures("_chunks")
@FEW
@given(shape=shapes)
def test_reductions_weighted_along_the_row_are_the_definition(shape: dict[str, Any]) -> None:
    census = make_census(**shape)
    reduces: Any = ("contrast", "sensitivity", "mass")
    found = census.strongest(reduces, None)
    for reduce in reduces:
        for head in range(N_HEADS):
            assert_same(rows_of(found[reduce], head), defined(census, reduce, head, "all"))


@FEW
@given(shape=shapes, n=st.integers(1, 60), where=st.sampled_from(["all", "stripe", "off"]), least=st.integers(1, 3))
def test_the_strongest_within_a_budget_are_the_strongest_of_all(
    shape: dict[str, Any], n: int, where: Any, least: int
) -> None:
    census = make_census(**shape)
    small = Census(census.layer, census.corpus, census.heads, census.reduces, 700, lambda: census.fingerprint)
    reduces: Any = ("sum", "abs", "max", "count")
    found = small.strongest(reduces, n, where=where, min_count=least)
    for reduce in reduces:
        for head in range(N_HEADS):
            every = defined(census, reduce, head, where)
            every = {cell: row for cell, row in every.items() if row[1] >= least}
            assert_strongest(rows_of(found[reduce], head), every, n)


@FEW
@given(shape=shapes, least=st.integers(2, 3))
def test_candidates_meet_in_enough_documents(shape: dict[str, Any], least: int) -> None:
    """Exhaustive: the strongest by contrast of all that meet on the stripe of so many documents, and no others."""
    census = make_census(**shape, n_docs=5)
    together = torch.zeros(D_SAE, D_SAE, dtype=torch.long)
    for doc in plain(census, 0):
        together += ((doc["mask"] & doc["stripe"])[:, :, None, None] & doc["live"]).any(0).any(0)
    for head in range(N_HEADS):
        every = defined(census, "contrast", head, "all")
        every = {cell: row for cell, row in every.items() if together[cell] >= least}
        assert_same(rows_of(census.channels("contrast", None, [head], min_documents=least), head), every)
        few = rows_of(census.channels("contrast", 3, [head], min_documents=least), head)
        assert_same(few, {cell: every[cell] for cell in few})
        sizes = sorted((abs(value) for value, _ in every.values()), reverse=True)[:3]
        assert sorted((abs(value) for value, _ in few.values()), reverse=True) == pytest.approx(sizes)
        stripe = {c: r for c, r in defined(census, "sum", head, "stripe").items() if together[c] >= least}
        found = census.channels("sum", None, [head], where="stripe", min_documents=least)
        assert_same(rows_of(found, head), stripe)


def test_ties_go_to_the_smaller_ids() -> None:
    census = make_census(3)
    found = census.channels("count", n=5)
    assert found["value"].duplicated().any()
    for _, mine in found.groupby("head"):
        order = mine.sort_values(["value", "q_feature", "k_feature"], ascending=[False, True, True])
        assert list(order.index) == list(mine.index)


@FEW
@given(shape=shapes, head=st.integers(0, 1), n=st.integers(1, 8))
def test_examples_are_the_strongest_terms_of_the_channel(shape: dict[str, Any], head: int, n: int) -> None:
    census = make_census(**shape)
    _, i, j, _, _ = next(census.channels("count", n=1, heads=[head]).itertuples(index=False))
    terms = {}
    for number, doc in zip(census.corpus.number.tolist(), plain(census, head), strict=True):
        for t, s in (doc["mask"] & doc["live"][:, :, i, j]).nonzero().tolist():
            terms[number, t, s] = float(doc["F"][t, s, i, j])
    found = census.examples(head, i, j, n)
    mine = {(int(d), int(t), int(s)): float(v) for d, t, s, v in found.itertuples(index=False)}
    assert len(mine) == len(found) == min(n, len(terms))
    for key, value in mine.items():
        assert value == pytest.approx(terms[key], abs=1e-12)
    assert list(found["value"].abs()) == sorted(found["value"].abs(), reverse=True)
    left = [abs(value) for key, value in terms.items() if key not in mine]
    assert not left or max(left) <= min(abs(value) for value in mine.values()) + 1e-12


@FEW
@given(shape=shapes)
def test_documents_may_be_cut_and_joined_anywhere(shape: dict[str, Any]) -> None:
    """Two halves merged equal the whole, to the last bit."""
    whole = make_census(**shape)
    corpora = [one_document(whole.corpus, doc) for doc in range(whole.n_documents)]
    halves = [concatenate(part, renumber=False) for part in (corpora[:2], corpora[2:])]
    joined = Census(whole.layer, halves[0], whole.heads, REDUCES, 1 << 30, lambda: whole.fingerprint).merge(
        Census(whole.layer, halves[1], whole.heads, REDUCES, 1 << 30, lambda: whole.fingerprint)
    )
    for reduce in REDUCES:
        pd.testing.assert_frame_equal(joined.channels(reduce), whole.channels(reduce), check_exact=True)


def one_document(corpus: Corpus, doc: int) -> Corpus:
    part = census_corpus.Part(corpus, doc, doc + 1)
    return Corpus(
        number=torch.tensor([0]),
        length=corpus.length[doc : doc + 1],
        n_offsets=corpus.n_offsets[doc : doc + 1],
        offset=torch.tensor(corpus.stripes[doc], dtype=torch.long),
        per_row=corpus.per_row[part.rows],
        feature=corpus.feature[part.entries],
        value=corpus.value[part.entries],
        gain_q=None if corpus.gain_q is None else corpus.gain_q[:, part.rows],
        gain_k=None if corpus.gain_k is None else corpus.gain_k[:, part.rows],
        inputs=corpus.inputs[part.rows],
    )


@pytest.mark.parametrize("rotary", ["none", "halves"])
def test_float32_is_the_definition_to_its_precision(rotary: str) -> None:
    exact, single = make_census(1, rotary=rotary), make_census(1, rotary=rotary, dtype=torch.float32)
    for reduce in ("sum", "abs", "max", "mass"):
        for head in range(N_HEADS):
            assert_same(rows_of(single.channels(reduce), head), defined(exact, reduce, head, "all"), 2e-5)
    assert single.channels("sum")["value"].dtype == "float32"


def test_counts_beyond_what_float32_holds_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    census = make_census(2)
    expected = census.channels("count")
    monkeypatch.setattr(tables, "count_dtype", lambda _: torch.int64)
    pd.testing.assert_frame_equal(census.channels("count"), expected)


def test_a_table_that_lost_something_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    census = make_census(4)
    right = blocks.segments
    monkeypatch.setattr(tables, "segments", lambda *args: right(*args) * 0.99)
    with pytest.raises(ArithmeticError, match="adds up to"):
        census.channels("sum")


def test_the_same_question_has_the_same_answer_twice() -> None:
    census = make_census(5, rotary="halves")
    for reduce in REDUCES:
        pd.testing.assert_frame_equal(census.channels(reduce), census.channels(reduce), check_exact=True)


@pytest.mark.parametrize("n", [1, 7, 40])
def test_strongest_are_the_same_with_and_without_a_look_at_the_numbers(n: int) -> None:
    """What a GPU does, which is not made to wait, finds the same rows in the same order; whole numbers tie often."""
    g = torch.Generator().manual_seed(n)
    table = torch.randint(-3, 4, (12, 10), generator=g).double()
    count = torch.randint(0, 3, (12, 10), generator=g)
    q, k = torch.randperm(12, generator=g) * 100, torch.randperm(10, generator=g)  # in the order of bounds, not of ids
    found = []
    for offer in (Strongest.offer_tile, Strongest.offer_unseen):
        best = Strongest(n)
        for low in (0, 5):  # blocks of columns, as a census goes: codes do not only grow
            for rows in (slice(0, 1), slice(1, 8), slice(8, 12)):
                columns = slice(low, low + 5)
                offer(best, table[rows, columns], q[rows], k[columns], count[rows, columns], 1)
        found.append(best.result())
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    cells = sorted((-abs(float(table[i, j])), int(q[i] + k[j])) for i, j in (count > 0).nonzero().tolist())
    assert [(-key, code) for key, code in zip(found[0][0].tolist(), found[0][1].tolist(), strict=True)] == [
        (key, code) for key, code in cells[:n]
    ]


@pytest.mark.parametrize("reduces", [("sum", "abs"), ("sum", "count", "mean")])
def test_a_threshold_from_the_busiest_features_loses_nothing(reduces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, layer = workloads.entries(2, 24, 6, 80), workloads.layer(80, 2, d_model=16)
    plain = workloads.of(layer, corpus).strongest(reduces, 9)
    told = []
    right = Strongest.expect
    monkeypatch.setattr(Strongest, "expect", lambda self, threshold: (told.append(threshold), right(self, threshold)))
    monkeypatch.setattr(dense, "SAMPLED_FEATURES", 16)
    for name, frame in workloads.of(layer, corpus).strongest(reduces, 9).items():
        pd.testing.assert_frame_equal(frame, plain[name], check_exact=True)
    assert told and min(told) > 0


@pytest.mark.parametrize("reduce", ["sum", "abs"])
def test_entries_that_hardly_repeat_are_added_straight(reduce: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, layer = workloads.entries(3, 12, 4, 400), workloads.layer(400, 2, d_model=16, n_pos=12)
    own, right = [], blocks.Side.by_entry
    monkeypatch.setattr(blocks.Side, "by_entry", lambda *args: (own.append(1), right(*args))[1])
    found = workloads.of(layer, corpus).channels(reduce, n=20)
    assert own
    monkeypatch.setattr(blocks.Side, "by_entry", lambda side, _: side)
    plain = workloads.of(layer, corpus).channels(reduce, n=20)
    pd.testing.assert_frame_equal(found, plain, rtol=1e-4)


@pytest.mark.parametrize("floor", [0, 1, 2])
def test_meetings_by_table_and_by_sort_are_those_written_out(floor: int) -> None:
    """A table is taken where pairs are few, a sort where they are many: both against a loop over pairs of rows."""
    g = torch.Generator().manual_seed(floor)
    for n_live in (5, 60):
        per_row = torch.randint(0, 5, (40,), generator=g)
        start = torch.cat((per_row.new_zeros(1), per_row.cumsum(0)))
        slot = torch.cat([torch.randperm(5, generator=g)[:n].sort().values for n in per_row.tolist()]) * (n_live // 5)
        value = torch.randn(len(slot), generator=g, dtype=torch.float64)
        q_row = torch.randint(0, 40, (90,), generator=g).sort().values
        k_row, doc = torch.randint(0, 40, (90,), generator=g), q_row // 8
        met: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for q, k, d in zip(q_row.tolist(), k_row.tolist(), doc.tolist(), strict=True):
            for a in range(int(start[q]), int(start[q + 1])):
                for b in range(int(start[k]), int(start[k + 1])):
                    row = (d, float(value[a] * value[b]))
                    met.setdefault((int(slot[a]), int(slot[b])), []).append(row)
        enough = {pair: rows for pair, rows in sorted(met.items()) if len({d for d, _ in rows}) >= floor}
        found = meetings.Meetings(slot, start, n_live, (q_row, k_row, doc), floor)
        assert list(zip(found.q_slot.tolist(), found.k_slot.tolist(), strict=True)) == list(enough)
        assert found.count.tolist() == [len(rows) for rows in enough.values()]
        documents = [len({d for d, _ in rows}) if floor else 1 for rows in enough.values()]
        assert found.documents.tolist() == documents
        sums = found.sums(value, value)[:, 0].tolist()
        assert sums == pytest.approx([sum(v for _, v in rows) for rows in enough.values()])
        halves = found.sums(value, value, (doc > 2).long(), 2)
        assert halves.sum(1).tolist() == pytest.approx(sums)
        late = [sum(v for d, v in rows if d > 2) for rows in enough.values()]
        assert halves[:, 1].tolist() == pytest.approx(late)
